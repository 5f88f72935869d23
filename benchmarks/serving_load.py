# SPDX-License-Identifier: Apache-2.0
"""Serving under load, prompts included: `vllm bench serve` against `vllm serve`, every format under the same loads.

    python -m benchmarks.serving_load --arms auto fp8 kqsvd-4 kqsvd-2.5 --loads 8192/1024x96@8,32,96
    python -m benchmarks.serving_load --folder MODEL --arms auto kqsvd-4=DIR --loads 448/64x8@2,4,8 --kv-memory 24M
    python -m benchmarks.serving_load --loads trace --trace mooncake_conversation_trace.jsonl

A load is IN/OUTxREQUESTS, all at once, or with @A,B,... at most so many of them at a time: one point of the curve each.
`tracexN` are N requests of the trace, 150 without a number.
Without `--folder` the weights are random (`--model` names published shapes), a token is a word. `--together` keeps
all servers up and lets them take turns, so that a machine whose speed changes treats them alike; it is meant for
CPUs. Rows go to benchmarks/results/serving_load.csv; `running` is the most requests the server ran at once, `cpu_s`
the CPU seconds its processes took, `machine_load` the load average while they did.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.decode_throughput import BITS, append_row, provenance, write_projection
from benchmarks.demo_server import Server

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
RESULTS = Path(__file__).parent / "results" / "serving_load.csv"
FIGURES = [f"{name}_p{p}" for name in ("ttft", "tpot", "e2el") for p in (50, 99)]  # milliseconds
COLUMNS = (
    "date device versions command model format bits tensor_parallel kv_tokens input_len output_len requests "
    "concurrency running preemptions tok_s"
).split() + [*FIGURES, "start_s", "cpu_s", "machine_load"]
TRACE_REQUESTS = 150


@dataclass(frozen=True)
class Load:
    """Tokens in and out, how many requests, how many of them at a time (None: all). 0 tokens: as the trace says."""

    input_len: int
    output_len: int
    requests: int
    concurrency: int | None = None

    @property
    def name(self) -> str:
        """For messages and file names."""
        what = f"{self.input_len}-{self.output_len}x{self.requests}" if self.input_len else "trace"
        return what + (f"@{self.concurrency}" if self.concurrency else "")


def loads_of(text: str) -> list[Load]:
    """The loads of "448/64x8@2,4", "8192/1024x96", "trace" or "tracex60"."""
    if trace := re.fullmatch(r"trace(?:x([1-9]\d*))?", text):
        return [Load(0, 0, int(trace[1] or TRACE_REQUESTS))]
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+)(?:@(\d+(?:,\d+)*))?", text)
    if match is None or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is no load such as 448/64x8@2,4 or 8192/1024x96")
    at = [int(n) for n in match[4].split(",")] if match[4] else [None]
    return [Load(int(match[1]), int(match[2]), int(match[3]), n) for n in at]


def serve_arguments(arm: str, projection: Path | None, options: argparse.Namespace) -> list[str]:
    """Arguments of `vllm serve MODEL` for one arm."""
    arguments = ["--max-model-len", str(options.max_model_len), "--tensor-parallel-size", str(options.tensor_parallel)]
    arguments.append("--no-enable-prefix-caching")  # the loads share their random prompts
    if not options.folder:
        arguments += ["--load-format", "dummy"]
    arguments += shlex.split(options.serve)
    if options.kv_memory:
        arguments += ["--kv-cache-memory-bytes", options.kv_memory]
    else:
        arguments += ["--gpu-memory-utilization", "0.85"]
    if projection is None:
        return [*arguments, "--kv-cache-dtype", arm]
    config = {"kqsvd": {"projection": str(projection)}}
    return [*arguments, "--attention-backend", "CUSTOM", "--additional-config", json.dumps(config)]


def bench_command(load: Load, model: Path, port: int, result: Path, options: argparse.Namespace) -> list[str]:
    """`vllm bench serve` of one load."""
    command = [*VLLM, "bench", "serve", "--port", str(port), "--model", str(model), "--ignore-eos"]
    command += ["--num-prompts", str(load.requests), "--percentile-metrics", "ttft,tpot,e2el"]
    command += ["--metric-percentiles", "50,99", "--save-result", "--result-dir", str(result.parent)]
    command += ["--result-filename", result.name, "--seed", "1", "--temperature", "0", "--disable-tqdm"]
    command += ["--ready-check-timeout-sec", "0"]  # it would send one more request
    if not load.input_len:
        command += ["--dataset-name", "timed_trace", "--dataset-path", str(options.trace_cut)]
        scale = str(options.trace_scale)
        return [*command, "--timed-trace-chunk-hash-size", "512", "--timed-trace-sec-multiplier", scale]
    command += ["--dataset-name", "random", "--random-input-len", str(load.input_len)]
    command += ["--random-output-len", str(load.output_len), "--random-range-ratio", "0"]
    return command + (["--max-concurrency", str(load.concurrency)] if load.concurrency else [])


def cut_trace(options: argparse.Namespace, count: int, folder: Path) -> Path:
    """The trace's first `count` requests that fit the server's context."""
    path, lines = folder / "trace.jsonl", []
    for line in options.trace.open():
        record = json.loads(line)
        if record["input_length"] + record["output_length"] < options.max_model_len - 64:
            lines.append(line)
        if len(lines) == count:
            break
    path.write_text("".join(lines))
    return path


class Watch:
    """Asks a server every second how many requests it runs, and counts its CPU seconds; a context manager."""

    def __init__(self, server: Server) -> None:
        self.url = f"{server.url}/metrics"
        self._process = psutil.Process(server.process.pid)
        self.running = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._before = self._sum("num_preemptions_total"), self._cpu_seconds()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.preemptions = self._sum("num_preemptions_total") - self._before[0]
        self.cpu_seconds = self._cpu_seconds() - self._before[1]

    def _cpu_seconds(self) -> float:
        times = [p.cpu_times() for p in (self._process, *self._process.children(recursive=True))]
        return sum(t.user + t.system for t in times)

    def _sum(self, name: str) -> int:
        with urllib.request.urlopen(self.url, timeout=60) as answer:
            found = re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", answer.read().decode(), re.M)
        return int(sum(map(float, found)))

    def _look(self) -> None:
        while not self._over.wait(1):
            with suppress(OSError):  # a server that is busy; the next second is as good
                self.running = max(self.running, self._sum("num_requests_running"))


def device() -> str:
    """The GPU's name, or the CPU's with the threads it may use."""
    found = provenance()["device"]
    if found != "cpu":
        return found
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    return f"CPU ({name[1] if name else platform.machine()}), {threads} thread{'s' * (str(threads) != '1')}"


def command_line(arguments: list[str]) -> str:
    """This run's command, folders by their names."""
    short = [re.sub(r"[^=]*/", "", a) if "/" in a and Path(a.split("=")[-1]).exists() else a for a in arguments]
    return "python -m benchmarks.serving_load " + shlex.join(short)


@dataclass(frozen=True)
class Arm:
    """A cache format to serve: its name, the projection it needs, bits per element."""

    name: str
    projection: Path | None
    bits: float | None


def arm_of(text: str, model: Path, options: argparse.Namespace) -> Arm:
    """The arm of "auto", "kqsvd-4=DIR" or, with random bases, "kqsvd-4"."""
    name, _, given = text.partition("=")
    if given:
        from vllm_kqsvd.projection import load_projection

        found = load_projection(given)
        elements = sum(2 * e.codec.num_kv_heads * e.codec.head_dim for e in found.layers.values())
        return Arm(name, Path(given).resolve(), 8 * found.bytes_per_token / elements)
    if name.startswith("kqsvd"):
        return Arm(name, model / name, write_projection(name, model, options.model))
    return Arm(name, None, BITS.get(name))


@contextmanager
def serving(arm: Arm, model: Path, options: argparse.Namespace) -> Iterator[tuple[Server, dict]]:
    """(server of one arm, what its rows have in common)."""
    begin = time.perf_counter()
    arguments = serve_arguments(arm.name, arm.projection, options)
    with Server(model, arguments, options.logs / f"serve.{arm.name}.log") as server:
        common = {
            **provenance("serving_load"),
            "device": device(),
            "command": command_line(sys.argv[1:]),
            "model": options.model,
            "format": arm.name,
            "bits": arm.bits,
            "tensor_parallel": options.tensor_parallel,
            "kv_tokens": server.kv_tokens(),
            "start_s": round(time.perf_counter() - begin, 1),
        }
        yield server, common


def measure(load: Load, model: Path, server: Server, common: dict, options: argparse.Namespace) -> None:
    """One load against one server: a row, or the benchmark's own words if it failed."""
    result = options.logs / f"{common['format']}.{load.name}.json"
    result.unlink(missing_ok=True)
    command = bench_command(load, model, server.port, result, options)
    with Watch(server) as watch:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.load_limit)
    if not result.exists():
        print(f"{common['format']} {load.name}: failed\n{done.stdout[-1500:]}{done.stderr[-1500:]}", flush=True)
        return
    found = json.loads(result.read_text())
    row = common | {
        "input_len": load.input_len or "trace",
        "output_len": load.output_len or "trace",
        "requests": found["completed"],
        "concurrency": load.concurrency or "",
        "running": watch.running,
        "preemptions": watch.preemptions,
        "tok_s": round(found["output_throughput"], 2),
        "cpu_s": round(watch.cpu_seconds, 1),
        "machine_load": round(os.getloadavg()[0], 1),
    }
    row |= {name: round(found[f"{name[-3:]}_{name[:4]}_ms"], 2) for name in FIGURES}
    append_row(row, options.output, COLUMNS)
    shown = "requests running tok_s ttft_p50 tpot_p50 e2el_p50 cpu_s".split()
    figures = ", ".join(f"{name} {row[name]}" for name in shown)
    print(f"{common['format']} {load.name}: {figures} in {found['duration']:.0f} s", flush=True)


def measure_all(model: Path, options: argparse.Namespace) -> None:
    """Every load against every arm: arm by arm, or all servers taking turns."""
    loads = [load for loads in options.loads for load in loads]
    arms = [arm_of(text, model, options) for text in options.arms]

    def start(arm: Arm, stack: ExitStack) -> list[tuple[Server, dict]]:
        try:
            return [stack.enter_context(serving(arm, model, options))]
        except RuntimeError as error:  # a server that did not start does not cost the other arms
            print(f"{arm.name}: {error}", flush=True)
            return []

    if options.together:
        with ExitStack() as stack:
            with ThreadPoolExecutor() as pool:
                servers = [s for found in pool.map(lambda arm: start(arm, stack), arms) for s in found]
            for load in loads:
                for server in servers:
                    measure(load, model, *server, options)
        return
    for arm in arms:
        with ExitStack() as stack:
            for server in start(arm, stack):
                for load in loads:
                    measure(load, model, *server, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b", help="published shapes to serve with random weights")
    parser.add_argument("--folder", type=Path, help="a real model instead of random weights")
    parser.add_argument("--arms", nargs="+", default=["auto", "fp8", "kqsvd-4", "kqsvd-2.5"], metavar="ARM[=DIR]",
                        help="--kv-cache-dtype, or kqsvd-BITS with its projection folder")  # fmt: skip
    parser.add_argument("--loads", nargs="+", type=loads_of, metavar="LOAD", required=True)
    parser.add_argument("--max-model-len", type=int, default=40960)
    parser.add_argument("--kv-memory", metavar="BYTES", help="bytes of the cache (default: of 85 %% of the GPU)")
    parser.add_argument("--serve", default="", metavar="ARGUMENTS", help="more arguments of `vllm serve`, as one word")
    parser.add_argument("--together", action="store_true", help="all servers up, taking turns")
    parser.add_argument("--trace", type=Path, help="JSON lines of timestamp, input_length, output_length, hash_ids")
    parser.add_argument("--trace-scale", type=float, default=0.001, help="seconds per unit of the trace's timestamps")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--load-limit", type=float, default=600, metavar="SECONDS")
    parser.add_argument("--logs", type=Path, default=Path("."))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    traced = {load.requests for loads in options.loads for load in loads if not load.input_len}
    if len(traced) > 1:
        parser.error("one load of the trace at a time")
    if traced and not options.trace:
        parser.error("the load `trace` needs --trace FILE")
    from benchmarks.shapes import SHAPES, model_folder, write_word_tokenizer

    with tempfile.TemporaryDirectory() as tmp:
        if options.folder:
            options.model, folder = options.folder.name, options.folder.resolve()
        else:
            folder = model_folder(options.model, Path(tmp))
            write_word_tokenizer(folder, int(SHAPES[options.model]["vocab_size"]))
        if traced:
            options.trace_cut = cut_trace(options, max(traced), Path(tmp))
        measure_all(folder, options)


if __name__ == "__main__":
    main()
