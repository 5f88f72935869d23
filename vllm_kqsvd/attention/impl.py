# SPDX-License-Identifier: Apache-2.0
"""One attention layer: binds its projection after the weights are loaded, then only routes to the ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_kqsvd.attention import binding, native, refusals, window
from vllm_kqsvd.attention.backend import KQSVDWindowBackend, backend_for
from vllm_kqsvd.attention.flash import use_flash_attention
from vllm_kqsvd.attention.metadata import KQSVDMetadata, WindowMetadata
from vllm_kqsvd.attention.selftest import check_layer
from vllm_kqsvd.config import KQSVDConfig
from vllm_kqsvd.errors import KernelError, UnsupportedError
from vllm_kqsvd.ops.dispatch import make_layer_ops
from vllm_kqsvd.ops.interface import LayerOps, LayerShape

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionLayer

    from vllm_kqsvd.attention.nan_guard import NanGuard
    from vllm_kqsvd.codec import LayerCodec


class KQSVDImpl(AttentionImpl[KQSVDMetadata]):
    """Attention over latent pages and the exact recent window.

    Life: __init__ refuses what cannot work; process_weights_after_loading finds the layer's codec and puts the
    window's shadow beside the layer; get_kv_cache_spec of the shadow (the block size is final by then) makes
    the ops; do_kv_cache_update and forward call them.

    A layer with a sliding window gets vLLM's own impl instead (`native.py`).
    """

    def __new__(cls, num_heads: int, head_size: int, scale: float, *rest: Any, **extra: Any) -> Any:
        """This class for layers that attend to the whole context, vLLM's own for others."""
        sliding_window = rest[2] if len(rest) > 2 else extra.get("sliding_window")
        if sliding_window is None:
            return super().__new__(cls)
        if reason := refusals.engine_refusal(get_current_vllm_config()):
            raise UnsupportedError(f"vllm_kqsvd: {reason}")
        return native.native_impl(num_heads, head_size, scale, *rest, **extra)

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: object,
    ) -> None:
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = float(logits_soft_cap or 0.0)
        config = get_current_vllm_config()
        reason = refusals.engine_refusal(config) or refusals.layer_refusal(
            head_size=head_size,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            kv_cache_dtype=kv_cache_dtype,
            attn_type=attn_type,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            kv_sharing_target=kv_sharing_target_layer_name,
            extra=extra,
        )
        if reason:
            raise UnsupportedError(f"vllm_kqsvd: {reason}")
        self.config = KQSVDConfig.from_vllm(config)
        self.layers = config.compilation_config.static_forward_context  # filled while the model is built
        self.model_config, self.cache_config = config.model_config, config.cache_config
        self.name = self.digest = ""
        self.codec: LayerCodec | None = None
        self.self_test_error: float | None = None  # None: not tested
        self.nan_guard: NanGuard | None = None  # the last layer has one
        self._ops: LayerOps | None = None
        self.window_spec: window.WindowSpec  # with the ops
        self._page: tuple[int, int] | None = None
        self.mean_bytes: int | None = None  # per token and head of a layer on average, where layers differ
        self._bound: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def ops(self) -> LayerOps:
        """The layer's kernels; there once vLLM has asked for cache specs."""
        assert self._ops is not None, f"{self.name or 'layer'}: no projection bound"
        return self._ops

    @property
    def graph_safe(self) -> bool:
        """Whether decode runs from device tensors alone, so that it may be captured in a CUDA graph."""
        return self.ops.graph_safe and not self.config.check_nan

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find this layer, its codec and its page; runs again when weights are reloaded."""
        if self.codec is not None:
            return
        name, layer = next((n, x) for n, x in self.layers.items() if getattr(x, "impl", None) is self)
        projection = binding.open_projection(self.config)
        entry = projection.layer(name)
        first = self.first()
        groups = (get_tp_group(), get_pp_group()) if first is self else ()
        binding.check_same_everywhere(projection.digest, name, first.digest or projection.digest, groups)
        if first is self:
            self._check_model(projection)
        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.codec = binding.shard(entry.codec, self.num_kv_heads, rank, world, name)
        self.name, self.rope_mode, self.digest = name, entry.rope_mode, projection.digest
        self.max_position = entry.max_position
        self.dtype, self.device = act_dtype, next(iter(layer.buffers()), torch.empty(0)).device
        self.mean_bytes = binding.mean_bytes(projection)
        layer.attn_backend = backend_for(self.codec.plan.bytes_per_token, self.mean_bytes is not None)
        self.shadow_name = name + window.SUFFIX
        self.shadow = window.WindowShadow(KQSVDWindowBackend, self.num_heads, self.prepare)
        self.layers[self.shadow_name] = self.shadow

    def first(self) -> KQSVDImpl:
        """The first compressed layer of the model (of this pipeline stage)."""
        return next(x.impl for x in self.layers.values() if isinstance(getattr(x, "impl", None), KQSVDImpl))

    def is_first(self) -> bool:
        """Whether that is this one."""
        return self.first() is self

    def _check_model(self, projection: binding.Projection) -> None:
        """Once per process: does the file fit the model, and is every cached layer ours?"""
        modes = {e.rope_mode for e in projection.layers.values()}
        if reason := refusals.rope_refusal(self.model_config, modes):
            raise UnsupportedError(f"vllm_kqsvd: {reason}")
        binding.check_served_model(projection, self.model_config)
        beside = len(native.layers_of(get_current_vllm_config()))
        binding.check_unequal_pages(projection, get_pp_group().world_size, beside)
        made: dict[Any, Any] = {}
        for name, layer in self.layers.items():
            if isinstance(layer, window.WindowShadow) or isinstance(getattr(layer, "impl", None), KQSVDImpl):
                continue
            if getattr(layer, "sliding_window", None) is not None and isinstance(layer.impl, AttentionImpl):
                native.adopt(layer, self.latent_page, made)
            elif hasattr(layer, "get_kv_cache_spec") and not isinstance(layer, MambaBase):
                raise UnsupportedError(
                    f"vllm_kqsvd: layer {name!r} ({type(layer).__name__}) found; beside compressed layers only sliding "
                    f"windows and linear attention may keep a cache of their own; {refusals.LEAVE_OUT}"
                )

    def latent_page(self) -> tuple[int, int]:
        """(tokens, bytes) of a block of this layer's latents; asked for once the block size is final.

        vLLM overwrites `cache_config.block_size` with the smallest group's afterwards.
        """
        if self._page is None:
            assert self.codec is not None
            tokens = self.cache_config.block_size
            binding.check_shape(self.codec, self.head_size, tokens, self.name)
            self._page = tokens, self.codec.layout.page_bytes(self.num_kv_heads, tokens)
        return self._page

    def prepare(self, config: VllmConfig) -> window.WindowSpec:
        """Make the ops for the final block size (once) and return the window group's spec."""
        if self._ops is not None:  # vLLM asks again
            return self.window_spec
        codec, (block_size, page_bytes) = self.codec, self.latent_page()
        assert codec is not None
        token_bytes = self.num_kv_heads * 2 * self.head_size * self.dtype.itemsize
        if self.mean_bytes is not None:  # windows share one size; together they fit where the latents do
            page_bytes = self.mean_bytes * self.num_kv_heads * block_size
        size = window.window_block_size(page_bytes, token_bytes, block_size)
        shape = LayerShape(
            self.num_heads, self.num_kv_heads, self.head_size, block_size, size,
            self.scale, self.dtype, self.config.window, self.soft_cap,
        )  # fmt: skip
        self._ops = make_layer_ops(codec, shape, self.device, self.config.implementation)
        if reason := refusals.draft_refusal(self._ops, config.num_speculative_tokens):
            raise UnsupportedError(f"vllm_kqsvd: {reason}")
        use_flash_attention(self._ops)
        self._ops.reserve(config.scheduler_config.max_num_seqs, config.model_config.max_model_len)
        if self.config.self_test:
            self.self_test_error = check_layer(self._ops, codec, self.device, self.name, config.num_speculative_tokens)
        self.window_spec = window.WindowSpec(
            block_size=size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=torch.uint8,
            state_content_bytes=2 * self.head_size * self.dtype.itemsize,
            page_size_padded=page_bytes if self.mean_bytes is None else None,
            sliding_window=self.config.window + window.TILE - 1,  # windows start at whole tiles
            max_decode_len=1 + config.num_speculative_tokens,
        )
        return self.window_spec

    def _pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(latent pages [blocks, page_bytes] uint8, exact pages [blocks, H, size, 2 d]) of the bound caches."""
        if self._bound is None or self._bound[0].data_ptr() != kv_cache.data_ptr():
            shape, codec = self.ops.shape, self.ops.codec
            exact = self.shadow.kv_cache.view(torch.uint8)
            for cache in (kv_cache, exact):
                if (cache.data_ptr() | cache.stride(0)) % 16:
                    raise KernelError(f"pages of layer {self.name!r} do not start at multiples of 16 bytes")
            heads, size, width = shape.num_kv_heads, shape.window_block_size, 2 * shape.head_dim
            row = width * shape.dtype.itemsize
            rows = torch.as_strided(exact, (exact.shape[0], heads * size * row), (exact.stride(0), 1))
            page = codec.layout.page_bytes(heads, shape.block_size)
            latent = torch.as_strided(kv_cache, (kv_cache.shape[0], page), (kv_cache.stride(0), 1))
            self._bound = latent, rows.view(shape.dtype).unflatten(1, (heads, size, width))
        return self._bound

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Code the step's keys and values [N, H, d] into latent pages and copy them into window pages."""
        context = get_forward_context()
        metadata = _of(context.attn_metadata, self.name)
        if metadata is None:
            return  # a profiling run
        latent, exact = self._pages(kv_cache)
        window_slots = _of(context.slot_mapping, self.shadow_name)
        self.ops.store(key, value, latent, exact, slot_mapping, window_slots, metadata.step.positions)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KQSVDMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the step's rows, written to `output` [N, Hq, d] in place."""
        if attn_metadata is None:
            return output.fill_(0)
        shadow: WindowMetadata = _of(get_forward_context().attn_metadata, self.shadow_name)
        step = attn_metadata.with_window(shadow)
        latent, exact = self._pages(kv_cache)
        self.ops.attend(query, key, value, latent, exact, step, output)
        if self.nan_guard is not None:
            self.nan_guard.count(output[: step.num_tokens], step.query_start_loc)
        if self.config.check_nan and not bool(torch.isfinite(output[: step.num_tokens]).all()):
            raise KernelError(
                f"layer {self.name!r} ({self.ops.name}) returned values that are not finite; "
                "run again with kqsvd.implementation 'reference' to tell a kernel's fault from the model's"
            )
        return output


def _of(by_layer: object, name: str) -> Any:
    """Value of a layer in vLLM's per-layer dict (or the first of a list of them); None while profiling."""
    if isinstance(by_layer, list):
        by_layer = by_layer[0]
    return by_layer.get(name) if isinstance(by_layer, dict) else None
