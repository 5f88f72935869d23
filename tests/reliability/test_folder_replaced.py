# SPDX-License-Identifier: Apache-2.0
"""A projection that is replaced, by writers that may be killed, while others read it: old or new, never neither."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.projections import tiny_projection
from tests.reliability import sized
from vllm_kqsvd import projection_write
from vllm_kqsvd.projection import Projection, load_projection, save_projection

PAIR = (tiny_projection(), tiny_projection(spectrum=False))


@contextmanager
def forked(work: Callable[[], None]) -> Iterator[int]:
    """A copy of this process that repeats `work` until it is killed; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                work()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status), "the writer failed by itself"


@pytest.fixture(autouse=True)
def plain_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plot: half a second each, and matplotlib locks what a fork may leave locked."""
    monkeypatch.setattr("vllm_kqsvd.model_card.write_plot", lambda *_: False)


def writer(folder: Path) -> Callable[[], None]:
    """Saves one projection after the other."""

    def work() -> None:
        for projection in PAIR:
            save_projection(projection, folder)

    return work


def exchanges(folder: Path) -> bool:
    """Whether the file system swaps names in one step."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    return projection_write._exchange(folder / "a", folder / "b")


@pytest.fixture
def digests(tmp_path: Path) -> set[str]:
    return {save_projection(p, tmp_path / f"known{i}") for i, p in enumerate(PAIR)}


def test_readers_see_the_old_or_the_new_one(tmp_path: Path, digests: set[str]) -> None:
    if not exchanges(tmp_path):
        pytest.skip("this file system cannot exchange two names")
    save_projection(PAIR[0], tmp_path / "p")
    seen = []
    with forked(writer(tmp_path / "p")):
        end = time.monotonic() + sized(3, 60)
        while time.monotonic() < end or len(set(seen)) < 2:
            seen.append(load_projection(tmp_path / "p").digest)
            assert time.monotonic() < end + 60
    assert set(seen) == digests


def test_a_killed_writer_leaves_a_whole_projection(tmp_path: Path, digests: set[str]) -> None:
    rng = random.Random(1)
    save_projection(PAIR[0], tmp_path / "p")
    atomic = exchanges(tmp_path)
    for _ in range(sized(15, 300)):
        with forked(writer(tmp_path / "p")):
            time.sleep(rng.uniform(0.0, 0.12))
        assert not atomic or load_projection(tmp_path / "p").digest in digests
    save_projection(PAIR[0], tmp_path / "p")
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".p.") and f.name.endswith(".tmp")] == []


def test_two_writers_at_once_leave_a_whole_projection(tmp_path: Path, digests: set[str]) -> None:
    def patient() -> None:
        try:
            writer(tmp_path / "p")()
        except Exception as e:  # the other one was faster with the same name
            assert "cannot be written" in str(e), e

    with forked(patient), forked(patient):
        time.sleep(sized(2, 30))
    assert load_projection(tmp_path / "p").digest in digests


def test_many_processes_share_one_folder(tmp_path: Path) -> None:
    """As the workers of two servers do: all read the same, none writes."""
    before = save_projection(PAIR[0], tmp_path / "p")
    state = {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (tmp_path / "p").iterdir()}
    os.chmod(tmp_path / "p", 0o555)
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            found: Projection | None = None
            try:
                for _ in range(10):
                    found = load_projection(tmp_path / "p")
            finally:
                os._exit(int(found is None or found.digest != before))
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
    assert state == {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in (tmp_path / "p").iterdir()}
