# SPDX-License-Identifier: Apache-2.0
"""LayerOps of the CUDA extension: store in one launch, decode on the pages, prefill through FlashAttention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import KernelError, UnsupportedError
from vllm_kqsvd.ops.cuda_library import available
from vllm_kqsvd.ops.cuda_prefill import Prefill, workspace_bytes
from vllm_kqsvd.ops.cuda_segments import PrefillPlan, plan_prefill
from vllm_kqsvd.ops.cuda_store import LatentStore
from vllm_kqsvd.ops.interface import LayerOps, LayerShape, Step

if TYPE_CHECKING:
    from vllm_kqsvd.ops.cuda_decode import ScheduleKind

__all__ = ["CudaOps", "CudaPlan", "available", "supports", "workspace_bytes"]


@dataclass(frozen=True)
class CudaPlan:
    """What `plan_step` returns: decode schedules by kind (layers of other kinds add theirs) and prefill segments."""

    prefill: PrefillPlan | None
    schedules: dict[ScheduleKind, torch.Tensor] = field(default_factory=dict)


def supports(codec: LayerCodec, shape: LayerShape) -> tuple[bool, str]:
    """Whether every kernel that `CudaOps` launches was compiled for this layer, and if not, why."""
    from vllm_kqsvd.ops.cuda_decode import why_unsupported

    if shape.dtype not in (torch.bfloat16, torch.float16):
        return False, f"model dtype {shape.dtype} found; the CUDA kernels take bfloat16 and float16"
    why = why_unsupported(codec, shape)
    return why is None, why or ""


class CudaOps(LayerOps):
    """Store, decode and prefill by the CUDA extension. Raises KernelError or UnsupportedError where it cannot serve."""

    name = "cuda"
    graph_safe = True  # decode rows; prefill rows run outside graphs
    max_decode_len = 8  # requests with up to this many rows go to the decode kernel
    needs_host_lengths = True
    max_cache_bytes = 2**37  # the decode kernel counts 32-byte units in 32 bits

    def __init__(self, codec: LayerCodec, shape: LayerShape) -> None:
        super().__init__(codec, shape)
        usable, why = available()
        if not usable:
            raise KernelError(f"implementation {self.name!r} asked for, but it is not available: {why}")
        self.device = codec.k.encode.device
        if self.device.type != "cuda":
            raise KernelError(f"implementation {self.name!r} asked for; the codec is on {self.device}, not on a GPU")
        self._make_decode()
        self._store = LatentStore(codec, shape.block_size)
        self.prefill = Prefill(self._store, shape, self.device)

    def _make_decode(self) -> None:
        usable, why = supports(self.codec, self.shape)
        if not usable:
            raise UnsupportedError(f"implementation {self.name!r} asked for, but not possible: {why}")
        from vllm_kqsvd.ops.cuda_decode import CudaDecode

        self._decode = CudaDecode(self.codec, self.shape, self.device)

    def reserve(self, max_requests: int, max_position: int) -> None:
        """See LayerOps.reserve."""
        self._decode.reserve(max_requests, max_position, self.max_decode_len)

    def forget_steps(self) -> None:
        """See LayerOps.forget_steps."""
        from vllm_kqsvd.ops.cuda_decode import workspace_of

        workspace_of(self.device).block_tables.clear()

    def plan_step(self, step: Step) -> CudaPlan:
        """Schedules of one step, shared by all layers; no host sync (none but a copy to the device for prefill)."""
        plan = CudaPlan(plan_prefill(step, self.shape.window, self.prefill.capacity))
        if step.num_decodes:
            self._schedule(step, plan, self.shape.window > 0)
        return plan

    def _schedule(self, step: Step, plan: CudaPlan, has_window: bool) -> torch.Tensor:
        kind = self._decode.kind(step.max_decode_len, has_window)
        if kind not in plan.schedules:
            plan.schedules[kind] = self._decode.schedule(step, has_window)[1]
        return plan.schedules[kind]

    def store(self, key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions) -> None:
        """See LayerOps.store."""
        self._store.store(key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions)

    def attend(self, query, key, value, pages, window_pages, step: Step, output) -> None:
        """See LayerOps.attend."""
        if step.window_block_table is None:
            window_pages = None
        plan = step.plan if isinstance(step.plan, CudaPlan) else self.plan_step(step)
        if step.num_decodes:
            self._attend_decodes(query, key, value, pages, window_pages, step, plan, output)
        if plan.prefill is not None:
            self.prefill.attend(query, key, value, pages, window_pages, step, plan.prefill, output)

    def _attend_decodes(self, query, key, value, pages, window_pages, step: Step, plan: CudaPlan, output) -> None:
        requests = self._schedule(step, plan, window_pages is not None)
        self._decode.attend(query, pages, window_pages, step, requests, output)
