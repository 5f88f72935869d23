# SPDX-License-Identifier: Apache-2.0
"""Minutes of `benchmarks.long_run`: mixed load, clients that leave, preemptions, prefix hits, an empty cache."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("aiohttp")

from benchmarks import long_run  # noqa: E402
from benchmarks.long_run_watch import Sample, risers, trend  # noqa: E402
from tests.reliability import LONG  # noqa: E402


@pytest.mark.skipif(not LONG, reason="takes minutes: make reliability")
def test_mixed_load(tmp_path: Path) -> None:
    pool = ["--longest", "2048", "--chunk", "256", "--blocks", "48", "--clients", "10", "--answer", "64"]
    files = [
        "--log",
        str(tmp_path / "log"),
        "--plot",
        str(tmp_path / "plot.png"),
        "--output",
        str(tmp_path / "out.csv"),
    ]
    assert long_run.main(["--minutes", "8", "--device", "cpu", *pool, *files]) == 0
    with (tmp_path / "out.csv").open() as f:
        (row,) = csv.DictReader(f)
    assert int(row["longest_prompt"]) == 2048 - 64 and float(row["cache_left"]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_leak_is_seen() -> None:
    seconds = [5.0 * n for n in range(120)]
    warm_up = [500 + min(300.0, 3 * s) for s in seconds]  # flat after 100 s
    assert trend(seconds, warm_up).flat()
    leak = [x + s / 10 for x, s in zip(warm_up, seconds, strict=True)]  # 360 MiB an hour
    found = trend(seconds, leak)
    assert not found.flat() and abs(found.growth - 360) < 1


def test_the_process_that_leaks_is_named() -> None:
    def sample(n: int) -> Sample:
        held = {"engine 7": 400.0, "worker 8": 500 + n / 2}  # 60 MiB in the end, 45 of them after the first quarter
        return Sample(5.0 * n, sum(held.values()), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, held)

    samples = [sample(n) for n in range(120)]
    assert risers(samples) == "worker 8 by 45"
    assert risers([Sample(s.seconds, 0, 0, 0, 0, 0, 0, 0, {"engine 7": 400.0}) for s in samples]) == ""
