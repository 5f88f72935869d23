# SPDX-License-Identifier: Apache-2.0
"""What defines each related method: similar heads share, ranks fall with depth, prefixes are trained."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from vllm_kqsvd.calibration.basis import klt, make_basis
from vllm_kqsvd.calibration.head_groups import cka, procrustes, share, similar_groups, turn_planes
from vllm_kqsvd.calibration.matryoshka import nested_loss, train_nested
from vllm_kqsvd.calibration.metric import with_ridge
from vllm_kqsvd.calibration.progressive import layer_ranks, log_condition, ranks_from
from vllm_kqsvd.calibration.refit import refit_decoder
from vllm_kqsvd.calibration.tiers import random_rotation, rotate_tiers
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.rope_block import RopeSpec, rotate

F64 = torch.float64
ROPE = RopeSpec(1e4 ** -(torch.arange(16, dtype=F64) / 16))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(n: int, dim: int, seed: int) -> torch.Tensor:
    gen = generator(seed)
    return torch.randn(n, dim, generator=gen, dtype=F64) @ (
        torch.randn(dim, dim, generator=gen, dtype=F64) * 0.9 ** torch.arange(dim)[:, None]
    )


def gram(x: torch.Tensor) -> torch.Tensor:
    """[n, H, d] -> [H, d, d]."""
    return torch.einsum("nhd,nhe->hde", x, x) / len(x)


def plane_turn(seed: int) -> torch.Tensor:
    """A random rotation of every plane of ROPE, [32, 32]."""
    angle = torch.rand(16, generator=generator(seed), dtype=F64) * 2 * math.pi
    c, s = torch.diag(angle.cos()), torch.diag(angle.sin())
    return torch.cat((torch.cat((c, s), 1), torch.cat((-s, c), 1)))


def test_cka_knows_orthogonal_copies() -> None:
    x, y = draw(500, 32, 1), draw(500, 32, 2)
    found = cka(torch.stack((x, y, 3 * x @ random_rotation(32, generator(3)) + 7), 1))
    assert float(found[0, 2]) == pytest.approx(1)
    assert float(found[0, 1]) < 0.4
    assert torch.allclose(found, found.T)


def test_groups_hold_similar_heads_wherever_they_stand() -> None:
    similarity = torch.eye(6)
    for a, b, s in ((0, 4, 0.9), (1, 3, 0.8), (2, 5, 0.7), (0, 3, 0.85), (4, 3, 0.84)):
        similarity[a, b] = similarity[b, a] = s
    assert similar_groups(similarity) == ((0, 4), (1, 3), (2, 5))
    assert similar_groups(similarity, 3)[0] == (0, 3, 4)
    assert similar_groups(similarity[:3, :3]) == ((0, 1), (2,))
    assert similar_groups(torch.ones(1, 1)) == ((0,),)


def test_recalkv_heads_of_a_group_share_their_axes() -> None:
    a, b = draw(400, 32, 4), draw(400, 32, 5)
    x = torch.stack((a, b, a + 0.1 * draw(400, 32, 6), b + 0.1 * draw(400, 32, 7)), 1)
    sharing = share(x, cka(x), ROPE, aligned=False)
    assert sharing.groups == ((0, 2), (1, 3))
    assert sharing.owner == (0, 1, 0, 1)
    eye = torch.eye(32, dtype=F64).expand(4, -1, -1)
    basis = make_basis("recalkv", gram(x), eye, {}, sharing=sharing)
    turned = rotate_tiers(basis, [0] * 16 + [1] * 16, 1)
    for found in (basis, turned):
        assert torch.equal(found.encode[0], found.encode[2])
        assert not torch.allclose(found.encode[0], found.encode[1])
    pooled = gram(x)[[0, 2]].mean(0)
    axes = basis.encode[0].T @ pooled @ basis.encode[0]
    assert (axes - torch.diag(axes.diagonal())).abs().max() < 1e-9 * axes.max()


def test_merged_heads_that_are_turned_copies_have_equal_latents_and_means() -> None:
    lead = draw(400, 32, 8) + 5
    for turn, rope in ((plane_turn(9), ROPE), (random_rotation(32, generator(9)), None)):
        x = torch.stack((lead, draw(400, 32, 10), lead @ turn.T), 1)
        sharing = share(x, cka(x), rope, aligned=True)
        assert sharing.groups == ((0, 2), (1,))
        own = x.mean(0)
        assert torch.allclose(sharing.shared_mean(own), own)
        centred = x - own
        eye = torch.eye(32, dtype=F64).expand(3, -1, -1)
        basis = rotate_tiers(make_basis("head_merge", gram(centred), eye, {}, sharing=sharing), [0] * 32, 2)
        z = torch.einsum("nhd,hdc->nhc", centred, basis.encode)
        assert torch.allclose(z[:, 0], z[:, 2])
        assert torch.allclose(torch.einsum("nhc,hcd->nhd", z, basis.decode), centred)


def test_alignments_are_orthogonal_and_those_of_keys_commute_with_rope() -> None:
    x, lead = draw(300, 32, 11), draw(300, 32, 12)
    free, planes = procrustes(x, lead), turn_planes(x, lead, ROPE)
    eye = torch.eye(32, dtype=F64)
    for a in (free, planes):
        assert (a @ a.T - eye).abs().max() < 1e-12
        assert (x @ a - lead).norm() <= (x - lead).norm()
    at = torch.arange(300)
    keys = x[:, None]
    assert torch.allclose(rotate(keys @ planes, at, ROPE), rotate(keys, at, ROPE) @ planes)


def test_lorc_ranks_fall_with_depth() -> None:
    ranks = ranks_from([2.0, 1.0, 4.0, 1.0, 2.0, 6.0], 128)
    assert ranks[0] == 128
    assert ranks[-1] == 64
    assert ranks == sorted(ranks, reverse=True)
    assert all(r % 16 == 0 for r in ranks)
    weight = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=F64)).reshape(2, 2, 4)
    assert log_condition(weight) == pytest.approx(math.log(8))
    with pytest.raises(CalibrationError, match="lorc"):
        layer_ranks([SimpleNamespace(projection_weight=lambda side: None, head_dim=64)])  # type: ignore[list-item]


def test_channels_beyond_the_rank_hold_nothing() -> None:
    x, w = draw(300, 48, 13)[:, None], draw(300, 48, 14)
    eye = torch.eye(48, dtype=F64)[None]
    whole = make_basis("lorc", gram(x), eye, {}, weight_gram=(w.T @ w)[None])
    basis = rotate_tiers(whole.truncated(32), [c // 16 for c in range(48)], 1)
    z = torch.einsum("nhd,hdc->nhc", x, basis.encode)
    assert not z[..., 32:].any()
    axes = whole.encode[0].T @ w.T @ w @ whole.encode[0]
    assert (axes.diagonal().diff() <= 0).all()  # in the order of the weights' singular values
    kept = x[:, 0] @ whole.encode[0, :, :32] @ whole.decode[0, :32]
    assert torch.allclose(torch.einsum("nhc,hcd->nhd", z, basis.decode)[:, 0], kept)


def test_matryoshka_training_betters_every_budget_and_stays_orthogonal() -> None:
    covariance, metric = (
        torch.stack([y.T @ y / 300 for y in (draw(300, 48, s), draw(300, 48, s + 1))]) for s in (15, 25)
    )
    axes = klt(covariance, torch.eye(48, dtype=F64).expand(2, -1, -1))[0]
    basis = train_nested(covariance, with_ridge(metric))
    assert (basis.mT @ basis - torch.eye(48, dtype=F64)).abs().max() < 1e-9
    before, after = (nested_loss(b, covariance, with_ridge(metric)) for b in (axes, basis))
    assert (after < 0.8 * before).all()
    direct = 0.0
    for rank in (16, 32):
        left = torch.eye(48, dtype=F64) - basis[..., :rank] @ basis[..., :rank].mT
        direct += torch.einsum("hde,hed->h", with_ridge(metric), left @ covariance @ left)
    assert torch.allclose(after, direct)
    assert torch.equal(train_nested(covariance, with_ridge(metric)), basis)


def test_matryoshka_without_a_metric_is_pca() -> None:
    covariance = draw(300, 32, 17)
    covariance = (covariance.T @ covariance)[None]
    eye = torch.eye(32, dtype=F64)[None]
    found = nested_loss(train_nested(covariance, eye), covariance, eye)
    best = torch.linalg.eigvalsh(covariance)[:, :16].sum(-1)
    assert torch.allclose(found, best)


def test_a_refitted_decoder_is_better_on_tokens_it_has_not_seen() -> None:
    x = draw(6000, 32, 18)[:, None]
    encode = torch.linalg.qr(torch.randn(32, 32, generator=generator(19), dtype=F64))[0][None]
    step = 1.6 * torch.einsum("nhd,hdc->nhc", x, encode).std(0)
    coded = (torch.floor(torch.einsum("nhd,hdc->nhc", x, encode) / step).clamp(-1, 0) + 0.5) * step
    decode = refit_decoder(coded[:4000], x[:4000], encode.mT)

    def error(d: torch.Tensor) -> float:
        return float((torch.einsum("nhc,hcd->nhd", coded[4000:], d) - x[4000:]).square().mean())

    assert error(decode) < 0.9 * error(encode.mT)
    some = refit_decoder(coded[:4], x[:4], encode.mT)  # far fewer tokens than channels: stays near the inverse
    assert float((some - encode.mT).norm()) < float(encode.norm())
