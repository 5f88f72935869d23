# SPDX-License-Identifier: Apache-2.0
"""Frames in which keys are coded, and the average of a second moment over the rotations of a frame.

A key in the frame of a rope block is R_j k with k the key before RoPE and j its offset in the block. Offsets do
not depend on content, so every moment of R_j k follows exactly from the moment of k: statistics are collected once,
before RoPE, and serve every rope mode and block length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_kqsvd.errors import CalibrationError
from vllm_kqsvd.ops.rope_block import RopeSpec, rotate

ROPE_MODES = ("page", "pre", "post", "none")


@dataclass(frozen=True)
class Frame:
    """Where keys of one layer are coded.

    mode "page": blocks of `rope_block` positions; "pre": blocks of one; "post": no turning back, calibrated over
    positions 0 .. max_position - 1; "none": the layer has no RoPE.
    """

    mode: str
    rope_block: int
    rope: RopeSpec
    max_position: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ROPE_MODES:
            raise CalibrationError(f"rope mode {self.mode!r} asked for; choose one of {', '.join(ROPE_MODES)}")
        want = {"pre": 1, "post": 0, "none": 0}.get(self.mode, self.rope_block)
        if self.rope_block != want or (self.mode == "page" and self.rope_block < 1):
            raise CalibrationError(
                f"rope mode {self.mode!r} with a rope block of {self.rope_block} positions asked for"
            )

    @property
    def num_offsets(self) -> int:
        """Number of rotations j = 0 .. n-1 the frame averages over."""
        if self.mode == "post":
            if not self.max_position:
                raise CalibrationError("rope mode 'post' needs the largest position that will be served")
            return self.max_position
        return max(1, self.rope_block)

    def average(self, gram: torch.Tensor) -> torch.Tensor:
        """Mean over the frame's offsets of R_j gram R_j^T; gram [..., d, d] float64."""
        return rotation_average(gram, self.rope, uniform_offsets(self.num_offsets))

    def apply(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """R_j x for keys before RoPE x [N, H, d] and offsets [N]."""
        return rotate(x, offsets, self.rope)


def planes_of(rope: RopeSpec, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(real coordinates, imaginary coordinates, frequency) of the dim / 2 planes; unrotated rest: frequency 0."""
    half, rot = rope.inv_freq.numel(), rope.rotary_dim
    if rope.interleaved:
        re, im = torch.arange(0, rot, 2), torch.arange(1, rot, 2)
    else:
        re, im = torch.arange(half), torch.arange(half, rot)
    rest = torch.arange(rot, dim)
    freq = torch.cat((rope.inv_freq.double().cpu(), torch.zeros(rest.numel() // 2, dtype=torch.float64)))
    return torch.cat((re, rest[0::2])), torch.cat((im, rest[1::2])), freq


@dataclass(frozen=True)
class OffsetLaw:
    """A distribution of rotation offsets 0 .. count - 1: uniform, or the causal law of a text's distances.

    `first` > 0: distance j >= first has weight count - j (the number of query-key pairs of one text of `count` tokens
    at that distance), nearer ones none. 0: all offsets alike.
    """

    count: int
    first: int = 0

    def weights(self) -> torch.Tensor:
        """Unnormalized weights [count] float64."""
        j = torch.arange(self.count, dtype=torch.float64)
        return torch.where(j >= self.first, self.count - j, 0.0) if self.first else torch.ones_like(j)

    def characteristic(self, omega: torch.Tensor) -> torch.Tensor:
        """Mean of exp(i omega j) for omega [...] float64, complex128."""
        if self.first == 0:  # a geometric series, whatever the length
            half = (omega / 2).remainder(torch.pi)
            resonant = half.sin().abs() < 1e-12
            ratio = (omega / 2 * self.count).sin() / torch.where(resonant, 1.0, (omega / 2).sin()) / self.count
            return torch.where(resonant, 1.0, torch.polar(torch.ones_like(omega), omega / 2 * (self.count - 1)) * ratio)
        w = (self.weights() / self.weights().sum()).to(omega.device)
        out = torch.zeros(omega.shape, dtype=torch.complex128, device=omega.device)
        for start in range(0, self.count, 512):
            j = torch.arange(start, min(start + 512, self.count), device=omega.device, dtype=torch.float64)
            angle = omega[..., None] * j
            part = w[start : start + 512]
            out += torch.complex((angle.cos() * part).sum(-1), (angle.sin() * part).sum(-1))
        return out


def uniform_offsets(count: int) -> OffsetLaw:
    """Offsets 0 .. count - 1, all alike."""
    return OffsetLaw(count)


def distance_law(window: int, context: int) -> OffsetLaw:
    """Distances at which queries of a text of `context` tokens read coded keys; the last `window` are exact."""
    return OffsetLaw(max(context, 2 * window, 2), max(window, 1))


@lru_cache(maxsize=32)
def _multipliers(freq: tuple[float, ...], law: OffsetLaw) -> tuple[torch.Tensor, torch.Tensor]:
    """Characteristic function at all differences and all sums of two plane frequencies, [planes, planes] each."""
    f = torch.tensor(freq, dtype=torch.float64)
    return law.characteristic(f[:, None] - f[None, :]), law.characteristic(f[:, None] + f[None, :])


def rotation_average(gram: torch.Tensor, rope: RopeSpec, law: OffsetLaw) -> torch.Tensor:
    """Mean over the law's offsets of R_j gram R_j^T, exactly; gram [..., d, d] float64 on the CPU.

    In complex plane coordinates z the moments E[z_a conj z_b] and E[z_a z_b] are multiplied by the law's
    characteristic function at the difference and at the sum of the two frequencies.
    """
    if rope.rotary_dim == 0 or law.count == 1:
        return gram.clone()
    re, im, freq = planes_of(rope, gram.shape[-1])
    rr, ri, ir, ii = (gram[..., a[:, None], b[None, :]] for a in (re, im) for b in (re, im))
    difference, total = _multipliers(tuple(freq.tolist()), law)
    minus = torch.complex(rr + ii, ir - ri) * difference
    plus = torch.complex(rr - ii, ir + ri) * total
    out = torch.empty_like(gram)
    out[..., re[:, None], re[None, :]] = (minus + plus).real / 2
    out[..., im[:, None], im[None, :]] = (minus - plus).real / 2
    out[..., im[:, None], re[None, :]] = (minus + plus).imag / 2
    out[..., re[:, None], im[None, :]] = (plus - minus).imag / 2
    return out


def rotate_mean(x: torch.Tensor, rope: RopeSpec, law: OffsetLaw, sign: int = 1) -> torch.Tensor:
    """Mean over the law's offsets of R_{sign j} x; x [..., d] float64."""
    if rope.rotary_dim == 0 or law.count == 1:
        return x.clone()
    re, im, freq = planes_of(rope, x.shape[-1])
    z = torch.complex(x[..., re], x[..., im]) * law.characteristic(sign * freq)
    out = torch.empty_like(x)
    out[..., re], out[..., im] = z.real, z.imag
    return out
