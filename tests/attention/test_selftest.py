# SPDX-License-Identifier: Apache-2.0
"""The start-up self-test passes good kernels and names the layer of bad ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.helpers import random_codec, side_plan
from vllm_kqsvd.attention.selftest import MOST, TOLERANCE, check_layer
from vllm_kqsvd.errors import KernelError
from vllm_kqsvd.ops import LayerOps, LayerShape, make_layer_ops
from vllm_kqsvd.plan import LayerPlan

CPU = torch.device("cpu")
CODEC = random_codec(LayerPlan(side_plan(4, 4, 2, 2), side_plan(4, 4)), heads=2, dim=64)


def made() -> LayerOps:
    """CPU ops of one layer."""
    return make_layer_ops(CODEC, LayerShape(4, 2, 64, 128, 32, 0.125, torch.bfloat16, 64), CPU, "cpu")


def test_good_kernels_pass() -> None:
    assert check_layer(made(), CODEC, CPU, "model.layers.0") < 0.02
    assert 0 < check_layer(made(), CODEC, CPU, "model.layers.0", drafts=3) < 0.02


def test_a_huge_key_mean_is_no_fault() -> None:
    gen = torch.Generator().manual_seed(0)
    mean = 600 * torch.randn(CODEC.k.mean.shape, generator=gen)
    k = replace(
        CODEC.k, mean=mean, sink=mean, mean_basis=1 + 0.01 * torch.randn(CODEC.k.mean_basis.shape, generator=gen)
    )
    codec, shape = replace(CODEC, k=k), LayerShape(4, 2, 64, 128, 32, 0.125, torch.float16, 64)
    tables = {n: getattr(k, n).half().float() for n in ("decode", "mean", "mean_basis", "sink")}
    ops = make_layer_ops(replace(codec, k=replace(k, **tables)), shape, CPU, "cpu")
    assert TOLERANCE[torch.float16] < check_layer(ops, codec, CPU, "model.layers.0") < MOST
    attend = ops.attend
    ops.attend = lambda q, k, v, pages, window, *rest: attend(q, k, v, pages.flip(0), window, *rest)  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="'model.layers.7'"):
        check_layer(ops, codec, CPU, "model.layers.7")


@pytest.mark.parametrize("fault", ["stale", "nan", "crash", "window"])
def test_bad_kernels_are_named(fault: str) -> None:
    ops = made()
    attend, store = ops.attend, ops.store

    def wrong(query, key, value, pages, window_pages, step, output) -> None:
        if fault == "crash":
            raise RuntimeError("illegal address")
        attend(query, key, value, pages, None if fault == "window" else window_pages, step, output)
        if fault == "nan":
            output[-1, 0, 0] = float("nan")

    ops.attend = wrong  # type: ignore[method-assign]
    if fault == "stale":
        ops.store = lambda *a: store(*a[:6], a[6] + 1)  # type: ignore[method-assign]
    with pytest.raises(KernelError, match="'model.layers.7'"):
        check_layer(ops, CODEC, CPU, "model.layers.7")
