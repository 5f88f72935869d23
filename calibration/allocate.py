# SPDX-License-Identifier: Apache-2.0
"""Exact bit allocation: which code width every group of 16 latent channels gets, in bytes the page layout can hold.

All layers and heads spend the same bytes (one page size, equal tensor-parallel shards); the split between K and V is
free. Kernels are compiled per plan, so a model may use only a few distinct ones: layers are clustered and each
cluster's plan is optimal for the sum of its layers' losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vllm_kqsvd.calibration.tiling import UNIT_BYTES, planes_from_counts
from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.plan import MAX_CODE_BITS, LayerPlan, SidePlan
from vllm_kqsvd.plan_catalog import compiled_plans

Table = NDArray[np.float64]  # [groups, 9]: loss of a group at every code width
_ROUNDS = 20


def plane_bytes(bits: float, head_dim: int) -> int:
    """Bytes of K and V planes per token and head for `bits` per element; the two scale bytes come on top if the total
    stays within 0.13 bits of the name, else out of it. Raises CalibrationError if nothing is left."""
    total = int(bits * 2 * head_dim / 8) // UNIT_BYTES * UNIT_BYTES
    if (total + 2) * 8 / (2 * head_dim) > bits + 0.13:
        total -= UNIT_BYTES
    if total < 2 * UNIT_BYTES:
        raise CalibrationError(f"{bits} bits of head_dim {head_dim} are too few bytes for one plane of K and one of V")
    return total


def side_losses(plan: SidePlan, table: Table) -> float:
    """Loss of a side under a plan; groups the plan drops have width 0."""
    widths = list(plan.group_bits) + [0] * (len(table) - plan.num_groups)
    return float(sum(table[g, w] for g, w in enumerate(widths)))


@lru_cache(maxsize=8)
def _count_choices(max_ones: int, max_twos: int) -> tuple[tuple[int, int, int, int], ...]:
    """(ones, twos, fours, width) a group may have."""
    return tuple(
        (a, b, c, a + 2 * b + 4 * c)
        for a in range(max_ones + 1)
        for b in range(max_twos + 1)
        for c in range(3)
        if a + 2 * b + 4 * c <= MAX_CODE_BITS
    )


def best_side_plans(table: Table, max_units: int) -> dict[int, tuple[float, SidePlan]]:
    """The best plan of a side for every number of 8-byte units 1 .. max_units: {units: (loss, plan)}.

    For every number n1 of 1-bit and n2 of 2-bit half planes a dynamic programme over groups chooses each group's
    fields; its state is how many fields of each kind are used. Groups are in falling order of energy and a plan keeps
    a prefix of them.
    """
    best: dict[int, tuple[float, tuple[tuple[int, int, int], ...]]] = {}
    for n1 in range(min(max_units, MAX_CODE_BITS) + 1):
        for n2 in range(max_units - n1 + 1):
            for n4, loss, counts in _fill(table, n1, n2, max_units - n1 - n2):
                units = n1 + n2 + n4
                if units and (units not in best or loss < best[units][0] - 1e-15):
                    best[units] = (loss, counts)
    return {u: (loss, planes_from_counts(*zip(*counts, strict=True))) for u, (loss, counts) in sorted(best.items())}


def _fill(table: Table, n1: int, n2: int, max_n4: int) -> list[tuple[int, float, tuple[tuple[int, int, int], ...]]]:
    """Best (fours, twos, ones) of every group using exactly n1 fours of ones and n2 pairs of twos, per number of fours.

    Returns [(n4, loss, ((fours, twos, ones) per kept group))]. Distinctness inside a plane: ones <= n1, twos <= n2.
    """
    groups = len(table)
    total_a, total_b, total_c = 4 * n1, 2 * n2, min(max_n4, 2 * groups)
    if total_a > groups * n1 or total_b > groups * n2:
        return []
    choices = [c for c in _count_choices(min(n1, MAX_CODE_BITS), min(n2, MAX_CODE_BITS // 2)) if c[2] <= total_c]
    value = np.full((total_a + 1, total_b + 1, total_c + 1), np.inf)
    value[0, 0, 0] = 0.0
    back: list[NDArray[np.int16]] = []
    tail = np.concatenate((np.cumsum(table[::-1, 0])[::-1], [0.0]))  # loss of dropping groups g, g + 1, ...
    ends: list[NDArray[np.float64]] = []
    for g in range(groups):
        new, chosen = np.full_like(value, np.inf), np.full(value.shape, -1, dtype=np.int16)
        for index, (a, b, c, width) in enumerate(choices):
            if width == 0 or a > total_a or b > total_b:
                continue  # a kept group has at least one bit: plans keep a prefix
            source = value[: total_a + 1 - a, : total_b + 1 - b, : total_c + 1 - c] + table[g, width]
            target, mark = new[a:, b:, c:], chosen[a:, b:, c:]
            better = source < target
            np.copyto(target, source, where=better)
            np.copyto(mark, index, where=better)
        back.append(chosen)
        value = new
        ends.append(value[total_a, total_b].copy())
    out = []
    for n4 in range(total_c + 1):
        losses = [end[n4] + tail[g + 1] for g, end in enumerate(ends)]
        last = int(np.argmin(losses))
        if np.isfinite(losses[last]):
            out.append((n4, float(losses[last]), _trace(back, choices, last, (total_a, total_b, n4))))
    return out


def _trace(
    back: list[NDArray[np.int16]], choices: list[tuple[int, int, int, int]], last: int, state: tuple[int, int, int]
) -> tuple[tuple[int, int, int], ...]:
    counts: list[tuple[int, int, int]] = []
    a, b, c = state
    for g in range(last, -1, -1):
        ones, twos, fours, _ = choices[int(back[g][a, b, c])]
        counts.append((fours, twos, ones))
        a, b, c = a - ones, b - twos, c - fours
    return tuple(reversed(counts))


def best_layer_plan(k: Table, v: Table, total_bytes: int) -> tuple[float, LayerPlan]:
    """The best plans of K and V that together take exactly `total_bytes` of planes: (loss, plan)."""
    units = total_bytes // UNIT_BYTES
    side_k, side_v = best_side_plans(k, units - 1), best_side_plans(v, units - 1)
    options = [(side_k[u][0] + side_v[units - u][0], u) for u in side_k if units - u in side_v]
    if not options:
        raise CalibrationError(f"no bit plan of {total_bytes} bytes exists for {len(k)} groups of 16 channels")
    loss, u = min(options)
    return loss, LayerPlan(side_k[u][1], side_v[units - u][1])


def layer_loss(plan: LayerPlan, k: Table, v: Table) -> float:
    """Predicted loss of a layer under a plan."""
    return side_losses(plan.k, k) + side_losses(plan.v, v)


def catalogue_plans(head_dim: int, rope_block: int, total_bytes: int) -> list[LayerPlan]:
    """Plans of this size that CUDA decode kernels are compiled for. Raises CalibrationError if there are none."""
    compiled = compiled_plans(head_dim, rope_block)
    found = [plan for plan in compiled if plan.bytes_per_token - 2 == total_bytes]
    if not found:
        have = sorted({plan.bits_per_element(head_dim) for plan in compiled})
        raise CalibrationError(
            f"compiled plans of {8 * (total_bytes + 2) / (2 * head_dim):g} bits for head_dim {head_dim} in rope blocks "
            f"of {rope_block} asked for; there are {', '.join(f'{b:g}' for b in have) or 'none'}; choose one of these "
            "widths, or --plans free"
        )
    return found


def _choose(cost: NDArray[np.float64], count: int) -> list[int]:
    """Greedily, the `count` columns of cost [layers, plans] whose least entries per layer have the smallest sum."""
    chosen = [int(cost.sum(0).argmin())]
    while len(chosen) < min(count, cost.shape[1]):
        held = cost[:, chosen].min(1)
        chosen.append(int(np.minimum(cost, held[:, None]).sum(0).argmin()))
    return chosen


def allocate(
    tables: Sequence[tuple[Table, Table]], total_bytes: int, max_plans: int = 4, among: Sequence[LayerPlan] = ()
) -> list[LayerPlan]:
    """One plan per layer, at most `max_plans` distinct, all of `total_bytes`; tables: (K, V) of every layer.

    Greedy start (add the plan that lowers the summed loss most), then Lloyd rounds: assign every layer to its best
    plan, make every plan optimal for the sum of its layers. `among`: only these plans, each layer its best.
    """
    if among:
        cost = np.array([[layer_loss(p, k, v) for p in among] for k, v in tables])
        chosen = _choose(cost, max_plans)
        return [among[chosen[i]] for i in cost[:, chosen].argmin(1)]
    own = [best_layer_plan(k, v, total_bytes) for k, v in tables]
    distinct = list(dict.fromkeys(plan for _, plan in own))
    if len(distinct) <= max_plans:
        return [plan for _, plan in own]
    pooled_k, pooled_v = (np.sum([t[s] for t in tables], axis=0) for s in (0, 1))
    pooled = best_layer_plan(pooled_k, pooled_v, total_bytes)[1]
    candidates = list(dict.fromkeys([pooled, *distinct]))
    cost = np.array([[layer_loss(p, k, v) for p in candidates] for k, v in tables])
    plans = [candidates[c] for c in _choose(cost, max_plans)]
    previous = float("inf")
    for _ in range(_ROUNDS):
        losses = np.array([[layer_loss(p, k, v) for p in plans] for k, v in tables])
        owner = losses.argmin(1)
        total = float(losses.min(1).sum())
        if total >= previous * (1 - 1e-9):
            break
        previous = total
        for i in range(len(plans)):
            members = [t for t, o in zip(tables, owner, strict=True) if o == i]
            if members:
                pooled_k, pooled_v = (np.sum([m[s] for m in members], axis=0) for s in (0, 1))
                plans[i] = best_layer_plan(pooled_k, pooled_v, total_bytes)[1]
    losses = np.array([[layer_loss(p, k, v) for p in plans] for k, v in tables])
    return [plans[i] for i in losses.argmin(1)]
