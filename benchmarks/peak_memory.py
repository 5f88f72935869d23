# SPDX-License-Identifier: Apache-2.0
"""Largest memory that this process and everything it started held together, sampled while it runs."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

PERIOD = 1.0  # seconds


def held() -> int:
    """Bytes held now by this process and its descendants, shared pages counted once (PSS; RSS without it)."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            memory = process.memory_full_info()
        except psutil.Error:  # gone, or not ours to read
            continue
        total += getattr(memory, "pss", memory.rss)
    return total


class PeakMemory:
    """Context manager; `bytes` is the largest sample so far."""

    def __init__(self, period: float = PERIOD) -> None:
        self.bytes = 0
        self._period, self._done = period, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.bytes = max(self.bytes, held())
            self._done.wait(self._period)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
