# SPDX-License-Identifier: Apache-2.0
"""Tables and fitted steps describe the coder that is really used (vllm_kqsvd.ops.reference)."""

from __future__ import annotations

import torch

from vllm_kqsvd.calibration.quantizer import distortion_table, fit_quantizer, voting
from vllm_kqsvd.codec import SideCodec
from vllm_kqsvd.ops.reference import decode, encode
from vllm_kqsvd.plan import planes_for

BITS = [6] * 32 + [2] * 32


def latents(seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    spread = torch.logspace(1, -1, 64)
    return torch.randn(3000, 2, 64, generator=gen) * spread * (0.5 + torch.rand(3000, 2, 1, generator=gen))


def test_table_falls_with_bits_and_starts_at_the_variance() -> None:
    z = latents()
    table = distortion_table(z, torch.ones(2, 64))
    assert torch.allclose(table[..., 0].float(), z.square().mean(0), rtol=1e-5)
    ratio = table[..., 1:] / table[..., :-1]
    assert (ratio < 0.5).all()
    assert (table[..., 4] / table[..., 0] > 0.008).all()  # 4 bits cannot beat the Gaussian bound by much


def test_table_and_fit_agree_with_the_reference_coder() -> None:
    z = latents()
    vote = voting(z.square().mean(0))
    bits = torch.tensor(BITS)
    step, scale_weight, guard = fit_quantizer(z, bits, torch.ones(2, 64), vote)
    plan = planes_for([6, 6, 2, 2])
    assert plan is not None
    eye = torch.eye(64).expand(2, -1, -1)
    zero = torch.zeros(2, 1, 64)
    side = SideCodec(
        plan, eye / step[:, None, :], eye * step[..., None], scale_weight, guard, torch.ones(1, 1), zero, zero
    )
    offsets = torch.zeros(len(z), dtype=torch.long)
    error = (decode(*encode(z, offsets, side), offsets, side) - z).square().mean(0)
    table = distortion_table(z, vote).gather(-1, bits.expand(2, -1)[..., None])[..., 0].float()
    assert torch.allclose(error, table, rtol=0.25)
    assert error.sum() < 1.03 * table.sum()


def test_an_outlier_does_not_clip() -> None:
    z = latents()
    _, scale_weight, guard = fit_quantizer(z, torch.tensor(BITS), torch.ones(2, 64), torch.ones(2, 64))
    step, *_ = fit_quantizer(z, torch.tensor(BITS), torch.ones(2, 64), torch.ones(2, 64))
    u = torch.zeros(2, 64)
    u[:, 5] = 1e3 / step[:, 5]
    scale = torch.maximum((scale_weight * u.square()).sum(-1).sqrt(), (guard * u).amax(-1))
    assert (u[:, 5] / scale <= 3.01 * 32).all()
