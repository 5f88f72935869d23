# SPDX-License-Identifier: Apache-2.0
"""The demo's memory figure sees children and falls back into no error when they end."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

pytest.importorskip("psutil")
from benchmarks.peak_memory import PeakMemory  # noqa: E402

CHILD = "import sys, time; x = b'1' * (200 << 20); print('held', flush=True); time.sleep(30)"


def test_a_childs_memory_counts() -> None:
    with PeakMemory(period=0.05) as alone:
        time.sleep(0.2)
    with PeakMemory(period=0.05) as memory:
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        time.sleep(0.3)
        child.kill()
        child.wait()
        time.sleep(0.2)
    assert 0.8 < (memory.bytes - alone.bytes) / (200 << 20) < 1.5
