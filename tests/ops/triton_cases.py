# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the float64 reference: run by test_triton.py in the interpreter, or as they are on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.helpers import gaps_untouched, random_codec, relative_error, side_by_side, side_plan
from tests.ops.test_cpu import fill, ragged_step
from vllm_kqsvd.ops import LayerShape
from vllm_kqsvd.ops.eager import ReferenceOps
from vllm_kqsvd.ops.triton import TritonOps, layer_ops
from vllm_kqsvd.plan import LayerPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """One layer and one step: `decodes` of the requests go through decode, the others through prefill."""

    k: tuple[int, ...] = (4, 2, 2)
    v: tuple[int, ...] = (3, 3, 3, 3)
    dim: int = 64
    group: int = 3
    heads: int = 1
    dtype: torch.dtype = torch.float32
    block: int = 32
    window_block: int = 16
    window: int = 64
    soft_cap: float = 0.0
    sliding: int = 0
    lengths: tuple[int, ...] = (1, 150, 77, 90)
    q_lens: tuple[int, ...] = (1, 3, 1, 20)
    decodes: int = 3
    programs: int = 1  # asks for this many programs, i.e. splits
    warps: int = 4  # of the split kernel
    sinks: bool = False  # half of the cached tokens are of the other class
    frame: dict = field(default_factory=dict)


BF16, F16 = torch.bfloat16, torch.float16
CASES = {
    "half-planes": Case(heads=2),
    "3-bit-d96-cap": Case(
        k=(3,) * 4, v=(2,) * 4, dim=96, group=1, dtype=BF16, block=48, soft_cap=20.0, frame={"rope_block": 16}
    ),
    "8-bit-g16-interleaved": Case(
        k=(8, 1, 1, 1, 1), v=(8, 4, 4, 1, 1, 1, 1), dim=128, group=16, dtype=F16, programs=8, lengths=(190, 33, 70),
        q_lens=(2, 1, 5), decodes=2, frame={"rope_block": 64, "rotary_dim": 32, "interleaved": True},
    ),
    "post-d256": Case(dim=256, group=2, dtype=BF16, block=16, window_block=32, frame={"rope_block": 0}),
    "no-rope-d80-no-window": Case(
        dim=80, group=5, window=0, lengths=(70, 40, 50), q_lens=(4, 1, 30), decodes=2, frame={"rotary_dim": 0}
    ),
    "sliding": Case(sliding=100, block=64, lengths=(250, 20, 230), q_lens=(2, 1, 40), decodes=2, programs=4),
    "sliding-inside-window": Case(sliding=40, lengths=(150, 130), q_lens=(1, 30), decodes=1, frame={"rope_block": 16}),
    "every-position-a-rope-block": Case(lengths=(100, 90), q_lens=(1, 9), decodes=1, frame={"rope_block": 1}),
    "long-rope-block": Case(lengths=(300, 280), q_lens=(1, 20), decodes=1, warps=1, frame={"rope_block": 256}),
    "short-rope-block-g1-d32": Case(
        k=(4, 4), v=(2, 2), dim=32, group=1, lengths=(150,), q_lens=(1,), decodes=1, frame={"rope_block": 4}
    ),
    "one-query": Case(
        k=(4, 4), v=(2, 2), dim=32, group=1, lengths=(200,), q_lens=(1,), decodes=1, block=64, warps=1
    ),
    "second-digit": Case(
        group=1, lengths=(1090,), q_lens=(1,), decodes=1, block=64, warps=16, frame={"rope_block": 1}
    ),
    "sinks-everywhere": Case(group=4, lengths=(200,), q_lens=(1,), decodes=1, warps=1, sinks=True),
    "one-key-group": Case(k=(4,), v=(3, 3, 1, 1), lengths=(150, 90), q_lens=(1, 20), decodes=1),
    "one-value-plane": Case(v=(2, 2), lengths=(150, 90), q_lens=(1, 20), decodes=1),
    "q-len-8": Case(group=8, lengths=(140,), q_lens=(8,), decodes=1),
}  # fmt: skip


def build(case: Case):
    """(Triton ops, float64 reference ops, step, generator) of a case."""
    gen = torch.Generator().manual_seed(len(case.k) + case.dim)
    plan = LayerPlan(side_plan(*case.k), side_plan(*case.v))
    codec = random_codec(plan, heads=case.heads, dim=case.dim, seed=case.dim, **case.frame)
    shape = LayerShape(
        case.heads * case.group, case.heads, case.dim, case.block, case.window_block, case.dim**-0.5, case.dtype,
        case.window, case.soft_cap, case.sliding,
    )  # fmt: skip
    ops = TritonOps(codec.to(DEVICE), shape)
    ops._programs, ops._warps = case.programs, case.warps
    step = ragged_step(case.lengths, case.q_lens, case.block, case.window_block, gen)
    decodes = case.decodes
    step = replace(
        step,
        num_decodes=decodes,
        num_decode_tokens=sum(case.q_lens[:decodes]),
        max_decode_len=max(case.q_lens[:decodes], default=0),
    )
    return ops, ReferenceOps(codec.to("cpu", torch.float64), shape), step, gen


def to_device(step):
    """The step with its device tensors on DEVICE."""
    names = ("query_start_loc", "seq_lens", "block_table", "window_block_table", "positions")
    return replace(step, **{n: getattr(step, n).to(DEVICE) for n in names})


def attend(ops, device, query, key, value, pages, window, step, dtype):
    """Output of `ops` over poisoned memory, on the CPU in float64 (the interpreter truncates to bfloat16)."""
    dtype = torch.float32 if device == torch.device("cpu") and dtype == BF16 else dtype
    out = torch.full(query.shape, float("nan"), dtype=dtype, device=device)
    ops.attend(*(None if x is None else x.to(device) for x in (query, key, value, pages, window)), step, out)
    return out.double().cpu()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(case, monkeypatch):
    monkeypatch.setattr(layer_ops, "WORKSPACE_SLOTS", 64)  # several rounds
    monkeypatch.setattr(layer_ops, "STATE_ROWS", 24)  # and several groups of rows
    ops, reference, step, gen = build(case)
    pages, window, key, value = fill(reference, step, gen)
    if case.sinks:
        tiles = pages.view(-1, ops.codec.layout.tile_bytes)[:, ops.codec.layout.scale_offset["k"] :]
        tiles ^= 128 * torch.randint(0, 2, tiles.shape, generator=gen, dtype=torch.uint8)
    if case.window:
        read = torch.zeros(window.shape[0], case.window_block, dtype=torch.bool)
        for i, (n, q) in enumerate(zip(case.lengths, case.q_lens, strict=True)):
            near = torch.arange(max(0, n - q + 1 - case.window) // 16 * 16, n - q)
            read[step.window_block_table[i].long()[near // case.window_block], near % case.window_block] = True
        window.transpose(1, 2)[~read] = float("nan")
    else:
        window = None
    pages = side_by_side(pages, 384)  # as in blocks that hold several layers
    query = torch.randn(step.num_tokens, case.heads * case.group, case.dim, generator=gen).to(case.dtype)
    expected = attend(reference, torch.device("cpu"), query, key, value, pages, window, step, torch.float64)
    out = attend(ops, DEVICE, query, key, value, pages, window, to_device(step), case.dtype)
    for i in range(step.num_reqs):
        rows = slice(int(step.query_start_loc[i]), int(step.query_start_loc[i + 1]))
        assert relative_error(out[rows], expected[rows]) < 2e-3, f"request {i}"


@pytest.mark.parametrize("case", [CASES[n] for n in ("half-planes", "3-bit-d96-cap", "8-bit-g16-interleaved")])
def test_store(case):
    ops, reference, step, gen = build(case)
    n, heads, dim, blocks = 21, case.heads, case.dim, 4
    size = ops.codec.layout.page_bytes(heads, case.block)
    pages = torch.randint(0, 256, (blocks, size), generator=gen, dtype=torch.uint8)
    window = torch.randn(blocks, heads, 2 * case.block, 2 * dim, generator=gen).to(case.dtype)
    kv = torch.randn(n, 2 * heads * dim, generator=gen)
    kv[4, heads * dim :] = ops.codec.v.sink[:, 0].cpu().flatten() + 0.1 * torch.randn(heads * dim, generator=gen)
    kv[5] *= 30  # an outlier
    kv = kv.to(case.dtype)
    key, value = kv[:, : heads * dim].view(n, heads, dim), kv[:, heads * dim :].view(n, heads, dim)
    slots = torch.randperm(blocks * case.block, generator=gen)[: n + 3]  # longer than the live tokens
    slots[3] = slots[n - 1] = -1
    positions = torch.randint(0, 100_000, (n,), generator=gen)
    expected, found = (pages.clone(), window.clone()), (pages.to(DEVICE), window.to(DEVICE))
    found = (side_by_side(found[0], 384), found[1].clone())
    reference.store(key, value, *expected, slots, slots, positions)
    ops.store(*(x.to(DEVICE) for x in (key, value)), *found, *(x.to(DEVICE) for x in (slots, slots, positions)))
    assert torch.equal(found[1].cpu(), expected[1])
    assert gaps_untouched(found[0], 384)
    untouched = expected[0] == pages
    different = (found[0].cpu() != expected[0]).sum() / (~untouched).sum()
    assert different < 2e-3  # a latent on the border of two codes may round either way


def test_empty_and_padded_rows():
    case = Case(lengths=(1, 40, 1, 100), q_lens=(1, 2, 1, 1), decodes=4, heads=2, programs=32)
    ops, reference, step, gen = build(case)
    pages, window, key, value = fill(reference, step, gen)
    query = torch.randn(step.num_tokens, 6, 64, generator=gen)
    lengths = torch.tensor([0, 40, 1, 100], dtype=torch.int32)
    starts = torch.tensor([0, 1, 3, 3, 4, 4], dtype=torch.int32)  # third request without rows, one of padding
    pad = torch.zeros(1, step.block_table.shape[1], dtype=torch.int32)
    wide = torch.zeros(1, step.window_block_table.shape[1], dtype=torch.int32)
    step = replace(
        step,
        num_reqs=5,
        num_decodes=5,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.cat((lengths, lengths[:1])),
        seq_lens_cpu=torch.cat((lengths, lengths[:1])),
        block_table=torch.cat((step.block_table, pad)),
        window_block_table=torch.cat((step.window_block_table, wide)),
    )
    expected = attend(reference, torch.device("cpu"), query, key, value, pages, window, step, torch.float64)
    for decodes in (5, 0):
        turned = to_device(replace(step, num_decodes=decodes))
        out = attend(ops, DEVICE, query, key, value, pages, window, turned, torch.float32)
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert relative_error(out[:4], expected[:4]) < 2e-3
        assert out[4:].isnan().all()  # rows of nobody stay as they were
