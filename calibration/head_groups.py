# SPDX-License-Identifier: Apache-2.0
"""Which KV heads resemble each other, and how one is laid on another: for bases that the heads of a group share.

Groups by centred kernel alignment (CKA) are ReCalKV's (arXiv 2505.24357); turning the heads of a group onto each other
before they are merged, with a rotation of every RoPE plane for keys, follows "Align attention heads before merging
them" (2412.20677). Every head keeps latents of its own: a page has the same bytes for each head and no byte belongs to
two, so what is shared is the basis (and the mean), and sharing saves no bytes here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.calibration.frames import planes_of
from vllm_kqsvd.ops.rope_block import RopeSpec

HEADS_PER_GROUP = 2


@dataclass(frozen=True)
class Sharing:
    """groups: a partition of the heads, the first of each leads; align [H, d, d]: orthogonal, x_h @ align_h resembles
    the leader's x. Own basis for every head: groups of one."""

    groups: tuple[tuple[int, ...], ...]
    align: torch.Tensor

    @property
    def owner(self) -> tuple[int, ...]:
        """The leader of every head."""
        leads = {h: group[0] for group in self.groups for h in group}
        return tuple(leads[h] for h in sorted(leads))

    def pooled(self, gram: torch.Tensor) -> torch.Tensor:
        """Mean over each group of the turned moments, given to every head of it: [H, d, d] -> [H, d, d]."""
        turned = self.align.mT @ gram @ self.align
        return self._of_group(turned)

    def shared_mean(self, mean: torch.Tensor) -> torch.Tensor:
        """The group's mean as each head sees it, [H, d] -> [H, d]."""
        turned = torch.einsum("hd,hde->he", mean, self.align)
        return torch.einsum("he,hde->hd", self._of_group(turned), self.align)

    def _of_group(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        for group in self.groups:
            out[list(group)] = x[list(group)].mean(0)
        return out


def cka(x: torch.Tensor) -> torch.Tensor:
    """Linear CKA between all heads of tokens x [n, H, d]: [H, H], 1 for orthogonal copies of each other."""
    y = (x - x.mean(0)).double()
    cross = torch.einsum("nhd,nge->hgde", y, y).square().sum((-1, -2))
    own = cross.diagonal().sqrt()
    return cross / (own[:, None] * own[None, :]).clamp_min(1e-300)


def similar_groups(similarity: torch.Tensor, size: int = HEADS_PER_GROUP) -> tuple[tuple[int, ...], ...]:
    """Groups of at most `size` heads, greedily: the most similar free pair, then who resembles its members most."""
    free = set(range(len(similarity)))
    groups = []
    while free:
        pairs = [(float(similarity[a, b]), -a, -b) for a in free for b in free if a < b]
        _, a, b = max(pairs, default=(0.0, -min(free), -min(free)))
        group = sorted({-a, -b}) if size > 1 else [min(free)]
        while len(group) < min(size, len(free)):
            rest = sorted(free - set(group))
            group.append(max(rest, key=lambda h: float(similarity[h, group].sum())))
        free -= set(group)
        groups.append(tuple(sorted(group)))
    return tuple(sorted(groups))


def procrustes(x: torch.Tensor, lead: torch.Tensor) -> torch.Tensor:
    """Orthogonal [d, d] that brings x @ it closest to lead; x, lead [n, d]."""
    u, _, vh = torch.linalg.svd(x.double().mT @ lead.double())
    return u @ vh


def turn_planes(x: torch.Tensor, lead: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """As `procrustes`, but a rotation in every RoPE plane alone: it commutes with RoPE."""
    dim = x.shape[-1]
    re, im, _ = planes_of(rope, dim)
    z, w = (torch.complex(y[:, re].double(), y[:, im].double()) for y in (x, lead))
    angle = (z.conj() * w).sum(0).angle()
    turn = torch.zeros(dim, dim, dtype=torch.float64)
    turn[re, re], turn[im, im] = angle.cos(), angle.cos()
    turn[re, im], turn[im, re] = angle.sin(), -angle.sin()
    return turn


def share(x: torch.Tensor, similarity: torch.Tensor, rope: RopeSpec | None, aligned: bool) -> Sharing:
    """Groups of similar heads of tokens x [n, H, d]; rope: of keys before RoPE, None for what is not rotated."""
    groups = similar_groups(similarity)
    align = torch.eye(x.shape[-1], dtype=torch.float64).repeat(x.shape[1], 1, 1)
    for group in groups if aligned else ():
        for h in group[1:]:
            pair = (x[:, h], x[:, group[0]])
            align[h] = turn_planes(*pair, rope) if rope is not None and rope.rotary_dim else procrustes(*pair)
    return Sharing(groups, align)
