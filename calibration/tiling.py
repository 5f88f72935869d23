# SPDX-License-Identifier: Apache-2.0
"""From code widths per group to bit planes that hold exactly them (vllm_kqsvd.plan).

A plane of 8 bytes holds 4 bits of one group, 2 bits of two or 1 bit of four; one of 16 bytes twice that (or 8 bits of
one group). So widths can be stored in n half planes iff each is a + 2 b + 4 c with the b's filling pairs and the a's
filling fours of distinct groups, which is the case iff no b exceeds their number of pairs and no a of fours.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_kqsvd.plan import MAX_CODE_BITS, Plane, SidePlan

UNIT_BYTES = 8  # the smallest plane
_UNIT_GROUPS = {4: 1, 2: 2, 1: 4}  # groups of a half plane of that many bits


def spread(counts: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Sets of `size` distinct groups in which group g occurs counts[g] times; counts must allow it."""
    left = list(counts)
    sets = []
    for _ in range(sum(counts) // size):
        pick = sorted(range(len(left)), key=lambda g: (-left[g], g))[:size]
        if min(left[g] for g in pick) < 1:
            raise ValueError(f"counts {counts} do not fill sets of {size} distinct groups")
        for g in pick:
            left[g] -= 1
        sets.append(tuple(sorted(pick)))
    return sets


def _merge(bits: int, sets: list[tuple[int, ...]]) -> list[Plane]:
    """Planes of these half-plane sets: two disjoint ones make a full plane, which a kernel reads faster."""
    planes, waiting = [], list(sets)
    while waiting:
        first = waiting.pop(0)
        partner = next((s for s in waiting if not set(s) & set(first)), None)
        if partner is not None:
            waiting.remove(partner)
            planes.append(Plane(bits, tuple(sorted(first + partner))))
        else:
            planes.append(Plane(bits, first))
    return sorted(planes, key=lambda p: (p.is_half, p.groups))


def planes_from_counts(fours: Sequence[int], twos: Sequence[int], ones: Sequence[int]) -> SidePlan:
    """The plan in which group g has fours[g] 4-bit, twos[g] 2-bit and ones[g] 1-bit fields.

    Two 4-bit fields of one group become an 8-bit plane. Trailing groups without fields are dropped.
    """
    eights = [Plane(8, (g,)) for g, c in enumerate(fours) if c == 2]
    fours = [c % 2 for c in fours]
    planes = list(eights)
    for bits, counts in ((4, fours), (2, twos), (1, ones)):
        planes += _merge(bits, spread(counts, _UNIT_GROUPS[bits]))
    return SidePlan(tuple(planes))


def split_width(width: int, ones: int, twos: int) -> int:
    """The number of 4-bit fields left in `width` bits after `ones` 1-bit and `twos` 2-bit fields, or -1."""
    rest = width - ones - 2 * twos
    return rest // 4 if rest >= 0 and rest % 4 == 0 and width <= MAX_CODE_BITS else -1
