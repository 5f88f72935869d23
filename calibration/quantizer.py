# SPDX-License-Identifier: Apache-2.0
"""The scalar quantizer measured on real latents: distortion tables for the allocator, steps for the file.

Uniform midrise codes, one static step per channel, one scale per token and head rounded to the scale byte
(docs/format.md 1.4-1.5). Nothing is taken from formulas: every figure is the squared error of the real rounding.
"""

from __future__ import annotations

import torch

from vllm_kqsvd.ops.scale_byte import decode_scale, encode_scale
from vllm_kqsvd.plan import MAX_CODE_BITS

# Steps of a uniform midrise quantizer for unit Gaussians, in standard deviations; the centre of the search grid.
GAUSSIAN_STEP = (0.0, 1.596, 0.9957, 0.586, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
# Squared error of that quantizer for unit Gaussians, clipping included.
GAUSSIAN_ERROR = (1.0, 0.3634, 0.11885, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003043, 0.0000877)
_TABLE_GRID = (0.85, 1.0, 1.15, 1.35, 1.65)
_STEP_GRID = (0.75, 0.85, 0.93, 1.0, 1.07, 1.15, 1.25, 1.38, 1.55, 1.8, 2.2)
_GUARDS = (1.0, 1.25, 1.6, 2.0, 3.0)
_SCALE_SHARE = 1e-3  # channels weaker than this share of the strongest do not vote on a token's scale


def round_scale(scale: torch.Tensor) -> torch.Tensor:
    """Token scale after a round trip through the scale byte."""
    return decode_scale(encode_scale(scale, torch.zeros_like(scale, dtype=torch.bool)))[0]


def midrise(z: torch.Tensor, step: torch.Tensor, half_range: torch.Tensor) -> torch.Tensor:
    """Nearest reconstruction value of z: (c + 1/2) step with c = floor(z / step) in [-half_range, half_range - 1]."""
    code = (z / step).floor_().clamp_(-half_range, half_range - 1)
    return code.add_(0.5).mul_(step)


def squared_error(y: torch.Tensor, scale: torch.Tensor, step: torch.Tensor, half_range: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error of y * scale: y [N, H, C], scale [N, H, 1] -> [H, C]."""
    return midrise(y, step, half_range).sub_(y).mul_(scale).square_().mean(0)


def voting(variance: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Which channels [H, C] decide a token's scale: all but those with next to no (weighted) energy. 0 or 1."""
    energy = variance if weight is None else variance * weight
    return (energy > _SCALE_SHARE * energy.amax(-1, keepdim=True)).to(variance.dtype)


def token_scale(z: torch.Tensor, variance: torch.Tensor, vote: torch.Tensor) -> torch.Tensor:
    """Scale of every token: rms of its normalized voting channels. z [N, H, C] -> [N, H]."""
    norm = vote / variance.clamp_min(1e-30) / vote.sum(-1, keepdim=True).clamp_min(1)
    return (z.square() * norm).sum(-1).sqrt()


def distortion_table(z: torch.Tensor, vote: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every channel at every code width: z [N, H, C] -> [H, C, 9] float64."""
    variance = z.square().mean(0)
    scale = round_scale(token_scale(z, variance, vote))[..., None]
    y = z / scale
    spread = y.square().mean(0).sqrt().clamp_min(1e-20)
    out = torch.empty(*variance.shape, MAX_CODE_BITS + 1, dtype=torch.float64, device=z.device)
    out[..., 0] = variance
    for bits in range(1, MAX_CODE_BITS + 1):
        half = torch.full_like(spread, 2.0 ** (bits - 1))
        best = torch.full_like(variance, float("inf"))
        for factor in _TABLE_GRID:
            error = squared_error(y, scale, spread * GAUSSIAN_STEP[bits] * factor, half)
            best = torch.minimum(best, error)
        out[..., bits] = best
    # More bits never hurt: the grid's coarseness must not make the allocator believe so.
    return torch.cummin(out, -1).values


def fit_steps(z: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best step of every channel and its error: z [N, H, C], bits [C], token scale [N, H] (rounded) -> [H, C] twice."""
    s = scale[..., None]
    y = z / s
    spread = y.square().mean(0).sqrt().clamp_min(1e-20)
    half = (2.0 ** (bits - 1)).to(z.dtype).expand_as(spread)
    centre = torch.tensor(GAUSSIAN_STEP, dtype=z.dtype, device=z.device)[bits]
    best = torch.full_like(spread, float("inf"))
    step = spread * centre
    for factor in _STEP_GRID:
        trial = spread * centre * factor
        error = squared_error(y, s, trial, half)
        better = error < best
        best, step = torch.where(better, error, best), torch.where(better, trial, step)
    return step, best


def fit_quantizer(
    z: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, vote: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(step, scale_weight, guard_weight), each [H, C], for latents z [N, H, C] of code widths bits [C].

    weight [H, C]: cost of squared error per channel; vote [H, C]: channels that decide the scale. The guard raises a
    token's scale until no channel lies further than `guard` ranges out; the width of that fence is searched. A larger
    scale coarsens every channel, so that a channel raises it only until the others' error costs as much as its own
    energy (`limit`): beyond, clipping an outlier that calibration never saw is the smaller harm.
    """
    variance = z.square().mean(0).clamp_min(1e-30)
    base = token_scale(z, variance, vote)
    half = (2.0 ** (bits - 1)).to(z.dtype)
    first, _ = fit_steps(z, bits, round_scale(base))
    # At scale s a midrise quantizer errs by s step / 2 in channels that hold next to nothing.
    limit = (weight / (weight * first.square() / 4).sum(-1, keepdim=True).clamp_min(1e-30)).sqrt()
    best_cost: torch.Tensor | None = None
    guard = torch.full_like(variance[:, :1], _GUARDS[-1])
    for trial in _GUARDS:
        s = round_scale(torch.maximum(base, fenced(z, torch.minimum(1 / (trial * half * first), limit))))[..., None]
        cost = ((midrise(z / s, first, half) * s - z).square() * weight).sum((0, 2))[:, None]
        better = torch.ones_like(guard, dtype=torch.bool) if best_cost is None else cost < best_cost
        guard = torch.where(better, trial, guard)
        best_cost = cost if best_cost is None else torch.minimum(cost, best_cost)
    fence = torch.minimum(1 / (guard * half * first), limit)
    scale = round_scale(torch.maximum(base, fenced(z, fence)))
    step, _ = fit_steps(z, bits, scale)
    scale_weight = vote / variance / vote.sum(-1, keepdim=True).clamp_min(1) * step.square()
    return step, scale_weight, fence * step  # in units of the final step


def fenced(z: torch.Tensor, fence: torch.Tensor) -> torch.Tensor:
    """Smallest scale [N, H] the fences [H, C] allow the tokens z [N, H, C]."""
    return (z.abs() * fence).amax(-1)


def round_trip(
    z: torch.Tensor, bits: torch.Tensor, step: torch.Tensor, scale_weight: torch.Tensor, guard_weight: torch.Tensor
) -> torch.Tensor:
    """Latents z [N, H, C] as they come back from the quantizer of `fit_quantizer`."""
    u = z / step
    scale = torch.maximum((scale_weight * u.square()).sum(-1).sqrt(), fenced(u, guard_weight))
    s = round_scale(scale)[..., None]
    return midrise(u / s, torch.ones_like(step), (2.0 ** (bits - 1)).to(z)) * s * step
