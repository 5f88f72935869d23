# SPDX-License-Identifier: Apache-2.0
"""Frames in which keys are coded, and the average of a second moment over the rotations of a frame.

A key in the frame of a rope block is R_j k with k the key before RoPE and j its offset in the block. Offsets do
not depend on content, so every moment of R_j k follows exactly from the moment of k: statistics are collected once,
before RoPE, and serve every rope mode and block length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.rope_block import RopeSpec, rotate

ROPE_MODES = ("page", "pre", "post", "none")


@dataclass(frozen=True)
class Frame:
    """Where keys of one layer are coded.

    mode "page": blocks of `rope_block` positions; "pre": blocks of one; "post": no turning back, calibrated over
    positions 0 .. max_position - 1; "none": the layer has no RoPE.
    """

    mode: str
    rope_block: int
    rope: RopeSpec
    max_position: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ROPE_MODES:
            raise CalibrationError(f"rope mode {self.mode!r} asked for; choose one of {', '.join(ROPE_MODES)}")
        want = {"pre": 1, "post": 0, "none": 0}.get(self.mode, self.rope_block)
        if self.rope_block != want or (self.mode == "page" and self.rope_block < 1):
            raise CalibrationError(f"rope mode {self.mode!r} with a rope block of {self.rope_block} positions asked for")

    @property
    def num_offsets(self) -> int:
        """Number of rotations j = 0 .. n-1 the frame averages over."""
        if self.mode == "post":
            if not self.max_position:
                raise CalibrationError("rope mode 'post' needs the largest position that will be served")
            return self.max_position
        return max(1, self.rope_block)

    def average(self, gram: torch.Tensor) -> torch.Tensor:
        """Mean over the frame's offsets of R_j gram R_j^T; gram [..., d, d] float64."""
        return rotation_average(gram, self.rope, torch.ones(self.num_offsets, dtype=torch.float64))

    def apply(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """R_j x for keys before RoPE x [N, H, d] and offsets [N]."""
        return rotate(x, offsets, self.rope)


def planes_of(rope: RopeSpec, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(real coordinates, imaginary coordinates, frequency) of the dim / 2 planes; unrotated rest: frequency 0."""
    half, rot = rope.inv_freq.numel(), rope.rotary_dim
    if rope.interleaved:
        re, im = torch.arange(0, rot, 2), torch.arange(1, rot, 2)
    else:
        re, im = torch.arange(half), torch.arange(half, rot)
    rest = torch.arange(rot, dim)
    freq = torch.cat((rope.inv_freq.double().cpu(), torch.zeros(rest.numel() // 2, dtype=torch.float64)))
    return torch.cat((re, rest[0::2])), torch.cat((im, rest[1::2])), freq


def rotation_average(gram: torch.Tensor, rope: RopeSpec, weights: torch.Tensor) -> torch.Tensor:
    """sum_j w_j R_j gram R_j^T / sum_j w_j, exactly. gram [..., d, d], weights [n] for j = 0 .. n-1.

    In complex plane coordinates z the moments E[z_a conj z_b] and E[z_a z_b] are multiplied by the weights'
    characteristic function at the difference and at the sum of the two frequencies.
    """
    if rope.rotary_dim == 0 or weights.numel() == 1:
        return gram.clone()
    re, im, freq = (t.to(gram.device) for t in planes_of(rope, gram.shape[-1]))
    block = {(a, b): gram[..., i[:, None], j[None, :]] for a, i in (("r", re), ("i", im)) for b, j in (("r", re), ("i", im))}
    minus = torch.complex(block["r", "r"] + block["i", "i"], block["i", "r"] - block["r", "i"])
    plus = torch.complex(block["r", "r"] - block["i", "i"], block["i", "r"] + block["r", "i"])
    minus = minus * _characteristic(freq[:, None] - freq[None, :], weights)
    plus = plus * _characteristic(freq[:, None] + freq[None, :], weights)
    out = torch.empty_like(gram)
    out[..., re[:, None], re[None, :]] = (minus + plus).real / 2
    out[..., im[:, None], im[None, :]] = (minus - plus).real / 2
    out[..., im[:, None], re[None, :]] = (minus + plus).imag / 2
    out[..., re[:, None], im[None, :]] = (plus - minus).imag / 2
    return out


def _characteristic(omega: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_j w_j exp(i omega j) / sum_j w_j for omega [...], complex128; offsets in chunks to bound memory."""
    w = (weights.double() / weights.double().sum()).to(omega.device)
    out = torch.zeros(omega.shape, dtype=torch.complex128, device=omega.device)
    for start in range(0, w.numel(), 512):
        j = torch.arange(start, min(start + 512, w.numel()), device=omega.device, dtype=torch.float64)
        angle = omega[..., None] * j
        part = w[start : start + 512]
        out += torch.complex((angle.cos() * part).sum(-1), (angle.sin() * part).sum(-1))
    return out


def distance_weights(window: int, context: int) -> torch.Tensor:
    """Causal distance law of coded keys: weight of distance j is the number of query-key pairs of one text of
    `context` tokens at that distance, zero inside the exact window. [context] float64."""
    j = torch.arange(max(context, window + 1), dtype=torch.float64)
    return torch.where(j >= window, j.numel() - j, torch.zeros_like(j))
