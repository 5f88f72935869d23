# SPDX-License-Identifier: Apache-2.0
"""CUDA decode kernel: its constants against the reference (no GPU), and the kernel itself where there is one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import random_codec, side_plan
from tests.ops.cuda_decode_cases import CASES, run_case
from tests.ops.decode_sass import BUDGETS, budget, cuobjdump, instructions_per_element, main_loop
from vllm_kqsvd.layout import layout_of
from vllm_kqsvd.ops import cuda_decode_constants as constants
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.cuda_decode import DecodeWorkspace, ScheduleKind, why_unsupported
from vllm_kqsvd.ops.interface import LayerShape
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.plan_catalog import PLANS, Instance, find_instance, instances

LANE = torch.arange(32)
G, T = LANE // 4, LANE % 4
ROWS_A = ((0, 0), (8, 0), (0, 8), (8, 8))  # (row, column) offsets of a lane's four A registers


def matrix_a(registers: torch.Tensor) -> torch.Tensor:
    """A operand registers [32, 4, 2] -> the 16 x 16 matrix they stand for."""
    out = torch.zeros(16, 16, dtype=torch.float64)
    for i, (row, col) in enumerate(ROWS_A):
        for h in (0, 1):
            out[G + row, 2 * T + col + h] = registers[:, i, h].double()
    return out


def halves(words: torch.Tensor) -> torch.Tensor:
    """int32 words [..., n] -> fp16 pairs [..., n, 2]."""
    return words.contiguous().view(torch.float16).unflatten(-1, (-1, 2))


def unpacked(tile: torch.Tensor, plan: LayerPlan, side: str) -> list[tuple[int, int, torch.Tensor]]:
    """(plane, group, 16 x 16 operand) as csrc/kqsvd/unpack.cuh masks them out of a tile's bytes. Of V as if no plane
    were open: what whole bytes add to the highest field is subtracted from the sums, not from constants."""
    layout, out = layout_of(plan), []
    whole = {f.plane for f in constants.lower_key_fields(plan.k)} if side == "k" else set()
    sp = layout.side(side)
    for p, plane in enumerate(sp.planes):
        at = layout.plane_offsets[side][p]
        w = tile[at : at + 16 * plane.bytes_per_token].contiguous().view(torch.int32).long() & 0xFFFFFFFF
        b = plane.num_bits
        for group in plane.groups:
            m0, m1 = (
                (((1 << b) - 1) << constants._field_bit(sp, p, group, y, side == "k")) * 0x00010001 for y in (0, 1)
            )
            if p in whole and group == plane.groups[-1]:
                m0, m1 = m0 if plane.is_half else 0x00FF00FF, 0x00FF00FF
            if side == "k":
                w0 = w[LANE]
                w1 = w0 if plane.is_half else w[LANE + 32]
                a = (
                    (w0 & m0, (w0 >> 8) & m0, w0 & m1, (w0 >> 8) & m1)
                    if plane.is_half
                    else (w0 & m0, w1 & m0, (w0 >> 8) & m0, (w1 >> 8) & m0)
                )
            else:
                w0 = w[8 * T + G]
                w1 = w0 >> 8 if plane.is_half else w[8 * T + G + 32]
                shift = b if plane.is_half else 8
                a = (w0 & m0, (w0 >> shift) & m0, w1 & m0, (w1 >> shift) & m0)
            bits = torch.stack(a, -1)  # subnormals: the bits are the value in units of 2^-24
            out.append((p, group, matrix_a(torch.stack((bits & 0xFFFF, bits >> 16), -1) * 2.0**-24)))
    return out


def exponent(sp, p: int, group: int, y: int, is_key: bool) -> int:
    """Power of two between plane p's fields of `group` and those of the group's first plane."""
    q = constants._first_plane(sp, group)
    here, first = (sp.shift(i, group) - constants._field_bit(sp, i, group, y, is_key) for i in (p, q))
    return here - first


def channels(group: int, y: int) -> slice:
    """Rows of half y of a group."""
    return slice(16 * group + 8 * y, 16 * group + 8 * y + 8)


@pytest.fixture(params=list(PLANS))
def coded(request):
    """A codec of each catalogue plan, 16 coded tokens (some sinks) in one tile, and its kernel constants."""
    dim, plan = PLANS[request.param]
    codec = random_codec(plan, 1, dim, 32, seed=3).to("cpu", torch.float64)
    gen = torch.Generator().manual_seed(1)
    key, value = (2 * torch.randn(16, 1, dim, generator=gen, dtype=torch.float64) for _ in range(2))
    pos = torch.arange(16)
    key[:2] = (codec.k.mean_basis[:2] @ codec.k.sink[0])[:, None] + 0.2 * key[:2]
    value[5] = codec.v.sink[:, 0]
    pages = torch.zeros(1, layout_of(plan).page_bytes(1, 16), dtype=torch.uint8)
    reference.store_latent(key, value, pages, pos, pos, codec, 16)
    return codec, pages, pos, constants.build_constants(codec, dim**-0.5, torch.device("cpu"))


def test_key_constants_give_the_reference_logits(coded) -> None:
    codec, pages, pos, c = coded
    plan, dim = codec.plan, codec.head_dim
    rank, rows = plan.k.rank, plan.k.rank + 16
    query = torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    image = c.key_image.view(torch.float16).view(-1, rows, 8, 8)
    at = torch.arange(8)[None] ^ (torch.arange(rows) % 8)[:, None]
    image = torch.gather(image, 2, at[None, :, :, None].expand_as(image)).transpose(0, 1).reshape(rows, -1)[:, :dim]
    turned = query[constants.absorb_order(dim, codec.rope)]
    a = image.double() @ turned
    zero_point = 2.0 ** (codec.k.channel_bits() - 1) - 0.5
    lower = {(f.plane, f.group, f.y): f for f in constants.lower_key_fields(plan.k)}
    true = a[:rank].clone()  # queries of lower fields come without that of the highest
    for field in (f for f in lower.values() if f.is_first):
        top = plan.k.planes[field.plane].groups[-1]
        true[channels(field.group, field.y)] += 2.0**field.exponent * a[channels(top, field.top_y)]
    acc = -(zero_point * 2.0 ** constants.unit_exponents(plan.k, True) * true).sum() * 2.0**-24
    acc = acc.expand(16).clone()
    for p, group, operand in unpacked(pages[0], plan, "k"):
        b = a[16 * group : 16 * group + 16].clone()
        for y in (0, 1):
            b[8 * y : 8 * y + 8] *= 2.0 ** exponent(plan.k, p, group, y, True)
            field = lower.get((p, group, y))
            if field and not field.is_first:
                top = plan.k.planes[p].groups[-1]
                b[8 * y : 8 * y + 8] -= 2.0**field.exponent * a[channels(top, field.top_y)]
        acc += operand @ b
    byte = pages[0, layout_of(plan).scale_offset["k"] :][:16]
    scale = (((byte.int() & 127) << 20) + int(c.key_exponent[0])).view(torch.float32).double()
    basis = matrix_a(halves(c.mean_tile[0, 0]))
    steps = halves(c.sink_rows[0]).double()
    sink = torch.zeros(16, dim, dtype=torch.float64)
    for k in range(dim // 16):
        for i, (n, kk) in enumerate(((0, 0), (0, 8), (8, 0), (8, 8))):
            for h in (0, 1):
                sink[G + n, 16 * k + 2 * T + kk + h] = steps[k, :, i, h]
    logits = scale * acc + basis @ a[rank:] + (byte >= 128) * (basis @ (sink @ turned))
    key, _ = reference.dequantize(pages, pos, pos, codec, 16)
    want = key[:, 0] @ query * dim**-0.5 * math.log2(math.e)
    assert (byte >= 128).any()
    assert (logits - want).norm() < 1e-3 * want.norm()


def test_value_constants_give_the_reference_sum(coded) -> None:
    codec, pages, pos, c = coded
    plan = codec.plan
    byte = pages[0, layout_of(plan).scale_offset["v"] :][:16]
    p = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ps = p * reference.decode_scale(byte)[0].double()
    acc = torch.zeros(plan.v.rank, dtype=torch.float64)
    for plane, group, operand in unpacked(pages[0], plan, "v"):
        acc[16 * group : 16 * group + 16] += operand @ (ps * 2.0 ** exponent(plan.v, plane, group, 0, False))
    zero_point = 2.0 ** (codec.v.channel_bits() - 1) - 0.5
    acc = acc * 2.0 ** (24 - constants.unit_exponents(plan.v, False).double()) - zero_point * ps.sum()
    words = c.value_basis[0]
    basis = torch.cat([torch.cat([matrix_a(halves(t)) for t in row], 1) for row in words])
    out = basis @ acc * c.value_factor[0].double()
    out += p.sum() * c.value_mean[0, 0] + (p * (byte >= 128)).sum() * c.value_mean[0, 1]
    _, value = reference.dequantize(pages, pos, pos, codec, 16)
    want = p @ value[:, 0]
    assert (byte >= 128).any()
    assert (out - want).norm() < 1e-3 * want.norm()


def test_block_tables_of_a_kind_are_told_apart() -> None:
    workspace, table = DecodeWorkspace(torch.device("cpu")), torch.zeros(8, 4, dtype=torch.int32)
    one, other = (ScheduleKind(next(iter(instances())), window, 0) for window in (64, 0))
    assert all(workspace.one_block_table(one, table[:n]) for n in (8, 3, 5))  # rows of the same
    assert workspace.one_block_table(other, table[2:])
    assert not workspace.one_block_table(one, table.clone())  # a second group of this kind: never again
    assert not workspace.one_block_table(one, table)
    workspace.block_tables.clear()
    assert workspace.one_block_table(one, table)


def test_generated_sources_are_current() -> None:
    folder = Path(__file__).parents[2] / "csrc"
    wanted = {f"{i.name}.cu": i.source() for i in instances()}
    assert {p.name for p in folder.glob("decode_d*.cu")} == set(wanted)
    for name, text in wanted.items():
        assert (folder / name).read_text() == text, f"{name}: run python -m vllm_kqsvd.plan_catalog csrc"


def test_instance_names_do_not_collide() -> None:
    assert len({i.key for i in instances()}) == len(instances())


def test_value_planes_never_scale_probabilities_up() -> None:
    for _, plan in PLANS.values():
        assert max(constants.match_exponents(plan.v, False)) == 0


def test_other_plans_are_refused_with_a_sentence() -> None:
    plan = LayerPlan(side_plan(8, 8, 8, 8), side_plan(8, 8, 8, 8))
    codec = random_codec(plan, 1, 64, 32)
    shape = LayerShape(4, 1, 64, 128, 32, 0.125, torch.bfloat16, 64)
    assert "plan_catalog" in (why_unsupported(codec, shape) or "")
    assert find_instance(plan, 64, 4, 32) is None


def test_main_loop_is_the_smallest_around_the_products() -> None:
    code = ("MOV", "LDS", "HGMMA", "BRA 0x0030", "BRA 0x0010", "BRA 0x0000")
    text = "\n".join(f"/*{16 * i:04x}*/ {op};" for i, op in enumerate(code))
    assert main_loop(text) == list(code[1:5])


@pytest.mark.skipif(shutil.which("nvcc") is None or cuobjdump() is None, reason="needs nvcc and cuobjdump")
def test_main_loop_keeps_its_instruction_budget() -> None:
    instance = Instance("d128_b82", 4, 32)
    assert instructions_per_element(instance) <= budget(instance)


def test_budgets_are_of_kernels_that_exist() -> None:
    compiled = {i.name for i in instances()}
    for name in BUDGETS:
        assert name in compiled or Instance(name, 4, 32).name in compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", list(CASES))
def test_kernel_equals_the_reference(name: str) -> None:
    error, worst_row, repeatable = run_case(CASES[name], torch.device("cuda", 0), repeats=3)
    assert error < 2e-3
    assert worst_row < 4e-3  # one row of 64 or 128 bfloat16 outputs
    assert repeatable
