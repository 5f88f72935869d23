# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/decode_attention.py times: latent pages of each catalogue plan, vLLM's own kernels, a plain copy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_kqsvd.layout import layout_of
from vllm_kqsvd.plan_catalog import PLANS

if TYPE_CHECKING:
    from benchmarks.decode_attention import Shape

DEVICE = torch.device("cuda", 0)
Call = Callable[[], None]


class Arm(ABC):
    """One format. `prepare` returns the work of a step and one call per layer, each on its own cache."""

    name: str

    @abstractmethod
    def bytes_per_token(self, shape: Shape) -> float:
        """Cache bytes of one token and KV head."""

    @abstractmethod
    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """Allocate random caches and bind the calls."""

    def bits(self, shape: Shape) -> float:
        """Bits per original K or V element, scales included."""
        return 8 * self.bytes_per_token(shape) / (2 * shape.head_dim)


def random_table(shape: Shape, block: int) -> tuple[torch.Tensor, int]:
    """Block table in random order, [batch, most blocks] int32, and the number of blocks."""
    most = max(-(-n // block) for n in shape.lengths)
    needed = sum(-(-n // block) for n in shape.lengths)
    order = torch.randperm(needed, device=DEVICE, dtype=torch.int32)
    out = torch.zeros(len(shape.lengths), most, dtype=torch.int32, device=DEVICE)
    at = 0
    for i, n in enumerate(shape.lengths):
        blocks = -(-n // block)
        out[i, :blocks] = order[at : at + blocks]
        at += blocks
    return out, needed


class LatentArm(Arm):
    """Our pages: 128-token blocks, page-relative RoPE, exact window of 64."""

    def __init__(self, plan_name: str, window: int = 64, block: int = 128) -> None:
        self.name, self.window, self.block = plan_name, window, block
        self.head_dim, self.plan = PLANS[plan_name]

    def bytes_per_token(self, shape: Shape) -> float:
        """Codes and scale bytes; the window is not counted."""
        return self.plan.bytes_per_token

    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """Random codes, scales near 1, no sinks; constants are separate copies for every layer."""
        from tests.helpers import random_codec
        from vllm_kqsvd.ops.cuda_decode import CudaDecode
        from vllm_kqsvd.ops.interface import LayerShape, Step

        if shape.head_dim != self.head_dim:
            raise RuntimeError(f"plan {self.name} is for head_dim {self.head_dim}")
        group = shape.num_heads // shape.num_kv_heads
        codec = random_codec(self.plan, shape.num_kv_heads, shape.head_dim, 32 if group <= 4 else 64, theta=5e5)
        batch, rows = len(shape.lengths), len(shape.lengths) * shape.query_len
        block_table, blocks = random_table(shape, self.block)
        window_blocks = 4 * batch  # a ring of 4 blocks of 32 per request
        window_table = torch.randperm(window_blocks, device=DEVICE, dtype=torch.int32).view(batch, 4)
        window_table = window_table.repeat(1, -(-max(shape.lengths) // 128))
        layer_shape = LayerShape(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, self.block, 32, shape.head_dim**-0.5, torch.bfloat16,
            self.window,
        )  # fmt: skip
        starts = torch.arange(batch + 1, dtype=torch.int32) * shape.query_len
        step = Step(
            rows, batch, batch, rows, shape.query_len, max(shape.lengths), starts.to(DEVICE), starts,
            torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE), None, block_table, window_table,
            torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        )  # fmt: skip
        first = CudaDecode(codec, layer_shape, DEVICE, max(shape.lengths))
        layout = layout_of(self.plan)
        query = torch.randn(rows, shape.num_heads, shape.head_dim, device=DEVICE).bfloat16()
        out = torch.empty_like(query)
        calls: list[Call] = []
        kind, requests = first.schedule(step, True)
        for _ in range(layers):
            pages = torch.randint(0, 256, (blocks, layout.page_bytes(shape.num_kv_heads, self.block)), device=DEVICE,
                                  dtype=torch.uint8)  # fmt: skip
            tiles = pages.view(-1, layout.tile_bytes)
            tiles[:, layout.scale_offset["k"] :] = tiles[:, layout.scale_offset["k"] :] % 16 + 56
            window = torch.randn(window_blocks, shape.num_kv_heads, 32, 2 * shape.head_dim, device=DEVICE).bfloat16()
            layer = CudaDecode.__new__(CudaDecode)
            layer.__dict__ = {**first.__dict__}
            c = first.constants
            layer.constants = replace(c, **{k: v.clone() for k, v in c.__dict__.items()})

            def call(layer=layer, pages=pages, window=window) -> None:
                layer.attend(query, pages, window, step, requests, out)

            calls.append(call)
        return (lambda: None if first.schedule(step, True) else None), calls


class FlashArm(Arm):
    """vLLM's FlashAttention 3, blocks of 16."""

    def __init__(self, fp8: bool) -> None:
        self.fp8, self.name = fp8, "fa3_fp8" if fp8 else "fa3_bf16"

    def bytes_per_token(self, shape: Shape) -> float:
        """K and V."""
        return 2 * shape.head_dim * (1 if self.fp8 else 2)

    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """As vLLM's FlashAttentionImpl calls it."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        dtype = torch.float8_e4m3fn if self.fp8 else torch.bfloat16
        batch = len(shape.lengths)
        block_table, blocks = random_table(shape, 16)
        query = torch.randn(batch * shape.query_len, shape.num_heads, shape.head_dim, device=DEVICE)
        query = query.bfloat16().to(dtype)
        out = torch.empty(query.shape, device=DEVICE, dtype=torch.bfloat16)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * shape.query_len
        lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE)
        descale = torch.ones(batch, shape.num_kv_heads, device=DEVICE)
        extra = {"q_descale": descale, "k_descale": descale, "v_descale": descale} if self.fp8 else {}
        calls: list[Call] = []
        for _ in range(layers):
            cache = torch.randn(2, blocks, 16, shape.num_kv_heads, shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
            cache = cache.to(dtype)

            def call(cache=cache) -> None:
                flash_attn_varlen_func(
                    q=query, k=cache[0], v=cache[1], out=out, cu_seqlens_q=starts, max_seqlen_q=shape.query_len,
                    seqused_k=lengths, max_seqlen_k=max(shape.lengths), softmax_scale=shape.head_dim**-0.5, causal=True,
                    block_table=block_table, fa_version=3, **extra,
                )  # fmt: skip

            calls.append(call)
        return (lambda: None), calls


class CopyArm(Arm):
    """Device-to-device copy of as many bytes as the 82-byte plan holds: reads and writes them, so half its rate."""

    name = "copy"

    def bytes_per_token(self, shape: Shape) -> float:
        """82: the same bytes as the 2.5-bit plan."""
        return 82

    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """One pair of buffers per layer."""
        n = int(sum(shape.lengths) * self.bytes_per_token(shape) * shape.num_kv_heads)
        pairs = [tuple(torch.empty(n, dtype=torch.uint8, device=DEVICE) for _ in range(2)) for _ in range(layers)]
        return (lambda: None), [lambda a=a, b=b: b.copy_(a) for a, b in pairs]


ARMS: dict[str, Arm] = {a.name: a for a in (FlashArm(False), FlashArm(True), CopyArm())}
ARMS |= {name: LatentArm(name) for name in PLANS}
