# SPDX-License-Identifier: Apache-2.0
"""LayerOps of the CUDA extension: store in one launch, decode on the pages, prefill through FlashAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import KernelError, UnsupportedError
from vllm_kqsvd.ops.cuda_library import available
from vllm_kqsvd.ops.cuda_prefill import Prefill, workspace_bytes
from vllm_kqsvd.ops.cuda_segments import PrefillPlan, plan_prefill
from vllm_kqsvd.ops.cuda_store import LatentStore
from vllm_kqsvd.ops.interface import LayerOps, LayerShape, Step

__all__ = ["CudaOps", "CudaPlan", "available", "supports", "workspace_bytes"]


class Decoder(Protocol):
    """Attention of the leading `num_decodes` requests of a step. `plan` does device work only, once per step."""

    max_decode_len: int

    def plan(self, step: Step) -> object: ...

    def attend(self, query, pages, window_pages, step: Step, plan: object, output) -> None: ...


@dataclass(frozen=True)
class CudaPlan:
    """What `CudaOps.plan_step` returns: the decode kernel's schedule and the prefill's segments."""

    decode: object
    prefill: PrefillPlan | None


def supports(codec: LayerCodec, shape: LayerShape) -> tuple[bool, str]:
    """Whether every kernel that `CudaOps` launches was compiled for this layer, and if not, why."""
    from vllm_kqsvd.ops import cuda_decode

    if shape.dtype not in (torch.bfloat16, torch.float16):
        return False, f"model dtype {shape.dtype} asked for; the CUDA kernels take bfloat16 and float16"
    return cuda_decode.supports(codec, shape)


class CudaOps(LayerOps):
    """Store, decode and prefill by the CUDA extension. Raises KernelError, UnsupportedError where it cannot serve."""

    name = "cuda"
    graph_safe = True  # decode rows; prefill rows never are

    def __init__(self, codec: LayerCodec, shape: LayerShape) -> None:
        super().__init__(codec, shape)
        usable, why = available()
        if not usable:
            raise KernelError(f"implementation 'cuda' asked for, but it is not available: {why}")
        device = codec.k.encode.device
        if device.type != "cuda":
            raise KernelError(f"implementation 'cuda' asked for; the codec is on {device}; move it to the GPU first")
        self.decoder = self._make_decoder()
        self.max_decode_len = self.decoder.max_decode_len
        self._store = LatentStore(codec, shape.block_size)
        self.prefill = Prefill(self._store, shape, device)

    def _make_decoder(self) -> Decoder:
        from vllm_kqsvd.ops import cuda_decode

        usable, why = supports(self.codec, self.shape)
        if not usable:
            raise UnsupportedError(f"implementation 'cuda' asked for, but {why}; set kqsvd.implementation to 'triton'")
        return cuda_decode.DecodeAttention(self.codec, self.shape)

    def plan_step(self, step: Step) -> CudaPlan:
        """Schedules of one step, shared by all layers: no host sync, no allocation on the decode path."""
        decode = self.decoder.plan(step) if step.num_decodes else None
        return CudaPlan(decode, plan_prefill(step, self.shape.window, self.prefill.capacity))

    def store(self, key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions) -> None:
        """See LayerOps.store."""
        self._store.store(key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions)

    def attend(self, query, key, value, pages, window_pages, step: Step, output) -> None:
        """See LayerOps.attend."""
        plan = step.plan if isinstance(step.plan, CudaPlan) else self.plan_step(step)
        if step.num_decodes:
            self.decoder.attend(query, pages, window_pages, step, plan.decode, output)
        if plan.prefill is not None:
            self.prefill.attend(query, key, value, pages, window_pages, step, plan.prefill, output)
