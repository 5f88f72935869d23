# SPDX-License-Identifier: Apache-2.0
"""The growing statistics of a calibration: damaged, of other data, or wanted by two calibrations at once."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.reliability import sized
from vllm_kqsvd.calibration.calibrate import only_user
from vllm_kqsvd.calibration.sinks import Prototypes
from vllm_kqsvd.calibration.statistics import LayerStatistics, Statistics
from vllm_kqsvd.errors import CalibrationError

OPTIONS: dict[str, object] = {"model": "ab", "data": [{"file": "text.txt"}], "collect": {"seed": 0}}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A statistics file of two layers."""
    gen = torch.Generator().manual_seed(0)
    layers = []
    for _ in range(2):
        proto = {s: Prototypes(torch.zeros(2, 16).double(), torch.ones(2, 16).double()) for s in ("k", "v")}
        layer = LayerStatistics(2, 16, proto, "cpu")
        for side in ("k", "v"):
            layer.add_tokens(side, torch.randn(2, 40, 16, generator=gen), torch.arange(8))
        layer.add_queries(torch.randn(4, 40, 16, generator=gen))
        layers.append(layer)
    path = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    Statistics(layers, OPTIONS, 3).save(path)
    return path.read_bytes()


def load(path: Path) -> Statistics | str:
    """The statistics, or the text of the one error."""
    try:
        return Statistics.load(path, OPTIONS, "cpu")
    except CalibrationError as e:
        assert "without --resume" in str(e) and "\n" not in str(e)
        return str(e)


def test_damaged_statistics_are_named(content: bytes, tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "statistics.safetensors"
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content)
    assert isinstance(load(path), Statistics)
    for length in [0, 1, 8, len(content) - 1] + [rng.randrange(len(content)) for _ in range(sized(50, 1000))]:
        path.write_bytes(content[:length])
        assert isinstance(load(path), str)
    for _ in range(sized(300, 5000)):
        broken = bytearray(content)
        broken[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        load(path)


def test_another_file_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    header = json.dumps({"options": OPTIONS, "steps_done": 1})
    one = {"0.q_gram": torch.zeros(1, 4, 4)}
    for tensors, text in (({}, header), (one, header), ({"x": torch.zeros(1)}, header), (one, "[]"), (one, "{}")):
        save_file(tensors, path, {"kqsvd_statistics": text})
        assert isinstance(load(path), str)
    save_file(one, path)
    assert isinstance(load(path), str)
    path.write_bytes(b"")
    assert isinstance(load(path), str)


def test_two_calibrations_do_not_share_an_output(tmp_path: Path) -> None:
    folder = tmp_path / ".p.partial"
    with (
        only_user(folder),
        pytest.raises(CalibrationError, match="another calibration is writing"),
        only_user(folder),
    ):
        pass
    pid = os.fork()
    if pid == 0:
        with only_user(folder):
            os._exit(0)  # dies without letting go
    assert os.waitpid(pid, 0)[1] == 0
    with only_user(folder):
        pass
