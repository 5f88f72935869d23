# SPDX-License-Identifier: Apache-2.0
"""The two attention backends vLLM sees: latent pages of the real layers, exact pages of their windows."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout, SlidingWindowSpec

from vllm_kqsvd.attention.refusals import connector_allowed, engine_refusal
from vllm_kqsvd.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

BLOCK_SIZE = 128  # tokens per latent page unless --block-size says otherwise
BLOCK_MULTIPLE = 64


class _Pages(AttentionBackend):
    """What both groups share: pages are opaque bytes, so any layout with whole pages per block will do."""

    forward_includes_kv_cache_update = False
    supported_dtypes = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        """A static member of vLLM's registry: dynamic names do not survive pickling into workers."""
        return "CUSTOM"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Layouts whose blocks hold a layer's page in one piece, preferred first."""
        layouts = KVCacheLayout
        return (layouts.LBHNC, layouts.LBNHC, layouts.BLHNC, layouts.BLNHC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Latent channels come in groups of 16."""
        return head_size % 16 == 0

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Prefill segments and the decode kernel's width are planned from host lengths."""
        return False

    @classmethod
    def validate_configuration(cls, *args: Any, **settings: Any) -> list[str]:
        """vLLM's list of reasons against this backend, and what to do instead."""
        reasons = super().validate_configuration(*args, **settings)
        if not reasons:
            return []
        config = get_current_vllm_config_or_none()
        known = engine_refusal(config) if config is not None and config.model_config is not None else None
        return [*reasons, f"vllm_kqsvd: {known or 'serve this model without --attention-backend CUSTOM'}"]

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors do not hash the projection, so two nodes could exchange pages neither can read."""
        config = get_current_vllm_config_or_none()
        return config is not None and connector_allowed(config)


class KQSVDBackend(_Pages):
    """Latent pages. Subclasses made by `backend_for` carry the bytes per token of a loaded projection."""

    bytes_per_token: int | None = None  # per KV head; None until a projection is bound
    unequal = False  # whether other layers have other sizes

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages of several sizes lie side by side in every block, so that one block table serves all layers."""
        known = super().supported_kv_cache_layouts()
        return tuple(x for x in known if x.is_block_outermost) if cls.unequal else known

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """The impl that binds projections and routes to the ops."""
        from vllm_kqsvd.attention.impl import KQSVDImpl

        return KQSVDImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """The builder of `Step`s."""
        from vllm_kqsvd.attention.metadata import KQSVDMetadataBuilder

        return KQSVDMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """Multiples of 64; without --block-size only of 128, which makes 128 the size vLLM picks."""
        config = get_current_vllm_config_or_none()
        chosen = config is not None and config.cache_config.user_specified_block_size
        return [MultipleOf(BLOCK_MULTIPLE if chosen or kv_cache_spec is not None else BLOCK_SIZE)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Such layers are handed to vLLM's own impl and keep their cache (`native.py`)."""
        return True

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The latent page of the bound projection; vLLM's own page before one is bound.

        Raises UnsupportedError for a sliding-window layer without a compressed layer on this rank.
        """
        if isinstance(spec, SlidingWindowSpec):
            raise UnsupportedError(
                f"vllm_kqsvd: every attention layer of this model (or pipeline stage) has a sliding window such as "
                f"{spec.sliding_window}; only layers that attend to the whole context are compressed; "
                "serve it without --attention-backend CUSTOM"
            )
        if cls.bytes_per_token is None:
            return spec
        return replace(spec, state_content_bytes=cls.bytes_per_token, dtype=torch.uint8)


class KQSVDWindowBackend(_Pages):
    """Exact pages `[kv_head][token][K d | V d]` of the sliding-window group; attends nothing itself."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        """Never called: shadows have no impl."""
        raise NotImplementedError("window shadows do not attend")

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """The builder that hands over block table and slots."""
        from vllm_kqsvd.attention.metadata import WindowMetadataBuilder

        return WindowMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        """Whole tiles."""
        return [MultipleOf(16)]


@lru_cache(maxsize=64)
def backend_for(bytes_per_token: int, unequal: bool = False) -> type[KQSVDBackend]:
    """The backend class of layers with this many latent bytes per token and KV head; unequal: others have more or less.

    Equal sizes share a class, and all keep one qualified name, so vLLM puts them into one attention group.
    """
    body = {
        "bytes_per_token": bytes_per_token,
        "unequal": unequal,
        "__module__": KQSVDBackend.__module__,
        "__qualname__": KQSVDBackend.__qualname__,
    }
    return type(KQSVDBackend.__name__, (KQSVDBackend,), body)
