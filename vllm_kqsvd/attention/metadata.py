# SPDX-License-Identifier: Apache-2.0
"""Per-step metadata: attribute copies of vLLM's persistent tensors into one `Step` shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_kqsvd.attention import native
from vllm_kqsvd.ops import cuda_library
from vllm_kqsvd.ops.interface import Step

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec


@dataclass
class WindowMetadata(AttentionMetadata):
    """Where the window group's pages are: block_table [S, m] int32, slot_mapping [>= N] int64."""

    block_table: torch.Tensor
    slot_mapping: torch.Tensor


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Passes the window group's tensors on."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        """Attribute copies."""
        return WindowMetadata(common_attn_metadata.block_table_tensor, common_attn_metadata.slot_mapping)


@dataclass
class KQSVDMetadata(AttentionMetadata):
    """The step as the ops see it; the window's block table joins when the first layer asks."""

    step: Step

    def with_window(self, window: WindowMetadata) -> Step:
        """The step with the window group's block table (made once per step, whichever layer is first)."""
        if self.step.window_block_table is not window.block_table:
            self.step = replace(self.step, window_block_table=window.block_table)
        return self.step


class KQSVDMetadataBuilder(AttentionMetadataBuilder[KQSVDMetadata]):
    """Builds one `Step` per engine step: no per-layer and no per-request Python.

    vLLM makes a builder for every page size; those whose layers run on the same kernels share what the first one built.
    """

    _latest: ClassVar[tuple[Any, Any, Any]] = (None, None, None)  # common metadata, kind of builder, what it built

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        from vllm_kqsvd.attention.report import announce

        context = vllm_config.compilation_config.static_forward_context
        impls = [context[name].impl for name in layer_names]
        self._ops = impls[0].ops
        longest = self._ops.max_decode_len
        self._init_reorder_batch_threshold(longest, supports_spec_as_decode=False)
        size = vllm_config.scheduler_config.max_num_batched_tokens
        self._positions = torch.zeros(size, dtype=torch.int64, device=device)
        # vLLM may deal the compressed layers to several groups; one builder speaks for all of them
        self._nan_guard = announce(vllm_config, native.compressed(vllm_config)) if impls[0].is_first() else None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Single-token decode batches, if every layer's ops run from device tensors alone."""
        impls = native.compressed(vllm_config)
        if impls and all(impl.graph_safe for impl in impls):
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KQSVDMetadata:
        """Metadata of one step. `plan_step` of the ops, if there is one, runs here once (device work only)."""
        if self._nan_guard is not None:
            self._nan_guard.poll()
        common = common_attn_metadata
        mine = type(self._ops), self.reorder_batch_threshold
        seen, kind, built = KQSVDMetadataBuilder._latest
        if seen is common and kind == mine:
            return built  # type: ignore[no-any-return]
        threshold = self.reorder_batch_threshold or 1
        decodes, _, decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=threshold)
        step = Step(
            num_tokens=common.num_actual_tokens,
            num_reqs=common.num_reqs,
            num_decodes=decodes,
            num_decode_tokens=decode_tokens,
            max_decode_len=_longest_decode(common, decodes, threshold),
            max_seq_len=common.max_seq_len,
            query_start_loc=common.query_start_loc,
            query_start_loc_cpu=common.query_start_loc_cpu,
            seq_lens=common.seq_lens,
            seq_lens_cpu=common.seq_lens_cpu_upper_bound,
            block_table=common.block_table_tensor,
            window_block_table=None,
            positions=self._token_positions(common),
        )
        built = KQSVDMetadata(replace(step, plan=self._ops.plan_step(step)))
        KQSVDMetadataBuilder._latest = common, mine, built
        return built

    def _token_positions(self, common: CommonAttentionMetadata) -> torch.Tensor:
        """Position of every token [N] int64: the runner's own buffer, or computed on the device without one."""
        if common.positions is not None and common.positions.dim() == 1:
            return common.positions
        n, device = common.num_actual_tokens, self._positions.device
        out = self._positions[:n]
        if device.type == "cuda" and cuda_library.available()[0]:
            torch.ops.kqsvd.token_positions(common.query_start_loc, common.seq_lens, out)
            return out
        row = torch.arange(n, device=device)
        start = common.query_start_loc
        request = torch.searchsorted(start[1:].contiguous(), row, right=True).clamp_max(common.num_reqs - 1)
        first = common.seq_lens[request] - start[request + 1]
        return torch.add(row, first, out=out)


def _longest_decode(common: CommonAttentionMetadata, decodes: int, threshold: int) -> int:
    """Largest query length among the leading decode requests, from host integers."""
    if common.max_query_len <= threshold:
        return common.max_query_len
    starts = common.query_start_loc_cpu[: decodes + 1]
    return int((starts[1:] - starts[:-1]).max()) if decodes else 1
