# SPDX-License-Identifier: Apache-2.0
"""Bytes moved between layers: which layer gets more than the others, at the same bytes in total.

What a layer costs is measured at one size (layer_costs.py); other sizes follow from the losses that the bit allocation
predicts for it anyway. The choice is an exact dynamic programme, and `auto` keeps it only where text that chose nothing
confirms it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_kqsvd.calibration.allocate import Table, allocate, layer_loss
from vllm_kqsvd.calibration.tiling import UNIT_BYTES
from vllm_kqsvd.plan import LayerPlan
from vllm_kqsvd.plan_catalog import compiled_plans

LAYER_BUDGETS = ("auto", "equal", "measured")
SCALE_BYTES = 2  # per token beside the planes
PROMISE = 0.05  # a smaller predicted gain is not tried
# Least fall of the KL that `auto` keeps unequal layers for. Text unlike the calibration's gains less: where held-out
# windows found 36 % and more, other texts kept 22 to 47 %, where they found 23 %, other texts lost (docs/design.md)
GAIN = 0.25


@dataclass(frozen=True)
class Verdict:
    """KL of the model on text that chose nothing, layers equal and unequal; error: standard error of the difference."""

    equal: float
    unequal: float
    error: float
    worst_file: float  # change of the KL on the file that gains least, relative; negative: less

    @property
    def gain(self) -> float:
        """By how much of its value the KL falls."""
        return 1 - self.unequal / max(self.equal, 1e-30)

    @property
    def convinces(self) -> bool:
        """A clear gain, beyond its error, and no file that loses."""
        return self.gain >= GAIN and self.equal - self.unequal > 2 * self.error and self.worst_file < 0


def choose(cost: NDArray[np.float64], size: Sequence[int], total: int) -> list[int]:
    """Index of every layer's choice with the least summed cost [layers, choices] whose sizes sum to at most `total`.

    Exact: a dynamic programme over the bytes spent. Raises ValueError if even the smallest do not fit.
    """
    unit = int(np.gcd.reduce([*size]))
    room = total // unit
    best = np.zeros(room + 1)
    back = []
    for row in cost:
        options = np.full((len(size), room + 1), np.inf)
        for n, s in enumerate(size):
            step = s // unit
            if step <= room:
                options[n, step:] = row[n] + best[: room + 1 - step]
        back.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best[room]):
        raise ValueError(f"{len(cost)} layers of at least {min(size)} bytes asked for; {total} are there")
    out, left = [], room
    for chosen in reversed(back):
        out.append(int(chosen[left]))
        left -= size[out[-1]] // unit
    return out[::-1]


def is_pattern(chosen: Sequence[int]) -> bool:
    """Whether there are several sizes, each in equally many layers: vLLM takes that for a repeating pattern of layers
    and half-fills the blocks of their windows (`attention/binding.py` refuses it)."""
    counts = set(Counter(chosen).values())
    return len(set(chosen)) > 1 and len(counts) == 1


def without_pattern(cost: NDArray[np.float64], size: Sequence[int], chosen: list[int]) -> list[int]:
    """The choice, or if it is a pattern, with the one layer made smaller that loses least by it."""
    if not is_pattern(chosen):
        return chosen
    found = []
    for i, now in enumerate(chosen):
        for n, s in enumerate(size):
            other = [*chosen[:i], n, *chosen[i + 1 :]]
            if s < size[now] and not is_pattern(other):
                found.append((cost[i, n] - cost[i, now], other))
    return min(found)[1] if found else chosen


def sizes_around(kind: str, head_dim: int, rope_blocks: set[int], total_bytes: int) -> list[int]:
    """Bytes of planes a layer may have: those of compiled plans if `total_bytes` is one of them and `kind` is not
    "free", else up to a bit more or less in steps of half a bit."""
    if kind != "free":
        per_block = [{p.bytes_per_token for p in compiled_plans(head_dim, block)} for block in rope_blocks]
        compiled = {n - SCALE_BYTES for n in set.intersection(*per_block)}
        if total_bytes in compiled:
            return sorted(compiled)
    step = max(head_dim // 8 // UNIT_BYTES * UNIT_BYTES, UNIT_BYTES)
    return [n for n in (total_bytes + i * step for i in range(-2, 3)) if n >= 2 * UNIT_BYTES]


def bytes_of_layers(bits: float, head_dim: int, layers: int) -> int:
    """Bytes of planes that `layers` unequal layers have together at `bits` per element, scales included: between the
    sizes of plans too, since only the mean has to be right."""
    return int(bits * 2 * head_dim / 8 * layers) - SCALE_BYTES * layers


@dataclass(frozen=True)
class Choice:
    """Plans of all layers, and which part of the summed cost of equal layers they are predicted to have."""

    plans: list[LayerPlan]
    predicted: float


def choose_plans(
    sensitivity: NDArray[np.float64],
    tables: Sequence[tuple[Table, Table]],
    equal: Sequence[LayerPlan],
    plans_of_size: dict[int, list[LayerPlan]],
    max_plans: int,
    room: int = 0,
) -> Choice:
    """The best plans at the bytes of the plans `equal`, or at `room` bytes of planes in all layers if those are more.

    sensitivity [layers]: cost of each layer at its plan of `equal`, in any unit. tables: losses (K, V) of every layer.
    plans_of_size: by bytes of planes, the plans to choose from; empty for any. max_plans: distinct ones of each size.
    """
    sizes = sorted(plans_of_size)
    plans = [allocate(tables, s, max_plans, plans_of_size[s]) for s in sizes]
    base = np.array([layer_loss(p, k, v) for p, (k, v) in zip(equal, tables, strict=True)])
    loss = np.array([[layer_loss(p, k, v) for p, (k, v) in zip(row, tables, strict=True)] for row in plans]).T
    cost = sensitivity[:, None] * loss / np.maximum(base, 1e-300)[:, None]
    total = max(sum(p.bytes_per_token - SCALE_BYTES for p in equal), room)
    chosen = without_pattern(cost, sizes, choose(cost, sizes, total))
    predicted = sum(cost[i, n] for i, n in enumerate(chosen)) / max(float(sensitivity.sum()), 1e-300)
    return Choice([plans[n][i] for i, n in enumerate(chosen)], float(predicted))
