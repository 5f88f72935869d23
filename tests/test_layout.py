# SPDX-License-Identifier: Apache-2.0
"""Properties of the page layout: no overlap, full cover, alignment, round trip, fragment order."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kqsvd.layout import TILE, layout_of
from vllm_kqsvd.ops.packing import codes_from_bytes, token_bytes
from vllm_kqsvd.plan import LayerPlan, Plane, SidePlan, planes_for


@st.composite
def side_plans(draw) -> SidePlan:
    """Planes laid round and round over the groups until every group is covered, then a few more."""
    num_groups = draw(st.sampled_from([1, 2, 4, 6, 8, 16]))
    planes, width, at = [], [0] * num_groups, 0
    while True:
        bits, half = draw(st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 1), (4, 0), (4, 1), (8, 0)]))
        count = (4 if half else 8) // bits
        if count > num_groups:
            bits, half, count = 8, 0, 1
        groups = tuple((at + i) % num_groups for i in range(count))
        if max(width[g] for g in groups) + bits > 8:
            break
        planes.append(Plane(bits, groups))
        width = [w + bits * (g in groups) for g, w in enumerate(width)]
        at += count
        if min(width) and draw(st.booleans()):
            break
    if not min(width):
        planes = [Plane(8, (g,)) for g in range(num_groups)]
    return SidePlan(tuple(planes))


@given(side_plans(), side_plans())
@settings(max_examples=60, deadline=None)
def test_every_code_byte_belongs_to_one_token(k: SidePlan, v: SidePlan):
    layout = layout_of(LayerPlan(k, v))
    used = [o for s in ("k", "v") for row in layout.byte_offset[s] for o in row]
    used += [layout.scale_offset[s] + r for s in ("k", "v") for r in range(TILE)]
    assert sorted(used) == list(range(layout.tile_bytes))
    assert layout.tile_bytes % 32 == 0


@given(side_plans(), st.integers(0, 2**31 - 1))
@settings(max_examples=40, deadline=None)
def test_codes_survive_packing(plan: SidePlan, seed: int):
    layout = layout_of(LayerPlan(plan, plan))
    gen = torch.Generator().manual_seed(seed)
    bits = torch.tensor(plan.group_bits).repeat_interleave(16)
    codes = (torch.rand(5, 2, plan.rank, generator=gen) * 2.0**bits).to(torch.uint8)
    for side in ("k", "v"):
        data = token_bytes(codes, layout, side)
        assert data.shape[-1] == plan.bytes_per_token
        assert torch.equal(codes_from_bytes(data, layout, side), codes)


@given(side_plans())
@settings(max_examples=40, deadline=None)
def test_every_bit_of_a_code_is_stored_once(plan: SidePlan):
    layout = layout_of(LayerPlan(plan, plan))
    for side in ("k", "v"):
        bits = {}
        for byte in layout.byte_fields[side]:
            for f in byte:
                assert f.bit + f.num_bits <= 8
                for b in range(f.shift, f.shift + f.num_bits):
                    assert (f.channel, b) not in bits
                    bits[f.channel, b] = True
        want = {(c, b) for c in range(plan.rank) for b in range(plan.group_bits[c // 16])}
        assert set(bits) == want


def test_words_are_in_tensor_core_order():
    """Lane (g, t) finds channels 2t, 2t+1 (+8) of token g (+8): the A fragment of mma.m16n8k16."""
    layout = layout_of(LayerPlan(planes_for([4, 4]), planes_for([4, 4])))
    for lane in range(32):
        g, t = divmod(lane, 4)
        for r, word in ((g, lane), (g + 8, lane + 32)):  # K: two words per lane
            offsets = [o for o in layout.byte_offset["k"][r] if o // 4 == word]
            assert len(offsets) == 4
            for o in offsets:
                fields = layout.byte_fields["k"][layout.byte_offset["k"][r].index(o)]
                half, byte = o % 4 // 2, o % 2
                assert [f.channel for f in fields] == [
                    2 * t + half + 8 * byte,
                    16 + 2 * t + half + 8 * byte,
                ]
                assert [f.bit for f in fields] == [0, 4]
