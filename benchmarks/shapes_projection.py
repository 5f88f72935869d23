# SPDX-License-Identifier: Apache-2.0
"""Projection folders with random bases for the shapes of `benchmarks.shapes`: good for speed, useless for text."""

from __future__ import annotations

from pathlib import Path

from benchmarks.shapes import random_codec
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import LayerEntry, ModelFingerprint, Projection, save_projection


def write_random_projection(config: dict, model: Path, plan: LayerPlan, out: Path, rope_block: int = 32) -> None:
    """Write a projection of `model` (a folder with config.json) whose layers all use `plan`."""
    fingerprint = ModelFingerprint.from_hf(model)
    rope = fingerprint.rope[0].spec()
    layers = {
        i: LayerEntry(
            i,
            f"model.layers.{i}.self_attn",
            "page",
            rope_block,
            0,
            None,
            "random",
            "random",
            random_codec(config, plan, rope, rope_block, seed=i),
        )
        for i in range(config["num_hidden_layers"])
    }
    save_projection(Projection(fingerprint, layers, {"data": "none: random bases"}), out)
