# SPDX-License-Identifier: Apache-2.0
"""A basis is found again in the coder made from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.fidelity_replan import BasisSolver, refuse_shaped
from vllm_kqsvd.calibration import solve
from vllm_kqsvd.calibration.basis import Basis, klt
from vllm_kqsvd.calibration.means import fixed_means
from vllm_kqsvd.calibration.solve import LayerSolver, Side, SolveOptions
from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.rope_block import RopeSpec
from vllm_kqsvd.plan_catalog import PLANS
from vllm_kqsvd.projection import LayerEntry


def test_basis_recovered_from_a_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions and lengths of the columns, and the loss of a plan, to the precision of 2,000 sampled tokens."""
    monkeypatch.setattr(solve, "SHAPED", ())  # as projections were made before tiers were shaped
    torch.manual_seed(0)
    heads, dim, index, seed = 2, 64, 3, 5
    plan = PLANS["d64_b66"][1]
    solver = object.__new__(LayerSolver)
    solver.options, solver._seed, solver.sides = SolveOptions(seed=seed), seed * 10_007 + index, {}
    tokens, spectrum = {}, {}
    for name in ("k", "v"):
        root, metric = torch.randn(2, heads, dim, dim, dtype=torch.float64) + 8 * torch.eye(dim, dtype=torch.float64)
        root = root * torch.logspace(0, -1, dim, dtype=torch.float64)
        encode, decode, variance = klt(root @ root.mT, metric @ metric.mT)
        basis = Basis(encode, decode, variance, torch.ones_like(variance), tuple(range(heads)))
        x = torch.einsum("hde,nhe->nhd", root.float(), torch.randn(2000, heads, dim))
        zero = torch.zeros(heads, dim, dtype=torch.float64)
        solver.sides[name] = Side(name, fixed_means(zero, zero), basis, x, solver._table(basis, x))
        tokens[name], spectrum[name] = x, variance.float()
    rope = RopeSpec(torch.zeros(0), 0)
    codec = LayerCodec(solver.coder("k", plan.k), solver.coder("v", plan.v), rope, 0)
    entry = LayerEntry(index, "layer", "none", 0, 0, None, "mix", "mix", codec, spectrum)
    found = BasisSolver(entry, tokens, seed)
    for name in ("k", "v"):
        want, got = solver.sides[name].basis.encode, found.sides[name].basis.encode
        cosine = torch.cosine_similarity(want, got, dim=1)
        assert cosine.min() > 0.9 and cosine.mean() > 0.999  # the weakest column takes up the others' sampling error
        assert (got.norm(dim=1) / want.norm(dim=1) - 1).abs().max() < 0.1
        table, again = solver.sides[name].table, found.sides[name].table
        assert abs(again[:, 2].sum() / table[:, 2].sum() - 1) < 0.02


def test_shaped_projections_are_refused() -> None:
    refuse_shaped(SimpleNamespace(calibration={}))  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="keep-statistics"):
        refuse_shaped(SimpleNamespace(calibration={"tiers": "shaped"}))  # type: ignore[arg-type]
