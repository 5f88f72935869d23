# SPDX-License-Identifier: Apache-2.0
"""Where one decode step of vLLM spends its time at a full cache: host milliseconds and GPU kernels, arm by arm.

    python -m benchmarks.step_profile --arms auto fp8 kqsvd-2.5 --requests 48 [--steps 40]

Requests start with their context in the cache (DecodeBenchConnector); once all run, `--steps` plain steps are timed and
then a few are profiled. `host_ms` is what the engine's own work costs per step (scheduling, inputs, metadata,
launches): the median profiled step less the time it is blocked in CUDA. It is hidden while the GPU is busy longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def kernel_table(profile, steps: int, rows: int) -> list[tuple[str, float, float]]:
    """(kernel, microseconds per step, launches per step), longest first."""
    from torch.autograd import DeviceType

    table = [
        (e.key, e.self_device_time_total / steps, e.count / steps)
        for e in profile.key_averages()
        if e.device_type == DeviceType.CUDA
    ]
    return sorted(table, key=lambda r: -r[1])[:rows]


def host_time(profile) -> float:
    """Milliseconds of the median profiled step that are not spent waiting for the GPU."""
    events = [e.time_range for e in profile.events() if e.name == "engine_step"]
    waits = [e.time_range for e in profile.events() if e.name in WAITS]
    host = [
        (step.end - step.start - sum(w.end - w.start for w in waits if step.start <= w.start < step.end)) / 1e3
        for step in events
    ]
    return statistics.median(host)


def run_arm(arm: str, model: Path, options: argparse.Namespace) -> dict:
    """Profile one arm in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from vllm import LLM, SamplingParams

    from benchmarks.decode_throughput import engine_options

    llm = LLM(**engine_options(arm, model, options))
    engine = llm.llm_engine
    params = SamplingParams(max_tokens=options.output_len, ignore_eos=True, temperature=0.0, detokenize=False)
    gen = torch.Generator().manual_seed(0)
    for i in range(options.requests):
        ids = torch.randint(10, 100000, (options.input_len,), generator=gen).tolist()
        engine.add_request(str(i), {"prompt_token_ids": ids}, params)
    ramp = time.perf_counter()
    steps = 0
    produced: set[str] = set()
    while len(produced) < options.requests and steps < 4 * options.requests:
        produced |= {o.request_id for o in engine.step()}
        steps += 1
    torch.cuda.synchronize()
    ramp = time.perf_counter() - ramp
    for _ in range(5):
        engine.step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(options.steps):
        engine.step()
    torch.cuda.synchronize()
    step_ms = (time.perf_counter() - start) / options.steps * 1e3
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for _ in range(options.profiled):
            with record_function("engine_step"):
                engine.step()
    kernels = kernel_table(prof, options.profiled, options.rows)
    busy = sum(r[1] for r in kernel_table(prof, options.profiled, 10**6)) / 1e3
    if options.trace:
        prof.export_chrome_trace(f"{options.trace}.{arm}.json.gz")
    return {
        "ramp_s": round(ramp, 2),
        "ramp_steps": steps,
        "running": len(produced),
        "step_ms": round(step_ms, 2),
        "gpu_ms": round(busy, 2),
        "host_ms": round(host_time(prof), 2),
        "kernels": [(k[:90], round(us, 1), round(n, 1)) for k, us, n in kernels],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--arms", nargs="+", default=["auto", "fp8", "kqsvd-4", "kqsvd-2.5"])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--input-len", type=int, default=8192)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--compilation", help="JSON for vLLM's compilation_config")
    parser.add_argument("--executor", choices=("mp", "ray"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profiled", type=int, default=9)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--trace", help="prefix of Chrome traces to write")
    parser.add_argument("--run-arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run_arm:
        print("RESULT " + json.dumps(run_arm(options.run_arm, options.folder, options)), flush=True)
        return
    from benchmarks.decode_throughput import write_projection
    from benchmarks.shapes import model_folder

    with tempfile.TemporaryDirectory() as tmp:
        folder = model_folder(options.model, Path(tmp))
        for arm in options.arms:
            if arm.startswith("kqsvd"):
                write_projection(arm, folder, options.model)
            command = [sys.executable, "-m", "benchmarks.step_profile", *sys.argv[1:]]
            command += ["--run-arm", arm, "--folder", str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            lines = [x[7:] for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if not lines:
                print(f"{arm}: failed\n{done.stdout[-3000:]}", flush=True)
                continue
            result = json.loads(lines[0])
            kernels = result.pop("kernels")
            print(f"{arm}: {json.dumps(result)}", flush=True)
            for name, us, count in kernels:
                print(f"  {us:9.1f} us {count:7.1f} x  {name}", flush=True)


if __name__ == "__main__":
    main()
