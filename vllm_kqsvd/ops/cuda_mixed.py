# SPDX-License-Identifier: Apache-2.0
"""For plans that no CUDA decode kernel was compiled for: CUDA stores and expands, Triton decodes, on the same pages."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.ops import cuda_library
from vllm_kqsvd.ops.cuda import CudaOps, CudaPlan
from vllm_kqsvd.ops.cuda_segments import plan_prefill
from vllm_kqsvd.ops.interface import LayerOps, LayerShape, Step

__all__ = ["MixedOps", "available", "supports"]


def available() -> tuple[bool, str]:
    """Whether both the extension and Triton run here, and if not, why."""
    from vllm_kqsvd.ops import triton

    usable, why = cuda_library.available()
    return (usable, why) if not usable else triton.available()


def supports(codec: LayerCodec, shape: LayerShape) -> tuple[bool, str]:
    """Whether the store and dequantize kernels hold this layer; they know its plan at run time."""
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return False, f"model dtype {shape.dtype} found; the CUDA kernels take bfloat16 and float16"
    rotary, dim = codec.rope.rotary_dim if codec.rope_block else 0, shape.head_dim
    if dim % 16 or dim > 256 or rotary % 8:
        return False, f"head_dim {dim} with rotary width {rotary} found; multiples of 16 up to 256 and of 8 are needed"
    return True, ""


class MixedOps(CudaOps):
    """CUDA store and prefill, Triton decode."""

    name = "cuda+triton"
    max_cache_bytes = LayerOps.max_cache_bytes

    def _make_decode(self) -> None:
        from vllm_kqsvd.ops.triton.layer_ops import TritonOps

        usable, why = supports(self.codec, self.shape)
        if not usable:
            raise UnsupportedError(f"implementation {self.name!r} asked for, but not possible: {why}")
        self._triton = TritonOps(self.codec, self.shape)

    def reserve(self, max_requests: int, max_position: int) -> None:
        """Triton's scratch, if it knows how to be asked for."""
        self._triton.reserve(max_requests, max_position)

    def plan_step(self, step: Step) -> CudaPlan:
        """Prefill segments alone: Triton's decode needs no schedule."""
        return CudaPlan(plan_prefill(step, self.shape.window, self.prefill.capacity))

    def _attend_decodes(self, query, key, value, pages, window_pages, step: Step, plan: CudaPlan, output) -> None:
        decodes = replace(step, num_reqs=step.num_decodes)
        self._triton.attend(query, key, value, pages, window_pages, decodes, output)
