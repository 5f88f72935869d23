# SPDX-License-Identifier: Apache-2.0
"""The CUDA extension on a GPU equals the reference: store, dequantize, positions, merge, whole steps, CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers import random_codec, relative_error
from tests.ops.cuda_cases import CASES, Case, assert_pages_close, paged_rows
from vllm_kqsvd.layout import TILE
from vllm_kqsvd.ops import LayerShape, Step, reference
from vllm_kqsvd.ops.cuda_library import available
from vllm_kqsvd.ops.cuda_prefill import Prefill
from vllm_kqsvd.ops.cuda_segments import plan_prefill
from vllm_kqsvd.ops.cuda_store import LatentStore
from vllm_kqsvd.ops.eager import store_exact
from vllm_kqsvd.plan_catalog import PLANS

USABLE, WHY = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not USABLE, reason=WHY)]
GPU = torch.device("cuda")
LLAMA = Case((4, 4, 2, 2, 2, 2, 2, 2), (3, 3, 3, 3, 2, 2, 2, 2), dim=128, heads=8, block_size=64)
WIDE = Case((8,) * 16, (8,) * 16, dim=256, heads=2, dtype=torch.float16)  # its encode matrix outgrows shared memory


@pytest.mark.parametrize("tokens", [1, 17, 640, 641, 1500])
@pytest.mark.parametrize("case", [*CASES, LLAMA, WIDE], ids=str)
def test_store(case, tokens):
    rows = paged_rows(case, tokens, seed=tokens, device="cuda")
    cpu = paged_rows(case, tokens, seed=tokens)
    codec = case.codec()
    LatentStore(codec.to(GPU), case.block_size).store(
        rows.key, rows.value, rows.pages, rows.window, rows.slots, rows.window_slots, rows.positions
    )
    exact64 = codec.to("cpu", torch.float64)
    want, window = cpu.pages.clone(), cpu.window.clone()
    reference.store_latent(
        cpu.key.double(), cpu.value.double(), want, cpu.slots, cpu.positions, exact64, case.block_size
    )
    store_exact(cpu.key, cpu.value, window, cpu.window_slots)
    assert torch.equal(rows.window.cpu(), window)
    assert_pages_close(rows.pages.cpu(), want, cpu, exact64, case.block_size)


def test_store_is_deterministic_and_batch_invariant():
    rows = paged_rows(LLAMA, 700, seed=1, device="cuda")
    store = LatentStore(LLAMA.codec().to(GPU), LLAMA.block_size)
    first, second, third = (rows.pages.clone() for _ in range(3))
    for pages in (first, second):
        store.store(rows.key, rows.value, pages, None, rows.slots, None, rows.positions)
    for i in range(0, 700, 100):  # the few-token kernel
        part = slice(i, i + 100)
        store.store(rows.key[part], rows.value[part], third, None, rows.slots[part], None, rows.positions[part])
    assert torch.equal(first, second)
    assert float((first != third).double().mean()) < 1e-3  # the two kernels add in the same order up to the scale


def test_store_in_a_graph_follows_its_inputs():
    case = LLAMA
    rows, other = (paged_rows(case, 64, seed=s, device="cuda") for s in (1, 2))
    store = LatentStore(case.codec().to(GPU), case.block_size)
    eager = other.pages.clone()
    store.store(other.key, other.value, eager, None, other.slots, None, other.positions)
    graph = torch.cuda.CUDAGraph()
    args = (rows.key, rows.value, rows.pages, None, rows.slots, None, rows.positions)
    store.store(*args)
    with torch.cuda.graph(graph):
        store.store(*args)
    for name in ("key", "value", "pages", "slots", "positions"):
        getattr(rows, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(rows.pages, eager)


@pytest.mark.parametrize("case", [*CASES, LLAMA, WIDE], ids=str)
def test_dequantize(case):
    codec = case.codec()
    gen = torch.Generator().manual_seed(7)
    size, near_size = case.block_size, case.window_block_size
    lengths, q_lens = [700, 33, 5, 1100], [37, 1, 5, 100]
    width, near_width = -(-1100 // size), -(-1100 // near_size)
    table = torch.randperm(4 * width, generator=gen).view(4, width).int()
    near = torch.randperm(4 * near_width, generator=gen).view(4, -1).int()
    pages = torch.randint(0, 256, (4 * width, codec.layout.page_bytes(case.heads, size)), generator=gen).byte()
    window = torch.randn(near.numel(), case.heads, near_size, 2 * case.dim, generator=gen).to(case.dtype)
    step = step_of(lengths, q_lens, table, near)
    store = LatentStore(codec.to(GPU), size)
    exact64 = codec.to("cpu", torch.float64)
    for segment in plan_prefill(step, 64, 512).segments:
        out = torch.full((2, 512, case.heads, case.dim), float("nan"), dtype=case.dtype, device=GPU)
        tables = (step.block_table, window.to(GPU), step.window_block_table)
        store.dequantize(pages.to(GPU), *tables, segment.ranges, segment.num_tiles, *out)
        assert bool(out[:, segment.num_rows :].isnan().all())
        first, row, _, exact, request = segment.ranges.tolist()
        for i in range(len(first) - 1):
            pos = torch.arange(first[i], first[i] + row[i + 1] - row[i])
            if pos.numel() == 0:
                continue
            slots = table[request[i]].long()[pos // size] * size + pos % size
            key, value = reference.dequantize(pages, slots, pos, exact64, size)
            copied = window[near[request[i]].long()[pos // near_size], :, pos % near_size]
            got, late = out[:, row[i] : row[i + 1]].cpu(), pos >= exact[i]
            assert torch.equal(got[0][late], copied[late][..., : case.dim])
            assert torch.equal(got[1][late], copied[late][..., case.dim :])
            if not bool(late.all()):
                assert relative_error(got[0][~late], key[~late]) < case.tolerance
                assert relative_error(got[1][~late], value[~late]) < case.tolerance


def test_token_positions():
    start = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32, device=GPU)
    seq = torch.tensor([30, 9, 7, 100], dtype=torch.int32, device=GPU)
    out = torch.full((14,), -5, dtype=torch.int64, device=GPU)
    torch.ops.kqsvd.token_positions(start, seq, out)
    assert out.tolist() == [27, 28, 29, *range(7), 99, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_attention(dtype):
    gen = torch.Generator(GPU).manual_seed(0)
    out, more = torch.randn(2, 77, 12, 80, generator=gen, device=GPU).to(dtype)
    lse, more_lse = 3 * torch.randn(2, 12, 77, generator=gen, device=GPU)
    lse[:, 5], more_lse[:, 6], more_lse[:, 7] = float("-inf"), float("-inf"), float("inf")
    out[5], more[6:8] = float("nan"), float("nan")
    want_lse = torch.logaddexp(lse, more_lse.masked_fill(more_lse.isinf(), float("-inf")))
    a, b = ((x - want_lse).exp().T[..., None] for x in (lse, more_lse))
    want = out.float().nan_to_num() * a + more.float().nan_to_num() * b.nan_to_num(posinf=0.0)
    torch.ops.kqsvd.merge_attention(out, lse, more, more_lse)
    assert relative_error(out.float(), want) < (3e-3 if dtype == torch.bfloat16 else 5e-4)
    assert torch.allclose(lse, want_lse, atol=1e-5)


def test_wrong_arguments_are_named():
    rows = paged_rows(LLAMA, 20, seed=1, device="cuda")
    store = LatentStore(LLAMA.codec().to(GPU), LLAMA.block_size)
    with pytest.raises(RuntimeError, match="pages must have shape"):
        store.store(rows.key, rows.value, rows.pages[:, :-32], None, rows.slots, None, rows.positions)
    with pytest.raises(RuntimeError, match="positions must have dtype"):
        store.store(rows.key, rows.value, rows.pages, None, rows.slots, None, rows.positions.int())
    with pytest.raises(RuntimeError, match="value must have dtype"):
        store.store(rows.key, rows.value.half(), rows.pages, None, rows.slots, None, rows.positions)


def step_of(lengths, q_lens, table, near, decodes=0) -> Step:
    """A step of these requests on the GPU."""
    start = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    seq = torch.tensor(lengths, dtype=torch.int32)
    positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, q_lens, strict=True)])
    counts = (sum(q_lens), len(q_lens), decodes, int(start[decodes]), max(q_lens[:decodes], default=0), max(lengths))
    on = [x.to(GPU) for x in (start, seq, table, near, positions)]
    return Step(*counts, on[0], start, on[1], seq, on[2], on[3], on[4])


@pytest.mark.parametrize(("cap", "sliding"), [(0.0, 0), (12.0, 0), (0.0, 300)])
@pytest.mark.parametrize("case", [LLAMA, CASES[0], CASES[1]], ids=str)
def test_prefill_over_cached_context(case, cap, sliding, monkeypatch):
    monkeypatch.setattr("vllm_kqsvd.ops.cuda_prefill.WORKSPACE_ROWS", 1024)
    monkeypatch.setattr("vllm_kqsvd.ops.cuda_prefill._workspaces", {})
    codec, size, near_size = case.codec(), case.block_size, case.window_block_size
    shape = LayerShape(
        4 * case.heads, case.heads, case.dim, size, near_size, case.dim**-0.5, case.dtype, 64, cap, sliding
    )
    gen = torch.Generator().manual_seed(3)
    lengths, q_lens = [1500, 40, 700, 90], [200, 40, 1, 70]
    blocks, near_blocks = 4 * -(-1500 // size), 4 * -(-1500 // near_size)
    table = torch.randperm(blocks, generator=gen).view(4, -1).int()
    near = torch.randperm(near_blocks, generator=gen).view(4, -1).int()
    step = step_of(lengths, q_lens, table, near)
    store = LatentStore(codec.to(GPU), size)
    prefill = Prefill(store, shape, GPU)
    pages = torch.randint(
        0, 256, (blocks, codec.layout.page_bytes(case.heads, size)), generator=gen, dtype=torch.uint8
    ).to(GPU)
    window = torch.full((near_blocks, case.heads, near_size, 2 * case.dim), float("nan"), dtype=case.dtype, device=GPU)
    news = []
    for i, (n, q) in enumerate(zip(lengths, q_lens, strict=True)):
        pos = torch.arange(n)
        kv = torch.randn(2, n, case.heads, case.dim, generator=gen).to(GPU, case.dtype)
        slots = (table[i].long()[pos // size] * size + pos % size).to(GPU)
        exact = (near[i].long()[pos // near_size] * near_size + pos % near_size).to(GPU)
        exact[: max(0, n - q + 1 - 64) // TILE * TILE] = -1
        store.store(kv[0], kv[1], pages, window, slots, exact, pos.to(GPU))
        news.append(kv[:, n - q :])
    new = torch.cat(news, 1)
    query = torch.randn(step.num_tokens, shape.num_heads, case.dim, generator=gen).to(GPU, case.dtype)
    out = torch.full_like(query, float("nan"))
    plan = plan_prefill(step, 64, prefill.capacity)
    prefill.attend(query, new[0], new[1], pages, window, step, plan, out)
    want = reference.attend(
        query,
        pages,
        step.block_table,
        step.seq_lens,
        step.query_start_loc,
        codec.to(GPU, torch.float64),
        size,
        shape.scale,
        reference.ExactWindow(window, step.window_block_table, 64),
        cap,
        sliding,
    )
    assert relative_error(out, want) < (6e-3 if case.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("name", ["cuda", "cuda+triton"])
def test_whole_step_equals_reference(name):
    """Three decodes and two prefills of one step, history stored by the ops themselves."""
    if name == "cuda":
        from vllm_kqsvd.ops.cuda import CudaOps as Ops
        from vllm_kqsvd.ops.cuda_decode import missing_instances

        if not hasattr(torch.ops.kqsvd, "decode_instance") or missing_instances():
            pytest.skip("this build of the extension has no decode kernels")
    else:
        from vllm_kqsvd.ops.cuda_mixed import MixedOps as Ops
    plan = PLANS["d128_b82"][1]
    codec = random_codec(plan, heads=8, dim=128, rope_block=32)
    size, near_size = 64, 16
    shape = LayerShape(32, 8, 128, size, near_size, 128**-0.5, torch.bfloat16, 64)
    ops = Ops(codec.to(GPU), shape)
    gen = torch.Generator().manual_seed(11)
    lengths, q_lens = [1200, 77, 64, 900, 300], [1, 1, 1, 130, 300]
    table = torch.randperm(5 * 19, generator=gen).view(5, 19).int()
    near = torch.randperm(5 * 75, generator=gen).view(5, 75).int()
    step = step_of(lengths, q_lens, table, near, decodes=3)
    pages = torch.full((95, codec.layout.page_bytes(8, size)), 255, dtype=torch.uint8, device=GPU)
    window = torch.full((375, 8, near_size, 256), float("nan"), dtype=torch.bfloat16, device=GPU)
    news = []
    for i, (n, q) in enumerate(zip(lengths, q_lens, strict=True)):
        pos = torch.arange(n)
        kv = torch.randn(2, n, 8, 128, generator=gen).to(GPU, torch.bfloat16)
        slots = (table[i].long()[pos // size] * size + pos % size).to(GPU)
        exact = (near[i].long()[pos // near_size] * near_size + pos % near_size).to(GPU)
        ops.store(kv[0], kv[1], pages, window, slots, exact, pos.to(GPU))
        news.append(kv[:, n - q :])
    new = torch.cat(news, 1)
    query = torch.randn(step.num_tokens, 32, 128, generator=gen).to(GPU, torch.bfloat16)
    out = torch.full((step.num_tokens + 3, 32, 128), float("nan"), dtype=torch.bfloat16, device=GPU)
    step = replace(step, plan=ops.plan_step(step))
    ops.attend(query, new[0], new[1], pages, window, step, out)
    assert bool(out[step.num_tokens :].isnan().all())
    exact = reference.ExactWindow(window, step.window_block_table, 64)
    lengths_q = (step.seq_lens, step.query_start_loc)
    want = reference.attend(
        query, pages, step.block_table, *lengths_q, codec.to(GPU, torch.float64), size, shape.scale, exact
    )
    starts = step.query_start_loc.tolist()
    for a, b in zip(starts, starts[1:], strict=False):
        assert relative_error(out[a:b], want[a:b]) < 6e-3
