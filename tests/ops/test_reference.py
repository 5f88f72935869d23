# SPDX-License-Identifier: Apache-2.0
"""The reference ops against themselves: round trip, skipping, windows, invariance to block order."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_codec, relative_error, side_plan
from vllm_kqsvd.ops import reference as ref
from vllm_kqsvd.plan import LayerPlan

PLANS = {
    "4bit-d64": LayerPlan(side_plan(6, 4, 4, 2), side_plan(4, 4, 4, 4)),
    "halves": LayerPlan(side_plan(4, 2, 2), side_plan(3, 3, 3, 3)),
}


def _fill(codec, length, block_size, blocks, seed=0):
    gen = torch.Generator().manual_seed(seed)
    key = torch.randn(length, codec.num_kv_heads, codec.head_dim, generator=gen)
    value = torch.randn(length, codec.num_kv_heads, codec.head_dim, generator=gen)
    pages = torch.randint(0, 256, (blocks, codec.layout.page_bytes(codec.num_kv_heads, block_size)), generator=gen).to(
        torch.uint8
    )
    table = torch.randperm(blocks, generator=gen)[: -(-length // block_size)]
    pos = torch.arange(length)
    slots = table[pos // block_size] * block_size + pos % block_size
    ref.store_latent(key, value, pages, slots, pos, codec, block_size)
    return key, value, pages, table, slots, pos


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("rope_block", [0, 1, 32])
def test_stored_tokens_come_back(plan, rope_block):
    codec = random_codec(plan, rope_block=rope_block)
    key, value, pages, table, slots, pos = _fill(codec, 100, 32, 7)
    k, v = ref.dequantize(pages, slots, pos, codec, 32)
    again_pages = torch.zeros_like(pages)
    ref.store_latent(k, v, again_pages, slots, pos, codec, 32)
    again = ref.dequantize(again_pages, slots, pos, codec, 32)
    assert relative_error(v, value) < 0.9 and relative_error(k, key) < 0.9
    assert relative_error(again[1], v) < 0.35  # coding a coded token moves it little


def test_negative_slots_are_skipped():
    codec = random_codec(PLANS["4bit-d64"])
    key, value, pages, *_ = _fill(codec, 20, 16, 4)
    before = pages.clone()
    ref.store_latent(key, value, pages, torch.full((20,), -1), torch.arange(20), codec, 16)
    assert torch.equal(pages, before)


def test_window_makes_recent_tokens_exact():
    codec = random_codec(PLANS["halves"])
    key, value, pages, table, slots, pos = _fill(codec, 60, 16, 6)
    exact = torch.zeros(6, 2, 16, 128)
    exact[table[pos // 16], :, pos % 16] = torch.cat((key, value), -1)
    query = torch.randn(1, 4, 64)
    args = (pages, table[None], torch.tensor([60]), torch.tensor([0, 1]), codec, 16, 0.125)
    out = ref.attend(query, *args, window=ref.ExactWindow(exact, table[None], 64))
    p = (torch.einsum("hgd,khd->hgk", query[0].view(2, 2, 64), key) * 0.125).softmax(-1)
    want = torch.einsum("hgk,khd->hgd", p, value).reshape(1, 4, 64)
    assert relative_error(out, want) < 1e-5
