# SPDX-License-Identifier: Apache-2.0
"""The dynamic programme finds what trying every plan finds, and its plans fit the page layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kqsvd.calibration.allocate import (
    allocate,
    best_layer_plan,
    best_side_plans,
    layer_loss,
    plane_bytes,
    side_losses,
)
from vllm_kqsvd.calibration.tiling import planes_from_counts
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.layout import layout_of


def random_table(groups: int, seed: int) -> np.ndarray:
    """Losses that fall with the code width, energies that fall with the group."""
    rng = np.random.default_rng(seed)
    energy = np.sort(rng.lognormal(0, 2, groups))[::-1]
    return energy[:, None] * np.cumprod(np.concatenate(([1.0], rng.uniform(0.15, 0.6, 8))))[None, :]


def brute_force(table: np.ndarray, units: int) -> float:
    """Least loss over every way to give each kept group fields of 4, 2 and 1 bits in `units` planes of 8 bytes."""
    groups, best = len(table), float("inf")
    fields = [(a, b, c) for a in range(9) for b in range(5) for c in range(3) if 0 < a + 2 * b + 4 * c <= 8]
    for kept in range(1, groups + 1):
        tail = table[kept:, 0].sum()
        for counts in itertools.product(fields, repeat=kept):
            ones, twos, fours = (sum(c[i] for c in counts) for i in range(3))
            if ones % 4 or twos % 2 or ones // 4 + twos // 2 + fours != units:
                continue
            if any(c[0] > ones // 4 or c[1] > twos // 2 for c in counts):
                continue
            loss = tail + sum(table[g, a + 2 * b + 4 * c] for g, (a, b, c) in enumerate(counts))
            best = min(best, loss)
    return best


@pytest.mark.parametrize(("groups", "max_units", "seed"), [(2, 4, 0), (2, 3, 1), (3, 4, 2), (3, 3, 3)])
def test_side_plans_are_optimal(groups: int, max_units: int, seed: int) -> None:
    table = random_table(groups, seed)
    plans = best_side_plans(table, max_units)
    for units in range(1, max_units + 1):
        want = brute_force(table, units)
        assert (units in plans) == np.isfinite(want)
        if units in plans:
            loss, plan = plans[units]
            assert loss == pytest.approx(want)
            assert loss == pytest.approx(side_losses(plan, table))
            assert plan.bytes_per_token == 8 * units


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 5, 6, 8]), st.integers(4, 12))
def test_layer_plans_spend_the_budget_and_fit_the_layout(seed: int, groups: int, units: int) -> None:
    k, v = random_table(groups, seed), random_table(groups, seed + 1)
    loss, plan = best_layer_plan(k, v, 8 * units)
    assert plan.bytes_per_token == 8 * units + 2
    assert loss == pytest.approx(layer_loss(plan, k, v))
    layout = layout_of(plan)
    for side in ("k", "v"):
        assert len(layout.byte_fields[side]) == layout.side(side).bytes_per_token


def test_few_plans_cost_little_and_many_cost_nothing() -> None:
    tables = [(random_table(4, s), random_table(4, s + 100)) for s in range(12)]
    own = [best_layer_plan(k, v, 64)[0] for k, v in tables]
    losses = {}
    for limit in (1, 2, 4, 12):
        plans = allocate(tables, 64, limit)
        assert len(set(plans)) <= limit
        losses[limit] = sum(layer_loss(p, k, v) for p, (k, v) in zip(plans, tables, strict=True))
    assert losses[1] >= losses[2] >= losses[4] >= losses[12]
    assert losses[12] == pytest.approx(sum(own))


def test_counts_become_merged_planes() -> None:
    plan = planes_from_counts((2, 1, 0, 0, 0), (0, 0, 1, 1, 0), (0, 1, 1, 1, 1))
    assert plan.group_bits == (8, 5, 3, 3, 1)
    assert plan.bytes_per_token == 16 + 8 + 8 + 8
    full = planes_from_counts((1, 1), (1, 1), (0, 0))
    assert [p.is_half for p in full.planes] == [False, True]


@pytest.mark.parametrize(
    ("bits", "dim", "planes"),
    [(4, 64, 64), (3, 64, 48), (2.5, 64, 40), (2, 64, 32), (4, 128, 128), (3, 128, 96), (4, 32, 24)],
)
def test_budgets(bits: float, dim: int, planes: int) -> None:
    assert plane_bytes(bits, dim) == planes


def test_a_budget_too_small_is_refused() -> None:
    with pytest.raises(CalibrationError, match="too few bytes"):
        plane_bytes(0.5, 64)
