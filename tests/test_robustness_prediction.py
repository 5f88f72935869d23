# SPDX-License-Identifier: Apache-2.0
"""What calibration predicts of the logit error is what `kqsvd verify` measures, and prints, within a factor of 1.5."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.calibration.conftest import make_model
from vllm_kqsvd.calibration.calibrate import PRESETS, CalibrateOptions, collect_statistics, project
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.projection import save_projection
from vllm_kqsvd.verify import verify
from vllm_kqsvd.verify_result import PREDICTION_FACTOR

COLLECT = CollectOptions(
    num_windows=4, window_length=256, gradient_windows=1, gradient_length=256, samples=600, window=32
)


def text(path: Path, seed: int) -> Path:
    """Sentences of the same words in another order for every seed."""
    words = ["".join(random.Random(i).choices("etaoinshrdlu", k=i % 8 + 2)) for i in range(300)]
    rng = random.Random(seed)
    path.write_text("\n".join(" ".join(rng.choices(words, k=12)) for _ in range(200)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """A folder with a tiny model and held-out text, and what a calibration collected."""
    place = tmp_path_factory.mktemp("prediction")
    model = make_model(place / "model", "llama", head_dim=64)
    text(place / "held_out.txt", 2)
    return place, collect_statistics(model, [text(place / "seen.txt", 1)], CalibrateOptions(collect=COLLECT))


@pytest.mark.parametrize("preset", ["balanced", "compact", "capacity"])
def test_prediction_holds_and_is_printed(made, preset: str) -> None:
    place, (statistics, layers, corpus) = made
    options = CalibrateOptions(bits=PRESETS[preset], collect=COLLECT)
    projection = project(place / "model", layers, statistics, corpus, options)
    save_projection(projection, place / preset)
    result, _ = verify(place / "model", place / preset, [place / "held_out.txt"], context=256, window=32)
    assert result.prediction_ratio is not None
    assert 1 / PREDICTION_FACTOR < result.prediction_ratio < PREDICTION_FACTOR
    assert f"measured is {result.prediction_ratio:.2f} times that" in result.table()
    assert "unlike the calibration text" not in result.verdict()


def test_foreign_text_is_named(made) -> None:
    """A text of one repeated character is nothing like the calibrated one; the verdict says so."""
    place, (statistics, layers, corpus) = made
    if not (place / "balanced").exists():
        save_projection(project(place / "model", layers, statistics, corpus, CalibrateOptions()), place / "balanced")
    (place / "foreign.txt").write_text("\x01\x02" * 2000)
    result, _ = verify(place / "model", place / "balanced", [place / "foreign.txt"], context=256, window=32)
    assert result.prediction_ratio is not None and result.prediction_ratio > PREDICTION_FACTOR
    assert "unlike the calibration text" in result.verdict()
