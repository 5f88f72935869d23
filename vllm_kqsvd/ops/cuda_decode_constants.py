# SPDX-License-Identifier: Apache-2.0
"""Constants of the CUDA decode kernel: tensor-core fragments of a layer's codec (csrc/kqsvd/decode_params.h).

Codes enter the tensor cores as fp16 subnormals, a field at bit i weighing 2^(i-24). The inverse of the weight a
group's first plane has is folded into the K absorb matrix; powers of two that are left over go into the exponent that
is added when a scale byte is read, so no multiplication by a constant remains in the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from vllm_kqsvd.codec import MEAN_RANK, LayerCodec
from vllm_kqsvd.ops.rope_block import RopeSpec, block_start_table
from vllm_kqsvd.plan import GROUP, SidePlan

_SCALE_BIAS = 127 - 8  # float exponent of the smallest scale byte
_ROW_NORM = 16.0  # norm of the longest absorb row: queries of norm 2000 still fit fp16
_TABLE_PAD = 8  # rows past the last rope block that a step may fetch


@dataclass(frozen=True)
class DecodeConstants:
    """Device tensors as `DecodeParams` names them; shapes there. H kv heads, all contiguous."""

    key_image: torch.Tensor
    mean_tile: torch.Tensor
    sink_rows: torch.Tensor
    key_exponent: torch.Tensor
    value_basis: torch.Tensor
    value_mean: torch.Tensor
    value_factor: torch.Tensor


def _field_bit(plan: SidePlan, p: int, group: int, y: int, is_key: bool) -> int:
    plane = plan.planes[p]
    i = plane.groups.index(group)
    return (2 * i + (y if is_key else 0)) * plane.num_bits if plane.is_half else i * plane.num_bits


def _first_plane(plan: SidePlan, group: int) -> int:
    return next(p for p, plane in enumerate(plan.planes) if group in plane.groups)


def _match_exponent(plan: SidePlan, p: int, group: int, y: int, is_key: bool) -> int:
    q = _first_plane(plan, group)
    here, first = (plan.shift(i, group) - _field_bit(plan, i, group, y, is_key) for i in (p, q))
    return here - first


def match_exponents(plan: SidePlan, is_key: bool) -> list[int]:
    """Powers of two between secondary planes and the first plane of their groups (`SidePlan::match_exponent`)."""
    planes = enumerate(plan.planes)
    return [0] + [_match_exponent(plan, p, g, y, is_key) for p, plane in planes for g in plane.groups for y in (0, 1)]


@dataclass(frozen=True)
class LowerField:
    """A field (group, channel half y) below the highest one of the bytes of an open K plane."""

    plane: int
    group: int
    y: int
    top_y: int  # channel half of the highest field, which is of the plane's last group
    exponent: int  # power of two by which that one's query is multiplied in this plane
    is_first: bool  # the plane is the only one of the group


def lower_key_fields(plan: SidePlan) -> list[LowerField]:
    """Fields below the highest in planes where the kernel reads that one as the whole byte (`SidePlan::is_open`)."""
    out: list[LowerField] = []
    for p, plane in enumerate(plan.planes):
        top = plane.groups[-1]
        halves = [(g, y) for g in plane.groups for y in (0, 1)]
        lower = halves[:-1] if plane.is_half else halves[:-2]
        single = [sum(g in other.groups for other in plan.planes) == 1 for g, _ in lower]
        first = [_first_plane(plan, g) == p for g, _ in lower]
        if any(f and not s for f, s in zip(first, single, strict=True)):
            continue
        for (g, y), is_first in zip(lower, first, strict=True):
            top_y = 1 if plane.is_half else y
            out.append(LowerField(p, g, y, top_y, _match_exponent(plan, p, top, top_y, True), is_first))
    return out


def _channels(group: int, y: int) -> slice:
    return slice(GROUP * group + GROUP // 2 * y, GROUP * group + GROUP // 2 * (y + 1))


def unit_exponents(plan: SidePlan, is_key: bool) -> torch.Tensor:
    """log2 of 2^24 times what one code unit of each channel weighs in an accumulator: [R] int64."""
    out = []
    for group in range(plan.num_groups):
        p = _first_plane(plan, group)
        for y in (0, 1):
            out += [_field_bit(plan, p, group, y, is_key) - plan.shift(p, group)] * (GROUP // 2)
    return torch.tensor(out)


def plane_dims(head_dim: int, rope: RopeSpec) -> torch.Tensor:
    """Dimensions (re, im) of each rotation plane: [head_dim / 2, 2] int64 (`plane_dims` in decode_absorb.cuh)."""
    i = torch.arange(head_dim // 2)
    split = torch.zeros_like(i, dtype=torch.bool) if rope.interleaved else 2 * i < rope.rotary_dim
    re = torch.where(split, i, 2 * i)
    return torch.stack((re, torch.where(split, i + rope.rotary_dim // 2, 2 * i + 1)), -1)


def absorb_order(head_dim: int, rope: RopeSpec) -> torch.Tensor:
    """Dimension at each position of the absorb product's inner index: [head_dim] int64."""
    k = torch.arange(head_dim)
    step, y, t, x = k // 16, k // 8 % 2, k // 2 % 4, k % 2
    i = 2 * step + y  # register of a lane; a lane's registers are rotation planes 16 (i / 4) + 4 t + i % 4
    return plane_dims(head_dim, rope)[16 * (i // 4) + 4 * t + i % 4, x]


def _lanes() -> tuple[torch.Tensor, torch.Tensor]:
    lane = torch.arange(32)
    return lane // 4, lane % 4


def _fragment_a(m: torch.Tensor) -> torch.Tensor:
    """[..., 16 i, 16 j] -> A operands of m16n8k16: [..., i, j, 32, 4, 2] in m's dtype."""
    g, t = _lanes()
    tiles = m.unflatten(-1, (-1, 16)).unflatten(-3, (-1, 16)).transpose(-3, -2)  # ..., i, j, 16, 16
    row = torch.stack((g, g + 8, g, g + 8), -1)
    col = torch.stack((2 * t, 2 * t, 2 * t + 8, 2 * t + 8), -1)
    return tiles[..., row[..., None], col[..., None] + torch.arange(2)]


def _fragment_b(m: torch.Tensor) -> torch.Tensor:
    """[..., 16 n, 16 k] (both n tiles of 8) -> B operands [..., k step, 32, 4, 2]: (b0, b1) of n 0-7, then of 8-15."""
    g, t = _lanes()
    steps = m.unflatten(-1, (-1, 16)).transpose(-3, -2)  # ..., k step, 16 n, 16 k
    row = torch.stack((g, g, g + 8, g + 8), -1)
    col = torch.stack((2 * t, 2 * t + 8, 2 * t, 2 * t + 8), -1)
    return steps[..., row[..., None], col[..., None] + torch.arange(2)]


def _words(x: torch.Tensor) -> torch.Tensor:
    """fp16 pairs in the last dimension -> int32 words."""
    return x.to(torch.float16).contiguous().view(torch.int32).squeeze(-1)


def _swizzled(m: torch.Tensor) -> torch.Tensor:
    """[H, rows, d] -> K-major wgmma image in 64-column halves, 128-byte swizzle: [H, bytes] uint8."""
    heads, rows, dim = m.shape
    m = torch.nn.functional.pad(m, (0, -dim % 64)).to(torch.float16)
    chunks = m.view(heads, rows, -1, 8, 8).permute(0, 2, 1, 3, 4)  # half, row, 16-byte chunk, element
    at = torch.arange(8)[None] ^ (torch.arange(rows) % 8)[:, None]
    image = torch.empty_like(chunks.contiguous())
    image.scatter_(3, at[None, None, :, :, None].expand_as(chunks), chunks.contiguous())
    return image.contiguous().view(heads, -1).view(torch.uint8)


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """Smallest integer e with x <= 2^e (0 for x = 0)."""
    return torch.where(x > 0, x.clamp_min(1e-30).log2().ceil(), torch.zeros_like(x)).long()


def build_constants(codec: LayerCodec, scale: float, device: torch.device) -> DecodeConstants:
    """Constants of one layer for softmax scale `scale`. Computed in float64 on the host, once."""
    codec = codec.to("cpu", torch.float64)
    k, v, dim = codec.k, codec.v, codec.head_dim
    log2_scale = scale * math.log2(math.e)
    order = absorb_order(dim, codec.rope)

    # K: a scale byte s contributes s 2^(n - 24) sum(field * 2^bit * image row . q).
    # Where the highest field is read as the whole byte, the query of the fields below makes up for it.
    rows = k.decode * 2.0 ** -unit_exponents(k.plan, True)[:, None] * (log2_scale * 2.0**24)
    for field in (f for f in lower_key_fields(k.plan) if f.is_first):
        top = rows[:, _channels(k.plan.planes[field.plane].groups[-1], field.top_y)]
        rows[:, _channels(field.group, field.y)] -= 2.0**field.exponent * top
    limit = _ROW_NORM * 2.0 ** -max(match_exponents(k.plan, True))
    n = _exponent(rows.norm(dim=-1).amax(-1) / limit)
    rows = rows * 2.0 ** -n[:, None, None].double()

    offsets = codec.rope_block or 32
    basis = torch.nn.functional.pad(k.mean_basis, (0, MEAN_RANK - k.mean_basis.shape[1])).expand(offsets, -1)
    pad = (0, 0, 0, MEAN_RANK - k.mean.shape[1])
    mean, sink = (torch.nn.functional.pad(x, pad) for x in (k.mean, k.sink - k.mean))
    m = _exponent(torch.maximum(mean, sink).abs().amax((1, 2)) * math.sqrt(dim) / _ROW_NORM).clamp(0, 12)
    shrink = 2.0 ** -m[:, None, None].double()
    tile = basis[None] * log2_scale / shrink  # [H, T, 16]

    units = 2.0 ** _exponent(v.decode.abs().amax((1, 2))).double()
    turned = (v.decode / units[:, None, None]).transpose(1, 2)  # [H, d, R]
    v_mean = torch.stack([(v.mean_basis[0] @ x) for x in (v.mean, v.sink - v.mean)], 1)
    return DecodeConstants(
        key_image=_swizzled(torch.cat((rows, mean * shrink), 1)[..., order]).to(device),
        mean_tile=_words(_fragment_a(tile)).squeeze(2).contiguous().to(device),
        sink_rows=_words(_fragment_b((sink * shrink)[..., order])).contiguous().to(device),
        key_exponent=((_SCALE_BIAS + n) << 23).to(torch.int32).to(device),
        value_basis=_words(_fragment_a(turned)).contiguous().to(device),
        value_mean=v_mean.float().contiguous().to(device),
        value_factor=units.float().to(device),
    )


@lru_cache(maxsize=8)
def _rope_words(
    inv_freq: tuple[float, ...], planes: int, rope_block: int, rows: int, device: torch.device
) -> torch.Tensor:
    table = torch.zeros(rows, planes, 2)
    table[..., 0] = 1.0
    if rope_block and inv_freq:
        spec = RopeSpec(torch.tensor(inv_freq, dtype=torch.float64))
        table[:, : len(inv_freq)] = block_start_table(spec, rope_block, rows)
    return _words(table).to(device)


def rope_words(codec: LayerCodec, max_position: int, device: torch.device) -> torch.Tensor:
    """(cos, sin) of block starts as fp16 pairs, [rows, head_dim / 2] int32; unrotated planes are (1, 0). Cached, so
    the layers of a model share one table."""
    rows = _TABLE_PAD + (-(-max_position // codec.rope_block) if codec.rope_block else 0)
    inv_freq = tuple(codec.rope.inv_freq.double().cpu().tolist())
    return _rope_words(inv_freq, codec.head_dim // 2, codec.rope_block, rows, device)
