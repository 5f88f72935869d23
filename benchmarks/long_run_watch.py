# SPDX-License-Identifier: Apache-2.0
"""What a server holds and does over time: memory of its processes and of the GPU, tokens, cache, and their trends."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.demo_server import Server

WARM_UP = 0.25  # share of a run before memory is expected to be flat
SPANS = 5  # of what follows: long prompts come and go within one, so each has seen the floor of memory
FLOOR = 10  # percentile


@dataclass(frozen=True)
class Sample:
    """One look: memory in MiB, the rest as on /metrics."""

    seconds: float
    host_mib: float
    device_mib: float  # 0 without a GPU
    tokens_out: float
    running: float
    cache_use: float
    preemptions: float
    prefix_hits: float
    by_process: dict[str, float]  # process -> MiB of `host_mib`


def held_mib(server: Server) -> dict[str, float]:
    """Memory that only the server's processes hold: anonymous and shared, resident or swapped; no mapped files.

    Files are left out because the system may drop and read them again at will.
    """
    found = {}
    for pid, title in server.members().items():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        kib = sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon:", "RssShmem:", "VmSwap:")))
        found[f"{title.split(' ')[0].rsplit('/', 1)[-1]} {pid}"] = kib / 1024
    return found


def device_mib() -> float:
    """Memory in use on the first GPU that this process may use."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={first}"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


class Watch(threading.Thread):
    """Samples until it is stopped; an answer of /metrics that fails is an error of the run."""

    def __init__(self, server: Server, on_gpu: bool, every: float) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self.errors: list[str] = []
        self._server, self._on_gpu, self._every = server, on_gpu, every
        self._stopped = threading.Event()
        self._began = time.monotonic()

    def run(self) -> None:
        """Look, wait, look again."""
        while not self._stopped.wait(self._every):
            try:
                self.samples.append(self._look())
            except OSError as e:
                self.errors.append(f"/metrics: {e}")

    def _look(self) -> Sample:
        metrics = self._server.metrics()
        held = held_mib(self._server)
        return Sample(
            time.monotonic() - self._began,
            sum(held.values()),
            device_mib() if self._on_gpu else 0.0,
            metrics["vllm:generation_tokens_total"],
            metrics["vllm:num_requests_running"],
            metrics["vllm:kv_cache_usage_perc"],
            metrics["vllm:num_preemptions_total"],
            metrics["vllm:prefix_cache_hits_total"],
            held,
        )

    def preempted_and_hit(self) -> bool:
        """Whether requests have been preempted and prefixes found since the first sample."""
        first, last = (self.samples[0], self.samples[-1]) if self.samples else (None, None)
        return bool(first and last and last.preemptions > first.preemptions and last.prefix_hits > first.prefix_hits)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join()


@dataclass(frozen=True)
class Trend:
    """A line through the floor of memory after the warm-up; what a long prompt takes for a while stands above it."""

    first: float  # MiB at its beginning
    last: float  # MiB at its end
    minutes: float  # between them

    @property
    def growth(self) -> float:
        """MiB per hour."""
        return 60 * (self.last - self.first) / self.minutes if self.minutes else 0.0

    def flat(self, share: float = 0.02, least: float = 16.0) -> bool:
        """Whether the line rises by less than `share` of the memory (or `least` MiB)."""
        return self.last - self.first <= max(share * self.first, least)


def trend(seconds: list[float], mib: list[float]) -> Trend:
    """Least squares through the floors of equal spans after the warm-up."""
    x, y = np.array(seconds), np.array(mib)
    keep = x >= x[0] + WARM_UP * (x[-1] - x[0])
    spans = [s for s in np.array_split(np.flatnonzero(keep), SPANS) if len(s)]
    middle = np.array([x[s].mean() for s in spans])
    slope, level = np.polyfit(middle, [np.percentile(y[s], FLOOR) for s in spans], 1)
    begin, end = x[keep][0], x[-1]
    return Trend(level + slope * begin, level + slope * end, (end - begin) / 60)


def risers(samples: list[Sample]) -> str:
    """Which processes' floors rise, by how much; empty if none does by a MiB."""
    seconds = [s.seconds for s in samples]
    lines = {name: trend(seconds, [s.by_process.get(name, 0.0) for s in samples]) for name in samples[-1].by_process}
    risen = {name: x.last - x.first for name, x in lines.items() if x.last - x.first >= 1}
    return ", ".join(f"{name} by {mib:.0f}" for name, mib in sorted(risen.items(), key=lambda x: -x[1]))


def draw(samples: list[Sample], out: Path) -> None:
    """Plot of memory, throughput and cache use over time."""
    from matplotlib.figure import Figure

    minutes = [s.seconds / 60 for s in samples]
    figure = Figure(figsize=(8, 6), layout="constrained")
    memory, speed, cache = figure.subplots(3, 1, sharex=True)
    memory.plot(minutes, [s.host_mib for s in samples], label="host, all processes")
    if any(s.device_mib for s in samples):
        memory.plot(minutes, [s.device_mib for s in samples], label="GPU")
    memory.set(ylabel="MiB", ylim=(0, None))
    memory.legend()
    rates = [
        (b.tokens_out - a.tokens_out) / (b.seconds - a.seconds) for a, b in zip(samples, samples[1:], strict=False)
    ]
    speed.plot(minutes[1:], rates)
    speed.set(ylabel="output tokens/s", ylim=(0, None))
    cache.plot(minutes, [100 * s.cache_use for s in samples])
    cache.set(ylabel="cache in use, %", xlabel="minutes", ylim=(0, 100))
    for axes in (memory, speed, cache):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
