# SPDX-License-Identifier: Apache-2.0
"""What vLLM leaves for the cache: the memory a GPU really offers, and what a server takes beside weights and cache.

An estimate of what vLLM measures when it starts (its "Available KV cache memory"); `kqsvd plan --kv-memory` takes
that number itself and is then exact.
"""

from __future__ import annotations

from typing import Any

USABLE = 0.9898  # CUDA offers 79.18 GiB of an H100 80GB
UTILIZATION = 0.92  # vLLM's default --gpu-memory-utilization
BATCHED_TOKENS = 8192  # `vllm serve` on an H100; LLM() takes 16384
# CUDA context, CUDA graphs, workspaces and the sampler's tensors, which do not grow with the model
FIXED = int(1.42 * 2**30)


def usable(sold: int) -> int:
    """Bytes that CUDA offers of a GPU sold with `sold` bytes."""
    return int(sold * USABLE)


def overhead(config: Any, batched_tokens: int, ranks: int) -> int:
    """Bytes beside weights and cache on each of `ranks` GPUs: the largest activations of a prompt chunk in 16 bits.

    They are those of the gated feed-forward: both inputs, their product, and four rows as wide as the model.
    """
    width = 3 * config.intermediate_size // ranks + 4 * config.hidden_size
    return FIXED + 2 * batched_tokens * width
