# SPDX-License-Identifier: Apache-2.0
"""The window group in vLLM's own cache manager: page sizes, grouping, blocks held per request, prefix hits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_kqsvd.errors import UnsupportedError

pytest.importorskip("vllm")
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from vllm_kqsvd.attention.window import WindowSpec, check_pool, window_block_size  # noqa: E402

HEADS, DIM = 2, 64


def window_spec(bits: int = 4, block_size: int = 128) -> WindowSpec:
    """The spec of a bf16 window beside latent pages of `bits` bits."""
    token = HEADS * 4 * DIM
    page = HEADS * block_size * (2 * DIM * bits // 8 + 2)
    return WindowSpec(
        block_size=window_block_size(page, token, block_size),
        num_kv_heads=HEADS,
        head_size=DIM,
        dtype=torch.uint8,
        state_content_bytes=4 * DIM,
        page_size_padded=page,
        sliding_window=79,
    )


@pytest.mark.parametrize(
    ("bits", "block", "expected"), [(8, 128, 64), (4, 128, 32), (3, 128, 16), (2, 128, 16), (4, 64, 16)]
)
def test_largest_block_that_fits_a_latent_page(bits: int, block: int, expected: int) -> None:
    spec = window_spec(bits, block)
    assert spec.block_size == expected
    assert spec.page_size_bytes == HEADS * block * (2 * DIM * bits // 8 + 2) >= spec.unpadded_page_size_bytes


def test_page_too_small() -> None:
    with pytest.raises(UnsupportedError, match="larger --block-size"):
        window_spec(2, 64)


def test_registered_manager_and_size() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    spec = window_spec()
    assert KVCacheSpecRegistry.get_manager_class(spec) is SlidingWindowManager
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=8192))
    assert spec.max_memory_usage_bytes(config) == 4 * spec.page_size_bytes  # type: ignore[arg-type]


def test_pool_too_small_for_a_whole_prompt() -> None:
    spec = window_spec()
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=2048),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
        max_in_flight_tokens=2048,
    )
    check_pool(spec, 128, 82, config)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="lower --max-num-batched-tokens"):
        check_pool(spec, 128, 81, config)  # type: ignore[arg-type]


def manager_for(num_blocks: int, caching: bool = True):
    """vLLM's KVCacheManager over a latent and a window group of one layer each."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    init_none_hash(sha256)
    window = window_spec()
    latent = FullAttentionSpec(
        block_size=128, num_kv_heads=HEADS, head_size=DIM, dtype=torch.uint8, state_content_bytes=DIM + 2
    )
    groups = [KVCacheGroupSpec(["a"], latent), KVCacheGroupSpec(["a.kqsvd_window"], window)]
    config = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups, prefix_cache_retention_interval=0
    )
    return KVCacheManager(
        config,
        max_model_len=4096,
        scheduler_block_size=128,
        hash_block_size=32,
        enable_caching=caching,
        max_in_flight_tokens=512,
    )


def request_of(tokens: list[int], name: str = "r"):
    """A request whose block hashes are computed at 32 tokens."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=900),
        pooling_params=None,
        block_hasher=get_request_block_hasher(32, sha256),
    )


def test_blocks_held_while_decoding_stay_bounded() -> None:
    manager = manager_for(200)
    free = manager.block_pool.get_num_free_blocks()
    request = request_of(list(range(400)))
    blocks, computed, *_ = manager.get_computed_blocks(request)
    assert computed == 0 and manager.allocate_slots(request, 400, 0, blocks) is not None
    request.num_computed_tokens = 400
    held = []
    for step in range(600):
        request.append_output_token_ids(step)
        assert manager.allocate_slots(request, 1) is not None
        request.num_computed_tokens += 1
        latent = -(-request.num_computed_tokens // 128)
        held.append(free - manager.block_pool.get_num_free_blocks() - latent)
    assert max(held) == 4 and sum(held) / len(held) < 3.6


def test_prefix_hit_restores_the_window() -> None:
    manager = manager_for(200)
    first = request_of(list(range(300)), "first")
    blocks, *_ = manager.get_computed_blocks(first)
    manager.allocate_slots(first, 300, 0, blocks)
    first.num_computed_tokens = 300
    manager.free(first)
    again = request_of([*range(300), 7, 8], "again")
    blocks, computed, *_ = manager.get_computed_blocks(again)
    assert computed == 256
    window = blocks.blocks[1]
    assert [b.is_null for b in window] == [True] * 5 + [False] * 3  # positions 160 to 255
