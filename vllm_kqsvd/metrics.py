# SPDX-License-Identifier: Apache-2.0
"""Numbers of the latent cache on vLLM's own /metrics (entry point group `vllm.stat_logger_plugins`).

vLLM makes one logger per front-end process and calls `record` after every engine step. Numbers come from the
workers (`status.py`) and, for the window's share of the pool, from the scheduler's own statistics. They are plain
gauges of the default registry, multiprocess mode "mostrecent", as vLLM's are, so several API servers work too.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import Gauge
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_kqsvd import __version__, status

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

PREFIX = "vllm_kqsvd:"
LOOK_SECONDS = 1.0  # how often the workers' files are looked at
LABELS = ("model_name", "engine")
# name -> (help, further labels)
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "info": ("Constant 1; the labels say what serves.", ("version", "kernels", "digest", "window", "block_size")),
    "ranks": ("Ranks that have reported.", ()),
    "layers": ("Attention layers by rope mode and kernels; mode native keeps vLLM's own cache.", ("mode", "kernels")),
    "kv_bytes_per_token": ("Bytes of one latent token over all ranks, scales included, window not.", ()),
    "kv_bytes_per_token_uncompressed": ("Bytes of one token in the model's own type, over all ranks.", ()),
    "kv_bits_per_element": ("Stored bits per element of K and V, scales included.", ()),
    "compression_ratio": ("KV tokens over those of an uncompressed cache in the same memory.", ()),
    "kv_tokens": ("KV tokens at max_model_len per request, exact windows counted.", ()),
    "kv_tokens_uncompressed": ("KV tokens an uncompressed cache would have in the same memory.", ()),
    "kv_tokens_gained": ("kv_tokens - kv_tokens_uncompressed.", ()),
    "window_blocks_per_request": ("Blocks the exact window of a decoding request holds, at most.", ()),
    "window_fill": ("Share of the block pool the windows of the running requests hold, at most.", ()),
    "self_test_layers": ("Layers by result of the start-up self-test; a failed one keeps the server from starting.",
                         ("result",)),
    "self_test_error_max": ("Largest relative difference from the reference in the self-test.", ()),
    "nan_guard_trips": ("Engine steps in which attention returned a value that is not finite.", ()),
}  # fmt: skip


@cache  # once per process: a registry refuses a second gauge of the same name
def gauges() -> dict[str, Gauge]:
    """The gauges by name without prefix."""
    return {
        name: Gauge(PREFIX + name, text, [*LABELS, *more], multiprocess_mode="mostrecent")
        for name, (text, more) in GAUGES.items()
    }


class KQSVDStatLogger(AggregateStatLoggerBase):
    """Sets the gauges. Does nothing, and shows nothing, unless CUSTOM was asked for."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        self._active = vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM
        self._model = str(vllm_config.model_config.served_model_name)
        self._engines = engine_indexes or [0]
        self._window_share: dict[int, float] = {}  # of one running request
        self._stamp: object = None
        self._next_look = 0.0

    def log_engine_initialized(self) -> None:
        """Workers have started and published."""
        self._look()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """After every step: the window's fill; once a second: has a worker published?"""
        if not self._active:
            return
        share = self._window_share.get(engine_idx)
        if scheduler_stats is not None and share is not None:
            self._set("window_fill", engine_idx, min(1.0, scheduler_stats.num_running_reqs * share))
        if time.monotonic() >= self._next_look:
            self._look()

    def _set(self, name: str, engine: int, value: float, *more: object) -> None:
        gauges()[name].labels(self._model, str(engine), *map(str, more)).set(value)

    def _look(self) -> None:
        self._next_look = time.monotonic() + LOOK_SECONDS
        if not self._active or (stamp := status.stamp()) == self._stamp:
            return
        self._stamp = stamp
        ranks = status.read_all()
        for engine in self._engines:
            if mine := [r for r in ranks if r.engine == engine]:
                self._publish(engine, mine)

    def _publish(self, engine: int, ranks: list[status.RankStatus]) -> None:
        first = ranks[0]
        for name, value in values_of(ranks).items():
            self._set(name, engine, value)
        labels = (__version__, first.kernels, first.digest[:16], first.window, first.block_size)
        self._set("info", engine, 1, *labels)
        for (mode, kernels), count in layers_of(ranks).items():
            self._set("layers", engine, count, mode, kernels)
        for result in ("passed", "skipped"):
            count = sum(r.self_test.get(result, 0) for r in ranks if r.tensor_rank == 0)
            self._set("self_test_layers", engine, count, result)
        self._window_share[engine] = max(r.window_blocks / max(r.num_blocks, 1) for r in ranks)
        self._set("window_fill", engine, 0.0)


def values_of(ranks: list[status.RankStatus]) -> dict[str, float]:
    """Unlabelled gauges of one engine from its ranks: bytes add up, the smallest pool decides the tokens."""
    latent, exact = sum(r.latent_bytes for r in ranks), sum(r.exact_bytes for r in ranks)
    tokens = min(r.kv_tokens for r in ranks)
    plain = min(r.kv_tokens_exact for r in ranks)
    against_plain = {
        "compression_ratio": tokens / max(plain, 1),
        "kv_tokens_uncompressed": plain,
        "kv_tokens_gained": tokens - plain,
    }
    return {
        "ranks": len(ranks),
        "kv_bytes_per_token": latent,
        "kv_bytes_per_token_uncompressed": exact,
        "kv_bits_per_element": sum(r.bits_per_element * r.exact_bytes for r in ranks) / max(exact, 1),
        "kv_tokens": tokens,
        **(against_plain if plain else {}),
        "window_blocks_per_request": max(r.window_blocks for r in ranks),
        "self_test_error_max": max(r.self_test_error for r in ranks),
        "nan_guard_trips": max(r.nan_trips for r in ranks),
    }


def layers_of(ranks: list[status.RankStatus]) -> dict[tuple[str, str], int]:
    """(rope mode, kernels) -> layers of the model: every pipeline stage once."""
    out: dict[tuple[str, str], int] = {}
    for rank in ranks:
        if rank.tensor_rank == 0:
            for key, count in rank.layers.items():
                mode, kernels = key.split("/", 1)
                out[mode, kernels] = out.get((mode, kernels), 0) + count
    return out
