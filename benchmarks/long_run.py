# SPDX-License-Identifier: Apache-2.0
"""A long run of mixed load against a real `vllm serve`: does it stay right, does it stay flat?

    python -m benchmarks.long_run --minutes 30                                  (a tiny random model; CPU or GPU)
    python -m benchmarks.long_run MODEL --projection DIR --minutes 8

Prompts of 16 tokens to the longest sequence, prefixes shared, clients leaving, a cache so small that requests are
preempted. Every answer must have its length; answers to known prompts must be those of the prompts alone, up to
nearly equal tokens (benchmarks/answers.py); the floor of memory must be flat after the first quarter; at the end the
cache must be empty. A table is printed and a row added to benchmarks/results/long_run.csv; its last column says what
was not as it must be, and the exit status is then 1. `--native` runs the same load on vLLM's own cache, for comparison.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.decode_throughput import append_row, provenance
from benchmarks.demo_server import OFFLINE, Server
from benchmarks.long_run_load import Crowd, Load, Tally, solo_runs
from benchmarks.long_run_watch import Watch, draw, risers, trend

COLUMNS = (
    "date device versions command model kv_tokens minutes answers left errors tokens_in tokens_out longest_prompt "
    "preemptions prefix_hit_rate compared equal near furthest_behind unexplained host_mib host_mib_per_hour device_mib "
    "device_mib_per_hour cache_left wrong"
).split()
RESULTS = Path(__file__).parent / "results" / "long_run.csv"
BLOCK = 128  # tokens of a latent page
# oneDNN keeps 1,024 matrix products on a CPU, one for each weight and number of rows: memory rises until they are
# there, on any attention backend (docs/reliability.md), and would hide a leak
STEADY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")}
TREND_MINUTES = 4  # shorter runs say nothing about leaks


def random_model(folder: Path, longest: int, bits: int) -> tuple[Path, Path]:
    """A two-layer random Llama and a projection of equal bits."""
    from tests.attention.models import write_model, write_projection

    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = write_model(folder / "model", **shape, max_position_embeddings=longest)
    return model, write_projection(folder / "projection", model, bits, layers=2)


def arguments_of(options: argparse.Namespace, projection: Path, on_gpu: bool) -> list[str]:
    """`vllm serve`'s arguments: a pool that holds one longest request and little more."""
    chunk = options.chunk or (2048 if on_gpu else 1024)
    blocks = options.blocks or 9 * options.longest // (8 * BLOCK) + chunk // 16 + 32
    found = {
        "max-model-len": options.longest,
        "num-gpu-blocks-override": blocks,
        "max-num-batched-tokens": chunk,
        "dtype": options.dtype or ("bfloat16" if on_gpu else "float32"),
    }
    if not options.native:
        found["attention-backend"] = "CUSTOM"
        found["additional-config"] = json.dumps({"kqsvd": {"projection": str(projection)}})
    found["kv-cache-memory-bytes"] = (4 << 30) if on_gpu else (256 << 20)  # of which the pool takes what it needs
    if on_gpu:
        found["gpu-memory-utilization"] = 0.3  # must be free at the start, though the cache has a size of its own
    listed = [x for name, value in found.items() for x in (f"--{name}", str(value))]
    # vLLM admits a prompt only when all of it fits, and preempts hardly ever; without that reserve it must
    listed += ["--no-scheduler-reserve-full-isl", "--disable-uvicorn-access-log"]
    return [*listed, *([] if on_gpu else ["--enforce-eager"])]


def tokens_of(text: Path | None, model: Path, longest: int) -> tuple[int, ...]:
    """The tokens of a text file, from which prompts are cut; nothing without one."""
    if text is None:
        return ()
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(model))(text.read_text(), add_special_tokens=False)["input_ids"]
    if len(tokens) < 4 * longest:
        raise SystemExit(f"{text} has {len(tokens)} tokens; prompts of {longest} want a text of {4 * longest} or more")
    return tuple(tokens)


def settle(server: Server, seconds: float = 60) -> dict[str, float]:
    """Metrics once nothing runs or waits any more (or the time is over)."""
    end = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        busy = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
        if not busy or time.monotonic() > end:
            return metrics
        time.sleep(1)


def row_of(options: argparse.Namespace, tally: Tally, watch: Watch, before: dict, after: dict) -> dict:
    """The figures of the run."""
    passed = {name: after[name] - before[name] for name in after}
    near = [p.behind for _, p in tally.parted if p.behind < options.near]
    host = trend([s.seconds for s in watch.samples], [s.host_mib for s in watch.samples])
    device = trend([s.seconds for s in watch.samples], [s.device_mib for s in watch.samples])
    return {
        "minutes": options.minutes,
        "answers": sum(tally.finished.values()),
        "left": tally.left,
        "errors": len(tally.errors) + len(watch.errors),
        "tokens_in": tally.tokens_in,
        "tokens_out": int(passed["vllm:generation_tokens_total"]),
        "longest_prompt": tally.longest,
        "preemptions": int(passed["vllm:num_preemptions_total"]),
        "prefix_hit_rate": round(passed["vllm:prefix_cache_hits_total"] / passed["vllm:prefix_cache_queries_total"], 3),
        "compared": tally.compared,
        "equal": tally.same,
        "near": len(near),
        "furthest_behind": round(max(near, default=0.0), 4),
        "unexplained": len(tally.parted) - len(near),
        "host_mib": round(host.first),
        "host_mib_per_hour": round(host.growth),
        "device_mib": round(device.first) or "",
        "device_mib_per_hour": round(device.growth) if device.first else "",
        "cache_left": after["vllm:kv_cache_usage_perc"],
    }


def complaints(options: argparse.Namespace, row: dict, tally: Tally, watch: Watch, server: Server) -> list[str]:
    """What was not as it must be."""
    found = [*tally.errors[:20], *watch.errors[:5]]
    found += [f"{n} tokens: {p}" for n, p in tally.parted if p.behind >= options.near]
    for name in ("answers", "left", "compared", "preemptions", "prefix_hit_rate"):
        if not row[name]:
            found.append(f"{name} is 0: the load did not do its work")
    if options.minutes >= TREND_MINUTES:
        seconds = [s.seconds for s in watch.samples]
        for what in ("host_mib", "device_mib"):
            line = trend(seconds, [getattr(s, what) for s in watch.samples])
            if not line.flat():
                rise = f"{what} rises from {line.first:.0f} to {line.last:.0f} in {line.minutes:.0f} minutes"
                found.append(rise + (f" ({risers(watch.samples)})" if what == "host_mib" else ""))
    if row["cache_left"]:
        found.append(f"{row['cache_left']:.1%} of the cache is in use though nothing runs")
    log = server.log.read_text(errors="replace")
    # a warning's Traceback tells of an optional module that cannot be imported
    alarms = [x for x in log.splitlines() if " ERROR " in x or ("Traceback" in x and " WARNING " not in x)]
    found += alarms[:5]
    return found


def run(options: argparse.Namespace, folder: Path) -> tuple[dict, list[str]]:
    """(row, complaints) of one long run."""
    import torch

    on_gpu = torch.cuda.is_available() if options.device == "auto" else options.device == "gpu"
    model, projection = options.model, options.projection
    if model is None:
        model, projection = random_model(folder, options.longest, options.bits)
    config = json.loads((model / "config.json").read_text())
    text = tokens_of(options.text, model, options.longest)
    clients = options.clients or (64 if on_gpu else 20)
    load = Load(clients, options.longest, options.answer, config["vocab_size"], text=text)
    log = options.log or folder / "server.log"
    with Server(model, arguments_of(options, projection, on_gpu), log, environment=OFFLINE | STEADY) as server:
        if not options.native:
            print(server.boot_report(), flush=True)
        known = solo_runs(server, load)
        print(f"{len(known)} prompts of {len(known[0][0])} to {len(known[-1][0])} tokens answered alone", flush=True)
        before = settle(server)
        watch = Watch(server, on_gpu, every=min(5.0, 3 * options.minutes))
        watch.start()
        crowd = Crowd(server.url, load, known, 60 * options.minutes, watch.preempted_and_hit)
        tally = asyncio.run(crowd.run())
        watch.stop()
        after = settle(server)
        row = {
            **provenance("long_run"),
            "model": (options.model.name if options.model else f"random, 2 layers, {options.bits} bits")
            + (", vLLM's own cache" if options.native else ""),
            "kv_tokens": server.kv_tokens(),
            **row_of(options, tally, watch, before, after),
        }
        print(f"host memory at the end, MiB: {watch.samples[-1].by_process}; risen: {risers(watch.samples) or 'none'}")
        if options.plot:
            draw(watch.samples, options.plot)
        found = complaints(options, row, tally, watch, server)
        return row | {"wrong": "; ".join(found)}, found


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path, help="model folder; left out: a tiny random model")
    parser.add_argument("--projection", type=Path, help="its projection folder")
    parser.add_argument("--minutes", type=float, default=8.0, help="of load; solo runs come before")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--text", type=Path, help="text file to cut prompts from; left out: random tokens")
    parser.add_argument("--longest", type=int, default=32768, help="tokens of a sequence, prompt and answer")
    parser.add_argument(
        "--answer", type=int, default=256, help="tokens of an answer; short ones fit the last block and preempt nobody"
    )
    parser.add_argument("--clients", type=int, help="at once; 64 on a GPU, 20 on a CPU")
    parser.add_argument("--chunk", type=int, help="--max-num-batched-tokens; 2048 on a GPU, 1024 on a CPU")
    parser.add_argument("--blocks", type=int, help="of the cache; an eighth more than one longest request needs")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--native", action="store_true", help="vLLM's own cache instead")
    parser.add_argument("--bits", type=int, default=8, help="of the random model's projection")
    parser.add_argument("--near", type=float, default=0.1, help="log probability by which tokens are nearly equal")
    parser.add_argument("--log", type=Path, help="where to keep the server's log")
    parser.add_argument("--plot", type=Path, help="PNG of memory and throughput over time")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.projection is None):
        parser.error("MODEL and --projection belong together")
    if options.text and options.model is None:
        parser.error("--text needs a MODEL, whose tokenizer cuts it")
    with tempfile.TemporaryDirectory() as folder:
        row, found = run(options, Path(folder))
    print("\n".join(f"{name:20} {row[name]}" for name in COLUMNS))
    print("\n".join(["", *found]) if found else "\nnothing wrong")
    append_row(row, options.output, COLUMNS)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
