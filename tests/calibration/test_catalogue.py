# SPDX-License-Identifier: Apache-2.0
"""Allocation among the plans that CUDA decode kernels are compiled for."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_kqsvd.calibration.allocate import allocate, catalogue_plans, layer_loss
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.plan_catalog import PLANS


def test_every_layer_takes_its_best_compiled_plan():
    rng = np.random.default_rng(0)
    tables = [tuple(np.sort(rng.random((8, 9)), 1)[:, ::-1] for _ in range(2)) for _ in range(3)]
    among = catalogue_plans(128, 128)
    for plan, (k, v) in zip(allocate(tables, 128, among=among), tables, strict=True):
        assert (128, plan) in PLANS.values()
        assert layer_loss(plan, k, v) == min(layer_loss(p, k, v) for p in among)


def test_a_width_without_kernels_is_refused():
    with pytest.raises(CalibrationError, match="there are .*2.5625"):
        catalogue_plans(128, 56)
