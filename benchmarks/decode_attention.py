# SPDX-License-Identifier: Apache-2.0
"""Time of one decode attention call per layer, beside what vLLM ships: python benchmarks/decode_attention.py --help.

Every arm runs in the same process on the same shapes: CUDA graphs over 32 distinct layer caches (as many as 16 GB hold,
and enough to miss L2), median of the replays. Ours includes everything: schedule (once per step, so once per graph),
exact window, merge, value basis. FlashAttention 3 is scheduled once per step too, as vLLM does.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from benchmarks.decode_arms import LATENTS, Arm
from benchmarks.decode_peers import PEERS
from benchmarks.decode_results import append, table
from vllm_kqsvd.ops import cuda_library

SIZES = ("1x1k", "1x8k", "1x32k", "4x8k", "16x8k", "64x8k", "256x1k", "64xlognormal")
MATRIX = tuple(f"{b}x{c}" for c in ("1k", "4k", "8k", "32k", "128k") for b in (1, 4, 16, 64, 256)) + ("64xlognormal",)
BASELINES = "fa3_bf16,fa3_fp8,triton_attn,vllm_int4,turboquant_4bit_nc,turboquant_3bit_nc,xformers_int4,copy"
OURS = "d128_b82,d128_b130,d128_b66,triton_d128_b82"
ARMS: dict[str, Arm] = PEERS | LATENTS
# L2 is 50 MB; layers cycle through at least this much. They are a model's number where that takes no more than
# MOST_BYTES, and four if it does: the schedule, and the start of a graph, are a step's cost and not a layer's.
CACHE_BYTES = 300e6
LAYERS = 32
MOST_BYTES = 16e9
MEMORY_SHARE = 0.7  # of the free memory that an arm's caches may take: filling them takes some more


@dataclass(frozen=True)
class Shape:
    """One row of the table: a batch of sequence lengths, and the model's heads."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    query_len: int = 1


def parse_size(text: str, **heads: int) -> Shape:
    """ "64x8k" or "64xlognormal" (mean 8k, sigma 0.8, seed 0)."""
    batch, context = text.split("x", 1)
    if context == "lognormal":
        gen = torch.Generator().manual_seed(0)
        draw = torch.exp(0.8 * torch.randn(int(batch), generator=gen))
        return Shape(text, tuple((draw / draw.mean() * 8192).long().clamp_min(128).tolist()), **heads)
    tokens = int(context[:-1]) * 1024 if context.endswith("k") else int(context)
    return Shape(text, (tokens,) * int(batch), **heads)


def graph_time(calls: Callable[[], None], repeats: int) -> float:
    """Median seconds of a replay of `calls` captured as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls()
    times = []
    for _ in range(repeats + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e-3)
    return sorted(times[3:])[repeats // 2]


def measure(arm: Arm, shape: Shape, repeats: int) -> dict[str, object]:
    """One row: microseconds per layer and bytes per second of the cache the arm reads."""
    token_bytes = arm.bytes_per_token(shape) * shape.num_kv_heads
    cache = sum(shape.lengths) * token_bytes
    free = torch.cuda.mem_get_info()[0]
    wanted = max(4, min(LAYERS, int(MOST_BYTES / cache)), min(64, math.ceil(CACHE_BYTES / cache)))
    layers = min(wanted, int(MEMORY_SHARE * free / cache))
    if layers == 0:
        raise RuntimeError(f"does not fit: {cache / 1e9:.0f} GB of cache, {free / 1e9:.0f} GB free")
    step, calls = arm.prepare(shape, layers)

    def run() -> None:
        step()
        for call in calls:
            call()

    seconds = graph_time(run, repeats) / layers
    return {"format": arm.name, "bits": round(arm.bits(shape), 2), "us": round(seconds * 1e6, 1),
            "gb_per_s": round(cache / seconds / 1e9)}  # fmt: skip


def main(argv: Iterable[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default=",".join(SIZES), help='such as 64x8k,4xlognormal; "matrix" for all of them')
    parser.add_argument("--arms", default=f"{BASELINES},{OURS}", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--heads", default="32/8/128", help="query heads / KV heads / head_dim")
    parser.add_argument("--query-len", type=int, default=1)
    parser.add_argument("--library", help="extension to load instead of the installed one")
    parser.add_argument("--csv", help="append rows here")
    arguments = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("cannot measure: no CUDA device is visible to PyTorch")
    command = shlex.join(["python", "-m", "benchmarks.decode_attention", *arguments])
    if args.library:
        torch.ops.load_library(args.library)
    elif why := cuda_library.load():
        print(why, flush=True)
    hq, hkv, dim = map(int, args.heads.split("/"))
    for size in MATRIX if args.sizes == "matrix" else args.sizes.split(","):
        shape = parse_size(size, num_heads=hq, num_kv_heads=hkv, head_dim=dim, query_len=args.query_len)
        group = []
        for name in args.arms.split(","):
            try:
                row = measure(ARMS[name], shape, args.repeats)
            except Exception as e:  # an arm that cannot run here must not take the others with it
                reason = (str(e) or type(e).__name__).splitlines()[0][:160]
                print(f"{size} {name}: not run: {type(e).__name__}: {reason}", flush=True)
                torch.cuda.empty_cache()
                continue
            group.append({"size": size, "batch": len(shape.lengths), "context": max(shape.lengths),
                          "query_len": args.query_len, **row})  # fmt: skip
            torch.cuda.empty_cache()
        print(table(group), flush=True)
        if args.csv:
            append(args.csv, group, command)


if __name__ == "__main__":
    main()
