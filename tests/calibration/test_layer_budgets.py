# SPDX-License-Identifier: Apache-2.0
"""Bytes between layers: the exact choice, what layers cost alone, and when unequal layers are kept."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.calibration.conftest import make_model
from vllm_kqsvd.calibration import layer_choice
from vllm_kqsvd.calibration.allocate import best_layer_plan
from vllm_kqsvd.calibration.calibrate import CalibrateOptions, calibrate
from vllm_kqsvd.calibration.capture import load_model
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.calibration.corpus import Corpus
from vllm_kqsvd.calibration.cut import cut
from vllm_kqsvd.calibration.layer_budgets import (
    Verdict,
    bytes_of_layers,
    choose,
    choose_plans,
    is_pattern,
    sizes_around,
    without_pattern,
)
from vllm_kqsvd.calibration.layer_costs import budget_texts, judge, sensitivities
from vllm_kqsvd.calibration.reuse import solve_again
from vllm_kqsvd.errors import CalibrationError, UnsupportedError
from vllm_kqsvd.projection import Projection, load_projection, save_projection
from vllm_kqsvd.verify_harness import ProjectionCodec, ReadRule, Reference, Window, score

COLLECT = CollectOptions(
    num_windows=8, window_length=128, gradient_windows=2, gradient_length=128, samples=512, window=16
)
OPTIONS = CalibrateOptions(bits=4.0, rope_block=16, plans="free", layer_budgets="measured", collect=COLLECT)


@pytest.mark.parametrize("seed", range(5))
def test_choice_is_the_best_of_all(seed: int) -> None:
    """As good as trying everything, and within the bytes."""
    rng = np.random.default_rng(seed)
    size, total = [66, 50, 34], 6 * 50
    cost = np.sort(rng.exponential(size=(6, 3)), axis=1)
    chosen = choose(cost, size, total)
    assert sum(size[n] for n in chosen) <= total
    best = min(
        sum(cost[i, n] for i, n in enumerate(some))
        for some in itertools.product(range(3), repeat=6)
        if sum(size[n] for n in some) <= total
    )
    assert sum(cost[i, n] for i, n in enumerate(chosen)) == pytest.approx(best)


def test_too_few_bytes() -> None:
    """Refused with both figures."""
    with pytest.raises(ValueError, match="2 layers of at least 34 bytes asked for; 60 are there"):
        choose(np.ones((2, 2)), [34, 66], 60)


def test_no_pattern_that_vllm_would_split() -> None:
    """Two sizes with as many layers each lose one layer's bytes, where that costs least."""
    cost = np.array([[1.0, 9.0], [1.0, 3.0], [0.1, 0.5], [0.2, 0.3]])
    assert is_pattern([0, 0, 1, 1])
    assert not is_pattern([0, 0, 0, 0])
    assert not is_pattern([0, 0, 0, 1])
    assert without_pattern(cost, [66, 34], [0, 0, 1, 1]) == [0, 1, 1, 1]
    assert without_pattern(cost, [66, 34], [0, 1, 1, 1]) == [0, 1, 1, 1]
    assert without_pattern(cost[:2], [66, 34], [0, 1]) == [1, 1]


def test_sizes() -> None:
    """Compiled ones where the asked one is compiled, half bits around it elsewhere."""
    assert sizes_around("auto", 64, {32}, 48) == [24, 32, 40, 48, 64]
    assert sizes_around("auto", 64, {32}, 32) == [24, 32, 40, 48, 64]
    assert sizes_around("auto", 128, {32, 64}, 80) == [64, 72, 80, 96, 128]
    assert sizes_around("free", 64, {32}, 48) == [32, 40, 48, 56, 64]
    assert sizes_around("auto", 96, {32}, 24) == [16, 24, 32, 40]


def test_sensitive_layers_get_more() -> None:
    """At the bytes of equal layers, and predicted to cost less."""
    table = np.array([[4.0**-b * 2.0**-g for b in range(9)] for g in range(4)])
    tables = [(table, table)] * 6
    equal = [best_layer_plan(table, table, 48)[1]] * 6
    sensitivity = np.array([100.0, 1, 1, 1, 1, 1])
    choice = choose_plans(sensitivity, tables, equal, {s: [] for s in (32, 40, 48, 56, 64)}, 4)
    sizes = [p.bytes_per_token for p in choice.plans]
    assert sizes[0] == max(sizes) > sizes[1]
    assert sum(sizes) <= 6 * 50
    assert choice.predicted < 0.7


def test_a_mean_between_the_sizes_of_plans() -> None:
    """2.25 bits of head_dim 64 are 36 bytes, which no plan has: some layers get more than 34, no more than there is."""
    table = np.array([[4.0**-b * 2.0**-g for b in range(9)] for g in range(4)])
    equal = [best_layer_plan(table, table, 32)[1]] * 6
    room = bytes_of_layers(2.25, 64, 6)
    assert room == 6 * 34
    choice = choose_plans(np.arange(1.0, 7.0), [(table, table)] * 6, equal, {s: [] for s in (32, 40)}, 4, room)
    assert [p.bytes_per_token for p in choice.plans] == [34] * 5 + [42]
    assert bytes_of_layers(2.0, 64, 6) < 6 * 32  # "2 bits" leave the scales out: equal layers spend more


def test_verdicts() -> None:
    """A clear gain, beyond its error, on every file."""
    assert Verdict(1.0, 0.7, 0.05, -0.1).convinces
    assert not Verdict(1.0, 0.8, 0.001, -0.1).convinces
    assert not Verdict(1.0, 0.7, 0.2, -0.1).convinces
    assert not Verdict(1.0, 0.7, 0.05, 0.02).convinces


def test_texts_that_choose_do_not_judge(llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Files in turn, no stretch twice; a short text has nothing left to judge by."""
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    tokenizer = AutoTokenizer.from_pretrained(llama)
    found = budget_texts(Corpus([text_file, other], tokenizer, 128), 10)
    assert found["choose_file"].tolist() == [0, 1]
    assert sorted(found["judge_file"].tolist()) == [0, 0, 0, 1, 1, 1]
    grams = [{tuple(row[i : i + 12]) for row in found[n].tolist() for i in range(116)} for n in ("choose", "judge")]
    assert len(grams[0] & grams[1]) <= 0.05 * len(grams[1])
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:300])
    found = budget_texts(Corpus([short], tokenizer, 128, chat=False), 10)
    assert len(found["choose"]) + len(found["judge"]) < 8


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three layers, the last of which matters most."""
    folder = make_model(tmp_path_factory.mktemp("three"), "llama", layers=3)
    return folder


@pytest.fixture(scope="module")
def made(three: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Projection, Path]:
    """A projection with measured layers, and the kept statistics."""
    place = tmp_path_factory.mktemp("made")
    projection = calibrate(three, [text_file], OPTIONS, output=place / "p", device="cpu")
    return projection, place / ".p.partial" / "statistics.safetensors"


def test_layers_alone_cost_what_the_harness_says(three: Path, text_file: Path, made: tuple[Projection, Path]) -> None:
    """Blocks that are skipped change nothing."""
    model = load_model(str(three), "cpu", torch.float32)
    texts = budget_texts(Corpus([text_file], AutoTokenizer.from_pretrained(three), 128), 10, choosing=1)
    codecs = {i: e.codec for i, e in made[0].layers.items()}
    found = sensitivities(model, texts, codecs, 16)
    assert found is not None
    ids = texts["choose"][0]
    window = Window(ids, "", len(ids) - len(ids) // 4)
    exact, rule = Reference(model, window), ReadRule(16, prefill=window.first_scored)
    kl = [float(score(model, window, exact, ProjectionCodec({i: c}), rule).kl.mean()) for i, c in codecs.items()]
    assert found / found.mean() == pytest.approx(np.array(kl) / np.mean(kl), rel=1e-3)
    same = judge(model, texts, codecs, codecs, 16)
    assert same is not None
    assert same.equal == same.unequal > 0
    assert not same.convinces


def test_measured_layers_spend_what_was_asked_for(made: tuple[Projection, Path], three: Path, tmp_path: Path) -> None:
    """Saved, read, solved again from statistics to the same bytes; a cut is refused in the words of the smallest."""
    projection, statistics = made
    sizes = [e.codec.plan.bytes_per_token for e in projection.layers.values()]
    equal = solve_again(three, statistics, dataclasses.replace(OPTIONS, layer_budgets="equal"), "cpu")
    assert len(set(sizes)) > 1
    codec = equal.layers[0].codec
    asked = OPTIONS.bits * 2 * codec.head_dim / 8  # what equal layers may have to stay below
    assert sum(sizes) <= 3 * max(codec.plan.bytes_per_token, asked)
    assert projection.calibration["layer_budgets"] == "unequal"
    assert equal.calibration["layer_budgets"] == "equal"
    assert "asked for" in str(equal.calibration["layer_budgets_reason"])
    bits = projection.calibration["bits_per_element"]
    assert bits == pytest.approx(16 / projection.compression_ratio())
    digest = save_projection(projection, tmp_path / "a")
    assert save_projection(solve_again(three, statistics, OPTIONS, "cpu"), tmp_path / "b") == digest
    assert load_projection(tmp_path / "a").layer_bits == (8 * min(sizes) / 64, 8 * max(sizes) / 64)
    with pytest.raises(CalibrationError, match="smallest layer has"):
        cut(projection, 4.0)


@pytest.mark.parametrize("convinced", [True, False])
def test_auto_keeps_what_text_confirms(
    made: tuple[Projection, Path], three: Path, monkeypatch: pytest.MonkeyPatch, convinced: bool
) -> None:
    """Unequal layers only with a clear gain on text that chose nothing, and the reason in words."""
    verdict = Verdict(0.01, 0.007 if convinced else 0.0095, 0.0005, -0.1)
    monkeypatch.setattr(layer_choice, "judge", lambda *_: verdict)
    monkeypatch.setattr(layer_choice, "PROMISE", -1.0)
    found = solve_again(three, made[1], dataclasses.replace(OPTIONS, layer_budgets="auto"), "cpu")
    about = found.calibration
    assert about["layer_budgets"] == ("unequal" if convinced else "equal")
    assert ("30 % less" if convinced else "no sure gain") in str(about["layer_budgets_reason"])
    assert (len({e.codec.plan.bytes_per_token for e in found.layers.values()}) > 1) == convinced


def test_models_that_cannot_be_measured_stay_equal(
    made: tuple[Projection, Path], three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` ends no calibration that worked before it; `measured` says why it cannot."""

    def refuse(*_: object) -> None:
        raise UnsupportedError("found an attention mask")

    monkeypatch.setattr(layer_choice, "sensitivities", refuse)
    found = solve_again(three, made[1], dataclasses.replace(OPTIONS, layer_budgets="auto"), "cpu")
    assert "measured alone: found an attention mask" in str(found.calibration["layer_budgets_reason"])
    with pytest.raises(UnsupportedError, match="found an attention mask"):
        solve_again(three, made[1], OPTIONS, "cpu")


def test_the_largest_compiled_size_has_nothing_to_give(llama: Path, text_file: Path) -> None:
    """At 4 bits, the default, nothing is measured: no compiled plan has more bytes."""
    options = dataclasses.replace(OPTIONS, plans="auto", rope_block=32, layer_budgets="auto")
    folder = llama.parent / "wide"
    make_model(folder, "llama", 2, 1, 64, layers=3)
    found = calibrate(folder, [text_file], options, device="cpu")
    assert found.calibration["layer_budgets_reason"] == "equal: no plans of more bytes with a CUDA decode kernel"
    with pytest.raises(CalibrationError, match="measured asked for; not possible: no plans of more bytes"):
        calibrate(folder, [text_file], dataclasses.replace(options, layer_budgets="measured"), device="cpu")


def test_models_with_other_layers_stay_equal(made: tuple[Projection, Path], three: Path) -> None:
    """Pages of unequal size beside them would be padded."""
    model = load_model(str(three), "cpu", torch.float32)
    layers = [SimpleNamespace(module=SimpleNamespace()) for _ in range(3)]
    assert layer_choice.whole_context_only(model, layers)  # type: ignore[arg-type]
    assert not layer_choice.whole_context_only(model, layers[:2])  # type: ignore[arg-type]
    layers[0].module.sliding_window = 48
    assert not layer_choice.whole_context_only(model, layers)  # type: ignore[arg-type]
