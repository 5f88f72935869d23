# SPDX-License-Identifier: Apache-2.0
"""The store and dequantize kernels, compiled for the host and run thread by thread, equal the reference."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers import gaps_untouched, random_codec, relative_error, side_by_side, side_plan
from tests.ops.cuda_cases import CASES, assert_pages_close, paged_rows
from vllm_kqsvd.layout import TILE
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.cuda_tables import LayerTables, SideTables, layer_tables
from vllm_kqsvd.ops.eager import store_exact
from vllm_kqsvd.plan import LayerPlan

ROOT = Path(__file__).parents[2]
ALIGNED = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")  # vector accesses trap as they would on a GPU
P, I32, I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
GAP = 128 * 7  # bytes of other layers before and behind a page


def cuda_headers() -> Path | None:
    """Folder of cuda_bf16.h, from CUDA_HOME, nvcc's folder or the usual place."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


pytestmark = pytest.mark.skipif(
    cuda_headers() is None or shutil.which("g++") is None, reason="needs g++ and CUDA's headers"
)


class Turn(ctypes.Structure):
    _fields_ = [("table", P), ("rotary_dim", I32), ("block_shift", I32), ("interleaved", ctypes.c_bool)]


class StoreSide(ctypes.Structure):
    _fields_ = [("x", P), ("token_stride", I64), ("head_stride", I64)]
    _fields_ += [(n, P) for n in ("encode", "operand", "weight", "latent_mean", "class_vector", "class_offset", "plan")]
    _fields_ += [("plan_ints", I32), ("groups", I32), ("period", I32), ("rotate", ctypes.c_bool)]


class StoreParams(ctypes.Structure):
    _fields_ = [("side", StoreSide * 2), ("rope", Turn), ("pages", P), ("page_stride", I64), ("window", P)]
    _fields_ += [("window_stride", I64 * 3), ("slots", P), ("window_slots", P), ("positions", P)]
    _fields_ += [
        (n, I32)
        for n in (
            "num_tokens",
            "dim",
            "block_size",
            "tiles_per_block",
            "tile_bytes",
            "window_block_size",
            "key_ctas",
            "block_shift",
            "window_shift",
        )
    ]


class DequantizeSide(ctypes.Structure):
    _fields_ = [(n, P) for n in ("decode", "decode_unit", "mean", "plan")]
    _fields_ += [("plan_ints", I32), ("groups", I32), ("period", I32), ("rotate", ctypes.c_bool)]
    _fields_ += [("first_byte", I32), ("num_bytes", I32), ("out", P), ("row_stride", I64), ("head_stride", I64)]


class DequantizeParams(ctypes.Structure):
    _fields_ = [("side", DequantizeSide * 2), ("rope", Turn), ("pages", P), ("page_stride", I64), ("window", P)]
    _fields_ += [("window_stride", I64 * 3)]
    _fields_ += [(n, P) for n in ("first", "row_start", "tile_start", "exact_from", "request")]
    _fields_ += [("block_table", P), ("window_block_table", P), ("table_stride", I64), ("window_table_stride", I64)]
    _fields_ += [
        (n, I32)
        for n in (
            "num_requests",
            "num_tiles",
            "dim",
            "block_size",
            "tiles_per_block",
            "tile_bytes",
            "window_block_size",
        )
    ]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels built for the host."""
    out = tmp_path_factory.mktemp("emulated") / "kernels.so"
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", *ALIGNED]
    command += [f"-I{ROOT / 'csrc'}", f"-I{cuda_headers()}"]
    subprocess.run([*command, str(ROOT / "tests/ops/cuda_emulated.cpp"), "-o", str(out)], check=True)
    lib = ctypes.CDLL(str(out))
    assert lib.store_params_size() == ctypes.sizeof(StoreParams)
    assert lib.dequantize_params_size() == ctypes.sizeof(DequantizeParams)
    return lib


def turn_of(tables: LayerTables) -> Turn:
    rotary = 2 * tables.rope_table.shape[2] if tables.rope_table.numel() else 0
    shift = max(tables.rope_block, 1).bit_length() - 1
    return Turn(tables.rope_table.data_ptr(), rotary, shift, tables.interleaved)


def log2_of(size: int) -> int:
    return size.bit_length() - 1 if size & (size - 1) == 0 else -1


def run_store(lib, codec, key, value, pages, slots, positions, block_size, window=None, window_slots=None, **how):
    tables, dim, heads = layer_tables(codec), key.shape[2], key.shape[1]
    sides = []
    for x, t, rotate in ((key, tables.k, tables.rope_table.numel() > 0), (value, tables.v, False)):
        pointers = [p.data_ptr() for p in t.encoder]
        sides.append(
            StoreSide(
                x.data_ptr(),
                x.stride(0),
                x.stride(1),
                *pointers,
                t.plan.numel(),
                t.encode.shape[1],
                t.latent_mean.shape[2],
                rotate,
            )
        )
    p = StoreParams((StoreSide * 2)(*sides), turn_of(tables), pages.data_ptr(), pages.stride(0))
    if window is not None:
        p.window, p.window_slots, p.window_block_size = window.data_ptr(), window_slots.data_ptr(), window.shape[2]
        p.window_stride = (I64 * 3)(*window.stride()[:3])
    p.slots, p.positions, p.num_tokens, p.dim = slots.data_ptr(), positions.data_ptr(), slots.numel(), dim
    p.block_shift, p.window_shift = log2_of(block_size), log2_of(p.window_block_size)
    p.block_size, p.tiles_per_block, p.tile_bytes = block_size, block_size // TILE, tables.tile_bytes
    bf16 = key.dtype == torch.bfloat16
    shape = (tables.k.encode.shape[2], int(how.get("many", 0)), how.get("ctas", 1), how.get("in_shared", True))
    lib.store(ctypes.byref(p), heads, bf16, *shape)


@pytest.mark.parametrize("many", [0, 1, 2], ids=["few", "many", "one side a CTA"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_store_equals_reference(emulated, case, many):
    codec = case.codec()
    rows = paged_rows(case, 70 if many else 21, seed=5)
    expected, pages = rows.pages.clone(), side_by_side(rows.pages, GAP)  # other layers' pages lie between
    window, exact = rows.window.clone(), rows.window.clone()
    run_store(
        emulated,
        codec,
        rows.key,
        rows.value,
        pages,
        rows.slots,
        rows.positions,
        case.block_size,
        window,
        rows.window_slots,
        many=many,
        in_shared=case.dim < 256,
    )
    exact64 = codec.to("cpu", torch.float64)
    reference.store_latent(
        rows.key.double(), rows.value.double(), expected, rows.slots, rows.positions, exact64, case.block_size
    )
    store_exact(rows.key, rows.value, exact, rows.window_slots)
    assert torch.equal(window, exact)
    assert gaps_untouched(pages, GAP)
    assert_pages_close(pages, expected, rows, exact64, case.block_size)


@pytest.mark.parametrize("many", [0, 1, 2], ids=["few", "many", "one side a CTA"])
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_store_of_outliers_equals_reference(emulated, case, many):
    codec = case.codec()
    rows = paged_rows(case, 40 if many else 16, seed=6)
    reach = 30.0 if case.dtype == torch.float16 else 1000.0  # times values of about 2; fp16 ends at 65504
    rows.key[1::5] *= reach
    rows.value[2::5] *= reach
    rows.key[3::5, :, 7] = 10 * reach
    rows.value[3::5], rows.key[4::10] = 0, 0
    expected, pages = rows.pages.clone(), rows.pages.clone()
    run_store(emulated, codec, rows.key, rows.value, pages, rows.slots, rows.positions, case.block_size, many=many)
    exact64 = codec.to("cpu", torch.float64)
    reference.store_latent(
        rows.key.double(), rows.value.double(), expected, rows.slots, rows.positions, exact64, case.block_size
    )
    assert_pages_close(pages, expected, rows, exact64, case.block_size)


def run_dequantize(
    lib, codec, pages, table, ranges, num_tiles, rows, block_size, dtype, window=None, window_table=None
):
    tables, dim, heads = layer_tables(codec), codec.head_dim, codec.num_kv_heads
    out = torch.full((2, rows, heads, dim), float("nan"), dtype=dtype)
    sides = []
    for o, t, rotate in ((out[0], tables.k, tables.rope_table.numel() > 0), (out[1], tables.v, False)):
        pointers = [x.data_ptr() for x in t.decoder[:4]]
        shape = (t.plan.numel(), t.decode.shape[2], t.mean.shape[2], rotate, t.first_byte, t.num_bytes)
        sides.append(DequantizeSide(*pointers, *shape, o.data_ptr(), o.stride(0), o.stride(1)))
    p = DequantizeParams((DequantizeSide * 2)(*sides), turn_of(tables), pages.data_ptr(), pages.stride(0))
    if window is not None:
        p.window, p.window_block_size = window.data_ptr(), window.shape[2]
        p.window_stride = (I64 * 3)(*window.stride()[:3])
        p.window_block_table, p.window_table_stride = window_table.data_ptr(), window_table.stride(0)
    for name, row in zip(("first", "row_start", "tile_start", "exact_from", "request"), ranges, strict=True):
        setattr(p, name, row.data_ptr())
    p.block_table, p.table_stride = table.data_ptr(), table.stride(0)
    p.num_requests, p.num_tiles, p.dim = ranges.shape[1] - 1, num_tiles, dim
    p.block_size, p.tiles_per_block, p.tile_bytes = block_size, block_size // TILE, tables.tile_bytes
    lib.dequantize(ctypes.byref(p), heads, dtype == torch.bfloat16, 2, dim < 256)
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dequantize_equals_reference(emulated, case):
    codec = case.codec()
    gen = torch.Generator().manual_seed(3)
    size, near_size = case.block_size, case.window_block_size
    width = -(-400 // size)
    table = torch.randperm(4 * width, generator=gen).view(4, width).int()
    near = torch.randperm(4 * (400 // near_size), generator=gen).view(4, -1).int()
    pages = torch.randint(0, 256, (4 * width, codec.layout.page_bytes(case.heads, size)), generator=gen).byte()
    pages = side_by_side(pages, GAP)
    window = torch.randn(near.numel(), case.heads, near_size, 2 * case.dim, generator=gen).to(case.dtype)
    spans = [(2, 0, 37, 16), (0, 64, 69, 0), (3, 128, 320, 256)]  # table row, first, end, exact from
    row_start = torch.tensor([0, *torch.tensor([e - f for _, f, e, _ in spans]).cumsum(0).tolist()])
    tile_start = torch.tensor([0, *torch.tensor([-(-(e - f) // TILE) for _, f, e, _ in spans]).cumsum(0).tolist()])
    pad = [*zip(*spans, strict=True)]
    ranges = torch.tensor([[*pad[1], 0], row_start.tolist(), tile_start.tolist(), [*pad[3], 0], [*pad[0], 0]]).int()
    args = (int(tile_start[-1]), int(row_start[-1]), size, case.dtype, window, near)
    out = run_dequantize(emulated, codec, pages, table, ranges, *args)
    exact64 = codec.to("cpu", torch.float64)
    at = 0
    for request, first, end, exact_from in spans:
        pos = torch.arange(first, end)
        slots = table[request].long()[pos // size] * size + pos % size
        key, value = reference.dequantize(pages, slots, pos, exact64, size)
        copied = window[near[request].long()[pos // near_size], :, pos % near_size]
        got = out[:, at : at + end - first]
        late = pos >= exact_from
        assert torch.equal(got[0][late], copied[late][..., : case.dim])
        assert torch.equal(got[1][late], copied[late][..., case.dim :])
        if not bool(late.all()):
            assert relative_error(got[0][~late], key[~late]) < case.tolerance
            assert relative_error(got[1][~late], value[~late]) < case.tolerance
        at += end - first


def test_many_planes():
    """The plan table holds the largest plan the layout allows: 16 groups of 8 bits in half planes of one group."""
    codec = random_codec(LayerPlan(side_plan(*[8] * 16), side_plan(4, 4, 2, 2)), heads=1, dim=256)
    tables = layer_tables(codec)
    assert isinstance(tables.k, SideTables) and tables.k.plan.numel() == 20 + 28 * 16
