# SPDX-License-Identifier: Apache-2.0
"""The one-pass attention of verify equals decoding step by step through the reference ops."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_codec, relative_error, side_plan
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.eager import store_exact
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.verify_attention import AttentionCall, CodedCache, exact_attention, mixed_attention
from vllm_kqsvd.verify_harness import ProjectionCodec, ReadRule

HEADS, GROUP, DIM, BLOCK = 2, 3, 64, 16


def tensors(length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    query = torch.randn(length, HEADS * GROUP, DIM, generator=gen)
    key, value = torch.randn(2, length, HEADS, DIM, generator=gen)
    return query, key, value


@pytest.mark.parametrize("window,chunk,prefill", [(64, 1, 96), (32, 1, 40), (64, 48, 0), (16, 7, 0), (64, 1, 0)])
@pytest.mark.parametrize("soft_cap,sliding_window", [(0.0, 0), (5.0, 0), (0.0, 50)])
def test_one_pass_equals_steps_through_pages(window, chunk, prefill, soft_cap, sliding_window):
    length, scale = 150, DIM**-0.5
    codec = random_codec(LayerPlan(side_plan(4, 2, 2), side_plan(4, 4, 2, 2)), HEADS, DIM)
    query, key, value = tensors(length)
    positions = torch.arange(length)
    pages = torch.zeros(10, codec.layout.page_bytes(HEADS, BLOCK), dtype=torch.uint8)
    window_pages = torch.zeros(10, HEADS, BLOCK, 2 * DIM)
    reference.store_latent(key, value, pages, positions, positions, codec, BLOCK)
    store_exact(key, value, window_pages, positions)
    table = torch.arange(10)[None]
    steps, at = [], prefill
    while at < length:
        end = min(length, at + chunk)
        steps.append(
            reference.attend(
                query[at:end], pages, table, torch.tensor([end]), torch.tensor([0, end - at]), codec, BLOCK, scale,
                reference.ExactWindow(window_pages, table, window), soft_cap, sliding_window,
            )
        )  # fmt: skip
        at = end
    coded_key, coded_value = ProjectionCodec({0: codec}).roundtrip(0, key, value, positions)
    rows = positions[prefill:]
    call = AttentionCall(0, query[prefill:], key, value, scale, soft_cap, sliding_window)
    first = ReadRule(window, chunk=chunk, prefill=prefill).first_exact(rows)
    out = mixed_attention(call, CodedCache(key, value, coded_key, coded_value, first), rows)
    assert relative_error(out, torch.cat(steps)) < 1e-5


def test_exact_sinks_and_no_window():
    query, key, value = tensors(40)
    positions = torch.arange(40)
    call = AttentionCall(0, query, key, value, 0.1)
    coded_key, coded_value = key + 0.3, value * 0.5
    first = ReadRule(window=0).first_exact(positions)
    out = mixed_attention(call, CodedCache(key, value, coded_key, coded_value, first, sinks=4), positions)
    coded_key[:4], coded_value[:4] = key[:4], value[:4]
    assert relative_error(out, exact_attention(AttentionCall(0, query, coded_key, coded_value, 0.1))) < 1e-5


@pytest.mark.parametrize("soft_cap,sliding_window", [(3.0, 0), (0.0, 9)])
def test_exact_attention_with_caps_and_windows(soft_cap, sliding_window):
    query, key, value = tensors(30)
    out = exact_attention(AttentionCall(0, query, key, value, 0.2, soft_cap, sliding_window))
    q = query.view(30, HEADS, GROUP, DIM)
    logit = torch.einsum("thgd,nhd->hgtn", q, key) * 0.2
    if soft_cap:
        logit = soft_cap * torch.tanh(logit / soft_cap)
    row, column = torch.arange(30)[:, None], torch.arange(30)
    hidden = column > row if not sliding_window else (column > row) | (column <= row - sliding_window)
    want = torch.einsum("hgtn,nhd->thgd", logit.masked_fill(hidden, float("-inf")).softmax(-1), value)
    assert relative_error(out, want.reshape(30, -1, DIM)) < 1e-5


def test_read_rule():
    positions = torch.tensor([0, 99, 100, 163, 164, 200])
    decode = ReadRule(window=64, prefill=100)
    assert decode.first_exact(positions).tolist() == [0, 0, 32, 96, 96, 128]
    chunked = ReadRule(window=64, chunk=64)
    assert chunked.first_exact(positions).tolist() == [0, 0, 0, 64, 64, 128]
    everything = ReadRule(window=0, prefill=100)
    assert everything.first_exact(positions).tolist() == [0, 0, 101, 164, 165, 201]
    assert everything.first_exact(positions, group_tokens=32).tolist() == [0, 0, 96, 160, 160, 192]
