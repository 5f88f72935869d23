# SPDX-License-Identifier: Apache-2.0
"""Time of storing one layer's new tokens: latent pages (and exact window) against vLLM's bf16 reshape_and_cache_flash.

python -m benchmarks.store_latent [--csv benchmarks/results/store_latent.csv]

Llama-3.1-8B heads (8 KV heads, d = 128, bf16). One CUDA graph holds a launch per layer over enough distinct layers that
nothing is read from L2; the median of many replays is divided by the number of layers.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.shapes import PLANS_BY_BITS, SHAPES, plan_of, random_codec
from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.ops.cuda_library import available
from vllm_kqsvd.ops.cuda_store import LatentStore
from vllm_kqsvd.ops.interface import LayerShape
from vllm_kqsvd.ops.rope_block import RopeSpec

HEADS, DIM, BLOCK, WINDOW_BLOCK = 8, 128, 64, 16
TOKENS = (1, 16, 64, 256, 512, 1024, 2048, 8192)


def time_graph(calls: list[Callable[[], None]], replays: int = 30) -> tuple[float, float, float]:
    """(median, p10, p90) microseconds of one call, from replays of a graph that makes all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    times.sort()
    return times[len(times) // 2], times[len(times) // 10], times[-1 - len(times) // 10]


def vllm_reshape() -> Callable[..., None] | None:
    """vLLM's own store of bf16 rows, or None where it is not installed."""
    try:
        import vllm._custom_ops as ops
    except ImportError:
        return None
    one = torch.ones((), device="cuda")
    return lambda k, v, kc, vc, slots: ops.reshape_and_cache_flash(k, v, kc, vc, slots, "auto", one, one)


def triton_store(codec: LayerCodec) -> Callable[..., None] | None:
    """Our Triton store (with window), or None where Triton does not run."""
    from vllm_kqsvd.ops import triton

    if not triton.available()[0]:
        return None
    shape = LayerShape(4 * HEADS, HEADS, DIM, BLOCK, WINDOW_BLOCK, DIM**-0.5, torch.bfloat16, 64)
    return triton.TritonOps(codec, shape).store


def arms(tokens: int, layers: int, bits: float) -> dict[str, list[Callable[[], None]]]:
    """Calls per arm, one per layer, each over inputs and caches of its own."""
    gen = torch.Generator().manual_seed(0)
    config = SHAPES["llama-3.1-8b"]
    rope = RopeSpec(config["rope_theta"] ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128))
    codec = random_codec(config, plan_of(bits), rope, 32, 0).to("cuda")
    store = LatentStore(codec, BLOCK)
    blocks = -(-tokens // BLOCK) + 1
    # Prefill writes runs of slots; a decode batch writes one slot in a page of its own for every request.
    step = 1 if tokens > 256 else BLOCK
    blocks = max(blocks, -(-tokens * step // BLOCK))
    slots = (torch.randperm(blocks, generator=gen)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[::step][:tokens]
    slots = slots.cuda()
    near = torch.randperm(-(-tokens * step // WINDOW_BLOCK) + 1, generator=gen)
    near_slots = (near[:, None] * WINDOW_BLOCK + torch.arange(WINDOW_BLOCK)).flatten()[::step][:tokens].cuda()
    positions = torch.arange(tokens, device="cuda") + 1000
    reshape = vllm_reshape()
    triton = triton_store(codec)
    out: dict[str, list[Callable[[], None]]] = {"latent": [], "latent+window": []}
    if triton:
        out["triton"] = []
    if reshape:
        out["vllm bf16"] = []
    for _ in range(layers):
        qkv = torch.randn(tokens, 6144, device="cuda").bfloat16()
        key = qkv[:, 4096:5120].view(tokens, HEADS, DIM)
        value = qkv[:, 5120:].view(tokens, HEADS, DIM)
        pages = torch.empty(blocks, codec.layout.page_bytes(HEADS, BLOCK), dtype=torch.uint8, device="cuda")
        window = torch.empty(near.numel(), HEADS, WINDOW_BLOCK, 2 * DIM, dtype=torch.bfloat16, device="cuda")
        bound = (key, value, pages)
        out["latent"].append(lambda b=bound: store.store(*b, None, slots, None, positions))
        out["latent+window"].append(lambda b=bound, w=window: store.store(*b, w, slots, near_slots, positions))
        if triton:
            out["triton"].append(lambda b=bound, w=window: triton(*b, w, slots, near_slots, positions))
        if reshape:
            cache = torch.empty(blocks, BLOCK, HEADS, 2 * DIM, dtype=torch.bfloat16, device="cuda")  # K beside V
            halves = (cache[..., :DIM], cache[..., DIM:])
            out["vllm bf16"].append(lambda k=key, v=value, c=halves: reshape(k, v, *c, slots))
    return out


def main() -> None:
    """Print the table and append it to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 4.0], choices=sorted(PLANS_BY_BITS))
    args = parser.parse_args()
    command = shlex.join(["python", "-m", "benchmarks.store_latent", *sys.argv[1:]])
    usable, why = available()
    if not usable:
        sys.exit(f"cannot measure: {why}")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; us per layer, median (p10-p90)")
    rows = []
    for bits in args.bits:
        for tokens in args.tokens:
            layers = max(4, min(64, 2**27 // (tokens * 4096)))  # 128 MB of rows and more: past L2
            for name, calls in arms(tokens, layers, bits).items():
                median, low, high = time_graph(calls)
                print(f"{bits} bits {tokens:6d} tokens  {name:14s} {median:8.2f} ({low:.2f}-{high:.2f})", flush=True)
                date = datetime.date.today().isoformat()
                rows.append((date, device, torch.__version__, command, bits, tokens, name, round(median, 2)))
    if args.csv:
        new = not args.csv.exists()
        with args.csv.open("a", newline="") as f:
            writer = csv.writer(f, lineterminator="\n")
            if new:
                writer.writerow(("date", "device", "torch", "command", "bits", "tokens", "arm", "us"))
            writer.writerows(rows)


if __name__ == "__main__":
    main()
