# SPDX-License-Identifier: Apache-2.0
"""Tiers of equal bits: emphasis, fitted rotations and gains lower the error, and change nothing where they cannot."""

from __future__ import annotations

import pytest
import torch

from vllm_kqsvd.calibration.basis import Basis
from vllm_kqsvd.calibration.quantizer import fit_quantizer, round_trip
from vllm_kqsvd.calibration.shaping import (
    GAIN_RANGE,
    TOKENS_PER_CHANNEL,
    axis_gains,
    emphasis,
    fit_rotation,
    nearest_rotation,
    shaped_losses,
)
from vllm_kqsvd.calibration.tiers import mixed, random_rotation, tier_rotation

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_tier(size: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((size,), width), torch.zeros(size, dtype=torch.long)


def error(axes: torch.Tensor, amplitude: torch.Tensor, turn: torch.Tensor, bits: torch.Tensor, gains: bool) -> float:
    """Error of axes [2n, H, R] after emphasis, turn and rounding; fitted on the first half, measured on the second."""
    z = torch.einsum("nhc,hcd->nhd", axes * amplitude, turn.float())
    half = len(z) // 2
    one = torch.ones(z.shape[1:])
    step, scale_weight, guard = fit_quantizer(z[:half], bits, one, one)
    coded = torch.einsum("nhc,hdc->nhd", round_trip(z, bits, step, scale_weight, guard), turn.float())
    factor = axis_gains(coded[:half], axes[:half], amplitude) if gains else 1 / amplitude
    return float((coded[half:] * factor - axes[half:]).square().mean())


def test_emphasis_keeps_a_tier_s_energy_and_leaves_equal_axes_alone() -> None:
    bits = torch.tensor([4] * 16 + [1] * 16)
    energy = torch.rand(3, 32, dtype=F64, generator=generator(0)) ** 4 + 1e-6
    h = emphasis(energy, bits, bits)
    for tier in (slice(0, 16), slice(16, 32)):
        assert torch.allclose((h.square() * energy)[:, tier].sum(-1), energy[:, tier].sum(-1), rtol=1e-6)
    flat = emphasis(torch.full((1, 32), 7.0, dtype=F64), bits, bits)
    assert torch.allclose(flat, torch.ones_like(flat))
    order = energy[0, :16].argsort()
    assert (h[0, :16][order].diff() <= 1e-9).all()  # weaker axes are raised, stronger ones lowered


def test_axes_without_energy_stay_finite() -> None:
    h = emphasis(torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0] * 4], dtype=F64), *one_tier(4, 2))
    assert torch.isfinite(h).all()
    assert (h > 0).all()


@pytest.mark.parametrize("width", [2, 4, 6])
def test_emphasis_lowers_the_error_and_more_of_it_does_not(width: int) -> None:
    sigma = torch.logspace(0, -0.7, 32)[None]
    axes = torch.randn(8192, 1, 32, generator=generator(width)) * sigma
    turn = tier_rotation((0,), torch.zeros(32, dtype=torch.long), 1)
    bits, tiers = one_tier(32, width)
    h = emphasis(sigma.square(), bits, tiers)
    none, less, right, more = (error(axes, h**t, turn, bits, gains=True) for t in (0.0, 0.5, 1.0, 1.6))
    assert right < none
    assert right < more
    assert right < 1.01 * less
    assert right < 0.95 * error(axes, h**0, turn, bits, gains=False)


def test_gains_alone_lower_the_error_of_a_tier_with_weak_axes() -> None:
    sigma = torch.cat((torch.ones(8), torch.full((24,), 0.15)))[None]
    axes = torch.randn(8192, 1, 32, generator=generator(3)) * sigma
    turn, (bits, _) = tier_rotation((0,), torch.zeros(32, dtype=torch.long), 1), one_tier(32, 1)
    one = torch.ones(1, 32)
    assert error(axes, one, turn, bits, gains=True) < 0.9 * error(axes, one, turn, bits, gains=False)


def test_fitted_rotation_finds_axes_that_round_well() -> None:
    size, tokens = 16, 8192
    bits, tiers = one_tier(size, 1)
    codes = torch.randint(2, (tokens, 1, size), generator=generator(4)) - 0.5
    noisy = codes + 0.1 * torch.randn(tokens, 1, size, generator=generator(5))
    axes = noisy @ random_rotation(size, generator(6)).float()
    start = tier_rotation((0,), tiers, 7)
    turn = fit_rotation(axes[: tokens // 2], start, bits, tiers, torch.ones(1, size))
    assert torch.allclose(turn @ turn.mT, torch.eye(size, dtype=F64).expand(1, -1, -1), atol=1e-9)
    one = torch.ones(1, size)
    assert error(axes, one, turn, bits, False) < 0.5 * error(axes, one, start, bits, False)


def test_rotations_stay_within_tiers_and_need_tokens() -> None:
    bits = torch.tensor([3] * 16 + [1] * 32)
    start = tier_rotation((0, 1), bits, 8)
    axes = torch.randn(20 * TOKENS_PER_CHANNEL, 2, 48, generator=generator(9))
    turn = fit_rotation(axes, start, bits, bits, torch.ones(2, 48))
    assert not turn[:, :16, 16:].any()
    assert not turn[:, 16:, :16].any()
    assert torch.allclose(turn[:, 16:, 16:], start[:, 16:, 16:], atol=1e-5)  # 32 channels, tokens for 20
    assert not torch.allclose(turn[:, :16, :16], start[:, :16, :16], atol=1e-2)
    assert torch.equal(fit_rotation(axes[:100], start, bits, bits, torch.ones(2, 48)), start)
    assert torch.equal(fit_rotation(axes, start, bits * 0 + 8, bits, torch.ones(2, 48)), start)


def test_gains_stay_near_what_was_emphasized() -> None:
    axes = torch.randn(512, 1, 4, generator=generator(10))
    h = torch.tensor([[0.5, 1.0, 2.0, 4.0]])
    coded = axes * h
    assert torch.allclose(axis_gains(coded, axes, h), 1 / h, rtol=1e-5)
    low, high = GAIN_RANGE
    assert torch.allclose(axis_gains(100 * coded, axes, h), low / h)
    assert torch.allclose(axis_gains(0.1 * coded, axes, h), high / h)
    assert torch.isfinite(axis_gains(torch.zeros_like(coded), axes, h)).all()


def test_nearest_rotation_is_the_polar_factor() -> None:
    m = torch.eye(48) * 5 + torch.randn(3, 48, 48, generator=generator(11)) * 0.5
    u, _, vh = torch.linalg.svd(m)
    assert torch.allclose(nearest_rotation(m), u @ vh, atol=1e-4)


def test_losses_fall_with_bits_and_mixing_inverts() -> None:
    sigma = torch.logspace(0, -1, 32)[None].expand(2, -1)
    basis = Basis(*(torch.eye(32, dtype=F64).expand(2, -1, -1),) * 2, sigma.double() ** 2, torch.ones(2, 32), (0, 1))
    tiers = torch.arange(32) // 16
    turn = tier_rotation(basis.owner, tiers, 12)
    table = shaped_losses(torch.randn(2048, 2, 32, generator=generator(13)) * sigma, basis, turn, tiers)
    assert (table.sum((0, 1)).diff() < 0).all()  # strictly: that no axis rises is made so
    assert float(table[..., 8].sum() / table[..., 0].sum()) < 1e-3
    h = emphasis(basis.variance, torch.full_like(tiers, 2), tiers)
    mix = mixed(basis, turn, h)
    assert torch.allclose(mix.encode @ mix.decode, torch.eye(32, dtype=F64).expand(2, -1, -1), atol=1e-9)
