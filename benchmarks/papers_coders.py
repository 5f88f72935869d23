# SPDX-License-Identifier: Apache-2.0
"""Coders of keys that benchmarks/papers.py compares: SVDq's, plain per-channel quantization, and this project's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from vllm_kqsvd.calibration.allocate import best_side_plans
from vllm_kqsvd.calibration.calibrate import CalibrateOptions, frame_of
from vllm_kqsvd.calibration.model_probe import LayerInfo
from vllm_kqsvd.calibration.solve import LayerSolver, SolveOptions
from vllm_kqsvd.calibration.statistics import Statistics
from vllm_kqsvd.calibration.tiling import UNIT_BYTES
from vllm_kqsvd.ops.reference import decode, encode
from vllm_kqsvd.ops.rope_block import rotate

# Bits of eight equal groups of latent channels, strongest first (SVDq, arXiv 2502.15304).
SVDQ_SCHEDULES = {2.25: (4, 4, 4, 2, 2, 2, 0, 0), 1.25: (4, 4, 2, 0, 0, 0, 0, 0)}


def min_max(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """x [H, n, C] through 2^bits levels between each channel's least and greatest value; bits [H, C], 0: the mean."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    steps = (2.0 ** bits[:, None] - 1).clamp_min(1)
    step = (high - low).clamp_min(1e-30) / steps
    coded = low + ((x - low) / step).round() * step
    return torch.where(bits[:, None] > 0, coded, x.mean(1, keepdim=True))


def svdq(k: torch.Tensor, bits: float) -> torch.Tensor:
    """Keys [H, n, d] coded in the principal axes of this very text, min-max per latent channel."""
    mean = k.mean(1, keepdim=True)
    u = torch.linalg.eigh((k - mean).mT @ (k - mean))[1].flip(-1)
    schedule = torch.tensor(SVDQ_SCHEDULES[bits]).repeat_interleave(k.shape[-1] // 8).expand(k.shape[0], -1)
    return min_max((k - mean) @ u, schedule) @ u.mT + mean


def per_channel(k: torch.Tensor, bits: float) -> torch.Tensor:
    """Keys [H, n, d] coded min-max per channel; a fraction of a bit gives one more to the channels of widest range."""
    dim, whole = k.shape[-1], int(bits)
    wide = (k.amax(1) - k.amin(1)).argsort(-1, descending=True).argsort(-1) < round((bits - whole) * dim)
    return min_max(k, whole + wide.long())


def our_keys(
    layers: list[LayerInfo], statistics: Path, budgets: tuple[float, ...]
) -> dict[str, Callable[[int, torch.Tensor], torch.Tensor]]:
    """By setting: (layer, keys before RoPE [H, n, d]) -> the same through this project's pages, in the default frame
    and basis. Every setting takes at most its budget in bits, the scale byte included."""
    stats = Statistics.load(statistics, None, "cpu")
    options = CalibrateOptions()
    solvers = [
        LayerSolver(a, s, frame_of(a, options, 1), SolveOptions()) for a, s in zip(layers, stats.layers, strict=True)
    ]

    def coder(budget: float) -> tuple[str, Callable[[int, torch.Tensor], torch.Tensor]]:
        dim = layers[0].head_dim
        units = int((budget * dim / 8 - 1) // UNIT_BYTES)
        codecs = [s.coder("k", best_side_plans(s.sides["k"].table, units)[units][1]) for s in solvers]

        def code(i: int, k: torch.Tensor) -> torch.Tensor:
            at = torch.arange(k.shape[1])
            turn, rope = at % max(1, solvers[i].frame.rope_block), layers[i].rope
            x = rotate(k.float().transpose(0, 1), turn, rope)
            back = decode(*encode(x, at, codecs[i]), at, codecs[i])
            return rotate(back, -turn, rope).transpose(0, 1).double()

        return f"{8 * (UNIT_BYTES * units + 1) / dim:g} bits", code

    return dict(coder(b) for b in budgets)
