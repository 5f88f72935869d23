# SPDX-License-Identifier: Apache-2.0
"""The batch shapes and the tolerance of vLLM's own backend test, through our builder and impl.

vLLM's test (tests/v1/attention/dense/test_attention_backends.py) hands a backend one cache with one block table of 16
tokens; ours has two groups with pages of their own, so the shapes are repeated here: random pages, random queries,
keys and values, against exact attention; on the CPU, in float32, at 8 bits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402

from tests.attention.models import _faithful  # noqa: E402
from tests.attention.test_metadata import builder_with  # noqa: E402
from tests.helpers import random_codec, side_plan  # noqa: E402
from vllm_kqsvd.attention import impl as impl_module  # noqa: E402
from vllm_kqsvd.attention.impl import KQSVDImpl  # noqa: E402
from vllm_kqsvd.attention.metadata import WindowMetadata  # noqa: E402
from vllm_kqsvd.attention.window import window_block_size  # noqa: E402
from vllm_kqsvd.ops.dispatch import make_layer_ops  # noqa: E402
from vllm_kqsvd.ops.interface import LayerShape  # noqa: E402
from vllm_kqsvd.plan import LayerPlan  # noqa: E402

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 64, 128
CLOSE = 1e-2  # absolute and relative, as in vLLM's test
BATCHES = {  # sequence lengths, query lengths
    "small_decode": ([32, 40], [1, 1]),
    "small_prefill": ([32, 40], [8, 8]),
    "mixed_small": ([32, 40, 48, 56], [1, 1, 5, 5]),
    "medium_decode": ([128, 256, 512, 1024] * 2, [1] * 8),
    "medium_prefill": ([256, 512, 1024, 2048], [16] * 4),
    "mixed_medium": ([512, 1024, 2048] * 2, [1, 1, 1, 7, 7, 7]),
    "large_decode": ([2048] * 8, [1] * 8),  # 32 there
    "large_prefill": ([4096] * 2, [32] * 2),  # 8 there
    "mixed_large": ([1024, 2048, 4096] * 2, [1, 1, 1, 32, 32, 32]),
    "single_decode": ([1024], [1]),
    "single_prefill": ([1024], [64]),
}


def layer() -> KQSVDImpl:
    """An impl with nearly lossless bases and no engine around it."""
    plan = side_plan(*[8] * (DIM // 16))
    codec = random_codec(LayerPlan(plan, plan), KV_HEADS, DIM)
    codec = codec.__class__(_faithful(codec.k), _faithful(codec.v), codec.rope, codec.rope_block)
    size = window_block_size(codec.layout.page_bytes(KV_HEADS, BLOCK), KV_HEADS * 2 * DIM * 4, BLOCK)
    shape = LayerShape(HEADS, KV_HEADS, DIM, BLOCK, size, DIM**-0.5, torch.float32, 64)
    made: Any = object.__new__(KQSVDImpl)
    made.codec, made._ops = codec, make_layer_ops(codec, shape, torch.device("cpu"))
    made._ops.reserve(32, 4096)
    made.name, made.shadow_name, made._bound, made.nan_guard = "layer", "window", None, None
    made.config = SimpleNamespace(check_nan=False)
    return made


def tables(lengths: list[int], size: int, gen: torch.Generator) -> torch.Tensor:
    """Random pages for every sequence; page 0 belongs to none."""
    most = -(-max(lengths) // size)
    pages = 1 + torch.randperm(len(lengths) * most, generator=gen).view(len(lengths), most)
    return pages.to(torch.int32)


def slots_of(table: torch.Tensor, size: int, first: list[int], last: list[int]) -> torch.Tensor:
    """Slots of positions first to last of every sequence, one after the other."""
    at = [torch.arange(a, b) for a, b in zip(first, last, strict=True)]
    return torch.cat([row[p // size].long() * size + p % size for row, p in zip(table, at, strict=True)])


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last rows of one sequence."""
    mask = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device).tril(k.shape[0] - q.shape[0])
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask).transpose(0, 1)


@pytest.mark.parametrize("name", BATCHES)
def test_vllms_batches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, queries = BATCHES[name]
    gen, impl = torch.Generator().manual_seed(42), layer()
    shape = impl.ops.shape
    old = [n - q for n, q in zip(lengths, queries, strict=True)]
    k, v = ([torch.randn(n, KV_HEADS, DIM, generator=gen) for n in lengths] for _ in range(2))
    q = [torch.randn(n, HEADS, DIM, generator=gen) for n in queries]
    table, window = tables(lengths, BLOCK, gen), tables(lengths, shape.window_block_size, gen)
    page = impl.ops.codec.layout.page_bytes(KV_HEADS, BLOCK)
    latent = torch.randint(0, 256, (int(table.max()) + 1, page), generator=gen, dtype=torch.uint8)
    rows = torch.full((int(window.max()) + 1, KV_HEADS, shape.window_block_size, 2 * DIM), torch.nan)
    impl.shadow = SimpleNamespace(kv_cache=rows.view(rows.shape[0], -1))  # type: ignore[assignment]

    def store(first: list[int], last: list[int], metadata: Any) -> list[torch.Tensor]:
        context = {"layer": metadata, "window": WindowMetadata(window, torch.empty(0))}
        slots = slots_of(window, shape.window_block_size, first, last)
        found = SimpleNamespace(attn_metadata=context, slot_mapping={"window": slots})
        monkeypatch.setattr(impl_module, "get_forward_context", lambda: found)
        new = [torch.cat([x[a:b] for x, a, b in zip(side, first, last, strict=True)]) for side in (k, v)]
        impl.do_kv_cache_update(None, *new, latent, slots_of(table, BLOCK, first, last))  # type: ignore[arg-type]
        return new

    before = torch.cat([torch.arange(n) for n in old])
    store([0] * len(old), old, SimpleNamespace(step=SimpleNamespace(positions=before)))
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens, num_reqs=len(lengths), num_actual_tokens=sum(queries),
        max_query_len=max(queries), max_seq_len=max(lengths), block_table_tensor=table,
        slot_mapping=slots_of(table, BLOCK, old, lengths),
        positions=torch.cat([torch.arange(a, b) for a, b in zip(old, lengths, strict=True)]),
    )  # fmt: skip
    builder = builder_with(impl.ops.max_decode_len)
    builder._ops = impl.ops
    metadata = builder.build(0, common)
    new = store(old, lengths, metadata)
    out = torch.empty(sum(queries), HEADS, DIM)
    impl.forward(None, torch.cat(q), *new, latent, metadata, out)  # type: ignore[arg-type]
    want = torch.cat([exact(*x) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(out, want, atol=CLOSE, rtol=CLOSE)
