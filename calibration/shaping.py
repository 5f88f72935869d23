# SPDX-License-Identifier: Apache-2.0
"""What is left to choose where neighbouring channels get equal bits: such a *tier* is mixed, and the mixture is shaped.

A rotation inside a tier gives all its channels the tier's mean variance and white rounding noise. Three things then
lower the error, all of them linear, so that neither the pages nor the kernels see them:

- *emphasis* before the rotation: optimal pre- and postfilters of a channel of equal noise (Costas 1952, "Coding with
  linear systems"). With e the energies of the axes in the metric and D the noise, the transmitted power is
  c sqrt(e) - D, so that noise lies under strong axes; at fine resolution n (mean e) becomes (sum sqrt(e))^2 / n;
- a *rotation fitted* to the rounding instead of a random one: rounding and the orthogonal Procrustes problem in turns
  (ITQ, Gong and Lazebnik 2011);
- *gains* after it, one per axis: the least-squares factor of an axis as it comes back (Wiener).
"""

from __future__ import annotations

import torch

from vllm_kqsvd.calibration.basis import Basis
from vllm_kqsvd.calibration.quantizer import GAUSSIAN_ERROR, fit_steps, midrise, round_scale, token_scale, voting
from vllm_kqsvd.calibration.tiers import mixed_weight
from vllm_kqsvd.plan import MAX_CODE_BITS

_LEAST_POWER = 0.05  # of the tier's mean, that no axis is weakened below: text unlike the calibration's may need it
GAIN_RANGE = (0.6, 1.1)  # of what was emphasized, for the same reason
_ROUNDS = 12  # of rounding and rotating
_REFIT_STEPS = 6  # rounds after which steps are fitted anew
_BOLDNESS = 2.0  # times the way to what was rounded: as good as twice the rounds, and 3 overshoots with some keys
_NEWTON_STEPS = 12  # from singular values of a thirtieth of the bound
_MOST_BITS = 5  # rounding to more is white noise, whichever way it is turned
TOKENS_PER_CHANNEL = 16  # fewer sample tokens than this do not tell a rotation from chance


def emphasis(energy: torch.Tensor, bits: torch.Tensor, tiers: torch.Tensor) -> torch.Tensor:
    """Amplitude [H, R] of every axis before its tier is mixed, relative to the axis itself.

    energy [H, R]: variance times weight; bits, tiers [R]: code width and label of an axis. Each tier keeps its energy.
    """
    out = torch.ones_like(energy)
    for tier in tiers.unique():
        at = (tiers == tier).nonzero()[:, 0]
        noise = GAUSSIAN_ERROR[int(bits[at[0]])]
        e = energy[:, at].clamp_min(1e-30)
        root = (e / e.mean(-1, keepdim=True)).sqrt()
        least = root.square().clamp_max(_LEAST_POWER)
        low, high = torch.zeros_like(root[:, :1]), (1 + noise) / root.mean(-1, keepdim=True)
        for _ in range(40):  # power grows with c; at `high` its mean is 1 or more
            c = (low + high) / 2
            much = (c * root - noise).maximum(least).mean(-1, keepdim=True) > 1
            low, high = torch.where(much, low, c), torch.where(much, c, high)
        power = (high * root - noise).maximum(least)
        out[:, at] = power.sqrt() / root.clamp_min(1e-6)
    return out


def nearest_rotation(m: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to m [..., n, n], which is near a multiple of one itself: Newton's iteration."""
    size = m.abs()
    bound = (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt()  # no singular value is larger
    x = m / bound.clamp_min(1e-30)[..., None, None]
    for _ in range(_NEWTON_STEPS):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


def fit_rotation(
    z: torch.Tensor, turn: torch.Tensor, bits: torch.Tensor, tiers: torch.Tensor, vote: torch.Tensor
) -> torch.Tensor:
    """Rotation [H, R, R] within tiers that loses least when its channels are rounded, starting from `turn`.

    z [N, H, R] float32: emphasized axes of sample tokens; vote [H, R] as in quantizer.fit_quantizer. Tiers too large
    for so few tokens stay as they are, and so do those of many bits.
    """
    found = [(tiers == t).nonzero()[:, 0] for t in tiers.unique()]
    fitted = [at for at in found if len(at) * TOKENS_PER_CHANNEL <= len(z) and bits[at[0]] <= _MOST_BITS]
    if not fitted:
        return turn
    half = (2.0 ** (bits - 1)).to(z)
    out = turn.to(z)
    y = torch.einsum("nhc,hcd->nhd", z, out)
    for i in range(_ROUNDS):
        scale = round_scale(token_scale(y, y.square().mean(0), vote.to(z)))
        if i % _REFIT_STEPS == 0:
            step, _ = fit_steps(y, bits, scale)
        rounded = midrise(y / scale[..., None], step, half).mul_(scale[..., None])
        for at in fitted:
            before, after = (x[..., at].transpose(0, 1) for x in (y, rounded))
            more = nearest_rotation(before.mT @ torch.lerp(before, after, _BOLDNESS))
            out[:, :, at] = out[:, :, at] @ more
            y[..., at] = (before @ more).transpose(0, 1)
    return _orthogonal(out.double().cpu(), tiers.cpu())  # many small decompositions


def _orthogonal(turn: torch.Tensor, tiers: torch.Tensor) -> torch.Tensor:
    """turn [H, R, R] rid of what float32 left between axes of a tier and of everything between tiers."""
    out = torch.zeros_like(turn)
    for tier in tiers.unique():
        at = (tiers == tier).nonzero()[:, 0]
        u, _, vh = torch.linalg.svd(turn[:, at[:, None], at])
        out[:, at[:, None], at] = u @ vh
    return out


def axis_gains(coded: torch.Tensor, axes: torch.Tensor, emphasized: torch.Tensor) -> torch.Tensor:
    """Factors [H, R] that turn axes as they come back, coded [N, H, R], into the tokens' own, axes [N, H, R].

    emphasized [H, R] of `emphasis`: gains stay near its inverse.
    """
    gain = (coded * axes).mean(0, dtype=torch.float64) / coded.square().mean(0, dtype=torch.float64).clamp_min(1e-30)
    low, high = GAIN_RANGE
    return (gain.to(emphasized) * emphasized).clamp(low, high) / emphasized


def shaped_losses(axes: torch.Tensor, basis: Basis, turn: torch.Tensor, tiers: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every axis at every code width, [H, R, 9] float64: each tier emphasized for that width,
    turned, rounded, and brought back by its gains. axes [N, H, R] of sample tokens; turn [H, R, R]; tiers [R]."""
    out = torch.empty(*axes.shape[1:], MAX_CODE_BITS + 1, dtype=torch.float64, device=axes.device)
    out[..., 0] = axes.square().mean(0)
    back = turn.mT.to(axes)
    for width in range(1, MAX_CODE_BITS + 1):
        bits = torch.full_like(tiers, width)
        amplitude = emphasis(basis.variance * basis.weight, bits, tiers)
        weight = mixed_weight(basis, turn, amplitude)
        z = torch.einsum("nhc,hcd->nhd", axes * amplitude.to(axes), turn.to(axes))
        variance = z.square().mean(0)
        scale = round_scale(token_scale(z, variance, voting(variance, weight.to(z))))
        step, _ = fit_steps(z, bits.to(z.device), scale)
        rounded = midrise(z / scale[..., None], step, torch.full_like(step, 2.0 ** (width - 1))) * scale[..., None]
        coded = torch.einsum("nhc,hcd->nhd", rounded, back)
        gains = axis_gains(coded, axes, amplitude.to(axes))
        out[..., width] = (coded * gains - axes).square().mean(0)
    # More bits never hurt: the grid's coarseness must not make the allocator believe so.
    return torch.cummin(out, -1).values
