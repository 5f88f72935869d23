# SPDX-License-Identifier: Apache-2.0
"""Tokens far from anything calibrated: their error stays in proportion to them, and nobody else notices (the CUDA store
kernels: tests/ops/test_cuda_emulated.py, Triton's: triton_cases.py).

Errors are relative to the token's distance from the mean of its class, in units in which the calibrator weighs them.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_codec, side_plan
from tests.ops.test_cpu import fill, ragged_step
from vllm_kqsvd.calibration.quantizer import fit_quantizer, voting
from vllm_kqsvd.codec import SideCodec
from vllm_kqsvd.ops import LayerShape, make_layer_ops, reference
from vllm_kqsvd.ops.scale_byte import MAX_SCALE, decode_scale
from vllm_kqsvd.plan import LayerPlan

BOUND = 1.5  # largest relative error of any token: what clips is shorter, not elsewhere
HEADS, DIM = 2, 64
PLANS = {"4 bits": (6, 4, 4, 2), "3 bits": (5, 3, 3, 1), "2 bits": (5, 1, 1, 1), "one group dropped": (6, 4, 2)}


def fitted(bits: tuple[int, ...]) -> tuple[SideCodec, torch.Tensor]:
    """A coder fitted as the calibrator does (its metric the identity) on Gaussian tokens [n, H, d], and these."""
    gen = torch.Generator().manual_seed(1)
    plan = side_plan(*bits)
    # What an allocator would give these bits to: every bit halves the error, which ends about equal in all channels.
    spread = 2.0 ** torch.tensor([*bits, *[0] * (DIM // 16 - len(bits))]).repeat_interleave(16).float()
    tokens = torch.randn(2048, HEADS, DIM, generator=gen) * spread
    z = tokens[..., : plan.rank]
    ones = torch.ones_like(z[0])
    step, scale_weight, guard = fit_quantizer(
        z, torch.tensor(bits).repeat_interleave(16), ones, voting(z.square().mean(0))
    )
    eye = torch.eye(DIM, plan.rank).expand(HEADS, -1, -1)
    mean = 3 * torch.randn(HEADS, 1, DIM, generator=gen)
    sink = mean + 40 * torch.randn(HEADS, 1, DIM, generator=gen)
    encode, decode = eye / step[:, None], eye.mT * step[..., None]
    return SideCodec(plan, encode, decode, scale_weight, guard, torch.ones(1, 1), mean, sink), tokens


def coded(x: torch.Tensor, side: SideCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, H, d] after a round trip, and its scales [n, H]."""
    at = torch.zeros(len(x), dtype=torch.long)
    codes, byte = reference.encode(x, at, side)
    return reference.decode(codes, byte, at, side), decode_scale(byte)[0]


def relative(got: torch.Tensor, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """|error| / |x - mean| [n, H] in float64."""
    return (got.double() - x.double()).norm(dim=-1) / (x - mean).double().norm(dim=-1)


@pytest.mark.parametrize("bits", PLANS.values(), ids=PLANS)
def test_larger_tokens_keep_their_relative_error(bits):
    side, tokens = fitted(bits)
    mean = side.mean[:, 0]
    ordinary = relative(coded(mean + tokens, side)[0], mean + tokens, mean)
    for factor in (10, 100):  # the scale byte reaches MAX_SCALE times the ordinary scale
        x = mean + factor * tokens
        far = relative(coded(x, side)[0], x, mean)
        assert far.mean() < 1.1 * ordinary.mean() and far.max() < 1.2 * ordinary.max()
    for factor in (1e3, 1e6, 1e15):  # beyond, tokens shrink to what it reaches
        x = mean + factor * tokens
        got, scale = coded(x, side)
        assert relative(got, x, mean).max() <= 1.01
        if factor > 1e3:
            assert (scale == MAX_SCALE).all()


@pytest.mark.parametrize("bits", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("factor", [10, 100, 1000, 1e6])
def test_one_channel_far_out_is_bounded(bits, factor):
    side, tokens = fitted(bits)
    mean = side.mean[:, 0]
    norm = tokens.norm(dim=-1).mean()
    for sign in (-1, 1):
        x = mean + sign * factor * norm * torch.eye(DIM)[:, None].expand(-1, HEADS, -1)
        assert relative(coded(x, side)[0], x, mean).max() < BOUND
        x = x[torch.randint(0, DIM, (len(tokens),), generator=torch.Generator().manual_seed(2))] + tokens
        assert relative(coded(x, side)[0], x, mean).max() < BOUND


@pytest.mark.parametrize("bits", PLANS.values(), ids=PLANS)
def test_nothing_sinks_and_what_lies_between(bits):
    side, tokens = fitted(bits)
    mean, sink = side.mean[:, 0], side.sink[:, 0]
    nothing = torch.zeros(1, HEADS, DIM)
    assert relative(coded(nothing, side)[0], nothing, mean).max() < BOUND
    got, scale = coded(mean[None].clone(), side)
    assert (got - mean).norm() < 0.05 * tokens.norm(dim=-1).mean() and (scale < 0.01).all()
    near = sink + 0.01 * tokens
    assert relative(coded(near, side)[0], near, sink).mean() < 0.5
    part = torch.linspace(0, 1, 100)[:, None, None]
    between = mean + part[1:-1] * (sink - mean)  # from ordinary to sink, the border of the classes included
    error = (coded(between, side)[0] - between).norm(dim=-1)
    distance = torch.minimum((between - mean).norm(dim=-1), (between - sink).norm(dim=-1) / 0.3**0.5)
    assert (error < BOUND * distance).all()


def test_what_comes_out_of_a_page_is_finite_whatever_went_in():
    side, _ = fitted(PLANS["3 bits"])
    x = torch.randn(8, HEADS, DIM)
    x[1], x[2], x[3], x[4, :, 3] = 3e38, float("inf"), float("nan"), float("-inf")
    assert coded(x, side)[0].isfinite().all()


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("factor", [10, 100, 1000])
def test_neighbours_and_attention_are_untouched(name, factor):
    codec = random_codec(LayerPlan(side_plan(6, 4, 4, 2), side_plan(4, 4, 4, 4)), heads=HEADS, dim=DIM)
    ops = make_layer_ops(codec, LayerShape(4, HEADS, DIM, 32, 16, 0.125, torch.float32, 64), torch.device("cpu"), name)
    gen = torch.Generator().manual_seed(0)
    step = ragged_step([150], [1], 32, 16, gen)
    pages, window, key, value = fill(ops, step, gen)
    slots = step.block_table[0].long()[torch.tensor([16, 17, 18]) // 32] * 32 + torch.tensor([16, 17, 18])
    k, v = torch.randn(2, 3, HEADS, DIM, generator=gen)
    calm, wild = pages.clone(), pages.clone()
    ops.store(k, v, calm, None, slots, None, torch.tensor([16, 17, 18]))
    k[1], v[1, :, 5] = factor * k[1], factor * v[1].abs().amax()
    ops.store(k, v, wild, None, slots, None, torch.tensor([16, 17, 18]))
    for pages in (calm, wild):
        at = torch.arange(150)
        where = step.block_table[0].long()[at // 32] * 32 + at % 32
        pages.tokens = reference.dequantize(pages, where, at, codec, 32)
    others = torch.arange(150) != 17
    for before, after in zip(calm.tokens, wild.tokens, strict=True):
        assert torch.equal(before[others], after[others]) and not torch.equal(before[17], after[17])
    # A query that does not look at the outlier gets the same answer, to what its share of the softmax allows.
    query = torch.randn(1, 4, DIM, generator=gen)
    away = -query * (query * k[1].repeat_interleave(2, 0)).sum(-1, keepdim=True).sign()
    out = torch.empty(2, 1, 4, DIM)
    for o, pages in zip(out, (calm, wild), strict=True):
        ops.attend(away, key, value, pages, window, step, o)
    assert out.isfinite().all()
    if factor == 1000:
        assert (out[0] - out[1]).abs().max() < 0.1 * out[0].abs().max()
