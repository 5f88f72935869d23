# SPDX-License-Identifier: Apache-2.0
"""Time of one layer's prefill chunk over cached context, latent pages against vLLM's FlashAttention 3 in bf16.

python -m benchmarks.prefill_attention [--csv benchmarks/results/prefill_attention.csv]

Both sides store the chunk's rows and attend to them and to the cached context; "attend" leaves the store out. Ours
expands the context from latent pages into a bounded workspace, segment by segment, and merges by log-sum-exp.
Llama-3.1-8B heads, one request, CUDA graphs (GPU time), distinct caches per layer.
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

from benchmarks.decode_attention import graph_time
from benchmarks.decode_peers import SPLITS
from benchmarks.shapes import PLANS_BY_BITS, SHAPES, plan_of, random_codec
from vllm_kqsvd.ops.cuda_library import available
from vllm_kqsvd.ops.cuda_prefill import Prefill
from vllm_kqsvd.ops.cuda_segments import plan_prefill
from vllm_kqsvd.ops.cuda_store import LatentStore
from vllm_kqsvd.ops.interface import LayerShape, Step
from vllm_kqsvd.ops.rope_block import RopeSpec

HEADS, GROUP, DIM, BLOCK, WINDOW = 8, 4, 128, 128, 64
CASES = ("2048+0", "2048+6144", "2048+30720", "512+30720", "8192+0")  # chunk + cached context
LAYERS = 4
Call = Callable[[], None]


def flash() -> Callable[..., torch.Tensor]:
    """vLLM's FlashAttention 3."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def rows_of(chunk: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value rows of a fused projection."""
    qkv = torch.randn(chunk, (GROUP + 2) * HEADS, DIM, device="cuda").bfloat16()
    return qkv[:, : GROUP * HEADS], qkv[:, GROUP * HEADS : -HEADS], qkv[:, -HEADS:]


def table_of(tokens: int, block: int) -> torch.Tensor:
    """Shuffled blocks of one request, [1, n] int32."""
    return torch.randperm(-(-tokens // block), device="cuda", dtype=torch.int32)[None]


def slots_of(table: torch.Tensor, first: int, last: int, block: int) -> torch.Tensor:
    """Slots of positions [first, last), int64."""
    position = torch.arange(first, last, device="cuda")
    return table[0].long()[position // block] * block + position % block


def baseline(chunk: int, context: int) -> tuple[list[Call], list[Call]]:
    """(stores, attends) of FlashAttention 3 over paged bf16 rows."""
    import vllm._custom_ops as ops
    from vllm.vllm_flash_attn import get_scheduler_metadata

    attention, one, total = flash(), torch.ones((), device="cuda"), chunk + context
    table = table_of(total, 16)
    slots = slots_of(table, context, total, 16)
    starts = torch.tensor([0, chunk], dtype=torch.int32, device="cuda")
    length = torch.tensor([total], dtype=torch.int32, device="cuda")
    # vLLM schedules once a step, with more splits where the chunk may run in a CUDA graph; K lies beside V.
    splits = SPLITS if chunk <= 512 else 0
    metadata = get_scheduler_metadata(
        1, chunk, total, GROUP * HEADS, HEADS, DIM, length, cu_seqlens_q=starts, page_size=16, causal=True,
        num_splits=splits,
    )  # fmt: skip
    stores, attends = [], []
    for _ in range(LAYERS):
        query, key, value = rows_of(chunk)
        cache = torch.randn(table.numel(), 16, HEADS, 2 * DIM, device="cuda", dtype=torch.bfloat16)
        halves = (cache[..., :DIM], cache[..., DIM:])
        out = torch.empty(query.shape, device="cuda", dtype=torch.bfloat16)
        stores.append(lambda k=key, v=value, c=halves: ops.reshape_and_cache_flash(k, v, *c, slots, "auto", one, one))

        def attend(query=query, halves=halves, out=out) -> None:
            attention(
                q=query, k=halves[0], v=halves[1], out=out, cu_seqlens_q=starts, max_seqlen_q=chunk, seqused_k=length,
                max_seqlen_k=total, softmax_scale=DIM**-0.5, causal=True, block_table=table, fa_version=3,
                scheduler_metadata=metadata, num_splits=splits,
            )  # fmt: skip

        attends.append(attend)
    return stores, attends


def latent(chunk: int, context: int, bits: float) -> tuple[list[Call], list[Call]]:
    """(stores, attends) of the CUDA implementation."""
    attention = flash()

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, out=None):
        return attention(
            q, k, v, max_q, cu_q, max_k, cu_k,
            softmax_scale=scale, causal=causal, out=out, return_softmax_lse=True, fa_version=3,
        )  # fmt: skip

    config, total = SHAPES["llama-3.1-8b"], chunk + context
    rope = RopeSpec(config["rope_theta"] ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM))
    codec = random_codec(config, plan_of(bits), rope, 32, 0).to("cuda")
    shape = LayerShape(GROUP * HEADS, HEADS, DIM, BLOCK, 16, DIM**-0.5, torch.bfloat16, WINDOW)
    store = LatentStore(codec, BLOCK)
    prefill = Prefill(store, shape, torch.device("cuda"))
    prefill.varlen = varlen
    table, near = table_of(total, BLOCK), table_of(total, 16)
    slots, near_slots = slots_of(table, context, total, BLOCK), slots_of(near, context, total, 16)
    positions = torch.arange(context, total, device="cuda")
    starts, length = torch.tensor([0, chunk], dtype=torch.int32), torch.tensor([total], dtype=torch.int32)
    step = Step(
        chunk, 1, 0, 0, 0, total, starts.cuda(), starts, length.cuda(), length, table, near, positions,
    )  # fmt: skip
    plan = plan_prefill(step, WINDOW, prefill.capacity)
    assert plan is not None
    stores, attends = [], []
    for _ in range(LAYERS):
        query, key, value = rows_of(chunk)
        pages = torch.randint(0, 128, (table.numel(), codec.layout.page_bytes(HEADS, BLOCK)), device="cuda").byte()
        window = torch.randn(near.numel(), HEADS, 16, 2 * DIM, device="cuda").bfloat16()
        out = torch.empty(query.shape, device="cuda", dtype=torch.bfloat16)
        stores.append(lambda k=key, v=value, p=pages, w=window: store.store(k, v, p, w, slots, near_slots, positions))
        attends.append(
            lambda q=query, k=key, v=value, p=pages, w=window, o=out: prefill.attend(q, k, v, p, w, step, plan, o)
        )
    return stores, attends


def microseconds(calls: list[Call], repeats: int) -> float:
    """Time of one layer."""

    def run() -> None:
        for call in calls:
            call()

    return graph_time(run, repeats) / LAYERS * 1e6


def main() -> None:
    """Print the table and append it to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="chunk + cached context")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.5, 4.0], choices=sorted(PLANS_BY_BITS))
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    usable, why = available()
    if not usable:
        sys.exit(f"cannot measure: {why}")
    command = shlex.join(["python", "-m", "benchmarks.prefill_attention", *sys.argv[1:]])
    stamp = (datetime.date.today().isoformat(), torch.cuda.get_device_name(), torch.__version__, command)
    for case in args.cases:
        chunk, context = map(int, case.split("+"))
        base: tuple[float, float] = (0.0, 0.0)
        for name in ("fa3_bf16", *(f"latent-{b}" for b in args.bits)):
            stores, attends = baseline(chunk, context) if not base[0] else latent(chunk, context, float(name[7:]))
            attend = microseconds(attends, args.repeats)
            both = microseconds([x for pair in zip(stores, attends, strict=True) for x in pair], args.repeats)
            base = base if base[0] else (attend, both)
            ratios = (round(attend / base[0], 3), round(both / base[1], 3))
            print(f"{case:12s} {name:12s} attend {attend:8.1f} us {ratios[0]:6.3f}  with store {both:8.1f} us "
                  f"{ratios[1]:6.3f}", flush=True)  # fmt: skip
            if args.csv:
                new = not args.csv.exists()
                with args.csv.open("a", newline="") as f:
                    writer = csv.writer(f, lineterminator="\n")
                    if new:
                        head = "date device torch command chunk context format attend_us us attend_ratio ratio"
                        writer.writerow(head.split())
                    writer.writerow((*stamp, chunk, context, name, round(attend, 1), round(both, 1), *ratios))


if __name__ == "__main__":
    main()
