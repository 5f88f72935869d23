# SPDX-License-Identifier: Apache-2.0
"""Status files, their sums over ranks, and the NaN guard (/metrics of a real server: test_serve)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm_kqsvd import metrics, status  # noqa: E402
from vllm_kqsvd.attention.nan_guard import NanGuard  # noqa: E402
from vllm_kqsvd.status import RankStatus  # noqa: E402


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A status folder of this test's own, not made yet."""
    monkeypatch.setenv(status.FOLDER, str(tmp_path / "s"))
    return tmp_path / "s"


def test_ranks_are_read_as_they_were_published(folder: Path) -> None:
    assert status.read_all() == [] and status.stamp() == ()
    ranks = [RankStatus(rank=r, layers={"page/cpu": 3}, kv_tokens=100 + r) for r in range(2)]
    for rank in reversed(ranks):
        status.publish(rank)
    assert status.read_all() == ranks and folder.stat().st_mode & 0o077 == 0
    before = status.stamp()
    (folder / "engine0-rank1.json").write_text("{ half a file")
    assert status.read_all() == ranks[:1] and status.stamp() != before
    (folder / "engine0-rank1.json").write_text(json.dumps({"rank": 1, "of_a_later_version": 1}))
    assert status.read_all()[1] == RankStatus(rank=1)


def test_a_folder_that_cannot_be_written_stops_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file")
    status.publish(RankStatus())
    assert status.read_all() == []
    monkeypatch.delenv(status.FOLDER)
    status.publish(RankStatus())
    assert status.read_all() == []


def test_a_server_names_a_folder_its_children_share_and_removes_it() -> None:
    script = """
import multiprocessing, os
from vllm_kqsvd import status
def child(seen):
    status.open_session(); status.publish(status.RankStatus(rank=1)); seen.put(os.environ[status.FOLDER])
if __name__ == "__main__":
    status.open_session(); mine = os.environ[status.FOLDER]; status.open_session()
    spawn = multiprocessing.get_context("spawn"); seen = spawn.Queue()
    process = spawn.Process(target=child, args=(seen,)); process.start(); theirs = seen.get(); process.join()
    print(mine, theirs, os.environ[status.FOLDER], len(status.read_all()))
"""
    file = Path(os.environ[status.FOLDER]).parent / "session.py"
    file.write_text(script)
    out = subprocess.run([sys.executable, file], capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == out[1] == out[2] != os.environ[status.FOLDER] and out[3] == "1"
    assert not Path(out[0]).exists()


def test_sums_over_ranks() -> None:
    def rank(stage: int, tensor: int, **more: int) -> RankStatus:
        layers = {"page/cuda": 2, "page/triton": 1}
        status = RankStatus(0, 0, stage, tensor, layers=layers, latent_bytes=10, exact_bytes=40, bits_per_element=4.0)
        return replace(status, **{"kv_tokens": 90, "kv_tokens_exact": 30, **more})

    ranks = [rank(0, 0), rank(0, 1, kv_tokens=80, nan_trips=4), rank(1, 0), rank(1, 1)]
    values = metrics.values_of(ranks)
    assert values["kv_bytes_per_token"] == 40 and values["kv_bytes_per_token_uncompressed"] == 160
    assert values["kv_tokens"] == 80 and values["kv_tokens_gained"] == 50 and values["kv_bits_per_element"] == 4
    assert values["nan_guard_trips"] == 4 and values["ranks"] == 4
    assert metrics.layers_of(ranks) == {("page", "cuda"): 4, ("page", "triton"): 2}
    assert set(values) <= set(metrics.GAUGES)
    mixed = metrics.values_of([rank(0, 0, kv_tokens_exact=0)])  # beside native layers nothing is comparable
    assert mixed["kv_tokens"] == 90 and "compression_ratio" not in mixed and "kv_tokens_gained" not in mixed


def test_without_custom_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "gauges", lambda: pytest.fail("gauges were made"))
    status.publish(RankStatus(kv_tokens=1))
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=None), model_config=SimpleNamespace(served_model_name="m")
    )
    logger = metrics.KQSVDStatLogger(config, [0])  # type: ignore[arg-type]
    logger.log_engine_initialized()
    logger.record(SimpleNamespace(num_running_reqs=1), None)  # type: ignore[arg-type]


def test_nan_guard_counts_steps_and_ignores_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_kqsvd.attention.nan_guard.POLL_SECONDS", 0.0)
    guard = NanGuard(torch.device("cpu"), RankStatus())
    starts = torch.tensor([0, 1, 3, 3], dtype=torch.int32)  # three live rows of five
    output = torch.zeros(5, 2, 4, dtype=torch.bfloat16)
    output[3:] = float("nan")
    guard.count(output, starts)
    guard.poll()
    assert status.read_all() == []
    for bad in (float("nan"), float("inf")):
        output[2, 1, 3] = bad
        guard.count(output, starts)
    guard.poll()
    assert [r.nan_trips for r in status.read_all()] == [2]
