# SPDX-License-Identifier: Apache-2.0
"""The results page: tables, provenance, the plot of serving, and pictures that are there."""

from __future__ import annotations

import argparse
import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib")
from benchmarks import report, report_tables, report_tasks, serving_load, serving_plot, shapes  # noqa: E402
from benchmarks.report_tables import newest, number, pivot, provenance, read, table  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs"
LOAD = {
    "date": "2026-11-22", "device": "GPU", "versions": "vllm 1", "command": "bench", "model": "m", "format": "fp8",
    "bits": "8", "tensor_parallel": "1", "input_len": "8192", "output_len": "1024", "requests": "96", "kv_tokens": "9",
    "concurrency": "8", "running": "7", "tok_s": "1234.5", "ttft_p50": "10", "ttft_p99": "20", "tpot_p50": "5",
    "tpot_p99": "7",
}  # fmt: skip


def test_newest_row_counts_and_blanks_stay_blank() -> None:
    rows = [{"a": "1", "us": "9"}, {"a": "2", "us": "8"}, {"a": "1", "us": "7"}]
    assert [r["us"] for r in newest(rows, ["a"])] == ["7", "8"]
    assert number("") == "" and number("1234.56", 1) == "1,234.6"
    old = {"a": "1", "us": "6", "command": "not recorded"}
    assert [r["us"] for r in newest([*rows, old], ["a"])] == ["7", "8"]  # a row that names its command is preferred
    head, lines = pivot(
        [{"n": "1", "f": "x", "us": "3"}, {"n": "1", "f": "y", "us": "4"}], ["n"], "f", "us", ["y", "x"]
    )
    assert (head, lines) == (["n", "y", "x"], [["1", "4", "3"]])
    assert table(["a", "b"], [["x", "1"]]).splitlines()[1] == "| --- | ---: |" and table(["a"], []) == "No rows yet."


def test_provenance_names_all_four() -> None:
    line = provenance([LOAD, {**LOAD, "date": "2026-11-25", "versions": "vllm 1; projection ab12"}])
    assert line == "*GPU; vllm 1; 2026-11-22 to 2026-11-25; `bench`*"
    line = provenance([LOAD, {**LOAD, "command": "not recorded"}])
    assert line.endswith("`bench`; 1 of 2 figures are older, their exact command was not recorded*")
    assert "3 more like it" in provenance([{**LOAD, "command": str(i)} for i in range(5)])


def test_rows_under_load_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_tables, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "IMAGES", tmp_path)
    assert "No rows yet" in report.load_section()
    more = {**LOAD, "concurrency": "", "tok_s": "2000", "tpot_p99": ""}  # all 96 at once
    rows = [more, LOAD, {**LOAD, "format": "kqsvd-2.5"}, {**LOAD, "input_len": "trace", "device": "CPU (x), 1 thread"}]
    with (tmp_path / "serving_load.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(LOAD))
        writer.writeheader()
        writer.writerows(rows)
    assert [serving_plot.at_a_time(r) for r in serving_plot.load_rows()] == [8, 8, 8, 96]
    serving_plot.main([str(tmp_path / "out.png")])
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    text = report.load_section()
    assert "| m | 96 x 8192 in, 1024 out | 96 | fp8 | 8.00 | 9 | 7 | 2,000.0 |" in text
    assert "images/serving_load" in text and "On a CPU" in text


def test_loads_are_read_as_written() -> None:
    assert serving_load.loads_of("448/64x8@2,4") == [serving_load.Load(448, 64, 8, 2), serving_load.Load(448, 64, 8, 4)]
    assert serving_load.loads_of("8192/1024x96")[0].name == "8192-1024x96"
    for text in ("", "8/8", "8x8", "0/8x8", "8/8x8@0", "8/8x8@2,", "light"):
        with pytest.raises(argparse.ArgumentTypeError):
            serving_load.loads_of(text)


def test_what_is_asked_of_vllm(tmp_path: Path) -> None:
    options = SimpleNamespace(
        max_model_len=528, tensor_parallel=1, folder=tmp_path, serve="--enforce-eager", kv_memory="24M"
    )
    plain = serving_load.serve_arguments("auto", None, options)
    assert plain[-2:] == ["--kv-cache-dtype", "auto"] and {"--enforce-eager", "24M"} <= set(plain)
    assert "--load-format" not in plain
    ours = serving_load.serve_arguments("kqsvd-4", tmp_path, options)
    assert json.loads(ours[-1]) == {"kqsvd": {"projection": str(tmp_path)}} and "CUSTOM" in ours
    bench = serving_load.bench_command(serving_load.Load(448, 64, 8, 2), tmp_path, 1, tmp_path / "r.json", options)
    assert " --random-input-len 448 --random-output-len 64 " in " ".join(bench) and bench[-2:] == [
        "--max-concurrency",
        "2",
    ]
    (tmp_path / "m").mkdir()
    line = serving_load.command_line(
        ["--folder", str(tmp_path / "m"), "--arms", f"kqsvd-4={tmp_path}/m", "--loads", "8/8x8"]
    )
    assert line == "python -m benchmarks.serving_load --folder m --arms kqsvd-4=m --loads 8/8x8"


def test_random_weights_get_a_tokenizer_of_words(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    shapes.write_word_tokenizer(tmp_path, 64)
    words = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [5, 63, 5, 0]
    assert words.encode(words.decode(ids)).ids == ids and words.get_vocab_size() == 64


def test_every_figure_names_its_origin() -> None:
    for file in sorted(report_tables.RESULTS.glob("*.csv")):
        for line, row in enumerate(read(file.stem), 2):
            missing = [k for k in ("date", "device", "command") if not row.get(k)]
            assert not missing and report_tables.versions(row), f"{file.name}:{line}: {missing or 'versions'}"


def test_every_picture_of_the_documents_is_there() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_local_link_leads_somewhere() -> None:
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"(?<!!)\[[^]]*\]\(([^)#\s]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_results_hold_only_known_tables() -> None:
    shown = {"decode_attention", "fidelity", "fidelity_tasks", "robustness", "serving", "serving_load", "store_latent"}
    assert shown == report.SHOWN
    assert all(read(name) for name in report.SHOWN)


def test_tasks_are_one_line_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_tables, "RESULTS", tmp_path)
    assert report_tasks.section() == ""
    each = {"date": "2026-11-22", "device": "GPU", "versions": "vllm 1", "command": "lm_eval", "model": "m"}
    scores = [("exact", "humaneval", "0.2"), ("exact", "humaneval", "0.71234"), ("ours", "humaneval", "0.7")]
    scores += [("ours", "lm-eval long document, 9 tokens, perplexity", "25")]
    scores += [("ours", "lm-eval long document, 9 tokens, perplexity / uncompressed", "1.00092")]
    rows = [{**each, "cache": c, "task": t, "samples": 8, "score": s, "standard_error": "0.03"} for c, t, s in scores]
    with (tmp_path / "fidelity_tasks.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    page = report_tasks.section()
    assert "| exact | 0.712 ± 0.030 (8) |" in page and "0.200" not in page and "25" not in page
    assert "| ours | 1.0009 ± 0.0300 (8) |" in page and "long document, 9 tokens, perplexity ratio" in page
