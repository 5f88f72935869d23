# SPDX-License-Identifier: Apache-2.0
"""benchmarks.fidelity_layers: the costs it reads, and mixtures."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fidelity_layers import COLUMNS, mixed, read_costs
from tests.helpers import random_codec, side_plan
from tests.projections import HEAD_DIM, KV_HEADS, LAYERS, tiny_projection
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.projection import Projection, load_projection, save_projection


def two_projections(folder: Path) -> list[Projection]:
    """One of 10 bytes of codes a tile row more than the other, saved and read again."""
    rich = tiny_projection()
    layers = {}
    for i, entry in rich.layers.items():
        codec = random_codec(LayerPlan(side_plan(2, 2), side_plan(2, 2)), KV_HEADS, HEAD_DIM, entry.rope_block, seed=i)
        layers[i] = replace(entry, codec=replace(codec, rope=entry.codec.rope))
    found = []
    for n, one in enumerate((rich, replace(rich, layers=layers))):
        save_projection(one, folder / str(n))
        found.append(load_projection(folder / str(n)))
    return found


def test_costs_and_mixture(tmp_path: Path) -> None:
    """Windows and texts are averaged in logarithms, incomplete columns left out; a mixture is a projection."""
    projections = two_projections(tmp_path)
    table = tmp_path / "table.csv"
    kl = {
        ("prose", 0): [1.0, 4.0, 16.0],
        ("prose", 1): [2.0, 2.0, 2.0],
        ("code", 0): [0.1, 0.1, 0.1],
        ("code", 1): [9.0],
    }
    with table.open("w", newline="") as f:
        writer = csv.DictWriter(f, COLUMNS)
        writer.writeheader()
        for (text, window), values in kl.items():
            for layer, value in enumerate(values):
                digest = projections[1].digest[:12]
                writer.writerow({"text": text, "window": window, "layer": layer, "digest": digest, "kl": value})
    cost = read_costs(table, projections)
    assert cost[:, 1] == pytest.approx(np.array([0.25, 1, 4]) ** 0.25)
    more_bits = 16 / projections[0].compression_ratio() - 16 / projections[1].compression_ratio()
    assert more_bits > 0
    assert cost[:, 0] == pytest.approx(cost[:, 1] / 4**more_bits)
    save_projection(mixed(projections, [1, 0, 1]), tmp_path / "mixed")
    found = load_projection(tmp_path / "mixed")
    sizes = [[p.layers[i].bytes_per_token for i in range(LAYERS)] for p in (*projections, found)]
    assert sizes[2] == [sizes[1][0], sizes[0][1], sizes[1][2]]
    assert found.calibration["mixed_from"] == [p.digest for p in projections]
