# SPDX-License-Identifier: Apache-2.0
"""Bit plans: which bit-planes hold which groups of latent channels. Pure Python, no torch.

Latent channels come in groups of 16 (one tensor-core k-step), largest variance first. A `Plane` stores
`num_bits` bits of every channel of the groups it lists; a group's code width is the sum over the planes
that list it, so 3 bits are a 2-bit and a 1-bit plane. A full plane takes 16 bytes per token, a half
plane 8 (kernels study, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from vllm_kqsvd.errors import PlanError

GROUP = 16  # channels per group = k of one 16-bit tensor-core instruction
PLANE_BITS = (1, 2, 4, 8)
MAX_CODE_BITS = 8


@dataclass(frozen=True)
class Plane:
    """`num_bits` bits of the channels of `groups` (field order). Full: 16 B per token; half: 8 B."""

    num_bits: int
    groups: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_bits not in PLANE_BITS:
            raise PlanError(f"plane of {self.num_bits} bits asked for; planes have {PLANE_BITS} bits")
        if len(self.groups) * self.num_bits not in (4, 8):
            raise PlanError(
                f"a {self.num_bits}-bit plane of {len(self.groups)} groups asked for; "
                f"it must hold {8 // self.num_bits} groups (16 bytes per token)"
                + (f" or {4 // self.num_bits} (8 bytes)" if self.num_bits < 8 else "")
            )
        if len(set(self.groups)) != len(self.groups) or min(self.groups) < 0:
            raise PlanError(f"plane groups must be distinct and not negative, found {self.groups}")

    @property
    def is_half(self) -> bool:
        """Whether the plane takes 8 bytes per token instead of 16."""
        return len(self.groups) * self.num_bits == 4

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's fields in this plane."""
        return 8 if self.is_half else 16


@dataclass(frozen=True)
class SidePlan:
    """The planes of K or of V of one layer, most significant first. Shared by all KV heads."""

    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        if not self.planes:
            raise PlanError("a side without planes asked for; keys and values need at least one")
        used = {g for p in self.planes for g in p.groups}
        if used != set(range(len(used))):
            raise PlanError(f"groups must be 0..n-1 without holes, found {sorted(used)}")
        if (bits := max(self.group_bits)) > MAX_CODE_BITS:
            raise PlanError(f"codes of {bits} bits asked for; at most {MAX_CODE_BITS} are supported")

    @cached_property
    def num_groups(self) -> int:
        """Groups of 16 latent channels that are kept."""
        return 1 + max(g for p in self.planes for g in p.groups)

    @property
    def rank(self) -> int:
        """Kept latent channels (a multiple of 16)."""
        return GROUP * self.num_groups

    @cached_property
    def group_bits(self) -> tuple[int, ...]:
        """Code width of each group, in bits."""
        n = 1 + max(g for p in self.planes for g in p.groups)
        return tuple(sum(p.num_bits for p in self.planes if g in p.groups) for g in range(n))

    def shift(self, plane: int, group: int) -> int:
        """Weight exponent of `plane` inside the code of `group`: earlier planes are more significant."""
        return sum(p.num_bits for p in self.planes[plane + 1 :] if group in p.groups)

    @property
    def bytes_per_token(self) -> int:
        """Code bytes per token and KV head, scale byte excluded."""
        return sum(p.bytes_per_token for p in self.planes)

    def to_json(self) -> list[list[object]]:
        """`[[num_bits, [group, ...]], ...]`, the form of the projection file."""
        return [[p.num_bits, list(p.groups)] for p in self.planes]

    @classmethod
    def from_json(cls, data: Sequence[Sequence[object]]) -> SidePlan:
        """Inverse of `to_json`; raises PlanError on anything else."""
        try:
            planes = tuple(Plane(int(b), tuple(int(g) for g in gs)) for b, gs in data)  # type: ignore
        except (TypeError, ValueError) as e:
            raise PlanError(f"plan entry is not [num_bits, [groups]]: {data!r}") from e
        return cls(planes)


@dataclass(frozen=True)
class LayerPlan:
    """Bit plans of the keys and of the values of one layer."""

    k: SidePlan
    v: SidePlan

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and KV head: codes of both sides and the two scale bytes."""
        return self.k.bytes_per_token + self.v.bytes_per_token + 2

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per original element of K and V, scales included."""
        return 8 * self.bytes_per_token / (2 * head_dim)


def planes_for(group_bits: Iterable[int]) -> SidePlan | None:
    """A side plan whose groups have exactly these code widths, or None if no planes tile it.

    Binary digits of the widths, most significant first: the groups whose width has bit `b` set share
    planes of `b` bits, full planes first, then one half plane; a remainder that fills neither fails.
    """
    widths = list(group_bits)
    planes: list[Plane] = []
    for b in (8, 4, 2, 1):
        groups = [g for g, w in enumerate(widths) if w & b]
        while groups:
            n = 8 // b if len(groups) >= 8 // b else 4 // b
            if n == 0 or len(groups) < n:
                return None
            planes.append(Plane(b, tuple(groups[:n])))
            groups = groups[n:]
    return SidePlan(tuple(planes)) if planes and min(widths) > 0 else None


def layer_range(least: float, most: float) -> str:
    """Words for layers of unequal bits per element; none if they are equal."""
    return f" (layers {least:.2f} to {most:.2f})" if least < most else ""
