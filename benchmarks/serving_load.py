# SPDX-License-Identifier: Apache-2.0
"""Serving under load with real prefill: `vllm serve` and `vllm bench serve`, one server per arm, several cases.

    python -m benchmarks.serving_load --tokenizer DIR --arms auto fp8 kqsvd-4 kqsvd-2.5 --cases light one-user 8k/1k
    python -m benchmarks.serving_load --tokenizer DIR --cases trace --trace mooncake_conversation_trace.jsonl

Weights are random (published shapes, `--load-format dummy`), so any tokenizer does. Rows go to
benchmarks/results/serving.csv; `requests` is how many were sent, all at once unless the case says otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decode_throughput import BITS, RESULTS, append_row, provenance, write_projection
from benchmarks.demo_server import Server

MAX_MODEL_LEN = 40960
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")


@dataclass(frozen=True)
class Case:
    """A load: tokens in and out, how many requests, and how many of them at a time (None: all)."""

    input_len: int
    output_len: int
    requests: int
    concurrency: int | None = None


CASES = {
    "light": Case(8192, 32, 12, 1),  # TTFT of a lone user
    "one-user": Case(1024, 256, 4, 1),  # TPOT of a lone user
    "8k/1k": Case(8192, 1024, 96),
    "2k/2k": Case(2048, 2048, 256),
    "32k/1k": Case(32768, 1024, 32),
    "trace": Case(0, 0, 150),
}


def serve_arguments(arm: str, model: Path, options: argparse.Namespace) -> list[str]:
    """Arguments of `vllm serve MODEL` for one arm."""
    arguments = ["--load-format", "dummy", "--max-model-len", str(MAX_MODEL_LEN), "--gpu-memory-utilization", "0.85"]
    arguments += ["--tensor-parallel-size", str(options.tensor_parallel)]
    if options.compilation:
        arguments += ["--compilation-config", options.compilation]
    if arm.startswith("kqsvd"):
        config = {"kqsvd": {"projection": str(model / arm)}}
        return [*arguments, "--attention-backend", "CUSTOM", "--additional-config", json.dumps(config)]
    return [*arguments, "--kv-cache-dtype", arm]


def bench_command(
    case: Case, name: str, model: Path, port: int, result: Path, options: argparse.Namespace
) -> list[str]:
    """`vllm bench serve` of one case."""
    command = [*VLLM, "bench", "serve", "--port", str(port), "--model", str(model), "--ignore-eos"]
    command += [
        "--num-prompts",
        str(case.requests),
        "--percentile-metrics",
        "ttft,tpot",
        "--metric-percentiles",
        "50,99",
    ]
    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name, "--seed", "1"]
    command += ["--temperature", "0", "--disable-tqdm"]
    if name == "trace":
        command += ["--dataset-name", "timed_trace", "--dataset-path", str(options.trace_cut)]
        return [
            *command,
            "--timed-trace-chunk-hash-size",
            "512",
            "--timed-trace-sec-multiplier",
            str(options.trace_scale),
        ]
    command += ["--dataset-name", "random", "--random-input-len", str(case.input_len)]
    command += ["--random-output-len", str(case.output_len), "--random-range-ratio", "0"]
    return command + (["--max-concurrency", str(case.concurrency)] if case.concurrency else [])


def cut_trace(options: argparse.Namespace, folder: Path) -> Path:
    """The trace's first requests that fit the server's context, as many as the case has."""
    path, lines = folder / "trace.jsonl", []
    for line in options.trace.open():
        record = json.loads(line)
        if record["input_length"] + record["output_length"] < MAX_MODEL_LEN - 64:
            lines.append(line)
        if len(lines) == CASES["trace"].requests:
            break
    path.write_text("".join(lines))
    return path


def run_case(name: str, model: Path, server: Server, result: Path, options: argparse.Namespace) -> dict | None:
    """What `vllm bench serve` found for one case; None, with its words printed, if it failed."""
    command = bench_command(CASES[name], name, model, server.port, result, options)
    done = subprocess.run(command, capture_output=True, text=True, timeout=options.case_limit)
    if result.exists():
        return json.loads(result.read_text())
    print(f"{name}: failed\n{done.stdout[-1500:]}{done.stderr[-1500:]}", flush=True)
    return None


def run_arm(arm: str, model: Path, options: argparse.Namespace) -> None:
    """Serve one arm and run every case against it."""
    bits = write_projection(arm, model, options.model) if arm.startswith("kqsvd") else BITS.get(arm)
    begin = time.perf_counter()
    with Server(model, serve_arguments(arm, model, options), options.logs / f"serve.{arm}.log") as server:
        start_s = round(time.perf_counter() - begin, 1)
        for name in options.cases:
            case, result = CASES[name], options.logs / f"{arm}.{name.replace('/', '-')}.json"
            r = run_case(name, model, server, result, options)
            if r is None:
                continue
            row = {
                **provenance(),
                "command": f"python -m benchmarks.serving_load --arms {arm} --cases {name}",
                "model": options.model,
                "format": arm,
                "bits": bits,
                "tensor_parallel": options.tensor_parallel,
                "input_len": case.input_len or name,
                "output_len": case.output_len or name,
                "requests": r["completed"],
                "kv_tokens": server.kv_tokens(),
                "tok_s": round(r["output_throughput"], 1),
                "start_s": start_s,
            }
            row |= {f"{m}_p{p}": round(r[f"p{p}_{m}_ms"], 2) for m in ("ttft", "tpot") for p in (50, 99)}
            append_row(row, options.output)
            shown = "requests tok_s ttft_p50 ttft_p99 tpot_p50 tpot_p99 kv_tokens".split()
            print(f"{arm} {name}: {json.dumps({k: row[k] for k in shown})} in {r['duration']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json; any will do")
    parser.add_argument("--arms", nargs="+", default=["auto", "fp8", "kqsvd-4", "kqsvd-2.5"])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=["light", "one-user", "8k/1k", "2k/2k"])
    parser.add_argument("--trace", type=Path, help="JSON lines of timestamp, input_length, output_length, hash_ids")
    parser.add_argument("--trace-scale", type=float, default=0.001, help="seconds per unit of the trace's timestamps")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--compilation", help="JSON for vLLM's compilation config")
    parser.add_argument("--case-limit", type=float, default=600)
    parser.add_argument("--logs", type=Path, default=Path("."))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if "trace" in options.cases and not options.trace:
        parser.error("the trace case needs --trace FILE")
    from benchmarks.shapes import model_folder

    with tempfile.TemporaryDirectory() as tmp:
        folder = model_folder(options.model, Path(tmp))
        for file in options.tokenizer.glob("tokenizer*"):
            shutil.copy(file, folder / file.name)
        if options.trace:
            options.trace_cut = cut_trace(options, Path(tmp))
        for arm in options.arms:
            try:
                run_arm(arm, folder, options)
            except RuntimeError as error:  # a server that did not start does not cost the other arms
                print(f"{arm}: {error}", flush=True)


if __name__ == "__main__":
    main()
