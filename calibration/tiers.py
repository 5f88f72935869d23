# SPDX-License-Identifier: Apache-2.0
"""Tiers: channels of a basis that get equal bits, mixed by a rotation (shaping.py says how one is chosen)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_kqsvd.calibration.basis import Basis


def random_rotation(size: int, gen: torch.Generator) -> torch.Tensor:
    """Haar-random orthogonal [size, size] float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=gen, dtype=torch.float64))
    return q * r.diagonal().sign()


def tier_rotation(owner: Sequence[int], tiers: torch.Tensor, seed: int) -> torch.Tensor:
    """Random rotations [H, R, R] float64 among the channels of one tier (tiers [R] equal).

    owner: the head whose rotations each of the H heads has; those that share a basis share them.
    """
    gen = torch.Generator().manual_seed(seed)
    turn = torch.zeros(len(owner), len(tiers), len(tiers), dtype=torch.float64)
    for tier in dict.fromkeys(tiers.tolist()):
        at = (tiers == tier).nonzero()[:, 0]
        for h in range(len(owner)):
            turn[h, at[:, None], at[None, :]] = random_rotation(len(at), gen)
    return turn[list(owner)]


def mixed_weight(basis: Basis, turn: torch.Tensor, amplitude: torch.Tensor) -> torch.Tensor:
    """Cost of a unit error [H, R] in each channel of `mixed`."""
    return (turn.square().mT @ (basis.weight / amplitude.square())[..., None])[..., 0]


def mixed(basis: Basis, turn: torch.Tensor, amplitude: torch.Tensor | None = None) -> Basis:
    """The basis with its axes multiplied by amplitude [H, R] (none: 1) and then turned [H, R, R].

    Variances and weights are recomputed as for uncorrelated axes.
    """
    h = torch.ones_like(basis.variance) if amplitude is None else amplitude
    return Basis(
        (basis.encode * h[:, None]) @ turn,
        turn.mT @ (basis.decode / h[..., None]),
        (turn.square().mT @ (basis.variance * h.square())[..., None])[..., 0],
        mixed_weight(basis, turn, h),
        basis.owner,
    )


def rotate_tiers(basis: Basis, tiers: Sequence[int], seed: int) -> Basis:
    """Random rotations among channels of one tier; error-neutral, makes the channels Gaussian."""
    kept = torch.tensor(tiers)
    return mixed(basis.first(len(kept)), tier_rotation(basis.owner, kept, seed))
