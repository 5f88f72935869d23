# SPDX-License-Identifier: Apache-2.0
"""Grading of task answers, and means over the same texts only."""

from __future__ import annotations

import json

from benchmarks.fidelity_plot import on_common_texts
from benchmarks.fidelity_tasks import grade, passes, table

CODE = {
    "id": "HumanEval/x",
    "task": "humaneval",
    "head": "from math import floor\n\n\ndef half(x):\n",
    "test": "def check(f):\n    assert f(5) == 2\n\ncheck(half)\n",
    "entry": "half",
}
FOUND = {"id": "ruler/8192/niah/0", "task": "ruler-8192-niah", "wanted": ["123", "456"]}
ASKED = {"id": "ruler/8192/qa_1/0", "task": "ruler-8192-qa_1", "wanted": ["Paris", "the capital"]}


def test_programs_are_run_against_their_tests():
    assert passes(CODE, "    return floor(x / 2)\n")
    assert passes(CODE, "def half(x):\n    return floor(x / 2)\n")  # the prompt's imports are kept
    assert not passes(CODE, "    return x\n")
    assert not passes(CODE, "    import sys; sys.exit(1)\n")


def test_ruler_counts_the_strings_found():
    assert grade(FOUND, "the numbers are 123 and 789") == 0.5
    assert grade(ASKED, "It is paris.") == 1.0


def test_table_has_a_row_per_kind_of_task(tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "fp8.jsonl"
    prompts.write_text("".join(json.dumps(t) + "\n" for t in (FOUND, ASKED)))
    answers.write_text("".join(json.dumps({"id": t["id"], "answer": "123 456"}) + "\n" for t in (FOUND, ASKED)))
    (row,) = table(prompts, [answers], {"model": "m"})
    assert (row["task"], row["samples"], row["score"], row["cache"]) == ("ruler-8192", 2, "0.5000", "fp8")


def test_means_compare_on_common_texts():
    rows = [{"method": m, "bits": "4", "window": "64", "text": t} for m, t in (("a", "x"), ("a", "y"), ("b", "x"))]
    assert {(r["method"], r["text"]) for r in on_common_texts(rows)} == {("a", "x"), ("b", "x")}
