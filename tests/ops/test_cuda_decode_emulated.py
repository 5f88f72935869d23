# SPDX-License-Identifier: Apache-2.0
"""The decode kernels, compiled for the host and run thread by thread, equal the float64 reference.

Slow (a warp is 32 fibers), so the problems are small; the ones that GPU tests run are in cuda_decode_cases.py.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.ops.cuda_decode_cases import Case, decode_step
from tests.ops.test_cuda_emulated import cuda_headers
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.cuda_decode_constants import build_constants, rope_words
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.plan_catalog import PLANS, Instance, side

ROOT = Path(__file__).parents[2]
NUM_CTAS = 3  # stands for the GPU's multiprocessors
P, I32, I64, F32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

pytestmark = pytest.mark.skipif(
    cuda_headers() is None or shutil.which("g++") is None, reason="needs g++ and CUDA's headers"
)


class ScheduleParams(ctypes.Structure):
    _fields_ = [(n, P) for n in ("seq_lens", "query_start_loc", "requests")]
    _fields_ += [(n, I32) for n in ("num_requests", "table_rows", "window", "sliding_window", "grain")]
    _fields_ += [("block_table", P), ("block_table_stride", I64), ("block_size", I32)]


class DecodeParams(ctypes.Structure):
    _fields_ = [("query", P), ("query_strides", I64 * 2), ("out", P), ("out_strides", I64 * 2)]
    _fields_ += [("pages", P), ("page_stride", I64), ("block_table", P), ("block_table_stride", I64)]
    _fields_ += [("block_size", I32), ("window_pages", P), ("window_strides", I64 * 3), ("window_table", P)]
    _fields_ += [("window_table_stride", I64), ("window_block_size", I32), ("prefetch_window", I32)]
    _fields_ += [("requests", P), ("num_requests", I32)]
    _fields_ += [(n, P) for n in ("key_image", "mean_tile", "sink_rows", "rope_table")]
    _fields_ += [("rope_table_moves", I32)]
    _fields_ += [(n, P) for n in ("key_exponent", "value_basis", "value_mean", "value_factor")]
    _fields_ += [("rotary_dim", I32), ("rotary_interleaved", I32), ("scale_log2", F32), ("soft_cap_log2", F32)]
    _fields_ += [(n, I32) for n in ("sliding_window", "is_bf16", "num_kv_heads", "heads_per_kv", "column_groups")]
    _fields_ += [("partials", P), ("whole_partials", P), ("num_ctas", I32), ("max_phases", I32)]
    _fields_ += [("late_ctas", I32), ("late_units", I32), ("most_ctas", I32), ("big_heads", I32)]
    _fields_ += [("finish_parts", I32), ("join_from", I32), ("finish_blocks", I32)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory):
    """Builds an instantiation for the host, once."""
    built: dict[str, ctypes.CDLL] = {}
    folder = tmp_path_factory.mktemp("decode")

    def build(instance: Instance) -> ctypes.CDLL:
        if instance.name not in built:
            source = re.sub(r'#include "kqsvd/decode_instance.cuh"', "", instance.source())
            source = re.sub(r"static const Registration<(.*)> registration\(\s*\".*\"\);", r"using Cf = \1;", source)
            plan, out = folder / f"{instance.name}.h", folder / f"{instance.name}.so"
            plan.write_text(source)
            command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w", f'-DPLAN_SOURCE="{plan}"']
            command += [f"-I{ROOT / 'csrc'}", f"-I{cuda_headers()}", str(ROOT / "tests/ops/cuda_decode_emulated.cpp")]
            subprocess.run([*command, "-o", str(out)], check=True)
            lib = built[instance.name] = ctypes.CDLL(str(out))
            assert lib.decode_params_size() == ctypes.sizeof(DecodeParams)
            assert lib.schedule_params_size() == ctypes.sizeof(ScheduleParams)
        return built[instance.name]

    return build


def run_emulated(case: Case, library, finish_blocks: int = 0, join: bool = False) -> tuple[float, float]:
    """(relative error of the whole output, of the worst head row) against float64.

    `finish_blocks`: of a virtual head where each warp finishes requests of its own; 0: a block for each request.
    """
    cpu = torch.device("cpu")
    step, t, shape, codec = decode_step(case, cpu)
    columns = 4 if case.group * step.max_decode_len <= 4 else 8
    lib = library(Instance(case.plan, columns, codec.rope_block or 32))
    groups = -(-case.group * step.max_decode_len // columns)
    heads = case.kv_heads * groups
    c = build_constants(codec, shape.scale, cpu)
    rope = rope_words(codec, step.max_seq_len, cpu)
    requests = torch.full((step.num_reqs + 5, 8), -1, dtype=torch.int32)
    record = lib.decode_record()
    phases = -(-heads // NUM_CTAS) + 1
    partials = torch.full((NUM_CTAS * lib.decode_parts() * phases * 2 * record,), float("nan"))
    whole_partials = torch.full((step.num_reqs * heads * record,), float("nan"))
    out = torch.full_like(t["query"], float("nan"))
    schedule = ScheduleParams(
        step.seq_lens.data_ptr(), step.query_start_loc.data_ptr(), requests.data_ptr(), step.num_reqs,
        requests.shape[0], case.window, case.sliding_window, 0,
        None, step.block_table.stride(0), case.block_size,
    )  # fmt: skip
    if case.window and len(case.lengths) != 3:  # as the caller does, but that the other way is tried too
        schedule.block_table = step.block_table.data_ptr()
    p = DecodeParams()
    p.query, p.query_strides = t["query"].data_ptr(), (I64 * 2)(*t["query"].stride()[:2])
    p.out, p.out_strides = out.data_ptr(), (I64 * 2)(*out.stride()[:2])
    p.pages, p.page_stride, p.block_size = t["pages"].data_ptr(), t["pages"].stride(0), case.block_size
    p.block_table, p.block_table_stride = step.block_table.data_ptr(), step.block_table.stride(0)
    p.window_block_size = 1
    if case.window:
        window = t["window_pages"]
        p.prefetch_window = True
        p.window_pages, p.window_block_size = window.data_ptr(), window.shape[2]
        p.window_strides = (I64 * 3)(*window.stride()[:3])
        p.window_table, p.window_table_stride = step.window_block_table.data_ptr(), step.window_block_table.stride(0)
    p.requests, p.num_requests = requests.data_ptr(), step.num_reqs
    for name, value in vars(c).items():
        setattr(p, name, value.data_ptr())
    p.rope_table, p.rope_table_moves = rope.data_ptr(), codec.rope_block > 0
    p.rotary_dim, p.rotary_interleaved = codec.rope.rotary_dim, codec.rope.interleaved
    log2e = 1.4426950408889634
    p.scale_log2, p.soft_cap_log2, p.sliding_window = shape.scale * log2e, case.soft_cap * log2e, case.sliding_window
    p.is_bf16, p.num_kv_heads = case.dtype == torch.bfloat16, case.kv_heads
    p.heads_per_kv, p.column_groups = case.group, groups
    p.partials, p.whole_partials = partials.data_ptr(), whole_partials.data_ptr()
    p.num_ctas, p.max_phases = NUM_CTAS, phases
    p.late_ctas, p.late_units = (1, 2) if len(case.lengths) % 2 else (0, 0)
    p.most_ctas = -(-NUM_CTAS // heads)
    p.big_heads = NUM_CTAS - (p.most_ctas - 1) * heads
    p.finish_parts = 4 if step.num_reqs == 1 else 1
    p.join_from = 0 if join else 1000
    p.finish_blocks = finish_blocks
    lib.decode(ctypes.byref(schedule), ctypes.byref(p))
    window = reference.ExactWindow(t["window_pages"], step.window_block_table, case.window) if case.window else None
    want = reference.attend(
        t["query"].double(), t["pages"], step.block_table, step.seq_lens, step.query_start_loc, codec, case.block_size,
        shape.scale, window, case.soft_cap, case.sliding_window,
    )  # fmt: skip
    got = out.double()
    rows = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-6)
    worst = torch.nan_to_num(torch.stack(((got - want).norm() / want.norm(), rows.max())), nan=float("inf"))
    return float(worst[0]), float(worst[1])


CASES = {
    "splits, sinks": Case(lengths=(700, 97, 1333), kv_heads=2),
    "one head": Case(lengths=(1500,), kv_heads=1),
    "warpgroups join": Case(lengths=(3200, 2700, 300), kv_heads=1),
    "warpgroups join, one request": Case(lengths=(2600,), kv_heads=1),
    "warpgroups join, eight columns": Case(lengths=(2600,), group=8, kv_heads=1),
    "more heads than CTAs": Case(lengths=(300, 90), kv_heads=4),
    "short, empty": Case(lengths=(1, 0, 17, 80, 129), query_lens=(1, 1, 1, 0, 1), kv_heads=1),
    "no window": Case(lengths=(5, 333), window=0, kv_heads=1),
    "blocks of 16": Case(lengths=(400,), block_size=16, window_block_size=16, kv_heads=1),
    "pages side by side": Case(lengths=(400, 33), kv_heads=1, gap=128 * 75),
    "soft cap, sliding window": Case(lengths=(700,), soft_cap=5.0, sliding_window=300, kv_heads=1),
    "interleaved, partial rotary": Case(lengths=(300,), group=3, interleaved=True, rotary_dim=64, kv_heads=1),
    "fp16": Case(lengths=(500,), dtype=torch.float16, kv_heads=1),
    "drafts": Case(lengths=(300, 200), query_lens=(4, 2), kv_heads=1),
    "block 64": Case(lengths=(800,), rope_block=64, kv_heads=1),
    "group 8": Case(lengths=(600,), group=8, rope_block=64, kv_heads=1),
    "4 bits": Case(plan="d128_b130", lengths=(600,), kv_heads=1),
    "head_dim 64": Case(plan="d64_b42", lengths=(600,), kv_heads=1),
    "8-bit plane, 7 fields": Case(plan="d128_b130a", lengths=(333, 97), kv_heads=1),
    "two key groups": Case(plan="d64_b34a", lengths=(333, 97), kv_heads=1),
    "one key group": Case(plan="d64_b26a", lengths=(333, 97), kv_heads=1),
    "one value plane, half": Case(plan="d64_b26", group=8, rope_block=64, lengths=(600,), kv_heads=1),
}


MANY = {  # requests for a warp each, for several of some, with rows of nothing and rows without latents between
    "a warp after another": (
        Case(lengths=(97, 0, 80, 129, 16, 333, 0, 64, 81, 200, 1, 145), query_lens=(1, 1, 1, 1, 1, 1, 0, *[1] * 5)),
        1,
    ),
    "two blocks": (Case(plan="d64_b42", lengths=(65, 96, 300, 17) * 3, window_block_size=16, kv_heads=1), 2),
    # Of 18 positions, the last one of the first chunk is not for the first query row.
    "split pieces": (Case(lengths=(1333, 18, 700), query_lens=(3, 4, 4), kv_heads=1), 1),
    "columns of a head in groups": (Case(lengths=(300, 97), group=16, rope_block=64, kv_heads=1), 1),
    "more window than a warp has entries": (
        Case(plan="d64_b42", lengths=(900, 600), window=560, window_block_size=16, kv_heads=1),
        1,
    ),
}


@pytest.mark.parametrize("finish_blocks", [0, 1])
@pytest.mark.parametrize("name", list(CASES))
def test_decode_equals_the_reference(library, name: str, finish_blocks: int) -> None:
    check(*run_emulated(CASES[name], library, finish_blocks, "join" in name), CASES[name])


@pytest.mark.parametrize("name", list(MANY))
def test_warps_that_finish_requests_alone(library, name: str) -> None:
    case, finish_blocks = MANY[name]
    check(*run_emulated(case, library, finish_blocks), case)


def check(error: float, worst_row: float, case: Case) -> None:
    assert error < (2e-3 if case.dtype == torch.bfloat16 else 5e-4)
    assert worst_row < (4e-3 if case.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("finish_blocks", [0, 1])
def test_head_dim_96(library, monkeypatch: pytest.MonkeyPatch, finish_blocks: int) -> None:
    """No plan of this width is in the catalogue yet; the kernel is ready for one."""
    plan = LayerPlan(side((4, "01"), (2, "2345")), side((2, "0123"), (2, "45"), (1, "0123")))
    monkeypatch.setitem(PLANS, "d96_b66", (96, plan))
    case = Case(plan="d96_b66", lengths=(700, 20), dtype=torch.float16, kv_heads=1)
    check(*run_emulated(case, library, finish_blocks), case)


@pytest.mark.parametrize("plan", ["d128_b82a", "d128_b82c", "d128_b66b", "d64_b34a", "d64_b26a"])
def test_plans_with_planes_of_one_bit(library, plan: str) -> None:
    case = Case(plan=plan, lengths=(400,), dtype=torch.float16, kv_heads=1)
    check(*run_emulated(case, library), case)


SHARED = {  # lengths, query rows, block tables (blocks of 16), window, whether pages are settled
    "own pages": ((160, 100), (1, 1), ((1, 2), (3, 4)), 64, True),
    "a shared prefix of before": ((161, 170), (1, 1), ((1, 2), (1, 2)), 64, True),
    "a page filled now": ((32, 170), (1, 1), ((1, 2), (1, 2)), 16, False),
    "a page filled now by drafts": ((34, 170), (4, 1), ((1, 2), (1, 2)), 16, False),
    "filled now, but in the reader's window": ((32, 40), (1, 1), ((1, 2), (1, 2)), 64, True),
    "not full": ((31, 170), (1, 1), ((1, 2), (1, 2)), 16, True),
    "another page": ((32, 170), (1, 1), ((1, 2), (1, 3)), 16, True),
    "no window": ((32, 170), (1, 1), ((1, 2), (3, 4)), 0, False),
    "an empty row": ((32, 170, 0), (0, 1, 1), ((1, 2), (1, 2), (0, 0)), 16, True),
}


@pytest.mark.parametrize("name", list(SHARED))
def test_pages_that_a_step_fills_are_known(library, name: str) -> None:
    lengths, rows, tables, window, settled = SHARED[name]
    requests = torch.full((8, 8), -1, dtype=torch.int32)
    table = torch.zeros(len(tables), 20, dtype=torch.int32)
    table[:, :2] = torch.tensor(tables, dtype=torch.int32)
    table[:, 2:] = torch.arange(100, 100 + 18 * len(tables)).view(len(tables), 18)
    starts = torch.tensor((0, *rows), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    schedule = ScheduleParams(
        seq_lens.data_ptr(), starts.data_ptr(), requests.data_ptr(), len(lengths), 8, window, 0, 64,
        table.data_ptr(), table.stride(0), 16,
    )  # fmt: skip
    library(Instance("d64_b34a", 4, 32)).schedule(ctypes.byref(schedule))
    assert requests[len(lengths) :, 2].tolist() == [settled] * (8 - len(lengths))
    schedule.block_table = None
    library(Instance("d64_b34a", 4, 32)).schedule(ctypes.byref(schedule))
    assert not requests[len(lengths) :, 2].any()


@settings(deadline=None, max_examples=300)
@given(
    units=st.integers(1, 3000),
    heads=st.integers(1, 40),
    ctas=st.sampled_from([1, 2, 3, 5, 7, 12, 66, 132]),
    late=st.floats(0, 0.49),
    late_units=st.integers(0, 40),
)
@example(units=2048, heads=8, ctas=132, late=0.0, late_units=8)
@example(units=512, heads=8, ctas=132, late=32 / 132, late_units=8)
@example(units=4, heads=8, ctas=132, late=0.0, late_units=8)
def test_ctas_share_the_heads_without_gap_or_overlap(
    library, units: int, heads: int, ctas: int, late: float, late_units: int
) -> None:
    ranges = torch.zeros(ctas, heads, 2, dtype=torch.int32)
    heads_of, ctas_of = torch.zeros(ctas, 2, dtype=torch.int32), torch.zeros(heads, ctas + 1, dtype=torch.int32)
    lib, late_ctas = library(Instance("d64_b34a", 4, 32)), round(late * ctas)
    lib.cut_lines(units, heads, ctas, late_ctas, late_units, *map(pointer, (ranges, heads_of, ctas_of)))
    for h in range(heads):
        held = [(int(b), int(e), c) for c, (b, e) in enumerate(ranges[:, h].tolist()) if e > b]
        assert held[0][0] == 0 and held[-1][1] == units
        assert all(a[1] == b[0] for a, b in pairwise(held))
        mine = ctas_of[h, 1 : 1 + int(ctas_of[h, 0])].tolist()
        assert [c for *_, c in held] == [c for c in mine if c in {c for *_, c in held}]  # in the order of the units
        if heads <= ctas:
            assert [h, h] * len(mine) == heads_of[mine].flatten().tolist()
            sizes = (ranges[mine, h, 1] - ranges[mine, h, 0]).tolist()
            early = sum(c < ctas - late_ctas for c in mine)
            if max(sizes) - min(sizes) <= 1:
                continue  # so few CTAs a head that all get the same
            less = min(late_units, units // early) if early < len(sizes) else 0
            assert max(sizes[:early]) - min(sizes[:early]) <= 1
            assert all(abs(min(sizes[:early]) - less - n) <= 1 for n in sizes[early:])
    if heads <= ctas:
        assert sorted(c for h in range(heads) for c in ctas_of[h].tolist()[1:] if c >= 0) == list(range(ctas))
    phases = (heads_of[:, 1] - heads_of[:, 0] + 1).max()
    assert phases <= -(-heads // ctas) + 1  # what the workspace has room for


def test_late_ctas_go_to_the_heads_with_more(library) -> None:
    """8 heads on 132 CTAs, 16 requests of 8k: heads with 17 CTAs have 6 late ones, those with 16 have 2."""
    ranges, heads_of = torch.zeros(132, 8, 2, dtype=torch.int32), torch.zeros(132, 2, dtype=torch.int32)
    ctas_of = torch.zeros(8, 133, dtype=torch.int32)
    library(Instance("d64_b34a", 4, 32)).cut_lines(527, 8, 132, 32, 8, *map(pointer, (ranges, heads_of, ctas_of)))
    sizes = (ranges[..., 1] - ranges[..., 0]).sum(1)
    assert (heads_of[:, 0] == heads_of[:, 1]).all()
    assert heads_of[100:, 0].bincount().tolist() == [6] * 4 + [2] * 4
    assert heads_of[:, 0].bincount().tolist() == [17] * 4 + [16] * 4
    assert sizes[:100].max() - sizes[:100].min() <= 1
    assert sizes[100:].max() <= sizes[:100].min() - 7


@pytest.mark.parametrize(
    ("heads", "requests", "want"),
    [
        (8, 1, (120, 4, 0, 0)),
        (8, 2, (128, 1, 0, 0)),
        (8, 4, (120, 1, 0, 0)),
        (8, 5, (132, 1, 10, 0)),
        (1, 1, (131, 4, 0, 0)),
        (8, 16, (132, 1, 32, 0)),
        (8, 64, (132, 1, 0, 0)),
        (8, 66, (132, 1, 0, 0)),
        (8, 67, (132, 1, 0, 17)),
        (8, 256, (132, 1, 0, 64)),
        (8, 384, (132, 1, 0, 66)),
        (600, 5, (132, 1, 0, 1)),
    ],
)
def test_multiprocessors_of_finishing_blocks(library, heads, requests, want) -> None:
    found = torch.zeros(4, dtype=torch.int32)
    library(Instance("d64_b34a", 4, 32)).grid(132, heads, requests, pointer(found))
    assert tuple(found.tolist()) == want


def pointer(x: torch.Tensor) -> P:
    return P(x.data_ptr())
