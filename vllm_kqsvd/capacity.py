# SPDX-License-Identifier: Apache-2.0
"""KV tokens and users in a given memory: the arithmetic of vLLM's block pool. Pure Python.

A request holds ceil(context / block) latent blocks and, whatever its length, the blocks its exact window can
touch; both kinds have equal bytes and come from one pool (`attention/window.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.layout import TILE

BLOCK = 128  # tokens of a latent page (the plugin's default)
PLAIN_BLOCK = 16  # tokens of vLLM's own page
WINDOW = 64  # exact tokens
EXACT_BLOCKS = (64, 32, 16)  # tokens of an exact page: the largest that fits a latent page


@dataclass(frozen=True)
class CacheFormat:
    """A cache format of one model on one rank. exact_bytes: per token in the model's dtype, 0 where no
    window is kept; block_bytes: one block of all layers."""

    name: str
    bytes_per_token: float
    block: int
    window: int = 0
    exact_bytes: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return round(self.block * self.bytes_per_token)

    @property
    def window_blocks(self) -> int:
        """Blocks of the exact window of one running request: it starts at a tile, anywhere in a block."""
        if not self.window:
            return 0
        for size in EXACT_BLOCKS:
            if size * self.exact_bytes <= self.block_bytes:
                return -(-(self.window + TILE - 1) // size) + 1
        raise UnsupportedError(
            f"{self.name}: {EXACT_BLOCKS[-1]} exact tokens do not fit a page of {self.block} latent tokens; "
            "use a larger --block-size"
        )

    def blocks_per_request(self, context: int) -> int:
        """Blocks of a running request of `context` tokens."""
        return -(-context // self.block) + self.window_blocks

    def num_blocks(self, memory: int) -> int:
        """Blocks in `memory` bytes."""
        return memory // self.block_bytes

    def users(self, memory: int, context: int) -> float:
        """Requests of `context` tokens that fit (vLLM's "maximum concurrency")."""
        return self.num_blocks(memory) / self.blocks_per_request(context)

    def tokens(self, memory: int, context: int) -> int:
        """KV tokens as vLLM reports them at start-up for --max-model-len `context`."""
        return int(self.users(memory, context) * context)

    def bytes_of_request(self, context: int) -> int:
        """Bytes of one running request, window and rounding to blocks included."""
        return self.blocks_per_request(context) * self.block_bytes


def plain(name: str, elements_per_token: int, element_size: int) -> CacheFormat:
    """A cache of plain elements, as vLLM keeps bf16 (2 bytes) or fp8 (1 byte)."""
    return CacheFormat(name, elements_per_token * element_size, PLAIN_BLOCK)


def latent(
    name: str, bytes_per_token: int, elements_per_token: int, window: int = WINDOW, element_size: int = 2
) -> CacheFormat:
    """A latent cache of `bytes_per_token` (all layers, scales included) with its exact window."""
    return CacheFormat(name, bytes_per_token, BLOCK, window, elements_per_token * element_size)


def plan_bytes(bits: float, head_dim: int) -> int:
    """Bytes per token and KV head of a bit budget: whole 8-byte half planes and two scale bytes."""
    return int(bits * 2 * head_dim / 8) // 8 * 8 + 2
