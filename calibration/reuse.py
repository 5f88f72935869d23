# SPDX-License-Identifier: Apache-2.0
"""Other budgets, bases and rope modes from the statistics of an earlier calibration, without its text: the moments say
everything but the bits (nested budgets from one calibration, as MatryoshkaKV, arXiv 2410.14731, cuts one basis)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from vllm_kqsvd.calibration.calibrate import CalibrateOptions, project
from vllm_kqsvd.calibration.capture import load_model
from vllm_kqsvd.calibration.collect import CollectOptions
from vllm_kqsvd.calibration.model_probe import probe
from vllm_kqsvd.calibration.statistics import Statistics
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.projection import ModelFingerprint, Projection


@dataclasses.dataclass(frozen=True)
class KnownText:
    """The text statistics were made from, as their file remembers it."""

    files: list[dict[str, object]]

    def describe(self) -> list[dict[str, object]]:
        """Name, size and digest of every file."""
        return self.files


def solve_again(
    model_dir: str | Path, statistics: str | Path, options: CalibrateOptions, device: str | None = None
) -> Projection:
    """A projection of these options from a statistics file; `options.collect` is what the file was collected with.

    Raises CalibrationError for a file of another model, one that is not finished, or none at all.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = Statistics.load(Path(statistics), None, device)
    known: dict[str, Any] = loaded.options
    try:
        model, text, collect = known["model"], KnownText(known["data"]), CollectOptions(**known["collect"])
    except (KeyError, TypeError) as e:
        raise CalibrationError(f"{statistics} does not say what it was made from; calibrate with --data") from e
    if model != ModelFingerprint.from_hf(model_dir).weights_sha256:
        raise CalibrationError(f"{statistics} belongs to another model than {model_dir}; calibrate with --data")
    if loaded.steps_done < collect.num_steps:
        raise CalibrationError(
            f"{statistics} holds {loaded.steps_done} of {collect.num_steps} windows; finish that run with --resume"
        )
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = load_model(str(model_dir), device, dtype)
    settings = dataclasses.replace(options, collect=collect)
    return project(model_dir, probe(model), loaded, text, settings, device, model)
