# SPDX-License-Identifier: Apache-2.0
"""The local data of lm-eval's tasks, and the files that describe them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
from benchmarks.lm_eval_documents import FOLDER, passage, windows  # noqa: E402

TASKS = Path(__file__).parents[1] / "benchmarks" / "lm_eval"


def test_a_passage_ends_before_a_word_that_it_had() -> None:
    text = "The harbour was quiet. Ships left it early, and at night the lamps of the harbour went out, one by one"
    found = passage(text)
    assert found == {"context": text[: text.rindex(" harbour")], "word": "harbour"}
    assert passage("Nothing here stands in this text a second time, whatever one does") is None


def test_windows_are_spread_over_the_text() -> None:
    assert list(windows(list(range(10)), 4, 3)) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(SystemExit, match="give a longer text"):
        list(windows([1, 2], 4, 1))


@pytest.mark.parametrize("name", ["long_document", "last_word"])
def test_tasks_read_what_is_written(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    assert task["task"] == f"kqsvd_{name}"
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).parent == FOLDER
