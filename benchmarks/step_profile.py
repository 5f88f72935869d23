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

from benchmarks.decode_throughput import (
    BITS,
    add_engine_arguments,
    append_row,
    engine_options,
    provenance,
    write_projection,
)

RESULTS = Path(__file__).parent / "results" / "step_profile.csv"
COLUMNS = (
    "date device versions command model format bits input_len users step_ms gpu_ms host_ms attention_us_per_layer tok_s"
).split()
ATTENTION = ("kqsvd::decode::", "FlashAttn", "flash_fwd")  # names of decode attention's kernels
WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize")


def kernel_table(profile, steps: int) -> list[tuple[str, float, float]]:
    """(kernel, microseconds per step, launches per step), longest first."""
    from torch.autograd import DeviceType

    table = [
        (e.key, e.self_device_time_total / steps, e.count / steps)
        for e in profile.key_averages()
        if e.device_type == DeviceType.CUDA and e.key != "engine_step"  # the mark spans kernels, it is none
    ]
    return sorted(table, key=lambda r: -r[1])


def host_time(profile) -> float:
    """Milliseconds of the median profiled step that are not spent waiting for the GPU."""
    all_events = profile.events()
    events = [e.time_range for e in all_events if e.name == "engine_step"]
    waits = [e.time_range for e in all_events if e.name in WAITS]
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
    kernels = kernel_table(prof, options.profiled)
    attention = sum(us for name, us, _ in kernels if any(x in name for x in ATTENTION))
    layers = llm.llm_engine.vllm_config.model_config.hf_text_config.num_hidden_layers
    if options.trace:
        prof.export_chrome_trace(f"{options.trace}.{arm}.json.gz")
    return {
        "ramp_s": round(ramp, 2),
        "ramp_steps": steps,
        "running": len(produced),
        "step_ms": round(step_ms, 2),
        "gpu_ms": round(sum(us for _, us, _ in kernels) / 1e3, 2),
        "attention_us_per_layer": round(attention / layers, 1),
        "tok_s": round(len(produced) / step_ms * 1e3),
        "host_ms": round(host_time(prof), 2),
        "kernels": [(k[:90], round(us, 1), round(n, 1)) for k, us, n in kernels[: options.rows]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_engine_arguments(parser, requests=48)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profiled", type=int, default=9)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--trace", help="prefix of Chrome traces to write")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.requests:
        parser.error("--requests takes a number here")
    if options.run_arm:
        print("RESULT " + json.dumps(run_arm(options.run_arm, options.folder, options)), flush=True)
        return
    from benchmarks.shapes import model_folder

    with tempfile.TemporaryDirectory() as tmp:
        folder = model_folder(options.model, Path(tmp))
        for arm in options.arms:
            bits = write_projection(arm, folder, options.model) if arm.startswith("kqsvd") else BITS.get(arm)
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
            row = {"model": options.model, "format": arm, "bits": bits, "input_len": options.input_len}
            row |= {"users": result["running"], **result}
            append_row({**provenance("step_profile"), **row}, options.output, COLUMNS)
            for name, us, count in kernels:
                print(f"  {us:9.1f} us {count:7.1f} x  {name}", flush=True)


if __name__ == "__main__":
    main()
