# SPDX-License-Identifier: Apache-2.0
"""Host tables of the CUDA kernels say what layout.py and the codec say. CPU only."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import random_codec, side_plan
from vllm_kqsvd.codec import SINK_RATIO
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.layout import TILE, layout_of
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.cuda_tables import (
    TURN_ROWS,
    chunk_order,
    decode_image,
    encode_image,
    layer_tables,
    plan_table,
    side_tables,
    turn_table,
)
from vllm_kqsvd.ops.packing import token_bytes
from vllm_kqsvd.ops.rope_block import RopeSpec
from vllm_kqsvd.plan import LayerPlan, planes_for


def field_bits(codes: torch.Tensor, column: int, groups: list[int], shift: list[int], bits: int, half: int) -> int:
    """A plane's 16 bits (half: 8) of one token and column."""
    out = 0
    for i, group in enumerate(groups):
        fields = [(int(codes[16 * group + column + 8 * y]) >> shift[i]) & ((1 << bits) - 1) for y in (0, 1)]
        out |= (fields[0] | fields[1] << bits) << (2 * i * bits) if half else (fields[0] | fields[1] << 8) << (i * bits)
    return out


def gathered_word(moves: list[tuple[int, int]], codes: torch.Tensor, t: int) -> int:
    """What csrc/kqsvd/plan_table.cuh's gather_plane makes of a token's code words."""
    out = 0
    for move, mask in moves:
        at = 16 * (move >> 8) + 2 * t
        word = sum(int(codes[at + c]) << 8 * i for i, c in enumerate((0, 8, 1, 9)))
        turned = (word << (move & 31) | word >> (32 - (move & 31))) & 0xFFFFFFFF
        out |= turned & mask
    return out


def packed_tile(table: list[int], codes: torch.Tensor, is_value: bool, tile_bytes: int) -> list[int]:
    """Bytes of a tile from codes [16, R], by the rules of csrc/kqsvd/plan_table.cuh; -1: not written."""
    tile = [-1] * tile_bytes
    groups, planes, header = table[0], table[1], 20
    for p in range(planes):
        head, base, quads, _, *entries = table[header + 28 * p : header + 28 * (p + 1)]
        bits, half, count = head & 255, head >> 8 & 1, head >> 16
        group, shift = [e & 255 for e in entries[:8]], [e >> 8 for e in entries[:8]]
        moves = list(zip(entries[8::2], entries[9::2], strict=True))
        assert all(mask == 0 for _, mask in moves[4 * quads :])
        for r, t in itertools.product(range(TILE), range(4)):  # the moves say the same as the fields below
            gathered = gathered_word(moves, codes[r], t)
            for h in (0, 1):
                want = field_bits(codes[r], 2 * t + h, group[:count], shift, bits, half)
                assert gathered >> 16 * h & (255 if half else 65535) == want
        for r in range(TILE):
            for c in range(8):
                assert all(g < groups for g in group[:count])
                out = field_bits(codes[r], c, group[:count], shift, bits, half)
                if is_value:
                    at = 32 * (r // 2 % (4 if half else 8)) + 4 * c + 2 * (r % 2) + (r // 8 if half else 0)
                else:
                    at = 16 * (r % 8) + 2 * c + r // 8 if half else 16 * r + 2 * c
                for k in range(1 if half else 2):
                    assert tile[base + at + k] == -1
                    tile[base + at + k] = out >> (8 * k) & 255
    return tile


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=8), st.lists(st.integers(1, 8), min_size=1, max_size=8))
def test_plan_table_packs_as_the_layout_does(k_bits, v_bits):
    k, v = planes_for(k_bits), planes_for(v_bits)
    if k is None or v is None:
        return
    layout = layout_of(LayerPlan(k, v))
    gen = torch.Generator().manual_seed(len(k_bits))
    for name, side in (("k", k), ("v", v)):
        limit = torch.tensor([2**b for b in side.group_bits]).repeat_interleave(16)
        codes = (torch.rand(TILE, side.rank, generator=gen) * limit).long()
        table = plan_table(layout, name).tolist()
        assert table[0] == side.num_groups and table[2] == layout.scale_offset[name]
        assert table[4 : 4 + side.num_groups] == list(side.group_bits)
        assert len(table) == 20 + 28 * len(side.planes)
        want = [-1] * layout.tile_bytes
        data = token_bytes(codes, layout, name)
        for r in range(TILE):
            for offset, byte in zip(layout.byte_offset[name][r], data[r].tolist(), strict=True):
                want[offset] = byte
        assert packed_tile(table, codes, name == "v", layout.tile_bytes) == want


@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(0, False), (16, True), (16, False), (48, False)])
def test_encode_image_is_the_b_operand(rotary_dim, interleaved):
    encode = torch.randn(2, 48, 32, dtype=torch.float64)
    order = chunk_order(48, rotary_dim, interleaved)
    assert sorted(order.flatten().tolist()) == list(range(48))
    if rotary_dim and not interleaved:  # both halves of a rotated pair in one chunk
        turned = order[: rotary_dim // 8]
        assert torch.equal(turned[:, 4:], turned[:, :4] + rotary_dim // 2)
    image = encode_image(encode, order, 4).double()
    both = image.sum(3)  # high and low terms
    for lane in (0, 5, 31):
        g, t = lane // 4, lane % 4
        for group, step, tile in ((0, 0, 0), (1, 1, 1), (0, 2, 1), (1, 3, 0)):
            chunk = 4 * (step // 2) + t
            got = both[1, group, step, lane, 4 * tile : 4 * tile + 4]
            if chunk < 6:
                rows = order[chunk, 4 * (step % 2) : 4 * (step % 2) + 4]
                want = encode[1, rows, 16 * group + 8 * tile + g]
            else:
                want = torch.zeros(4, dtype=torch.float64)
            assert torch.allclose(got, want, rtol=2**-16, atol=0)


def test_decode_image_is_the_b_operand():
    decode = 1e-3 * torch.randn(2, 32, 48)
    order = chunk_order(48, 32, False)
    image, unit = decode_image(decode, order)
    assert image.shape == (2, 2, 2, 2, 32, 8)
    assert torch.equal(torch.frexp(unit)[0], torch.full((2,), 0.5))
    for span, group, tile, g, t in ((0, 1, 0, 3, 2), (1, 0, 3, 2, 1), (0, 0, 2, 7, 0)):
        rows = torch.tensor([2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9]) + 16 * group
        got = image[1, span, group, tile // 2, 4 * g + t, 4 * (tile % 2) : 4 * (tile % 2) + 4].float() * unit[1]
        column = order[4 * span + g // 2, 2 * tile + g % 2]
        assert torch.allclose(got, decode[1, rows, column], rtol=2**-10, atol=2**-20 * float(unit[1]))


@pytest.mark.parametrize("rope_block", [1, 32])
def test_turns_multiply_to_every_block_start(rope_block):
    rope = RopeSpec(1e4 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32))
    table = turn_table(rope, rope_block, torch.device("cpu")).double()
    assert table.shape == (2, TURN_ROWS, 16, 2)
    turns = torch.view_as_complex(table.contiguous())
    for block in (0, 1, 1023, 1024, 5000, TURN_ROWS**2 - 1):
        angle = block * rope_block * rope.inv_freq
        got = turns[0, block % TURN_ROWS] * turns[1, block // TURN_ROWS]
        assert torch.allclose(got, torch.polar(torch.ones_like(angle), angle), atol=4e-7)
    assert turn_table(rope, rope_block, torch.device("cpu")) is turn_table(rope, rope_block, torch.device("cpu"))


def test_class_rule_and_latent_means():
    assert SINK_RATIO == 0.3  # the store kernels have 0.7 |x|^2 in it
    codec = random_codec(LayerPlan(side_plan(8, 4, 4), side_plan(4, 4)), rope_block=32)
    tables = side_tables(codec.k, codec.layout, "k", chunk_order(64, 64, False), 4)
    offset = torch.arange(32)
    mean, sink = (x.double() for x in reference._means(codec.to("cpu", torch.float64).k, offset))
    x = torch.randn(32, 2, 64, dtype=torch.float64) + torch.where(offset[:, None, None] % 2 > 0, mean, sink)
    rule = 0.7 * x.square().sum(-1) - (x * tables.class_vector.transpose(0, 1)).sum(-1) + tables.class_offset.T
    want = (x - sink).square().sum(-1) < SINK_RATIO * (x - mean).square().sum(-1)
    assert torch.equal(rule < 0, want) and bool(want.any()) and not bool(want.all())
    for i, m in enumerate((mean, sink)):
        latent = torch.einsum("nhd,hdr->hnr", m, codec.k.encode.double())
        assert torch.allclose(tables.latent_mean[:, i].double(), latent, rtol=1e-5, atol=1e-5)
        assert torch.allclose(tables.mean[:, i].double(), m.transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_refusals_name_the_limit():
    with pytest.raises(UnsupportedError, match="head_dim 24"):
        layer_tables(random_codec(LayerPlan(side_plan(4), side_plan(4)), dim=24))
    with pytest.raises(UnsupportedError, match="rotary width 12"):
        layer_tables(random_codec(LayerPlan(side_plan(4), side_plan(4)), dim=32, rotary_dim=12))
