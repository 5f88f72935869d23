# SPDX-License-Identifier: Apache-2.0
"""Segments cover every cached position once; the plain prefill path over them equals the reference. CPU only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import random_codec, relative_error, side_plan
from vllm_kqsvd.ops import LayerShape, Step, reference
from vllm_kqsvd.ops.cuda_prefill import Prefill, workspace_bytes
from vllm_kqsvd.ops.cuda_segments import NEVER, plan_prefill
from vllm_kqsvd.plan import LayerPlan


def step_of(lengths: list[int], q_lens: list[int], decodes: int = 0) -> Step:
    """A step of these requests, without block tables."""
    start = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    seq = torch.tensor(lengths, dtype=torch.int32)
    tokens, near = int(start[-1]), int(start[decodes])
    blank = torch.zeros(len(lengths), 1, dtype=torch.int32)
    positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, q_lens, strict=True)])
    longest = max(q_lens[:decodes], default=0)
    shape = (tokens, len(lengths), decodes, near, longest, max(lengths))
    return Step(*shape, start, start, seq, seq, blank, None, positions)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90)), min_size=1, max_size=12),
    st.integers(0, 5),
    st.sampled_from([16, 48, 128, 4096]),
    st.sampled_from([0, 64]),
)
def test_segments_cover_the_context_once(requests, decodes, capacity, window):
    lengths, q_lens = [c + q for c, q in requests], [q for _, q in requests]
    decodes = min(decodes, len(requests))
    step = step_of(lengths, q_lens, decodes)
    plan = plan_prefill(step, window, capacity)
    if decodes == len(requests):
        assert plan is None
        return
    seen = {i: [] for i in range(decodes, len(requests))}
    for s in plan.segments:
        first, row, tile, exact, request = s.ranges.tolist()
        assert row[-1] == s.num_rows <= capacity and tile[-1] == s.num_tiles <= capacity // 16
        assert [b - a for a, b in zip(tile, tile[1:], strict=False)] == [
            -(-(b - a) // 16) for a, b in zip(row, row[1:], strict=False)
        ]
        assert (s.cu_query[-1], s.max_rows) == (
            s.query_rows.stop - s.query_rows.start,
            max(b - a for a, b in zip(row, row[1:], strict=False)),
        )
        for i in range(len(first) - 1):
            context = lengths[request[i]] - q_lens[request[i]]
            assert first[i] % 16 == 0
            assert exact[i] == (max(0, context + 1 - window) // 16 * 16 if window else NEVER)
            seen[request[i]] += range(first[i], first[i] + row[i + 1] - row[i])
            start = int(step.query_start_loc[request[i]]) - plan.first_row
            assert int(s.cu_query[i]) + s.query_rows.start == start
    for i, positions in seen.items():
        assert positions == list(range(lengths[i] - q_lens[i]))


class ReferenceStore:
    """Stands in for LatentStore: expands ranges with the reference."""

    def __init__(self, codec, shape):
        self.codec, self.shape = codec, shape

    def dequantize(self, pages, block_table, window_pages, window_block_table, ranges, num_tiles, key, value):
        size, near = self.shape.block_size, self.shape.window_block_size
        first, row, _, exact, request = ranges.tolist()
        for i in range(len(first) - 1):
            pos = torch.arange(first[i], first[i] + row[i + 1] - row[i])
            slots = block_table[request[i]].long()[pos // size] * size + pos % size
            k, v = reference.dequantize(pages, slots, pos, self.codec, size)
            late = pos >= exact[i]
            copied = window_pages[window_block_table[request[i]].long()[pos // near], :, pos % near].float()
            k[late], v[late] = copied[late][..., : self.shape.head_dim], copied[late][..., self.shape.head_dim :]
            key[row[i] : row[i + 1]], value[row[i] : row[i + 1]] = k.to(key.dtype), v.to(value.dtype)


@pytest.mark.parametrize(("cap", "sliding"), [(0.0, 40), (8.0, 0), (8.0, 100)])
def test_plain_path_equals_reference(monkeypatch, cap, sliding):
    monkeypatch.setattr("vllm_kqsvd.ops.cuda_prefill.WORKSPACE_ROWS", 96)
    codec = random_codec(LayerPlan(side_plan(8, 4), side_plan(4, 4)), heads=2, dim=32, rope_block=32)
    shape = LayerShape(4, 2, 32, 32, 16, 0.2, torch.float32, 64, cap, sliding)
    gen = torch.Generator().manual_seed(1)
    lengths, q_lens = [150, 90, 40, 333], [70, 1, 40, 65]
    step = step_of(lengths, q_lens)
    tables = [torch.randperm(4 * 24, generator=gen).view(4, 24).int() for _ in range(2)]
    object.__setattr__(step, "block_table", tables[0])
    object.__setattr__(step, "window_block_table", tables[1])
    pages = torch.randint(0, 256, (96, codec.layout.page_bytes(2, 32)), generator=gen).byte()
    window = torch.randn(96, 2, 16, 64, generator=gen)
    query = torch.randn(step.num_tokens, 4, 32, generator=gen)
    rows = [torch.empty(0, 2, 64)]
    for i, (n, q) in enumerate(zip(lengths, q_lens, strict=True)):
        for p in range(max(0, n - q + 1 - 64) // 16 * 16, n):
            window[tables[1][i, p // 16], :, p % 16] = torch.randn(2, 64, generator=gen)
        pos = torch.arange(n - q, n)
        rows.append(window[tables[1][i].long()[pos // 16], :, pos % 16])
    new = torch.cat(rows)
    prefill = Prefill(ReferenceStore(codec, shape), shape, torch.device("cpu"))
    assert prefill.capacity == 96 and workspace_bytes(shape) == 2 * 96 * 2 * 32 * 4
    plan = plan_prefill(step, shape.window, prefill.capacity)
    out = torch.full_like(query, float("nan"))
    prefill.attend(query, new[..., :32], new[..., 32:], pages, window, step, plan, out)
    exact = reference.ExactWindow(window, tables[1], 64)
    lengths_t = (step.seq_lens, step.query_start_loc)
    want = reference.attend(query, pages, tables[0], *lengths_t, codec, 32, 0.2, exact, cap, sliding)
    assert relative_error(out, want) < 1e-5
