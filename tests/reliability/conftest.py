# SPDX-License-Identifier: Apache-2.0
"""The marker of this folder's tests, and projection folders to damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.projections import tiny_projection
from tests.reliability.folders import CONFIG, TENSORS
from vllm_kqsvd.projection import save_projection

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("reliability")


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid projection folder, never changed."""
    folder = tmp_path_factory.mktemp("good") / "p"
    save_projection(tiny_projection(), folder)
    return folder


@pytest.fixture
def victim(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for name in (TENSORS, CONFIG):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path
