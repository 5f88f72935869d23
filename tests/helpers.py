# SPDX-License-Identifier: Apache-2.0
"""Builders shared by the tests: random codecs, filled paged caches, error measures."""

from __future__ import annotations

import torch

from vllm_kqsvd.codec import MEAN_RANK, LayerCodec, SideCodec
from vllm_kqsvd.ops.rope_block import RopeSpec, rotate
from vllm_kqsvd.plan import LayerPlan, SidePlan, planes_for


def side_plan(*group_bits: int) -> SidePlan:
    """A side plan with these code widths per group of 16 channels."""
    plan = planes_for(group_bits)
    assert plan is not None, f"no planes tile {group_bits}"
    return plan


def random_side(
    plan: SidePlan, heads: int, dim: int, offsets: int, rope: RopeSpec | None, gen: torch.Generator
) -> SideCodec:
    """A well-scaled random coder whose latents have about unit rms per quantizer range."""
    g = {"generator": gen, "dtype": torch.float64}
    basis = torch.linalg.qr(torch.randn(heads, dim, dim, **g))[0][..., : plan.rank]
    bits = torch.tensor(plan.group_bits, dtype=torch.float64).repeat_interleave(16)
    step = torch.linspace(2.0, 0.5, plan.rank, dtype=torch.float64) * 3.2 / 2**bits
    mean, sink = torch.randn(heads, 1, dim, **g), 4 * torch.randn(heads, 1, dim, **g)
    table = torch.ones(1, 1, dtype=torch.float64)
    if rope is not None and offsets > 1:  # the rotated mean, in rank MEAN_RANK over the offsets
        rows = [rotate(torch.cat((mean, sink)), torch.full((2 * heads,), j), rope) for j in range(offsets)]
        flat = torch.stack(rows).reshape(offsets, -1)
        u, s, vh = torch.linalg.svd(flat, full_matrices=False)
        m = min(MEAN_RANK, offsets)
        table = u[:, :m]
        factor = (s[:m, None] * vh[:m]).reshape(m, 2 * heads, dim).transpose(0, 1)
        mean, sink = factor[:heads].contiguous(), factor[heads:].contiguous()
    weight = (step / (3.2 / 2**bits)).square().reciprocal() * (1 / plan.rank) * (step**2)
    guard = torch.where(bits >= 3, 1 / (1.25 * 2.0 ** (bits - 1)), torch.zeros_like(bits))
    return SideCodec(
        plan,
        basis / step,
        (basis * step).transpose(1, 2).contiguous(),
        weight.expand(heads, -1).contiguous(),
        guard.expand(heads, -1).contiguous(),
        table,
        mean,
        sink,
    )


def random_codec(
    plan: LayerPlan,
    heads: int = 2,
    dim: int = 64,
    rope_block: int = 32,
    seed: int = 0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    theta: float = 1e4,
) -> LayerCodec:
    """A random codec of the given plan (float64 internally, returned as float32)."""
    gen = torch.Generator().manual_seed(seed)
    rot = dim if rotary_dim is None else rotary_dim
    rope = RopeSpec(theta ** -(torch.arange(0, rot, 2, dtype=torch.float64) / max(rot, 1)), interleaved)
    k = random_side(plan.k, heads, dim, rope_block, rope, gen)
    v = random_side(plan.v, heads, dim, 1, None, gen)
    return LayerCodec(k, v, rope, rope_block).to("cpu")


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; NaN counts as infinite."""
    err = (out.double() - ref.double()).norm() / ref.double().norm()
    return float(torch.nan_to_num(err, nan=float("inf")))


def side_by_side(pages: torch.Tensor, gap: int) -> torch.Tensor:
    """A copy of pages [blocks, bytes] as a layer's share of wider blocks: `gap` bytes of others before and behind."""
    wide = torch.full((pages.shape[0], pages.shape[1] + 2 * gap), 0xA5, dtype=torch.uint8, device=pages.device)
    wide[:, gap : gap + pages.shape[1]] = pages
    return wide[:, gap : gap + pages.shape[1]]


def gaps_untouched(pages: torch.Tensor, gap: int) -> bool:
    """Whether nobody has written between the pages of `side_by_side`."""
    whole = torch.as_strided(
        pages, (pages.shape[0], pages.stride(0)), (pages.stride(0), 1), pages.storage_offset() - gap
    )
    return bool((whole[:, :gap] == 0xA5).all() and (whole[:, gap + pages.shape[1] :] == 0xA5).all())
