# SPDX-License-Identifier: Apache-2.0
"""Allocation among the plans that CUDA decode kernels are compiled for."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_kqsvd.calibration.allocate import allocate, catalogue_plans, layer_loss, plane_bytes
from vllm_kqsvd.calibration.calibrate import PRESETS
from vllm_kqsvd.calibration.solve import plans_to_choose_from
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.plan_catalog import PLANS, find_instance


def test_every_layer_takes_its_best_compiled_plan():
    rng = np.random.default_rng(0)
    tables = [tuple(np.sort(rng.random((8, 9)), 1)[:, ::-1] for _ in range(2)) for _ in range(3)]
    among = catalogue_plans(128, 32, 128)
    for plan, (k, v) in zip(allocate(tables, 128, among=among), tables, strict=True):
        assert (128, plan) in PLANS.values()
        assert layer_loss(plan, k, v) == min(layer_loss(p, k, v) for p in among)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", PRESETS.values())
def test_every_preset_has_several_compiled_plans(head_dim: int, bits: float):
    total = plane_bytes(bits, head_dim)
    plans = catalogue_plans(head_dim, 32, total)
    assert len(plans) >= 3
    assert all(find_instance(p, head_dim, c, 32) for p in plans for c in (4, 8))
    assert plans_to_choose_from("auto", head_dim, {0, 32}, total) == plans
    if head_dim == 128:
        assert all(find_instance(p, head_dim, 8, 64) for p in catalogue_plans(head_dim, 64, total))


def test_shapes_without_kernels_are_free_unless_the_catalogue_is_asked_for():
    assert plans_to_choose_from("auto", 96, {32}, 96) == []
    assert plans_to_choose_from("auto", 128, {1}, 128) == []
    assert plans_to_choose_from("free", 128, {32}, 128) == []
    with pytest.raises(CalibrationError, match="head_dim 96 .* none"):
        plans_to_choose_from("catalogue", 96, {32}, 96)


def test_few_plans_are_the_best_few():
    rng = np.random.default_rng(1)
    tables = [tuple(np.sort(rng.random((8, 9)), 1)[:, ::-1] for _ in range(2)) for _ in range(6)]
    among = catalogue_plans(128, 32, 128)
    one = allocate(tables, 128, 1, among)
    assert len(set(one)) == 1
    losses = [sum(layer_loss(p, k, v) for k, v in tables) for p in among]
    assert sum(layer_loss(p, k, v) for p, (k, v) in zip(one, tables, strict=True)) == pytest.approx(min(losses))


def test_a_width_without_kernels_is_refused():
    with pytest.raises(CalibrationError, match="there are .*2.5625"):
        catalogue_plans(128, 32, 56)
