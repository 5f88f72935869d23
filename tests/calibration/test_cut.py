# SPDX-License-Identifier: Apache-2.0
"""`kqsvd cut`: fewer bits from a projection alone come close to solving the statistics again, or are refused."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.calibration.conftest import make_model
from vllm_kqsvd.calibration.calibrate import CalibrateOptions, collect_statistics, project
from vllm_kqsvd.calibration.cli import add_arguments as add_calibrate_arguments
from vllm_kqsvd.calibration.cli import options_from
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.calibration.cut import cut, cut_side, gaussian_table, group_energy
from vllm_kqsvd.calibration.quantizer import GAUSSIAN_ERROR, GAUSSIAN_STEP, midrise
from vllm_kqsvd.cli import main
from vllm_kqsvd.codec import SideCodec
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.reference import decode, encode
from vllm_kqsvd.plan import planes_for
from vllm_kqsvd.projection import Projection, load_projection, save_projection

OPTIONS = CalibrateOptions(
    bits=4.0,
    plans="free",
    collect=CollectOptions(
        num_windows=4, window_length=192, gradient_windows=2, gradient_length=128, samples=600, window=32
    ),
)
Solve = tuple[dict[tuple[float, bool], Projection], torch.Tensor]


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Solve:
    """Projections by (bits, nested) of a tiny model with 64 channels, and values of its last layer [n, H, d]."""
    model = make_model(tmp_path_factory.mktemp("wide"), "llama", heads=2, kv_heads=1, head_dim=64)
    statistics, layers, corpus = collect_statistics(model, [text_file], OPTIONS)
    found = {}
    for bits in (4.0, 3.0, 2.0):
        for nested in (False, True):
            options = dataclasses.replace(OPTIONS, bits=bits, nested=nested)
            found[bits, nested] = project(model, layers, statistics, corpus, options)
    return found, statistics.layers[-1].tokens("v")


def error(side: SideCodec, x: torch.Tensor) -> float:
    """Mean squared error of a coder on tokens that no offset concerns."""
    at = torch.zeros(len(x), dtype=torch.long)
    return float((decode(*encode(x, at, side), at, side) - x).square().mean())


def test_gaussian_errors_are_those_of_the_quantizer() -> None:
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits in range(1, 7):
        step = torch.tensor(GAUSSIAN_STEP[bits], dtype=torch.float64)
        found = (midrise(x, step, torch.tensor(2.0 ** (bits - 1))) - x).square().mean()
        assert float(found) == pytest.approx(GAUSSIAN_ERROR[bits], rel=0.02)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("bits", [3.0, 2.0])
def test_a_cut_is_close_to_solving_again(solved: Solve, bits: float, nested: bool, tmp_path: Path) -> None:
    found, values = solved
    smaller, again = cut(found[4.0, nested], bits), found[bits, nested]
    save_projection(smaller, tmp_path / "cut")
    loaded = load_projection(tmp_path / "cut")
    assert loaded.bytes_per_token == again.bytes_per_token
    assert loaded.calibration["bits"] == bits
    for mine, theirs in zip(loaded.layers.values(), again.layers.values(), strict=True):
        assert mine.codec.plan.bytes_per_token == theirs.codec.plan.bytes_per_token
    # The split between K and V may differ; the same plan must cost little more without the tokens.
    last = max(again.layers)
    plan = again.layers[last].codec.v.plan
    entry = found[4.0, nested].layers[last]
    assert entry.spectrum is not None
    same_plan = cut_side(entry.codec.v, plan, group_energy(entry.spectrum["v"], entry.codec.v.plan, nested))
    assert error(same_plan, values) < 1.35 * error(again.layers[last].codec.v, values)
    assert all(0.5 < p / q < 2 for p, q in zip(loaded.predicted, again.predicted, strict=True))


def test_nested_order_makes_the_better_cut(solved: Solve) -> None:
    found, _ = solved
    mixed, nested = (cut(found[4.0, n], 2.0) for n in (False, True))
    assert found[4.0, False].layers[0].codec.k.plan.group_bits == (8, 8, 8)  # nothing left to order them by
    assert nested.predicted[0] < 0.75 * mixed.predicted[0]
    assert nested.layers[0].codec.k.plan.group_bits == found[2.0, True].layers[0].codec.k.plan.group_bits


def test_steps_and_scales_follow_the_widths() -> None:
    """On Gaussian channels the cut has the steps of the fewer bits and the same token scale."""
    wide, narrow = planes_for([4, 4, 4, 4]), planes_for([2, 2])
    assert wide is not None
    assert narrow is not None
    step = torch.full((1, 64), GAUSSIAN_STEP[4])
    eye, mean = torch.eye(64)[None], torch.zeros(1, 1, 64)
    side = SideCodec(
        wide, eye / step[:, None], eye * step[..., None], step**2 / 64, step / 10, torch.ones(1, 1), mean, mean
    )
    energy = torch.full((1, 4), 16.0)
    small = cut_side(side, narrow, energy)
    assert torch.allclose(1 / small.encode[0].diagonal(), torch.full((32,), GAUSSIAN_STEP[2]))
    assert torch.allclose(small.encode @ small.decode, eye[:, :, :32] @ eye[:, :32])
    x = torch.randn(4000, 1, 64, generator=torch.Generator().manual_seed(1))
    scale = (small.scale_weight * (x @ small.encode[0]).square()).sum(-1).sqrt()
    assert torch.allclose(scale, x[..., :32].square().mean(-1).sqrt())
    assert (small.guard_weight <= 2 / 32**0.5 + 1e-6).all()
    at = torch.zeros(4000, dtype=torch.long)
    left = decode(*encode(x, at, small), at, small)[..., :32] - x[..., :32]
    assert float(left.square().mean()) == pytest.approx(GAUSSIAN_ERROR[2], rel=0.1)
    assert cut_side(side, wide, energy) is side


def test_a_cut_may_be_cut_again(solved: Solve) -> None:
    whole = solved[0][4.0, True]
    at_once, in_steps = cut(whole, 2.0), cut(cut(whole, 3.0), 2.0)
    for a, b in zip(at_once.layers.values(), in_steps.layers.values(), strict=True):
        assert a.codec.plan == b.codec.plan
        assert torch.allclose(a.codec.k.encode, b.codec.k.encode, rtol=1e-5)
        assert torch.allclose(a.codec.k.scale_weight, b.codec.k.scale_weight, rtol=1e-5)


def test_mixed_groups_share_their_energy_and_lost_ones_stay_lost() -> None:
    spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0]).repeat_interleave(16)[None]
    plan = planes_for([4, 2, 2])
    assert plan is not None
    assert group_energy(spectrum, plan, nested=True).tolist() == [[128, 64, 32]]
    assert group_energy(spectrum, plan, nested=False).tolist() == [[128, 48, 48]]
    table = gaussian_table(spectrum, plan, nested=True)
    assert table[:, 0].tolist() == [128, 64, 32, 16]
    assert np.isinf(table[3, 1:]).all()
    assert table[0, 2] == pytest.approx(128 * GAUSSIAN_ERROR[2])


def test_what_cannot_be_cut_is_refused(solved: Solve) -> None:
    whole = solved[0][3.0, False]
    for bits in (3.0, 4.0):
        with pytest.raises(CalibrationError, match="only takes bits away"):
            cut(whole, bits)
    bare = {i: dataclasses.replace(e, spectrum=None) for i, e in whole.layers.items()}
    with pytest.raises(CalibrationError, match="no spectra"):
        cut(dataclasses.replace(whole, layers=bare), 2.0)
    with pytest.raises(CalibrationError, match="too few bytes"):
        cut(whole, 0.3)


def test_command(solved: Solve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = save_projection(solved[0][4.0, False], tmp_path / "four")
    assert main(["cut", str(tmp_path / "four"), "--preset", "capacity", "--output", str(tmp_path / "small")]) == 0
    assert "wrote" in capsys.readouterr().out
    small = load_projection(tmp_path / "small")
    assert small.calibration["bits"] == 2.5
    assert small.calibration["cut_from"] == digest
    assert main(["cut", str(tmp_path / "four"), "--bits", "3", "--output", str(tmp_path / "four")]) == 1
    assert "choose another folder" in capsys.readouterr().err
    assert main(["cut", str(tmp_path / "four"), "--output", str(tmp_path / "none")]) == 2


def test_calibrate_takes_nested() -> None:
    parser = argparse.ArgumentParser()
    add_calibrate_arguments(parser)
    fixed = ["m", "--output", "p", "--data", "t", "--bits", "3"]
    assert options_from(parser.parse_args([*fixed, "--nested"])).nested
    assert not options_from(parser.parse_args(fixed)).nested
