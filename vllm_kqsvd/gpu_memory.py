# SPDX-License-Identifier: Apache-2.0
"""What vLLM leaves for the cache: the memory a GPU really offers, and what a server takes beside weights and cache.

An estimate of what vLLM measures when it starts (its "Available KV cache memory"); `kqsvd plan --kv-memory` takes
that number itself and is then exact. The constants come from vLLM 0.33 on H100s: an 8B Llama with and without
torch.compile, and a 135M Llama without graphs on one and two GPUs.
"""

from __future__ import annotations

from typing import Any

GIB = 2**30
USABLE = 0.9898  # CUDA offers 79.18 GiB of an H100 80GB
UTILIZATION = 0.92  # vLLM's default --gpu-memory-utilization
BATCHED_TOKENS = 8192  # `vllm serve` on an H100; LLM() takes 16384
MAX_SEQS = 1024
CONTEXT = int(0.17 * GIB)  # CUDA context and workspaces
GRAPHS = int(0.5 * GIB)  # CUDA graphs of the default sizes
EXCHANGE = int(0.65 * GIB)  # NCCL and its buffers, with tensor parallelism
LOGIT = 6  # bytes of a logit: 16 bits as computed, 32 as sampled


def usable(sold: int) -> int:
    """Bytes that CUDA offers of a GPU sold with `sold` bytes."""
    return int(sold * USABLE)


def overhead(config: Any, batched_tokens: int, max_seqs: int, ranks: int) -> int:
    """Bytes beside weights and cache on each of `ranks` GPUs.

    The largest activations of a prompt chunk are those of the gated feed-forward, in 16 bits: both inputs, their
    product, and four rows as wide as the model. The sampler holds the logits of `max_seqs` requests.
    """
    width = 3 * config.intermediate_size // ranks + 4 * config.hidden_size
    sampler = LOGIT * max_seqs * config.vocab_size
    return CONTEXT + GRAPHS + 2 * batched_tokens * width + sampler + (EXCHANGE if ranks > 1 else 0)
