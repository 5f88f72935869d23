# SPDX-License-Identifier: Apache-2.0
"""Closed forms: KQ-SVD's identities, the transform's optimality, and every basis being invertible and sorted."""

from __future__ import annotations

import pytest
import torch

from vllm_kqsvd.calibration.basis import BASES, klt, kqsvd_factors, make_basis, signed_hadamard
from vllm_kqsvd.calibration.metric import matrix_root, with_ridge
from vllm_kqsvd.calibration.tiers import rotate_tiers
from vllm_kqsvd.errors import CalibrationError

F64 = torch.float64


def tokens(n: int, dim: int, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(2, dim, dim, generator=gen, dtype=F64) * torch.logspace(0, -0.5, dim, dtype=F64)
    return torch.randn(2, n, dim, generator=gen, dtype=F64) @ (mix + 2 * torch.eye(dim, dtype=F64))


def test_kqsvd_identities() -> None:
    gen = torch.Generator().manual_seed(1)
    k, q = (torch.randn(2, n, 32, generator=gen, dtype=F64) for n in (300, 500))
    gk, gq = k.mT @ k, q.mT @ q
    a, b, s = kqsvd_factors(gk, gq)
    eye = torch.eye(32, dtype=F64)
    assert (a.mT @ gk @ a - eye).abs().max() < 1e-10
    assert (a.mT @ b - eye).abs().max() < 1e-10
    assert (b.mT @ gq @ b / s[:, :1, None] ** 2 - torch.diag_embed(s**2) / s[:, :1, None] ** 2).abs().max() < 1e-10
    assert torch.allclose(s, torch.linalg.svdvals(k @ q.mT)[:, :32], rtol=1e-8)
    r = 8  # the best rank-r approximation of K Q^T (Eckart-Young)
    left = k @ q.mT - k @ a[..., :r] @ b[..., :r].mT @ q.mT
    assert torch.allclose(left.square().sum((1, 2)), (s[:, r:] ** 2).sum(-1), rtol=1e-8)


def test_klt_decorrelates_and_measures_the_metric() -> None:
    x, m = tokens(400, 32, 3), with_ridge(tokens(100, 32, 4).mT @ tokens(100, 32, 4))
    cov = x.mT @ x / 400
    e, d, variance = klt(cov, m)
    assert (e @ d - torch.eye(32, dtype=F64)).abs().max() < 1e-10
    z = x @ e
    assert (z.mT @ z / 400 - torch.diag_embed(variance)).abs().max() < 1e-10 * variance.max()
    error = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(5), dtype=F64)
    back = error @ d
    assert torch.allclose(torch.einsum("hnd,hde,hne->hn", back, m, back), error.square().sum(-1), rtol=1e-9)


def test_matrix_root() -> None:
    m = with_ridge(tokens(100, 16, 6).mT @ tokens(100, 16, 6))
    root, inverse = matrix_root(m)
    assert (root @ root - m).abs().max() < 1e-10 * m.abs().max()
    assert (root @ inverse - torch.eye(16, dtype=F64)).abs().max() < 1e-10


@pytest.mark.parametrize("name", BASES)
def test_every_basis_is_invertible_and_sorted(name: str) -> None:
    x, q, w = (tokens(200, 48, s) for s in (7, 8, 9))
    cov, gq, gw = (y.mT @ y / 200 for y in (x, q, w))
    kinds = {k: with_ridge(gq) for k in ("kq", "mix", "fisher")}
    basis = make_basis(name, cov, kinds["mix"], kinds, gq, gw)
    eye = torch.eye(48, dtype=F64)
    assert (basis.encode @ basis.decode - eye).abs().max() < 1e-8
    if name not in ("channel_prune", "lorc", "matryoshka"):  # these have an order of their own
        energy = basis.variance * basis.weight
        assert (energy[:, 1:] <= energy[:, :-1] * (1 + 1e-9)).all()
    turned = rotate_tiers(basis, [c // 16 for c in range(48)], 1)
    assert (turned.encode @ turned.decode - eye).abs().max() < 1e-8


def test_tier_rotation_keeps_the_energy_of_a_tier() -> None:
    x = tokens(200, 32, 10)
    cov = x.mT @ x / 200
    kinds = {"mix": torch.eye(32, dtype=F64).expand(2, -1, -1)}
    basis = make_basis("mix", cov, kinds["mix"], kinds)
    turned = rotate_tiers(basis, [0] * 16 + [1] * 16, 3)
    for part in (slice(0, 16), slice(16, 32)):
        assert torch.allclose(turned.variance[:, part].sum(-1), basis.variance[:, part].sum(-1))
    actual = torch.einsum("hdc,hde,hec->hc", turned.encode, cov, turned.encode)
    assert torch.allclose(actual, turned.variance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
def test_signed_hadamard_is_orthogonal(dim: int) -> None:
    h = signed_hadamard(dim, 3)
    assert (h @ h.T - torch.eye(dim, dtype=F64)).abs().max() < 1e-12


def test_unknown_basis_and_missing_weights_are_refused() -> None:
    cov = torch.eye(16, dtype=F64)[None]
    with pytest.raises(CalibrationError, match="choose one of"):
        make_basis("pca", cov, cov, {})
    with pytest.raises(CalibrationError, match="weight_svd"):
        make_basis("weight_svd", cov, cov, {})
