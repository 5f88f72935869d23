# SPDX-License-Identifier: Apache-2.0
"""Predicted decode speed from measured kernel times (`decode_speed.json`, made by `python -m benchmarks.decode_fit`).

One layer's decode attention takes fixed + tokens * per_token + requests * per_request, each format's three numbers
fitted to its rows in benchmarks/results/decode_attention.csv. A step adds reading the weights once and a measured
rest. Steady decoding: no prompts, no speculation, and with tensor parallelism no exchange between GPUs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

TABLE = "decode_speed.json"
REACH = 0.3  # bits beyond the narrowest and widest measured plan


@dataclass(frozen=True)
class AttentionTime:
    """Microseconds of one layer's decode attention for the table's heads, at `bits` per element."""

    bits: float
    fixed: float
    per_1k_tokens: float
    per_request: float

    def at(self, requests: float, context: int, share: float) -> float:
        """`requests` of `context` tokens; share: KV elements per token over those of the table's heads."""
        return self.fixed + share * (self.per_1k_tokens * requests * context / 1000 + self.per_request * requests)


@cache
def table() -> dict[str, Any]:
    """The measured table: device, versions, date, kv_elements (of a token and layer), formats, step."""
    return json.loads(files("vllm_kqsvd").joinpath(TABLE).read_text())


def attention_time(name: str, bits: float) -> AttentionTime | None:
    """Of "bf16", "fp8", or latents of any width within REACH of measured ones (linear in bits)."""
    formats = table()["formats"]
    if name in formats:
        return AttentionTime(**formats[name])
    known = sorted((AttentionTime(**f) for n, f in formats.items() if n.startswith("kqsvd")), key=lambda f: f.bits)
    if len(known) < 2 or not known[0].bits - REACH <= bits <= known[-1].bits + REACH:
        return None
    pairs = list(zip(known, known[1:], strict=False))
    low, high = next((pair for pair in pairs if bits <= pair[1].bits), pairs[-1])
    t = (bits - low.bits) / (high.bits - low.bits)
    mixed = ((1 - t) * getattr(low, k) + t * getattr(high, k) for k in ("fixed", "per_1k_tokens", "per_request"))
    return AttentionTime(bits, *mixed)


def tokens_per_second(
    name: str, bits: float, requests: float, context: int, layers: int, kv_elements: int, weights: int
) -> float | None:
    """Decode tokens per second of one rank's step with `requests` of `context` tokens each; None if unmeasured.

    kv_elements: K and V elements of a token and layer on the rank; weights: bytes the rank reads per step.
    """
    time = attention_time(name, bits)
    if time is None or requests < 1:
        return None
    measured, step = table(), table()["step"]
    micros = layers * time.at(requests, context, kv_elements / measured["kv_elements"])
    micros += weights / step["weight_bytes_per_us"] + step["fixed_us"] + step["us_per_request"] * requests
    return requests / micros * 1e6
