# SPDX-License-Identifier: Apache-2.0
"""Serving options: what is accepted, what is refused and with which hint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_kqsvd.config import KQSVDConfig
from vllm_kqsvd.errors import ConfigError


def served(additional_config: object, model: str = "nowhere") -> SimpleNamespace:
    """The two fields of a VllmConfig that options are read from."""
    return SimpleNamespace(additional_config=additional_config, model_config=SimpleNamespace(model=model))


def test_defaults() -> None:
    config = KQSVDConfig.from_vllm(served({"kqsvd": {"projection": "p"}, "other": 1}))
    assert config == KQSVDConfig(Path("p"), window=64, implementation="auto", digest="", self_test=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projecton": "p"}, "did you mean 'projection'"),
        ({"projection": "p", "banana": 1}, "known are projection, window"),
        ({"projection": "p", "window": 0}, "at least 32"),
        ({"projection": "p", "window": 72}, "multiple of 16"),
        ({"projection": "p", "window": "64"}, "must be of type int"),
        ({"projection": "p", "self_test": 1}, "must be of type bool"),
        ({"projection": 3}, "must be of type str"),
        ({"projection": "p", "implementation": "gpu"}, "use one of auto, cuda"),
        ({"window": 64}, "needs a projection"),
        ([], "must be an object"),
    ],
)
def test_refused(options: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KQSVDConfig.from_vllm(served({"kqsvd": options}))


def test_projection_beside_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kqsvd calibrate"):
        KQSVDConfig.from_vllm(served({}, str(tmp_path)))
    (tmp_path / "kqsvd").mkdir()
    (tmp_path / "kqsvd" / "kqsvd_config.json").write_text("{}")
    config = KQSVDConfig.from_vllm(served({"kqsvd": {"window": 32}}, str(tmp_path)))
    assert (config.projection, config.window) == (tmp_path / "kqsvd", 32)
