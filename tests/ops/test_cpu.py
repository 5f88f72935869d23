# SPDX-License-Identifier: Apache-2.0
"""The CPU implementation equals the reference on ragged batches, every layout and every frame."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import gaps_untouched, random_codec, relative_error, side_by_side, side_plan
from vllm_kqsvd.ops import LayerShape, Step, cpu, make_layer_ops
from vllm_kqsvd.plan import LayerPlan

CASES = {
    "page": {"rope_block": 32},
    "pre": {"rope_block": 1},
    "post": {"rope_block": 0},
    "partial-interleaved": {"rope_block": 64, "rotary_dim": 32, "interleaved": True},
}


def ragged_step(lengths, q_lens, block_size, window_size, gen):
    """A Step over shuffled blocks, with the number of latent and window blocks it needs."""
    tables = []
    for size in (block_size, window_size):
        width = -(-max(lengths) // size)
        tables.append(torch.randperm(len(lengths) * width, generator=gen).view(len(lengths), width).int())
    start = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, q_lens, strict=True)])
    seq = torch.tensor(lengths, dtype=torch.int32)
    return Step(
        sum(q_lens),
        len(lengths),
        len(lengths),
        sum(q_lens),
        max(q_lens),
        max(lengths),
        start,
        start,
        seq,
        seq,
        tables[0],
        tables[1],
        positions,
    )


def fill(ops, step, gen):
    """Random history for every request, stored by `ops`; returns (pages, window_pages, key, value of new rows)."""
    s = ops.shape
    blocks, near = step.block_table.numel(), step.window_block_table.numel()
    pages = torch.randint(
        0, 256, (blocks, ops.codec.layout.page_bytes(s.num_kv_heads, s.block_size)), generator=gen
    ).to(torch.uint8)
    window = torch.randn(near, s.num_kv_heads, s.window_block_size, 2 * s.head_dim, generator=gen).to(s.dtype)
    rows = []
    for i, length in enumerate(step.seq_lens.tolist()):
        kv = torch.randn(2, length, s.num_kv_heads, s.head_dim, generator=gen).to(s.dtype)
        pos = torch.arange(length)
        slots = step.block_table[i].long()[pos // s.block_size] * s.block_size + pos % s.block_size
        size = s.window_block_size
        near_slots = step.window_block_table[i].long()[pos // size] * size + pos % size
        ops.store(kv[0], kv[1], pages, window, slots, near_slots, pos)
        q_len = int(step.query_start_loc[i + 1] - step.query_start_loc[i])
        rows.append(kv[:, length - q_len :])
    return pages, window, *torch.cat(rows, 1)


@pytest.mark.parametrize("frame", CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "plan", [((6, 4, 4, 2), (4, 4, 4, 4)), ((4, 2, 2), (3, 3, 3, 3)), ((4,), (2, 2))], ids=["full", "half", "least"]
)
def test_cpu_equals_reference(frame, plan):
    compare(frame, plan)


@pytest.mark.parametrize("span", [64, 8])  # requests of one to four spans; less than a block
@pytest.mark.parametrize("frame", CASES.values(), ids=CASES)
def test_history_in_spans(frame, span, monkeypatch):
    monkeypatch.setattr(cpu, "SPAN", span)
    compare(frame, ((4, 2, 2), (3, 3, 3, 3)))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, those of `known` left out."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.bytes = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple) else (made,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("q_len", [1, 48])
def test_workspace_does_not_grow_with_the_context(q_len, monkeypatch):
    """Passing tensors of every length would leave holes in the C library's heap, which then grows for hours."""
    monkeypatch.setattr(cpu, "SPAN", 256)
    gen = torch.Generator().manual_seed(1)
    codec = random_codec(LayerPlan(side_plan(4, 2, 2), side_plan(3, 3, 3, 3)), heads=2, dim=64, rope_block=32)
    shape = LayerShape(6, 2, 64, 32, 16, 0.125, torch.float32, 64)
    ops = make_layer_ops(codec, shape, torch.device("cpu"), "cpu")
    largest = []
    for length in (512, 2048):
        step = ragged_step([length], [q_len], 32, 16, gen)
        pages, window, key, value = fill(ops, step, gen)
        query = torch.randn(q_len, 6, 64, generator=gen)
        with Largest(pages, window, key, value, query) as found:
            ops.attend(query, key, value, pages, window, step, torch.empty(q_len, 6, 64))
        largest.append(found.bytes)
    assert largest[0] == largest[1] > 0


@pytest.mark.parametrize(("soft_cap", "sliding_window"), [(5.0, 0), (0.0, 90), (5.0, 90)])
def test_soft_cap_and_sliding_window(soft_cap, sliding_window):
    compare(CASES["page"], ((4, 2, 2), (3, 3, 3, 3)), soft_cap, sliding_window)


def test_pages_between_those_of_other_layers():
    compare(CASES["page"], ((4, 2, 2), (3, 3, 3, 3)), gap=256)


def compare(frame, plan, soft_cap=0.0, sliding_window=0, gap=0):
    """A ragged batch through both implementations; `gap`: bytes of other layers around the pages of the fast one."""
    gen = torch.Generator().manual_seed(1)
    codec = random_codec(LayerPlan(side_plan(*plan[0]), side_plan(*plan[1])), heads=2, dim=64, **frame)
    shape = LayerShape(6, 2, 64, 32, 16, 0.125, torch.float32, 64, soft_cap, sliding_window)
    fast, slow = (make_layer_ops(codec, shape, torch.device("cpu"), n) for n in ("cpu", "reference"))
    step = ragged_step([1, 200, 77, 64, 130], [1, 3, 77, 1, 9], 32, 16, gen)
    pages, window, key, value = fill(slow, step, gen)
    shared = side_by_side(pages, gap) if gap else pages
    if gap:
        slots = step.block_table[2].long()[step.positions[4:81] // 32] * 32 + step.positions[4:81] % 32
        shared.copy_(torch.zeros(()))
        fast.store(key[4:81], value[4:81], shared, None, slots, None, step.positions[4:81])
        assert torch.equal(shared[step.block_table[2].long()[:2]], pages[step.block_table[2].long()[:2]])
        assert gaps_untouched(shared, gap)
        shared.copy_(pages)
    query = torch.randn(step.num_tokens, 6, 64, generator=gen)
    out = torch.full((2, step.num_tokens, 6, 64), float("nan"))
    for ops, read, o in zip((fast, slow), (shared, pages), out, strict=True):
        ops.attend(query, key, value, read, window, step, o)
    assert relative_error(out[0], out[1]) < 1e-5
