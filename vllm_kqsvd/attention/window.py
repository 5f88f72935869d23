# SPDX-License-Identifier: Apache-2.0
"""The exact recent window: a second, sliding-window KV-cache group that vLLM's own hybrid manager owns.

Every compressed layer has a shadow entry in vLLM's layer table. It computes nothing; it makes vLLM allocate,
free, prefix-cache and address blocks of exact keys and values of the last tokens of every running request.
Its pages have as many bytes as a latent page, so both groups draw blocks from one pool (docs/window.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.layout import TILE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

SUFFIX = ".kqsvd_window"
BLOCK_SIZES = (256, 128, 64, 32, 16)  # tokens per exact page


def window_block_size(page_bytes: int, token_bytes: int, block_size: int = 128) -> int:
    """Tokens of `token_bytes` (exact K and V of all heads) per page of `page_bytes` and `block_size` latent tokens.

    The largest power of two that fits and divides `block_size`, so that both groups share block boundaries.
    """
    for size in BLOCK_SIZES:
        if size * token_bytes <= page_bytes and block_size % size == 0:
            return size
    raise UnsupportedError(
        f"a latent page has {page_bytes} bytes, too few for {TILE} exact tokens of {token_bytes} bytes; "
        "use a larger --block-size (128 serves every plan of 2 bits and more), or a projection with more bits"
    )


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """A sliding window whose start-up size is what a running request keeps.

    vLLM sizes sliding windows as if every request had a whole batch of prompt tokens in flight; the exact
    window has that only while a prompt is read (and `check_pool` covers that case).
    """

    max_decode_len: int = 1

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one layer and request: blocks a window can touch when it starts anywhere in a block."""
        tokens = min(self.sliding_window - 1 + self.max_decode_len, vllm_config.model_config.max_model_len)
        return (-(-tokens // self.block_size) + 1) * self.page_size_bytes


def check_pool(
    spec: WindowSpec, block_size: int, num_blocks: int, config: VllmConfig, groups: tuple[int, int] = (1, 0)
) -> None:
    """Raise unless one request of the longest length fits the pool, its prompt read in the largest chunks.

    groups: (latent groups, blocks of native layers), see `native.groups_of`.
    """
    longest = config.model_config.max_model_len
    window = spec.max_admission_blocks_per_request(config.max_in_flight_tokens, longest)
    needed = groups[0] * (-(-longest // block_size) + window) + groups[1] + 1  # block 0 is never used
    if needed > num_blocks:
        raise UnsupportedError(
            f"a request of max_model_len {longest} needs {needed} cache blocks, {groups[0] * window} of them for the "
            f"exact rows of a chunk of {config.scheduler_config.max_num_batched_tokens} tokens, and there are "
            f"{num_blocks}; lower --max-num-batched-tokens or --max-model-len, or give the cache more memory"
        )


class WindowShadow(AttentionLayerBase):
    """Stands for the window of one layer in `static_forward_context`; vLLM binds its cache tensor here."""

    def __init__(
        self, backend: type[AttentionBackend], num_heads: int, spec_of: Callable[[VllmConfig], WindowSpec]
    ) -> None:
        self.kv_cache = torch.tensor([])
        self.num_heads = num_heads
        self._backend, self._spec_of = backend, spec_of

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Backend that says how pages of this group are addressed."""
        return self._backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowSpec:
        """The sliding-window spec, made when the block size is final."""
        return self._spec_of(vllm_config)
