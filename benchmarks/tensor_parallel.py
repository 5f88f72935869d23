# SPDX-License-Identifier: Apache-2.0
"""Do two GPUs give the tokens of one? Greedy answers of a real model, tensor parallel against one GPU, mp and ray.

    python -m benchmarks.tensor_parallel MODEL --projections DIR... [--kill]

For the model's own cache and each projection: one GPU, TP 2 with the mp executor, TP 2 with ray. Prints for each how
many of the answers equal the one-GPU answers, and where one parts, at which token and with which margin between the
two likeliest tokens (16-bit sums in another order turn a tie). `--kill` then kills a worker of a TP 2 server.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.decode_throughput import append_row, provenance

RESULTS = Path(__file__).parent / "results" / "tensor_parallel.csv"
COLUMNS = (
    "date device versions command model format executor tensor_parallel answers equal_to_one_gpu "
    "largest_margin_where_parted kv_tokens"
).split()
PROMPTS = [
    "Write the numbers from one to twenty in words.",
    "Explain in simple terms why the sky is blue.",
    "List the months of the year and the number of days in each.",
    "Write a short story about a lighthouse keeper.",
    "What is the capital of France, and what is it known for?",
    "Describe how bread is made, step by step.",
    "Write a Python function that reverses a string, and explain it.",
    "Summarise the history of the bicycle.",
]


def engine_options(options: argparse.Namespace) -> dict:
    """LLM(...) keyword arguments."""
    model, projection, size, executor = options.model, options.projection, options.size, options.executor
    kw: dict = {
        "model": model,
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.3,
        "tensor_parallel_size": size,
        "enable_prefix_caching": False,
        "max_num_seqs": 32,
    }
    if size > 1:
        kw["distributed_executor_backend"] = executor
    if options.compilation:
        kw["compilation_config"] = json.loads(options.compilation)
    if projection:
        kw |= {"attention_backend": "CUSTOM", "additional_config": {"kqsvd": {"projection": projection}}}
    return kw


def generate(options: argparse.Namespace) -> dict:
    """One arm in this process: answers as token ids with their logprobs."""
    from vllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(**engine_options(options))
    ready = time.perf_counter() - start
    tokenizer = llm.get_tokenizer()
    filler = Path(__file__).with_name("tensor_parallel.py").read_text()  # a prompt longer than the exact window
    messages = [[{"role": "user", "content": filler[:1500] + "\n\n" + p}] for p in PROMPTS]
    prompts = [tokenizer.apply_chat_template(m, add_generation_prompt=True, tokenize=False) for m in messages]
    params = SamplingParams(max_tokens=96, temperature=0.0, logprobs=2)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = []
    for o in outputs:
        c = o.outputs[0]
        top = [sorted((x.logprob for x in lp.values()), reverse=True)[:2] for lp in c.logprobs]
        answers.append({"tokens": list(c.token_ids), "margin": [a - b for a, b in top]})
    cache = llm.llm_engine.vllm_config.cache_config
    tokens = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
    return {"answers": answers, "kv_tokens": tokens, "start_s": round(ready, 1)}


def compare(one: dict, two: dict) -> dict:
    """Equal answers, and the top-two logprob margin of the first arm where two answers part."""
    equal, parts = 0, []
    for a, b in zip(one["answers"], two["answers"], strict=True):
        n = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=False)) if x != y), None)
        if n is None and len(a["tokens"]) == len(b["tokens"]):
            equal += 1
        elif n is not None:
            parts.append((n, round(a["margin"][n], 4)))
    return {"equal": equal, "of": len(one["answers"]), "parting": parts}


def run(options: argparse.Namespace, projection: str | None, size: int, executor: str) -> dict | None:
    """An arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tensor_parallel", options.model, "--arm"]
    command += ["--size", str(size), "--executor", executor] + (["--projection", projection] if projection else [])
    command += ["--compilation", options.compilation] if options.compilation else []
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [x[7:] for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if not lines:
        print(f"TP {size} {executor} {projection or 'native'}: failed\n{done.stdout[-2500:]}", flush=True)
        return None
    return json.loads(lines[0])


def record(label: str, executor: str, size: int, one: dict, answer: dict, options: argparse.Namespace) -> None:
    """Print an arm against the one-GPU answers, and add its row to the results."""
    found = compare(one, answer)
    print(f"{label}: TP {size} {executor}: {json.dumps(found)}, {answer['kv_tokens']} KV tokens", flush=True)
    row = {
        **provenance("tensor_parallel"),
        "command": "python -m benchmarks.tensor_parallel MODEL --projections DIR",
        "model": Path(options.model).name,
        "format": label,
        "executor": executor,
        "tensor_parallel": size,
        "answers": found["of"],
        "equal_to_one_gpu": found["equal"],
        "largest_margin_where_parted": max((m for _, m in found["parting"]), default=""),
        "kv_tokens": answer["kv_tokens"],
    }
    append_row(row, options.output, COLUMNS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--projections", nargs="*", default=[])
    parser.add_argument("--executors", nargs="+", default=["mp", "ray"])
    parser.add_argument("--compilation", help="JSON for vLLM's compilation_config")
    parser.add_argument("--kill", action="store_true", help="also kill a worker of a server with the last projection")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--arm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--projection", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--executor", default="mp", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print("RESULT " + json.dumps(generate(options)), flush=True)
        return
    for projection in [None, *options.projections]:
        label = Path(projection).name if projection else "native"
        one = run(options, projection, 1, "mp")
        if one is None:
            continue
        record(label, "mp", 1, one, one, options)
        for executor in options.executors:
            two = run(options, projection, 2, executor)
            if two:
                record(label, executor, 2, one, two, options)
    if options.kill:
        from benchmarks.kill_worker import kill_worker

        kill_worker(options.model, options.projections[-1])


if __name__ == "__main__":
    main()
