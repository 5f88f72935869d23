# SPDX-License-Identifier: Apache-2.0
"""Bit plans: what they accept, what they refuse, and what their numbers mean."""

from __future__ import annotations

import pytest

from vllm_kqsvd.errors import PlanError
from vllm_kqsvd.plan import LayerPlan, Plane, SidePlan, layer_range, planes_for


def test_widths_and_bytes_add_up():
    plan = SidePlan((Plane(4, (0, 1)), Plane(2, (0, 2, 3, 4)), Plane(2, (2, 5, 6, 7))))
    assert plan.group_bits == (6, 4, 4, 2, 2, 2, 2, 2)
    assert plan.rank == 128 and plan.bytes_per_token == 48
    assert 16 * sum(plan.group_bits) == 8 * plan.bytes_per_token
    assert plan.shift(0, 0) == 2 and plan.shift(1, 0) == 0 and plan.shift(0, 1) == 0


def test_scales_count_in_the_bits():
    side = planes_for([4] * 8)
    assert side is not None
    assert LayerPlan(side, side).bits_per_element(128) == pytest.approx(4 + 1 / 16)


@pytest.mark.parametrize(
    "planes",
    [
        (Plane(4, (0, 2)),),  # hole
        (Plane(8, (0,)), Plane(1, (0, 1, 2, 3))),  # 9-bit codes
        (),
    ],
    ids=["hole", "too-wide", "empty"],
)
def test_impossible_sides_are_refused(planes):
    with pytest.raises(PlanError):
        SidePlan(planes)


@pytest.mark.parametrize(("bits", "groups"), [(3, (0, 1)), (4, (0, 1, 2)), (2, (0, 0, 1, 2)), (8, ())])
def test_impossible_planes_are_refused(bits, groups):
    with pytest.raises(PlanError):
        Plane(bits, groups)


def test_json_round_trip_and_refusal():
    plan = planes_for([6, 4, 4, 2, 2, 2, 2, 2])
    assert plan is not None and SidePlan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError):
        SidePlan.from_json([["four", [0, 1]]])


def test_widths_that_no_planes_tile_give_none():
    assert planes_for([3, 3, 3]) is None
    assert planes_for([]) is None


def test_layers_of_unequal_bits_in_words() -> None:
    assert layer_range(3.125, 3.125) == ""
    assert layer_range(2.125, 4.125) == " (layers 2.12 to 4.12)"
