# SPDX-License-Identifier: Apache-2.0
"""The results page: tables, provenance, the plot of serving, and pictures that are there."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from benchmarks import report, report_tables, serving_plot  # noqa: E402
from benchmarks.report_tables import newest, number, pivot, provenance, read, table  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
LOAD = {
    "date": "2026-11-22", "device": "GPU", "versions": "vllm 1", "command": "bench", "model": "m", "format": "fp8",
    "bits": "8", "tensor_parallel": "1", "input_len": "8192", "output_len": "1024", "requests": "96", "kv_tokens": "9",
    "tok_s": "1234.5", "ttft_p50": "10", "ttft_p99": "20", "tpot_p50": "5", "tpot_p99": "7",
}  # fmt: skip


def test_newest_row_counts_and_blanks_stay_blank() -> None:
    rows = [{"a": "1", "us": "9"}, {"a": "2", "us": "8"}, {"a": "1", "us": "7"}]
    assert [r["us"] for r in newest(rows, ["a"])] == ["7", "8"]
    assert number("") == "" and number("1234.56", 1) == "1,234.6"
    head, lines = pivot(
        [{"n": "1", "f": "x", "us": "3"}, {"n": "1", "f": "y", "us": "4"}], ["n"], "f", "us", ["y", "x"]
    )
    assert (head, lines) == (["n", "y", "x"], [["1", "4", "3"]])
    assert table(["a", "b"], [["x", "1"]]).splitlines()[1] == "| --- | ---: |" and table(["a"], []) == "No rows yet."


def test_provenance_names_all_four() -> None:
    line = provenance([LOAD, {**LOAD, "date": "2026-11-25", "versions": "vllm 1; projection ab12"}])
    assert line == "*GPU; vllm 1; 2026-11-22 to 2026-11-25; `bench`*"
    assert "3 more like it" in provenance([{**LOAD, "command": str(i)} for i in range(5)])


def test_rows_under_load_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_tables, "RESULTS", tmp_path)
    rows = [LOAD, {**LOAD, "format": "kqsvd-2.5", "tok_s": "2000"}, {**LOAD, "input_len": "trace", "tpot_p99": ""}]
    with (tmp_path / "serving.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(LOAD))
        writer.writeheader()
        writer.writerows([*rows, {**LOAD, "tpot_p50": ""}])  # a row without latency is not one of load
    assert len(serving_plot.load_rows()) == 3
    serving_plot.main([str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    text = report.serving_section()
    assert "| m | 8192 in, 1024 out, 96 requests | kqsvd-2.5 | 8.00 | 2,000 |" in text and "images/serving_load" in text


def test_every_picture_of_the_documents_is_there() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_local_link_leads_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"(?<!!)\[[^]]*\]\(([^)#\s]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_results_hold_only_known_tables() -> None:
    assert {"decode_attention", "fidelity", "serving", "store_latent"} == report.SHOWN
    assert all(read(name) for name in report.SHOWN)
