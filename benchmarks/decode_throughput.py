# SPDX-License-Identifier: Apache-2.0
"""Decode throughput of vLLM at a full cache, without paying for prefill: bf16, fp8, vLLM's low-bit caches, ours.

    python -m benchmarks.decode_throughput --arms auto fp8 kqsvd-4 kqsvd-2.5 --requests 192 [--output CSV]

Every request starts with `--input-len` tokens already in the cache (vLLM's DecodeBenchConnector) and decodes
`--output-len` more; `--requests full` runs as many as the arm's cache holds at once. `tok_s` has the filling of the new
requests' blocks in its time (the connector's `startup_fill` is of no use here: vLLM's own warm-up writes into the pages
afterwards), which no server does. `decode_tok_s` has not: where all requests fit at once it is timed over the steps in
which all of them decode, otherwise the same requests also run for one token each and that time is taken off. Each arm
runs in a process of its own with the same memory; rows go to benchmarks/results/serving.csv. Weights are random
(`--load-format dummy`): speed depends on shapes alone.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

COLUMNS = (
    "date device versions command model format bits tensor_parallel input_len output_len requests kv_tokens tok_s "
    "ttft_p50 ttft_p99 tpot_p50 tpot_p99 start_s decode_tok_s"
).split()
RESULTS = Path(__file__).parent / "results" / "serving.csv"
BITS = {"auto": 16.0, "fp8": 8.0}


def engine_options(arm: str, model: Path, options: argparse.Namespace) -> dict:
    """LLM(...) keyword arguments of one arm."""
    kw: dict = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": options.input_len + options.output_len + 16,
        "enable_prefix_caching": False,
        "max_num_seqs": options.max_num_seqs,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "tensor_parallel_size": options.tensor_parallel,
        "kv_transfer_config": {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both"},
    }
    if options.executor:
        kw["distributed_executor_backend"] = options.executor
    if options.compilation:
        kw["compilation_config"] = json.loads(options.compilation)
    if arm.startswith("kqsvd"):
        kw["attention_backend"] = "CUSTOM"
        kw["additional_config"] = {"kqsvd": {"projection": str(model / arm)}}
    else:
        kw["kv_cache_dtype"] = arm
    return kw


def run_arm(arm: str, model: Path, options: argparse.Namespace) -> dict:
    """Serve one arm in this process and return its figures."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    kw = engine_options(arm, model, options)
    if options.profile:
        where = {"profiler": "torch", "torch_profiler_dir": str(options.profile.resolve() / arm)}
        kw["profiler_config"] = {**where, "torch_profiler_with_stack": False}
    llm = LLM(**kw)
    ready = time.perf_counter() - start
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    tokens = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
    fit = min(tokens // config.model_config.max_model_len, options.max_num_seqs)
    requests = options.requests or fit
    params = SamplingParams(max_tokens=options.output_len, ignore_eos=True, temperature=0.0, detokenize=False)
    gen = torch.Generator().manual_seed(0)
    vocab = min(100_000, config.model_config.get_vocab_size())
    prompts = [
        {"prompt_token_ids": torch.randint(10, vocab, (options.input_len,), generator=gen).tolist()}
        for _ in range(requests)
    ]
    llm.generate(prompts[:2], params, use_tqdm=False)
    rates = (all_at_once if requests <= fit else in_turns)(llm, prompts, params)
    if options.profile and requests <= fit:
        profile_steps(llm, prompts, params)
    return {
        **{name: round(rate, 1) for name, rate in rates.items()},
        "requests": requests,
        "kv_tokens": tokens,
        "start_s": round(ready, 1),
    }


def in_turns(llm, prompts: list[dict], params) -> dict[str, float]:
    """Tokens per second of more requests than the cache may hold, the filling's time taken off the second figure."""
    one = params.clone()
    one.max_tokens = 1
    start = time.perf_counter()
    llm.generate(prompts, one, use_tqdm=False)
    filling = time.perf_counter() - start
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    produced = sum(len(o.outputs[0].token_ids) for o in outputs)
    return {"tok_s": produced / seconds, "decode_tok_s": (produced - len(outputs)) / (seconds - filling)}


def all_at_once(llm, prompts: list[dict], params) -> dict[str, float]:
    """Tokens per second of requests that all fit the cache; the second figure from the step that all run in on."""
    from vllm.sampling_params import RequestOutputKind

    params = params.clone()
    params.output_kind = RequestOutputKind.DELTA
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(f"request-{i}", prompt, params)
    produced, running = 0, set()
    full = steady = 0.0  # seconds from the start, tokens since all run
    rate = 0.0
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - start
        count = sum(len(o.outputs[0].token_ids) for o in outputs)
        produced += count
        if full and not rate:
            steady += count
            if any(o.finished for o in outputs):
                rate = steady / (now - full)
        running |= {o.request_id for o in outputs}
        if not full and len(running) == len(prompts):
            full = now
    return {"tok_s": produced / now, "decode_tok_s": rate}


def profile_steps(llm, prompts: list[dict], params, steps: int = 8) -> None:
    """Steps of all requests once more, under PyTorch's profiler on every rank."""
    from vllm.sampling_params import RequestOutputKind

    params = params.clone()
    params.output_kind = RequestOutputKind.DELTA  # `generate` has set FINAL_ONLY, which shows no step
    engine = llm.llm_engine
    names = [f"profiled-{i}" for i in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, prompt, params)
    running: set[str] = set()
    while len(running) < len(prompts):
        running |= {o.request_id for o in engine.step()}
    llm.start_profile()
    for _ in range(steps):
        engine.step()
    llm.stop_profile()
    engine.abort_request(names)


def request_count(text: str) -> int:
    """The number of requests; 0 for "full", as many as the cache holds at once."""
    if text != "full" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of requests nor 'full'")
    return 0 if text == "full" else int(text)


def add_engine_arguments(parser: argparse.ArgumentParser, requests: int) -> None:
    """Options of `engine_options`, and which arms to run on how many requests."""
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--arms", nargs="+", default=["auto", "fp8", "kqsvd-4", "kqsvd-2.5"])
    parser.add_argument("--requests", type=request_count, default=requests, help="how many, or 'full'")
    parser.add_argument("--input-len", type=int, default=8192)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--compilation", help="JSON for vLLM's compilation_config")
    parser.add_argument("--executor", choices=("mp", "ray"), help="how tensor-parallel workers are run")
    parser.add_argument("--run-arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)


def write_projection(arm: str, model: Path, name: str) -> float:
    """Random projection of the model's shape in the folder engine_options names; returns its true bits."""
    from benchmarks.shapes import SHAPES, plan_of
    from benchmarks.shapes_projection import write_random_projection

    plan = plan_of(float(arm.split("-")[1]))
    write_random_projection(SHAPES[name], model, plan, model / arm)
    return plan.bits_per_element(SHAPES[name]["head_dim"])


def append_row(row: dict, path: Path = RESULTS, columns: Sequence[str] = COLUMNS) -> None:
    """Add one row to a results table, with its header if the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({k: row.get(k, "") for k in columns})


def provenance(module: str = "decode_throughput") -> dict:
    """Date, device, versions and command line of this run."""
    import torch
    import vllm

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": f"vllm {vllm.__version__} torch {torch.__version__}",
        "command": f"python -m benchmarks.{module} " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_engine_arguments(parser, requests=192)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--profile", type=Path, metavar="DIR", help="then profile some steps on every rank, if all fit")
    options = parser.parse_args()
    if options.run_arm:
        print("RESULT " + json.dumps(run_arm(options.run_arm, options.folder, options)), flush=True)
        return
    from benchmarks.shapes import model_folder

    with tempfile.TemporaryDirectory() as tmp:
        folder = model_folder(options.model, Path(tmp))
        for arm in options.arms:
            bits = write_projection(arm, folder, options.model) if arm.startswith("kqsvd") else BITS.get(arm)
            command = [sys.executable, "-m", "benchmarks.decode_throughput", *sys.argv[1:]]
            command += ["--run-arm", arm, "--folder", str(folder)]
            log = options.output.with_name(f"{options.output.stem}.{arm}.log")
            with log.open("w") as f:
                subprocess.run(command, stdout=f, stderr=subprocess.STDOUT)
            lines = [x[7:] for x in log.read_text().splitlines() if x.startswith("RESULT ")]
            if not lines:
                print(f"{arm}: failed, see {log}", flush=True)
                continue
            row = {
                **provenance(),
                "model": options.model,
                "format": arm,
                "bits": bits,
                "tensor_parallel": options.tensor_parallel,
                "input_len": options.input_len,
                "output_len": options.output_len,
                **json.loads(lines[0]),
            }
            append_row(row, options.output)
            print(f"{arm}: {lines[0]}", flush=True)


if __name__ == "__main__":
    main()
