# SPDX-License-Identifier: Apache-2.0
"""Collects statistics on several processes or machines with ray (optional: `pip install ray`).

Windows depend on their number alone and statistics only add up, so the work splits by step. Sums of another number of
workers differ from a single run's in the last float64 bits, no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kqsvd.calibration.collect import CollectOptions, Collector
from vllm_kqsvd.calibration.statistics import Statistics
from vllm_kqsvd.errors import CalibrationError


def share(steps: Sequence[int], workers: int) -> list[list[int]]:
    """Every worker's steps, in order: runs of neighbours whose lengths differ by at most one."""
    base, extra = divmod(len(steps), workers)
    out, at = [], 0
    for i in range(workers):
        size = base + (i < extra)
        out.append(list(steps[at : at + size]))
        at += size
    return [s for s in out if s]


def _worker(
    model_dir: str, data: list[str], collect: CollectOptions, start: bytes, steps: list[int], device: str
) -> bytes:
    """Statistics of `steps` as the bytes of a statistics file; `start` is an empty one with the sink prototypes."""
    import torch
    from transformers import AutoTokenizer

    from vllm_kqsvd.calibration.capture import load_model
    from vllm_kqsvd.calibration.corpus import Corpus
    from vllm_kqsvd.calibration.model_probe import probe

    corpus = Corpus(data, AutoTokenizer.from_pretrained(model_dir), collect.window_length, collect.seed, collect.chat)
    model = load_model(model_dir, device, torch.bfloat16 if device.startswith("cuda") else torch.float32)
    statistics = _from_bytes(start, device)
    Collector(model, probe(model), corpus, collect).run(statistics, steps)
    return _to_bytes(statistics)


def collect_with_ray(
    model_dir: str | Path,
    data: Sequence[str | Path],
    collect: CollectOptions,
    start: Statistics,
    workers: int,
    device: str = "cpu",
    **ray_options: Any,
) -> Statistics:
    """All windows of a run, spread over `workers` ray tasks (resources per task in `ray_options`, e.g. num_gpus=1).

    start: `Collector.start` of the same options. Raises CalibrationError if ray is not installed.
    """
    try:
        import ray
    except ImportError as e:
        raise CalibrationError("distributed calibration needs ray: pip install ray") from e
    task = ray.remote(_worker)
    if ray_options:
        task = task.options(**ray_options)
    empty = _to_bytes(start)
    steps = range(collect.num_steps)
    files = [str(f) for f in data]
    jobs = [task.remote(str(model_dir), files, collect, empty, part, device) for part in share(steps, workers)]
    total = start
    for part in ray.get(jobs):
        total.merge(_from_bytes(part, device))
    return total


def _to_bytes(statistics: Statistics) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        statistics.save(path)
        return path.read_bytes()


def _from_bytes(data: bytes, device: str) -> Statistics:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.safetensors"
        path.write_bytes(data)
        return Statistics.load(path, None, device)
