# SPDX-License-Identifier: Apache-2.0
"""Averages over rotations equal the sums they stand for, in every pairing."""

from __future__ import annotations

import pytest
import torch

from vllm_kqsvd.calibration.frames import (
    Frame,
    OffsetLaw,
    distance_law,
    rotate_mean,
    rotation_average,
    uniform_offsets,
)
from vllm_kqsvd.calibration.means import key_means
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.rope_block import RopeSpec, rotate


def spec(rotary_dim: int, interleaved: bool = False, theta: float = 1e4) -> RopeSpec:
    return RopeSpec(theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / max(rotary_dim, 1)), interleaved)


@pytest.mark.parametrize("law", [uniform_offsets(40), distance_law(8, 40)])
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(32, False), (32, True), (16, False), (8, True), (0, False)])
def test_averages_are_the_weighted_sums(rotary_dim: int, interleaved: bool, law: OffsetLaw) -> None:
    gen = torch.Generator().manual_seed(1)
    rope = spec(rotary_dim, interleaved)
    x = torch.randn(2, 50, 32, generator=gen, dtype=torch.float64)
    gram, weights = x.mT @ x, law.weights()
    want, moved = torch.zeros_like(gram), torch.zeros_like(x)
    for j, w in enumerate(weights):
        y = rotate(x.transpose(0, 1), torch.full((50,), j), rope).transpose(0, 1)
        want += w * y.mT @ y
        moved += w * rotate(x.transpose(0, 1), torch.full((50,), -j), rope).transpose(0, 1)
    got = rotation_average(gram, rope, law)
    assert (got - want / weights.sum()).abs().max() < 1e-10 * gram.abs().max()
    assert (rotate_mean(x, rope, law, sign=-1) - moved / weights.sum()).abs().max() < 1e-10


def test_resonant_frequencies_average_to_one() -> None:
    omega = torch.tensor([0.0, 2 * torch.pi, 1e-14], dtype=torch.float64)
    assert (uniform_offsets(1000).characteristic(omega) - 1).abs().max() < 1e-9


def test_post_frame_forgets_fast_planes() -> None:
    frame = Frame("post", 0, spec(32), max_position=100_000)
    gram = torch.eye(32, dtype=torch.float64)[None].clone()
    gram[0, 0, 1] = gram[0, 1, 0] = 0.9
    averaged = frame.average(gram)
    assert abs(averaged[0, 0, 1]) < 1e-3
    assert torch.allclose(averaged.diagonal(dim1=1, dim2=2), torch.ones(1, 32, dtype=torch.float64))


def test_key_means_are_exact_for_blocks_of_32_and_consistent_for_64() -> None:
    gen = torch.Generator().manual_seed(2)
    rope = spec(128, theta=5e5)
    mean, sink = torch.randn(2, 2, 128, generator=gen, dtype=torch.float64)
    for block, bound in ((32, 1e-4), (64, 0.2)):
        means = key_means(mean, sink, Frame("page", block, rope))
        j = torch.arange(block)
        got, got_sink = means.at(j)
        want = rotate(mean[None].expand(block, -1, -1), j, rope)
        assert (got - want).norm() < bound * want.norm()
        assert (got_sink - rotate(sink[None].expand(block, -1, -1), j, rope)).norm() < bound * want.norm()
        left = (want - got).transpose(0, 1)
        assert torch.allclose(means.residual, left.mT @ left / block, atol=1e-12)


def test_distance_law_leaves_the_exact_window_out() -> None:
    weights = distance_law(64, 256).weights()
    assert weights[:64].sum() == 0
    assert weights[64] == 192
    assert weights[255] == 1


@pytest.mark.parametrize(("mode", "block"), [("page", 0), ("pre", 32), ("post", 32), ("rope", 1)])
def test_impossible_frames_are_refused(mode: str, block: int) -> None:
    with pytest.raises(CalibrationError, match="rope mode"):
        Frame(mode, block, spec(32))
