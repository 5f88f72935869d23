# SPDX-License-Identifier: Apache-2.0
"""Sums in float32 blocks have the digits of float64 ones, and what is turned back before RoPE is what was turned."""

from __future__ import annotations

import pytest
import torch

from vllm_kqsvd.calibration.collect import before_rope
from vllm_kqsvd.calibration.sinks import FIRST_ORDINARY, Prototypes
from vllm_kqsvd.calibration.statistics import LayerStatistics
from vllm_kqsvd.ops.rope_block import RopeSpec, rotate

HEADS, DIM = 2, 16


@pytest.mark.parametrize("bias", [0.0, 300.0])
def test_sums_equal_float64_ones(bias: float) -> None:
    gen = torch.Generator().manual_seed(2)
    mix = torch.randn(HEADS, DIM, DIM, generator=gen)
    x = torch.randn(HEADS, 700, DIM, generator=gen) @ mix + bias
    sink = torch.randn(HEADS, DIM, generator=gen)
    x[0, [0, 90]] = sink[0]
    proto = Prototypes(torch.full((HEADS, DIM), bias + 0.3), torch.stack((sink[0], torch.full((DIM,), bias + 0.3))))
    one, two = (LayerStatistics(HEADS, DIM, {"k": proto, "v": proto}, "cpu") for _ in range(2))
    one.add_tokens("k", x[:, :300], torch.arange(3))
    two.add_tokens("k", x[:, 300:].clone(), torch.arange(3))
    one.merge(two)
    assert one.sums["k_sink_count"].tolist() == [2, 0]
    assert torch.allclose(one.sums["k_sink_sum"][0], 2 * sink[0].double())
    for h in range(HEADS):
        left = torch.ones(700, dtype=torch.bool)
        left[[*range(FIRST_ORDINARY), *range(300, 300 + FIRST_ORDINARY)]] = False
        left[90] &= h == 1
        y = x[h, left].double()
        assert one.sums["k_count"][h] == len(y)
        assert (one.mean("k")[h] - y.mean(0)).norm() < 1e-6 * y.std()
        cov = y.T.cov(correction=0)
        assert (one.covariance("k")[h] - cov).norm() < 1e-6 * cov.norm()


def test_query_sums_leave_the_first_positions_out() -> None:
    q = torch.randn(3 * HEADS, 600, DIM, generator=torch.Generator().manual_seed(3))
    stats = LayerStatistics(HEADS, DIM, {s: Prototypes(*torch.zeros(2, HEADS, DIM)) for s in ("k", "v")}, "cpu")
    stats.add_queries(q.clone())
    y = q[:, FIRST_ORDINARY:].double().reshape(HEADS, -1, DIM)
    assert stats.sums["q_count"] == y.shape[1]
    assert torch.allclose(stats.sums["q_gram"], y.mT @ y, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [0, 8, DIM])
def test_before_rope_undoes_rope(rotary: int, interleaved: bool) -> None:
    rope = RopeSpec(100.0 ** -torch.linspace(0, 1, rotary // 2, dtype=torch.float64), interleaved)
    x = torch.randn(40, 3, DIM, generator=torch.Generator().manual_seed(4))
    turned = rotate(x, torch.arange(40), rope).transpose(0, 1)
    kept = turned.clone()
    back = before_rope(turned, rope)
    assert torch.allclose(back, x.transpose(0, 1), atol=1e-5)
    assert back.is_contiguous()
    back.zero_()  # a copy even without RoPE: sums overwrite it
    assert torch.equal(turned, kept)
