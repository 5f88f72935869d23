# SPDX-License-Identifier: Apache-2.0
"""Rows of the task table from lm-eval's folders: scores, standard errors, what ran."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from benchmarks.lm_eval_results import Sample, accuracy, perplexity, read, table


def test_perplexity_and_its_error() -> None:
    assert perplexity([Sample(-20.0, 10), Sample(-40.0, 20)]) == (pytest.approx(math.exp(2)), pytest.approx(0))
    # Over equal lengths it is the mean's own standard error, times the perplexity.
    losses = [2.0, 3.0, 5.0, 2.5]
    mean = sum(losses) / 4
    error = math.sqrt(sum((x - mean) ** 2 for x in losses) / 3 / 4)
    found = perplexity([Sample(-x * 7, 7) for x in losses])
    assert found == (pytest.approx(math.exp(mean)), pytest.approx(math.exp(mean) * error))


def test_error_covers_the_spread_of_repeated_draws() -> None:
    rng = random.Random(0)

    def draw() -> list[Sample]:
        sizes = [rng.randint(50, 150) for _ in range(12)]
        return [Sample(-n * rng.gauss(2, 0.3), n) for n in sizes]

    found = [perplexity(draw()) for _ in range(400)]
    scores = [s for s, _ in found]
    middle = sum(scores) / 400
    spread = math.sqrt(sum((s - middle) ** 2 for s in scores) / 399)
    assert sum(e for _, e in found) / 400 == pytest.approx(spread, rel=0.1)


def test_ratio_is_paired() -> None:
    exact = [Sample(-20.0, 10), Sample(-90.0, 20)]
    worse = [Sample(s.loglikelihood - 0.01 * s.words, s.words) for s in exact]
    assert perplexity(worse, exact) == (pytest.approx(math.exp(0.01)), pytest.approx(0, abs=1e-9))


def test_accuracy_has_lm_evals_error() -> None:
    assert accuracy([Sample(0, 1, float(i % 2)) for i in range(24)]) == (0.5, pytest.approx(0.1043, abs=1e-4))


def write(folder: Path, shift: float) -> None:
    folder.mkdir(parents=True)
    settings = {"pretrained": "somewhere/tiny", "additional_config": {"kqsvd": {"projection": "a/b/tiny-4bit"}}}
    run = {"config": {"model_args": settings}, "configs": {"kqsvd_long_document": {}}}
    run |= {"lm_eval_version": "0.4.13", "pretty_env_info": "PyTorch version: 2.11.0\nIs debug build: False"}
    (folder / "results_2026.json").write_text(json.dumps(run))
    documents = [
        {"doc_id": i, "doc": {"tokens": n}, "word_perplexity": [-n * (2 + shift), n]}
        for i, n in ((2, 40), (0, 10), (1, 40))
    ]
    words = [{"doc_id": i, "doc": {}, "perplexity": -1.0 - shift, "acc": 1} for i in range(3)]
    for name, rows in (("kqsvd_long_document", documents), ("kqsvd_last_word", words)):
        (folder / f"samples_{name}_2026.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_rows(tmp_path: Path) -> None:
    write(tmp_path / "ours", 0.01)
    write(tmp_path / "bf16" / "model", 0.0)
    rows = table(tmp_path, "bf16", {"versions": "vllm 0.33.0", "device": "GPU", "date": "d", "model": "tiny"})
    assert [r["cache"] for r in rows[:4]] == ["bf16"] * 4 and len(rows) == 4 + 7
    ours = {r["task"]: (r["samples"], r["score"]) for r in rows if r["cache"] == "ours"}
    assert ours["lm-eval last word"] == (3, "1.00000")
    assert ours["lm-eval long document, 40 tokens, perplexity"] == (2, f"{math.exp(2.01):.5f}")
    assert ours["lm-eval long document, 40 tokens, perplexity / uncompressed"] == (2, "1.01005")
    assert "tiny-4bit" in rows[-1]["command"] and "a/b" not in rows[-1]["command"]
    assert rows[-1]["versions"] == "vllm 0.33.0; lm-eval 0.4.13; torch 2.11.0; served in auto"


def test_a_run_in_pieces_is_joined_and_no_sample_counts_twice(tmp_path: Path) -> None:
    write(tmp_path / "bf16" / "a", 0.0)
    write(tmp_path / "whole", 0.0)
    other = tmp_path / "bf16" / "b"
    write(other, 0.0)
    with pytest.raises(SystemExit, match="twice"):
        read(tmp_path / "bf16")
    for path in other.glob("samples*"):
        rows = map(json.loads, path.read_text().splitlines())
        path.write_text("".join(json.dumps({**r, "doc_id": r["doc_id"] + 3}) + "\n" for r in rows))
    whole, both = read(tmp_path / "whole")[0], read(tmp_path / "bf16")[0]
    assert {t: len(x) for t, x in both.items()} == {t: 2 * len(x) for t, x in whole.items()}
    with pytest.raises(SystemExit, match="different samples"):
        table(tmp_path, "bf16", {"versions": ""})
    with pytest.raises(SystemExit, match="no results"):
        read(tmp_path / "nothing")
