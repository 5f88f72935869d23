# SPDX-License-Identifier: Apache-2.0
"""Layers that keep vLLM's own cache beside compressed ones: sliding windows, and states of linear attention.

All groups of vLLM's cache manager draw blocks of equal bytes from one pool. A native layer left alone would ask for
the largest page of all and have every latent page padded to it, so its block is made as small as its kernels allow
and fills one latent page as well as it can; what is lost is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.selector import get_attn_backend

from vllm_kqsvd.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import AttentionSpec

BLOCK_MULTIPLE = 64  # of latent pages


@dataclass(frozen=True)
class Fit:
    """How a native layer fills a latent page: `block_size` tokens of `token_bytes` in `page_bytes`."""

    block_size: int
    token_bytes: int
    page_bytes: int

    @property
    def lost(self) -> float:
        """Share of the layer's memory that is padding."""
        return 1 - self.block_size * self.token_bytes / self.page_bytes


def kernel_block(backend: type[AttentionBackend]) -> int:
    """Smallest block that the backend's kernels read."""
    sizes = backend.get_supported_kernel_block_sizes()
    return min((s.base if isinstance(s, MultipleOf) else s for s in sizes), default=1)


def fit(token_bytes: int, page_bytes: int, smallest: int, block_size: int) -> Fit | None:
    """The largest block that fits a latent page of `block_size` tokens and divides it, or None."""
    sizes = [n for n in range(smallest, block_size + 1, smallest) if block_size % n == 0]
    fitting = [n for n in sizes if n * token_bytes <= page_bytes]
    return Fit(max(fitting), token_bytes, page_bytes) if fitting else None


def better_block_sizes(token_bytes: int, latent_bytes: int, smallest: int, now: Fit | None) -> list[int]:
    """Values of --block-size with less padding, best first (latent_bytes: per token of the layer, all heads)."""
    sizes = range(BLOCK_MULTIPLE, 513, BLOCK_MULTIPLE)
    tried = {n: fit(token_bytes, n * latent_bytes, smallest, n) for n in sizes}
    lost = {n: f.lost for n, f in tried.items() if f is not None and f.lost < (now.lost - 0.02 if now else 1)}
    return sorted(lost, key=lambda n: (round(lost[n], 3), n))


def native_impl(num_heads: int, head_size: int, scale: float, *rest: Any, **extra: Any) -> Any:
    """vLLM's own impl for a layer that is not compressed; arguments as vLLM passes them to an impl."""
    kv_cache_dtype = rest[3] if len(rest) > 3 else extra.get("kv_cache_dtype", "auto")
    backend = own_backend(head_size, kv_cache_dtype)
    return backend.get_impl_cls()(num_heads, head_size, scale, *rest, **extra)  # type: ignore[call-arg]


def own_backend(head_size: int, kv_cache_dtype: Any) -> type[AttentionBackend]:
    """What vLLM chooses for a sliding-window layer of this width when nobody asks for a backend."""
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    attention = get_current_vllm_config().attention_config
    asked, attention.backend = attention.backend, None
    try:
        return get_attn_backend(head_size, torch.get_default_dtype(), kv_cache_dtype, has_sliding_window=True)
    finally:
        attention.backend = asked


def adopt(layer: Any, latent_page: Callable[[], tuple[int, int]], made: dict[Any, Any]) -> None:
    """Give a native layer a backend whose pages are as large as latent pages.

    latent_page: () -> (tokens, bytes) of a latent page, called once the block size is final.
    made: backends made so far for this model, so that equal layers share one.
    """
    native = own_backend(layer.head_size, layer.kv_cache_dtype)
    if not isinstance(layer.impl, native.get_impl_cls()):  # --attention-config.backend_per_kind chose another
        native = layer.attn_backend
    if native not in made:
        made[native] = _fitting(native, latent_page)
    layer.attn_backend = made[native]


def _fitting(native: type[AttentionBackend], latent_page: Callable[[], tuple[int, int]]) -> type[AttentionBackend]:
    """The native backend, under its own qualified name, with specs that fit latent pages."""

    def customize_spec(cls: Any, spec: AttentionSpec) -> AttentionSpec:
        spec = native.customize_spec(spec)
        if spec.block_size == 1:
            return spec  # vLLM asks how many bytes a token takes
        block_size, page_bytes = latent_page()
        token_bytes = spec.real_page_size_bytes // spec.block_size
        smallest = kernel_block(native)
        found = fit(token_bytes, page_bytes, smallest, block_size)
        if found is None:
            sizes = better_block_sizes(token_bytes, page_bytes // block_size, smallest, None)
            hint = f"use --block-size {sizes[0]}" if sizes else "use a projection with more bits"
            raise UnsupportedError(
                f"vllm_kqsvd: a latent page of {page_bytes} bytes cannot hold {smallest} tokens of {token_bytes} bytes "
                f"of a layer that stays native ({native.get_name()}); {hint}"
            )
        cls.fitted = found
        return replace(spec, block_size=found.block_size, page_size_padded=page_bytes)

    body = {
        "customize_spec": classmethod(customize_spec),
        "fitted": None,
        "__module__": native.__module__,
        "__qualname__": native.__qualname__,
    }
    return type(native.__name__, (native,), body)


def compressed(config: VllmConfig) -> list[Any]:
    """The impls of the compressed layers (of this pipeline stage), in the order of the model."""
    from vllm_kqsvd.attention.impl import KQSVDImpl

    layers = config.compilation_config.static_forward_context.values()
    return [x.impl for x in layers if isinstance(getattr(x, "impl", None), KQSVDImpl)]


def layers_of(config: VllmConfig) -> list[Any]:
    """The layers of vLLM's table (of this pipeline stage) that keep a cache of their own kind."""
    from vllm_kqsvd.attention.impl import KQSVDImpl
    from vllm_kqsvd.attention.window import WindowShadow

    layers = config.compilation_config.static_forward_context.values()
    cached = [x for x in layers if hasattr(x, "get_kv_cache_spec") and not isinstance(x, WindowShadow)]
    return [x for x in cached if not isinstance(getattr(x, "impl", None), KQSVDImpl)]


def groups_of(config: VllmConfig, compressed: int) -> tuple[int, int]:
    """(latent groups that vLLM makes, blocks that native layers hold for one request of the longest length).

    vLLM deals layers to groups of equal size: that of the smallest kind, or of the largest if nearly as small.
    """
    counts = Counter(_spec(x, config) for x in layers_of(config))
    sizes = [compressed, *counts.values()]
    size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    blocks = (-(-n // size) * (s.max_memory_usage_bytes(config) // s.page_size_bytes) for s, n in counts.items())
    return -(-compressed // size), sum(blocks)


def _spec(layer: Any, config: VllmConfig) -> Any:
    """The cache spec of a native layer as vLLM sees it."""
    spec = layer.get_kv_cache_spec(config)
    fitting = hasattr(layer.get_attn_backend(), "fitted")
    return layer.get_attn_backend().customize_spec(spec) if fitting else spec


def padding_warning(layers: list[Any], latent_bytes: int) -> str | None:
    """What the padding of sliding-window layers costs, and which block size costs less; None if next to nothing.

    latent_bytes: of one token in one layer, all heads.
    """
    backends = [x.get_attn_backend() for x in layers]
    fits = [(b.fitted, b) for b in backends if getattr(b, "fitted", None)]
    if not fits:
        return None
    worst, backend = max(fits, key=lambda f: f[0].lost)
    if worst.lost < 0.05:
        return None
    better = better_block_sizes(worst.token_bytes, latent_bytes, kernel_block(backend), worst)
    hint = f"; --block-size {better[0]} would lose less" if better else ""
    return (
        f"{len(fits)} sliding-window layers keep vLLM's own cache; their blocks of {worst.block_size} tokens are "
        f"padded from {worst.block_size * worst.token_bytes:,} to {worst.page_bytes:,} bytes, which loses "
        f"{100 * worst.lost:.0f} % of their memory{hint}"
    )
