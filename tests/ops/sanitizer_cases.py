# SPDX-License-Identifier: Apache-2.0
"""A few small launches of every kernel of the extension, for compute-sanitizer: see test_sanitizer.py.

Inputs are made on the CPU and copied, so that initcheck knows every byte that was written.
"""

from __future__ import annotations

import sys

import torch

from tests.ops.cuda_cases import CASES, Case, paged_rows
from tests.ops.cuda_decode_cases import Case as DecodeCase
from tests.ops.cuda_decode_cases import decode_step
from vllm_kqsvd.ops.cuda_decode import CudaDecode
from vllm_kqsvd.ops.cuda_library import available
from vllm_kqsvd.ops.cuda_segments import plan_prefill
from vllm_kqsvd.ops.cuda_store import LatentStore
from vllm_kqsvd.ops.interface import Step

LLAMA = Case((4, 4, 2, 2, 2, 2, 2, 2), (3, 3, 3, 3, 2, 2, 2, 2), dim=128, heads=2, block_size=64)
DECODES = (
    DecodeCase(lengths=(500, 0, 17, 129), kv_heads=1),
    DecodeCase(lengths=(300, 70), query_lens=(4, 2), kv_heads=1, block_size=16, window_block_size=16),
    DecodeCase(lengths=(260,), window=0, rope_block=0, kv_heads=1),
    DecodeCase(lengths=(9000, 9000), kv_heads=2),  # warpgroups of a CTA join their results
    DecodeCase(lengths=tuple(1 + 7 * (i % 23) for i in range(300)), kv_heads=2),  # a warp finishes a request alone
)


def store(case: Case, tokens: int) -> None:
    """The few-token kernel up to 640 tokens, the many-token kernel beyond."""
    rows = paged_rows(case, tokens, seed=1, device="cuda")
    kernel = LatentStore(case.codec().to("cuda"), case.block_size)
    kernel.store(rows.key, rows.value, rows.pages, rows.window, rows.slots, rows.window_slots, rows.positions)


def dequantize(case: Case) -> None:
    """Two requests, one with rows of the exact window."""
    size, near_size, lengths, q_lens = case.block_size, case.window_block_size, [150, 40], [20, 40]
    gen = torch.Generator().manual_seed(0)
    codec = case.codec()
    table = torch.randperm(2 * -(-150 // size), generator=gen).view(2, -1).int()
    near = torch.randperm(2 * -(-150 // near_size), generator=gen).view(2, -1).int()
    pages = torch.randint(0, 256, (table.numel(), codec.layout.page_bytes(case.heads, size)), generator=gen).byte()
    window = torch.randn(near.numel(), case.heads, near_size, 2 * case.dim, generator=gen).to(case.dtype)
    starts, seq = torch.tensor([0, 20, 60], dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)
    step = Step(
        60, 2, 0, 0, 0, 150, starts.cuda(), starts, seq.cuda(), seq, table.cuda(), near.cuda(),
        torch.cat([torch.arange(n - q, n) for n, q in zip(lengths, q_lens, strict=True)]).cuda(),
    )  # fmt: skip
    kernel = LatentStore(codec.to("cuda"), size)
    plan = plan_prefill(step, 64, 512)
    assert plan is not None
    for segment in plan.segments:
        out = torch.zeros(2, 512, case.heads, case.dim, dtype=case.dtype).cuda()
        kernel.dequantize(
            pages.cuda(),
            step.block_table,
            window.cuda(),
            step.window_block_table,
            segment.ranges,
            segment.num_tiles,
            *out,
        )


def decode(case: DecodeCase) -> None:
    """Schedule and attention over pages that the reference wrote."""
    step, tensors, shape, codec = decode_step(case, torch.device("cuda", 0))
    kernel = CudaDecode(codec, shape, torch.device("cuda", 0), max_position=max(case.lengths))
    _, requests = kernel.schedule(step, case.window > 0)
    out = torch.zeros_like(tensors["query"])
    kernel.attend(
        tensors["query"], tensors["pages"], tensors["window_pages"] if case.window else None, step, requests, out
    )


def rest() -> None:
    """Merge and positions."""
    out, more = torch.randn(2, 37, 12, 80).bfloat16().cuda()
    lse, more_lse = torch.randn(2, 12, 37).cuda()
    torch.ops.kqsvd.merge_attention(out, lse, more, more_lse)
    start = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32).cuda()
    seq = torch.tensor([30, 9, 7, 100], dtype=torch.int32).cuda()
    torch.ops.kqsvd.token_positions(start, seq, torch.zeros(14, dtype=torch.int64).cuda())


def main(parts: list[str]) -> None:
    """Run the named parts (store, dequantize, decode, rest), all of them by default."""
    usable, why = available()
    if not usable:
        sys.exit(why)
    for part in parts or ["store", "dequantize", "decode", "rest"]:
        if part == "store":
            for case in (LLAMA, CASES[1], CASES[3]):
                store(case, 40)
                store(case, 700)
        elif part == "dequantize":
            for case in (LLAMA, CASES[1], CASES[3]):
                dequantize(case)
        elif part == "decode":
            for decode_case in DECODES:
                decode(decode_case)
        else:
            rest()
        torch.cuda.synchronize()
        print(f"{part} done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
