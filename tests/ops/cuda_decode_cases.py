# SPDX-License-Identifier: Apache-2.0
"""Random decode problems and their error against the float64 reference, for the CUDA decode tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tests.helpers import random_codec, side_by_side
from vllm_kqsvd.layout import layout_of
from vllm_kqsvd.ops import cuda_library, reference
from vllm_kqsvd.ops.cuda_decode import CudaDecode
from vllm_kqsvd.ops.interface import LayerShape, Step
from vllm_kqsvd.plan_catalog import PLANS


@dataclass(frozen=True)
class Case:
    """One decode step over random pages."""

    plan: str = "d128_b82"
    lengths: tuple[int, ...] = (1333, 700, 97, 3000)
    query_lens: tuple[int, ...] | None = None  # default: 1 each
    kv_heads: int = 2
    group: int = 4
    rope_block: int = 32
    block_size: int = 128
    window: int = 64
    window_block_size: int = 32
    dtype: torch.dtype = torch.bfloat16
    soft_cap: float = 0.0
    sliding_window: int = 0
    rotary_dim: int | None = None
    interleaved: bool = False
    sinks: bool = True
    gap: int = 0  # bytes of other layers before and behind a page
    seed: int = 0


def decode_step(case: Case, device: torch.device) -> tuple[Step, dict[str, torch.Tensor], LayerShape, object]:
    """The step, its tensors (query, pages, window_pages), the layer's shape and its codec (float64)."""
    head_dim, plan = PLANS[case.plan]
    codec = random_codec(
        plan, case.kv_heads, head_dim, case.rope_block, case.seed, case.rotary_dim, case.interleaved, theta=5e5
    ).to(device, torch.float64)
    gen = torch.Generator(device).manual_seed(case.seed + 1)
    query_lens = case.query_lens or (1,) * len(case.lengths)

    def table(size: int) -> tuple[torch.Tensor, int]:
        most = max(-(-max(n, 1) // size) for n in case.lengths)
        blocks = len(case.lengths) * most + 3
        order = torch.randperm(blocks, generator=gen, device=device)[: len(case.lengths) * most]
        return order.view(len(case.lengths), most).int(), blocks

    block_table, blocks = table(case.block_size)
    window_table, window_blocks = table(case.window_block_size)
    pages = torch.randint(
        0, 256, (blocks, layout_of(plan).page_bytes(case.kv_heads, case.block_size)), generator=gen, device=device
    ).to(torch.uint8)
    pages = side_by_side(pages, case.gap) if case.gap else pages
    window_pages = torch.full(
        (window_blocks, case.kv_heads, case.window_block_size, 2 * head_dim), float("nan"), device=device
    ).to(case.dtype)
    for i, length in enumerate(case.lengths):
        if length <= 0:
            continue
        pos = torch.arange(length, device=device)
        key = torch.randn(length, case.kv_heads, head_dim, generator=gen, device=device, dtype=torch.float64)
        value = torch.randn(length, case.kv_heads, head_dim, generator=gen, device=device, dtype=torch.float64)
        basis = codec.k.mean_basis[pos % codec.k.mean_basis.shape[0]]
        key += torch.einsum("nm,hmd->nhd", basis, codec.k.mean)
        value += codec.v.mean[:, 0]
        if case.sinks and i % 2 == 0:  # a few tokens of the other class, not only at the start
            at = torch.tensor(sorted({0, min(1, length - 1), min(70, length - 1)}), device=device)
            key[at] = torch.einsum("nm,hmd->nhd", basis[at], codec.k.sink) * 1.0 + 0.3 * key[at]
            value[at] = codec.v.sink[:, 0] + 0.3 * value[at]
            key[at] *= 1.0
        key = reference._turn_back(key, pos, codec, 1)
        slots = block_table[i].long()[pos // case.block_size] * case.block_size + pos % case.block_size
        reference.store_latent(key, value, pages, slots, pos, codec, case.block_size)
        near = pos[max(0, length - query_lens[i] - case.window - 32) :]
        exact = torch.cat((key, value), -1)[near].to(case.dtype)
        size = case.window_block_size
        window_pages[window_table[i].long()[near // size], :, near % size] = exact
    rows = sum(query_lens)
    query = torch.randn(rows, case.kv_heads * case.group, head_dim, generator=gen, device=device).to(case.dtype) * 0.7
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    step = Step(
        num_tokens=rows,
        num_reqs=len(case.lengths),
        num_decodes=len(case.lengths),
        num_decode_tokens=rows,
        max_decode_len=max(query_lens),
        max_seq_len=max(case.lengths),
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(case.lengths, dtype=torch.int32, device=device),
        seq_lens_cpu=None,
        block_table=block_table,
        window_block_table=window_table,
        positions=torch.zeros(rows, dtype=torch.int64, device=device),
    )
    shape = LayerShape(
        num_heads=case.kv_heads * case.group,
        num_kv_heads=case.kv_heads,
        head_dim=head_dim,
        block_size=case.block_size,
        window_block_size=case.window_block_size,
        scale=head_dim**-0.5,
        dtype=case.dtype,
        window=case.window,
        soft_cap=case.soft_cap,
        sliding_window=case.sliding_window,
    )
    return step, {"query": query, "pages": pages, "window_pages": window_pages}, shape, codec


def run_case(case: Case, device: torch.device, repeats: int = 1) -> tuple[float, float, bool]:
    """(relative error of the whole output, of the worst head row, repeats bitwise equal) against float64."""
    if why := cuda_library.load():
        raise RuntimeError(why)
    step, t, shape, codec = decode_step(case, device)
    exact = case.window > 0
    kernel = CudaDecode(codec, shape, device, max_position=max(case.lengths))
    kind, requests = kernel.schedule(step, exact)
    outs = []
    for _ in range(repeats):
        out = torch.full_like(t["query"], float("nan"))
        kernel.attend(t["query"], t["pages"], t["window_pages"] if exact else None, step, requests, out)
        outs.append(out)
    window = reference.ExactWindow(t["window_pages"], step.window_block_table, case.window) if exact else None
    want = reference.attend(
        t["query"].double(), t["pages"], step.block_table, step.seq_lens, step.query_start_loc, codec, case.block_size,
        shape.scale, window, case.soft_cap, case.sliding_window,
    )  # fmt: skip
    got = outs[-1].double()
    rows = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-6)
    total = (got - want).norm() / want.norm()
    same = all(torch.equal(o, outs[0]) for o in outs)
    worst = torch.nan_to_num(torch.stack((total, rows.max())), nan=float("inf"))
    return float(worst[0]), float(worst[1]), same


CASES = {
    "plain": Case(sinks=False),
    "sinks": Case(),
    "short": Case(lengths=(1, 16, 17, 64, 65, 80, 81, 96, 127, 128, 129, 200)),
    "empty rows": Case(lengths=(300, 0, 900, 0), query_lens=(1, 1, 1, 0)),
    "no window": Case(window=0, lengths=(1, 5, 333, 1024)),
    "long": Case(lengths=(20000,)),
    "warpgroups join": Case(lengths=(20000, 19000), kv_heads=8),
    "warpgroups join, few blocks": Case(lengths=(30000, 20000, 200)),
    "fp16": Case(dtype=torch.float16),
    "blocks of 16": Case(block_size=16, window_block_size=16),
    "blocks of 32": Case(block_size=32),
    "pages side by side": Case(gap=128 * 75),
    "blocks of 64": Case(block_size=64),
    "soft cap": Case(soft_cap=5.0),
    "sliding window": Case(sliding_window=300),
    "group 1": Case(group=1),
    "group 3, interleaved": Case(group=3, interleaved=True),
    "partial rotary": Case(rotary_dim=64),
    "no frame": Case(rope_block=0),
    "block 64": Case(rope_block=64),
    "group 8": Case(group=8, rope_block=64),
    "group 8, block 32": Case(group=8),
    "group 6": Case(group=6, rope_block=64),
    "group 16": Case(group=16, rope_block=64),
    "drafts": Case(query_lens=(4, 2, 1, 3)),
    "drafts 8, no window": Case(query_lens=(8, 3, 8, 1), window=0),
    "many heads": Case(kv_heads=8, lengths=(500, 2000, 100, 64, 1500)),
    "4 bits": Case(plan="d128_b130"),
    "3 bits": Case(plan="d128_b98"),
    "74 bytes": Case(plan="d128_b74"),
    "2 bits": Case(plan="d128_b66"),
    "head_dim 64, 4 bits": Case(plan="d64_b66"),
    "head_dim 64, 3 bits": Case(plan="d64_b50", kv_heads=3, group=3),
    "head_dim 64": Case(plan="d64_b42", group=8, rope_block=64),
    "head_dim 64, 2 bits": Case(plan="d64_b34", window=0),
    "head_dim 64, 1.6 bits": Case(plan="d64_b26"),
    "head_dim 64, one key group": Case(plan="d64_b26a", window=0),
}

__all__ = ["CASES", "Case", "decode_step", "replace", "run_case"]
