# SPDX-License-Identifier: Apache-2.0
"""Decode attention on latent pages by the CUDA kernel (csrc/kqsvd/decode_kernel.cuh).

One `DecodeWorkspace` per device is shared by all layers; one `DecodeSchedule` per engine step by all layers of the same
kind; `CudaDecode` holds a layer's constants. Nothing here allocates or synchronises once warm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.errors import KernelError, UnsupportedError
from vllm_kqsvd.ops.cuda_decode_constants import build_constants, rope_words
from vllm_kqsvd.ops.interface import LayerShape, Step
from vllm_kqsvd.plan_catalog import Instance, find_instance, instances

_REQUEST_INTS = 8  # decode_params.h: Request
_MAX_CTAS = 160  # more multiprocessors than any GPU this kernel runs on


@dataclass(frozen=True)
class ScheduleKind:
    """What decides how a step's work is cut: layers that agree in these share one schedule."""

    instance: Instance
    window: int
    sliding_window: int


@dataclass
class DecodeWorkspace:
    """Scratch of one device: grows when first asked for more, so warm up before graphs are captured."""

    device: torch.device
    partials: torch.Tensor = field(init=False)
    whole_partials: torch.Tensor = field(init=False)
    requests: dict[ScheduleKind, torch.Tensor] = field(default_factory=dict)
    block_tables: dict[ScheduleKind, int] = field(default_factory=dict)
    rope_tables: dict[tuple[object, ...], tuple[int, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.partials = torch.empty(0, dtype=torch.float32, device=self.device)
        self.whole_partials = torch.empty(0, dtype=torch.float32, device=self.device)

    def reserve(self, partials: int, whole_partials: int) -> None:
        """Hold at least this many floats of results of split and of other requests."""
        if self.partials.numel() < partials:
            self.partials = torch.empty(partials, dtype=torch.float32, device=self.device)
        if self.whole_partials.numel() < whole_partials:
            self.whole_partials = torch.empty(whole_partials, dtype=torch.float32, device=self.device)

    def request_table(self, kind: ScheduleKind, num_requests: int) -> torch.Tensor:
        """Persistent request table of a kind: [>= num_requests + 1, 8] int32."""
        table = self.requests.get(kind)
        if table is None or table.shape[0] <= num_requests:
            rows = max(num_requests + 1, 1025)
            table = torch.zeros(rows, _REQUEST_INTS, dtype=torch.int32, device=self.device)
            self.requests[kind] = table
        return table

    def one_block_table(self, kind: ScheduleKind, table: torch.Tensor) -> bool:
        """Whether all steps of a kind came with the same block table. Cache groups of one kind share a request table,
        and what is said there about the pages of one group would not hold for another's."""
        if self.block_tables.setdefault(kind, table.data_ptr()) != table.data_ptr():
            self.block_tables[kind] = -1
        return self.block_tables[kind] != -1


_workspaces: dict[torch.device, DecodeWorkspace] = {}


def workspace_of(device: torch.device) -> DecodeWorkspace:
    """The workspace of a device."""
    if device not in _workspaces:
        _workspaces[device] = DecodeWorkspace(device)
    return _workspaces[device]


def why_unsupported(codec: LayerCodec, shape: LayerShape) -> str | None:
    """One sentence if no compiled kernel serves this layer, else None."""
    if codec.rope_block not in (0, 32, 64):
        return f"rope block {codec.rope_block} asked for; the CUDA decode kernel has 32, 64 and none"
    if shape.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {shape.dtype} asked for; the CUDA decode kernel has bfloat16 and float16"
    if find_instance(codec.plan, shape.head_dim, 8, codec.rope_block) is None:
        plan = (codec.plan.k.to_json(), codec.plan.v.to_json())
        return (
            f"bit plan {plan} with head_dim {shape.head_dim} asked for; the CUDA decode kernel is compiled for the "
            f"plans of vllm_kqsvd/plan_catalog.py; use one of them when calibrating, or the Triton kernels"
        )
    return None


class CudaDecode:
    """The decode kernel of one layer. Raises UnsupportedError where none is compiled for it."""

    def __init__(self, codec: LayerCodec, shape: LayerShape, device: torch.device, max_position: int = 1 << 18) -> None:
        if why := why_unsupported(codec, shape):
            raise UnsupportedError(why)
        self.codec, self.shape, self.device = codec, shape, device
        self.constants = build_constants(codec, shape.scale, device)
        self.heads_per_kv = shape.num_heads // shape.num_kv_heads
        self.workspace = workspace_of(device)
        self._cover(max_position)
        self._instances: dict[int, tuple[Instance, int, int]] = {}

    def _cover(self, max_position: int) -> None:
        """Make the table of block starts, shared by layers of equal rotation, reach `max_position`."""
        rope = self.codec.rope
        key = (tuple(rope.inv_freq.tolist()), rope.interleaved, self.codec.rope_block, self.codec.head_dim)
        found = self.workspace.rope_tables.get(key)
        if found is None or found[0] < max_position:
            found = (max_position, rope_words(self.codec, max_position, self.device))
            self.workspace.rope_tables[key] = found
        self.max_position, self.rope_table = found

    def reserve(self, max_requests: int, max_position: int, max_query_len: int) -> None:
        """Allocate what any step needs; graphs captured afterwards hold addresses that never change."""
        if max_position > self.max_position:
            self._cover(max_position)
        for q_len in (1, max_query_len):
            self._reserve(max_requests, q_len)
            for has_window in (False, True):
                self.workspace.request_table(self.kind(q_len, has_window), max_requests)

    def _reserve(self, num_requests: int, max_query_len: int) -> int:
        """Scratch for a step; returns the query column groups of a KV head."""
        instance, record, parts = self.instance(max_query_len)
        groups = -(-self.heads_per_kv * max_query_len // instance.columns)
        heads = self.shape.num_kv_heads * groups
        phases = -(-heads // torch.cuda.get_device_properties(self.device).multi_processor_count) + 1
        self.workspace.reserve(_MAX_CTAS * parts * phases * 2 * record, num_requests * heads * record)
        return groups

    def instance(self, max_query_len: int) -> tuple[Instance, int, int]:
        """(kernel, floats of a partial result, warpgroups per CTA) for requests of up to this many rows."""
        columns = 4 if self.heads_per_kv * max_query_len <= 4 else 8
        if columns not in self._instances:
            found = find_instance(self.codec.plan, self.shape.head_dim, columns, self.codec.rope_block)
            if found is None:  # not every plan has a kernel of 4 columns; one of 8 leaves some of its own empty
                found = find_instance(self.codec.plan, self.shape.head_dim, 8, self.codec.rope_block)
            assert found is not None  # why_unsupported
            packed = torch.ops.kqsvd.decode_instance(found.key)
            if packed == 0:
                raise KernelError(f"{found.name} asked for, but the extension lacks it; rebuild the extension")
            self._instances[columns] = (found, packed // 4, packed % 4)
        return self._instances[columns]

    def kind(self, max_query_len: int, has_window: bool) -> ScheduleKind:
        """The schedule this layer needs."""
        instance, _, _ = self.instance(max_query_len)
        s = self.shape
        return ScheduleKind(instance, s.window if has_window else 0, s.sliding_window)

    def schedule(self, step: Step, has_window: bool) -> tuple[ScheduleKind, torch.Tensor]:
        """Cut the step's decode requests into work on the device; reuse the result for every layer of this kind.

        A step of decode requests alone also finds out whether its pages may be read while its own tokens are stored.
        """
        kind = self.kind(step.max_decode_len, has_window)
        same = self.workspace.one_block_table(kind, step.block_table)
        settled = same and step.num_decodes == step.num_reqs and kind.window > 0
        table = self.workspace.request_table(kind, step.num_decodes)
        torch.ops.kqsvd.decode_schedule(
            step.seq_lens,
            step.query_start_loc,
            table,
            kind.instance.key,
            step.num_decodes,
            kind.window,
            kind.sliding_window,
            step.block_table if settled else None,
            self.shape.block_size,
        )
        return kind, table

    def attend(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        window_pages: torch.Tensor | None,
        step: Step,
        requests: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Attention of the step's leading `num_decodes` requests: query, out [N, Hq, d]; `requests` from `schedule`."""
        if step.max_seq_len > self.max_position:
            self._cover(step.max_seq_len)
        kind = self.kind(step.max_decode_len, window_pages is not None)
        groups = self._reserve(step.num_decodes, step.max_decode_len)
        c, s = self.constants, self.shape
        torch.ops.kqsvd.decode(
            query,
            out,
            pages,
            step.block_table,
            window_pages,
            step.window_block_table if window_pages is not None else None,
            requests,
            c.key_image,
            c.mean_tile,
            c.sink_rows,
            self.rope_table,
            c.key_exponent,
            c.value_basis,
            c.value_mean,
            c.value_factor,
            self.workspace.partials,
            self.workspace.whole_partials,
            kind.instance.key,
            step.num_decodes,
            s.block_size,
            groups,
            self.codec.rope_block,
            self.codec.rope.rotary_dim,
            self.codec.rope.interleaved,
            s.sliding_window,
            s.scale,
            s.soft_cap,
        )


def missing_instances() -> list[str]:
    """Names of catalogue kernels that the loaded extension lacks."""
    return [i.name for i in instances() if torch.ops.kqsvd.decode_instance(i.key) == 0]
