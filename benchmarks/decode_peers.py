# SPDX-License-Identifier: Apache-2.0
"""The decode attention that others ship, for benchmarks/decode_attention.py: vLLM's kernels, xformers', a plain copy.

Each is called as its own backend calls it, with the same heads and block size 16, caches filled at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.decode_arms import DEVICE, Arm, Call, random_table

if TYPE_CHECKING:
    from benchmarks.decode_attention import Shape

BLOCK = 16
SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph


@dataclass(frozen=True)
class Batch:
    """What every paged kernel takes besides its cache."""

    query: torch.Tensor
    out: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    blocks: int


def batch_of(shape: Shape) -> Batch:
    """Random bf16 queries and a shuffled block table."""
    requests = len(shape.lengths)
    table, blocks = random_table(shape, BLOCK)
    query = torch.randn(requests * shape.query_len, shape.num_heads, shape.head_dim, device=DEVICE).bfloat16()
    starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * shape.query_len
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device=DEVICE)
    return Batch(query, torch.empty_like(query), starts, lengths, table, blocks)


class FlashArm(Arm):
    """vLLM's FlashAttention 3."""

    def __init__(self, fp8: bool) -> None:
        self.fp8, self.name = fp8, "fa3_fp8" if fp8 else "fa3_bf16"

    def bytes_per_token(self, shape: Shape) -> float:
        """K and V."""
        return 2 * shape.head_dim * (1 if self.fp8 else 2)

    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """As FlashAttentionImpl calls it in full CUDA graphs: scheduled once a step, K beside V in a cache row."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

        dtype = torch.float8_e4m3fn if self.fp8 else torch.bfloat16
        b, requests, longest = batch_of(shape), len(shape.lengths), max(shape.lengths)
        query, descale = b.query.to(dtype), torch.ones(requests, shape.num_kv_heads, device=DEVICE)
        extra = {"q_descale": descale, "k_descale": descale, "v_descale": descale} if self.fp8 else {}

        def schedule() -> torch.Tensor:
            return get_scheduler_metadata(
                requests, shape.query_len, longest, shape.num_heads, shape.num_kv_heads, shape.head_dim, b.lengths,
                dtype, cu_seqlens_q=b.starts, page_size=BLOCK, causal=True, num_splits=SPLITS,
            )  # fmt: skip

        metadata = schedule()
        calls: list[Call] = []
        for _ in range(layers):
            size = (b.blocks, BLOCK, shape.num_kv_heads, 2 * shape.head_dim)
            cache = torch.randn(size, device=DEVICE, dtype=torch.bfloat16).to(dtype)

            def call(cache=cache) -> None:
                flash_attn_varlen_func(
                    q=query, k=cache[..., : shape.head_dim], v=cache[..., shape.head_dim :], out=b.out,
                    cu_seqlens_q=b.starts, max_seqlen_q=shape.query_len, seqused_k=b.lengths, max_seqlen_k=longest,
                    softmax_scale=shape.head_dim**-0.5, causal=True, block_table=b.table, fa_version=3,
                    scheduler_metadata=metadata, num_splits=SPLITS, **extra,
                )  # fmt: skip

            calls.append(call)

        def step() -> None:
            metadata.copy_(schedule())

        return step, calls


class TritonAttentionArm(Arm):
    """vLLM's `triton_attn`: bf16, or `int4_per_token_head` (4-bit codes and one float32 per token, head and side)."""

    def __init__(self, int4: bool) -> None:
        self.int4, self.name = int4, "vllm_int4" if int4 else "triton_attn"

    def bytes_per_token(self, shape: Shape) -> float:
        """K and V, scales included."""
        return 2 * (shape.head_dim // 2 + 4) if self.int4 else 4 * shape.head_dim

    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """As vLLM's TritonAttentionImpl calls it: 16 segments up to 128 / num_kv_heads requests, none beyond."""
        from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
        from vllm.v1.kv_cache_interface import KVQuantMode

        b = batch_of(shape)
        threshold = MIN_LAUNCH_GRID_SIZE_2D // shape.num_kv_heads
        parts = (threshold * shape.query_len, shape.num_heads, NUM_PAR_SOFTMAX_SEGMENTS)
        segments = {
            "seq_threshold_3D": threshold,
            "num_par_softmax_segments": NUM_PAR_SOFTMAX_SEGMENTS,
            "softmax_segm_output": torch.empty(*parts, shape.head_dim, device=DEVICE),
            "softmax_segm_max": torch.empty(parts, device=DEVICE),
            "softmax_segm_expsum": torch.empty(parts, device=DEVICE),
        }
        descale = None if self.int4 else torch.ones(1, device=DEVICE).expand(len(shape.lengths), shape.num_kv_heads)
        mode = KVQuantMode.INT4_PER_TOKEN_HEAD if self.int4 else KVQuantMode.NONE
        calls: list[Call] = []
        for _ in range(layers):
            key, value, scales = self._cache(shape, b.blocks)

            def call(key=key, value=value, scales=scales) -> None:
                unified_attention(
                    q=b.query, k=key, v=value, out=b.out, cu_seqlens_q=b.starts, max_seqlen_q=shape.query_len,
                    seqused_k=b.lengths, max_seqlen_k=max(shape.lengths), softmax_scale=shape.head_dim**-0.5,
                    causal=True, window_size=(-1, -1), block_table=b.table, softcap=0, q_descale=None,
                    k_descale=descale, v_descale=descale, kv_quant_mode=mode, **scales, **segments,
                )  # fmt: skip

            calls.append(call)
        return (lambda: None), calls

    def _cache(self, shape: Shape, blocks: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """(keys, values, scale views) of one layer."""
        size = (blocks, BLOCK, shape.num_kv_heads)
        if not self.int4:
            rows = torch.randn(*size, 2 * shape.head_dim, device=DEVICE, dtype=torch.bfloat16)
            key, value = rows.split(shape.head_dim, -1)
            return key, value, {}
        half = shape.head_dim // 2 + 4
        rows = torch.randint(0, 256, (*size, 2 * half), device=DEVICE, dtype=torch.uint8)
        floats = rows.view(torch.float32)
        scales = {"k_scale_cache": floats[..., half // 4 - 1], "v_scale_cache": floats[..., half // 2 - 1]}
        for scale in scales.values():
            scale.fill_(0.2)
        key, value = rows.split(half, -1)
        return key, value, scales


class TurboQuantArm(Arm):
    """vLLM's TurboQuant, one query token per request."""

    def __init__(self, preset: str) -> None:
        self.preset, self.name = preset, preset

    def _config(self, head_dim: int):
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        return TurboQuantConfig.from_cache_dtype(self.preset, head_dim)

    def bytes_per_token(self, shape: Shape) -> float:
        """Packed keys and values."""
        return self._config(shape.head_dim).slot_size_aligned

    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """As vLLM's TurboQuantAttentionImpl calls it: 32 splits, buffers allocated beforehand."""
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
        from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

        if shape.query_len != 1:
            raise RuntimeError("its decode kernel takes one query token per request")
        config, b = self._config(shape.head_dim), batch_of(shape)
        rotation = _build_hadamard(shape.head_dim, str(DEVICE))
        centroids = get_centroids(shape.head_dim, config.centroid_bits).to(DEVICE, torch.float32)
        heads = (len(shape.lengths), shape.num_heads)
        partial = torch.empty(*heads, 32, shape.head_dim + 1, device=DEVICE)
        lse = torch.empty(heads, device=DEVICE)
        key_bytes = config.key_packed_size
        calls: list[Call] = []
        for _ in range(layers):
            size = (b.blocks, BLOCK, shape.num_kv_heads, config.slot_size_aligned)
            cache = torch.randint(0, 128, size, device=DEVICE, dtype=torch.uint8)
            # Norms, scales and zeros are float16: bytes 0x38 0x38 make about 0.53, whatever the alignment.
            cache[..., key_bytes - 2 : key_bytes] = 0x38
            cache[..., -4:] = 0x38

            def call(cache=cache) -> None:
                triton_turboquant_decode_attention(
                    query=b.query, kv_cache=cache, block_table=b.table, seq_lens=b.lengths, Pi=rotation,
                    centroids=centroids, scale=shape.head_dim**-0.5, mse_bits=config.key_mse_bits,
                    key_packed_size=key_bytes, value_quant_bits=config.effective_value_quant_bits,
                    key_fp8=config.key_fp8, norm_correction=config.norm_correction, PiT=rotation, mid_o_buf=partial,
                    output_buf=b.out, lse_buf=lse, max_num_kv_splits=32,
                )  # fmt: skip

            calls.append(call)
        return (lambda: None), calls


class XformersArm(Arm):
    """xformers' split-K int4 attention: one fp16 scale and shift per row, caches contiguous per request, not paged."""

    name = "xformers_int4"

    def bytes_per_token(self, shape: Shape) -> float:
        """K and V with their scales."""
        return 2 * (shape.head_dim // 2 + 4)

    def prepare(self, shape: Shape, layers: int) -> tuple[Call, list[Call]]:
        """Its own choice of splits; KV heads are repeated by a stride of 0, which it turns into query rows."""
        from xformers.ops import fmha
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask
        from xformers.ops.fmha.triton_splitk import FwOp

        requests, longest, group = len(shape.lengths), max(shape.lengths), shape.num_heads // shape.num_kv_heads
        bias = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen=[shape.query_len] * requests, kv_padding=longest, kv_seqlen=list(shape.lengths), device=DEVICE
        )
        query = torch.randn(
            1, requests * shape.query_len, shape.num_kv_heads, group, shape.head_dim, device=DEVICE
        ).bfloat16()
        calls: list[Call] = []
        for _ in range(layers):
            size = (2, 1, requests * longest, shape.num_kv_heads, 1, shape.head_dim // 8 + 1)
            cache = torch.randint(-(2**31), 2**31 - 1, size, device=DEVICE, dtype=torch.int32)
            cache[..., 0] = 0x30003000  # scale and shift of 1/8
            key, value = cache.expand(-1, -1, -1, -1, group, -1)

            def call(key=key, value=value) -> None:
                fmha.memory_efficient_attention_forward(query, key, value, attn_bias=bias, op=FwOp)

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


PEERS: dict[str, Arm] = {
    a.name: a
    for a in (
        FlashArm(False),
        FlashArm(True),
        TritonAttentionArm(False),
        TritonAttentionArm(True),
        TurboQuantArm("turboquant_4bit_nc"),
        TurboQuantArm("turboquant_3bit_nc"),
        XformersArm(),
        CopyArm(),
    )
}
