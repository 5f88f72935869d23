# SPDX-License-Identifier: Apache-2.0
"""Our arms of benchmarks/decode_attention.py: latent pages of each catalogue plan, by the CUDA or Triton kernels."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.layout import layout_of
from vllm_kqsvd.ops.interface import LayerShape, Step
from vllm_kqsvd.plan_catalog import PLANS

if TYPE_CHECKING:
    from benchmarks.decode_attention import Shape

DEVICE = torch.device("cuda", 0)
Call = Callable[[], None]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]  # query, pages, window, out


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
        layout = layout_of(self.plan)
        query = torch.randn(rows, shape.num_heads, shape.head_dim, device=DEVICE).bfloat16()
        out = torch.empty_like(query)
        calls: list[Call] = []
        schedule, attentions = self._attentions(codec, layer_shape, step, layers)
        for attend in attentions:
            pages = torch.randint(0, 256, (blocks, layout.page_bytes(shape.num_kv_heads, self.block)), device=DEVICE,
                                  dtype=torch.uint8)  # fmt: skip
            tiles = pages.view(-1, layout.tile_bytes)
            tiles[:, layout.scale_offset["k"] :] = tiles[:, layout.scale_offset["k"] :] % 16 + 56
            window = torch.randn(window_blocks, shape.num_kv_heads, 32, 2 * shape.head_dim, device=DEVICE).bfloat16()
            calls.append(lambda a=attend, p=pages, w=window: a(query, p, w, out))
        return schedule, calls

    def _attentions(self, codec: LayerCodec, shape: LayerShape, step: Step, layers: int) -> tuple[Call, list[Attend]]:
        """(schedule of a step, attention of every layer)."""
        from vllm_kqsvd.ops.cuda_decode import CudaDecode

        first = CudaDecode(codec, shape, DEVICE, step.max_seq_len)
        first.reserve(step.num_decodes, step.max_seq_len, step.max_decode_len)
        _, requests = first.schedule(step, True)

        def bind(layer: CudaDecode) -> Attend:
            return lambda query, pages, window, out: layer.attend(query, pages, window, step, requests, out)

        layer_ops = [with_own_constants(first, ("constants",)) for _ in range(layers)]
        return (lambda: None if first.schedule(step, True) else None), [bind(layer) for layer in layer_ops]


def with_own_constants(layer, names: tuple[str, ...]):
    """A shallow copy of a layer's ops whose constants (dataclasses of tensors) lie in memory of their own."""
    out = copy.copy(layer)
    for name in names:
        held = getattr(layer, name)
        tensors = {k: v.clone() for k, v in vars(held).items() if isinstance(v, torch.Tensor)}
        setattr(out, name, replace(held, **tensors))
    return out


class TritonLatentArm(LatentArm):
    """Our pages read by the Triton kernels."""

    def __init__(self, plan_name: str) -> None:
        super().__init__(plan_name)
        self.name = f"triton_{plan_name}"

    def _attentions(self, codec: LayerCodec, shape: LayerShape, step: Step, layers: int) -> tuple[Call, list[Attend]]:
        from vllm_kqsvd.ops.triton.layer_ops import TritonOps

        first = TritonOps(codec.to(DEVICE), shape)
        key = torch.randn(step.num_tokens, shape.num_kv_heads, shape.head_dim, device=DEVICE).bfloat16()

        def bind(layer: TritonOps) -> Attend:
            return lambda query, pages, window, out: layer.attend(query, key, key, pages, window, step, out)

        layer_ops = [with_own_constants(first, ("_k", "_v")) for _ in range(layers)]
        return (lambda: None), [bind(layer) for layer in layer_ops]


LATENTS: dict[str, Arm] = {name: LatentArm(name) for name in PLANS}
LATENTS |= {a.name: a for a in map(TritonLatentArm, PLANS)}
