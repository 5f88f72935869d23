# SPDX-License-Identifier: Apache-2.0
"""Constants of one layer as the Triton kernels read them: matrices in stored order, means, rotations.

Stored order: plane after plane, field after field (a field is 16 channels), byte after byte, exactly as
`common.plane_fields` unpacks them; a channel coded by several planes has a column in each. Permuting the
matrices here is what saves the kernels every permutation of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.codec import MEAN_RANK, LayerCodec, SideCodec
from vllm_kqsvd.errors import KernelError
from vllm_kqsvd.layout import LatentLayout
from vllm_kqsvd.ops.rope_block import RopeSpec
from vllm_kqsvd.plan import GROUP

ROPE_ROWS = 1024  # rows of each of the two rotation tables: 2^20 rope blocks are addressable

# One plane for the kernels: (bits, fields, is_half, byte offset in the tile, first column).
PlaneSpec = tuple[int, int, int, int, int]


def next_power_of_two(n: int) -> int:
    """Smallest power of two >= n (n >= 1)."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class SideTables:
    """H heads, P padded head_dim (a power of two, at least 64), C columns in stored order, on one device.

    decode [H, C, P] float16 (keys) or float32 (values, which are decoded once per query): decode rows times
    their field's weight over `unit`; unit [H] float32 (power of two).
    encode [H, P, C] float32: encode columns over `encode_unit` [H, C] float32 (powers of two).
    weight, guard [H, C] float32: scale weights (a channel's weight counts once).
    shift [C] int32: weight exponent of the field; half_range [C] float32: 2^(code width - 1).
    means [H, 2 * MEAN_RANK, P] float32: ordinary rows, then sink rows; basis [offsets, MEAN_RANK] float32.
    centers [H, 2, P] float32: mean and sink prototype at offset 0 (for values: at every offset).
    """

    planes: tuple[PlaneSpec, ...]
    columns: int
    scale_offset: int
    decode: torch.Tensor
    unit: torch.Tensor
    encode: torch.Tensor
    encode_unit: torch.Tensor
    weight: torch.Tensor
    guard: torch.Tensor
    shift: torch.Tensor
    half_range: torch.Tensor
    means: torch.Tensor
    basis: torch.Tensor
    centers: torch.Tensor


def _power_above(x: torch.Tensor) -> torch.Tensor:
    """Smallest power of two >= x, elementwise (x > 0 assumed; 0 counts as 1e-20): float32."""
    return (2.0 ** x.clamp_min(1e-20).log2().ceil()).float()


def _stored_order(layout: LatentLayout, name: str) -> tuple[tuple[PlaneSpec, ...], list[int], list[int]]:
    """(plane specs, channel of every column, shift of every column)."""
    fields, specs, byte = layout.byte_fields[name], [], 0
    channels: list[int] = []
    shifts: list[int] = []
    for plane, offset in zip(layout.side(name).planes, layout.plane_offsets[name], strict=True):
        n = len(plane.groups)
        specs.append((plane.num_bits, n, int(plane.is_half), offset, len(channels)))
        for j in range(n):
            for i in range(GROUP):
                at, field = (byte + i, j) if not plane.is_half else (byte + i % 8, 2 * j + i // 8)
                found = next(f for f in fields[at] if f.bit == field * plane.num_bits)
                channels.append(found.channel)
                shifts.append(found.shift)
        byte += plane.bytes_per_token
    return tuple(specs), channels, shifts


def side_tables(codec: LayerCodec, name: str) -> SideTables:
    """Tables of side "k" or "v" on the codec's device."""
    side: SideCodec = getattr(codec, name)
    device, heads, dim = side.encode.device, codec.num_kv_heads, codec.head_dim
    padded = max(next_power_of_two(dim), 64)
    planes, channels, shifts = _stored_order(codec.layout, name)
    channel = torch.tensor(channels, device=device)
    shift = torch.tensor(shifts, device=device)
    first = torch.tensor([c not in channels[:i] for i, c in enumerate(channels)], device=device)

    rows = side.decode.float()[:, channel] * 2.0 ** shift[:, None]
    unit = _power_above(rows.norm(dim=-1).amax(-1))
    decode = torch.zeros(heads, len(channels), padded, device=device)
    decode[..., :dim] = rows / unit[:, None, None]
    columns = side.encode.float()[..., channel]
    encode_unit = _power_above(columns.norm(dim=1))
    encode = torch.zeros(heads, padded, len(channels), device=device)
    encode[:, :dim] = columns / encode_unit[:, None]

    offsets, width = side.mean_basis.shape
    if width > MEAN_RANK or (name == "v" and offsets != 1):
        raise KernelError(
            f"a mean of rank {width} over {offsets} offsets asked for on side {name!r}; the kernels take rank "
            f"{MEAN_RANK}, and one offset for values: calibrate the projection again with this version"
        )
    means = torch.zeros(heads, 2, MEAN_RANK, padded, device=device)
    means[:, 0, :width, :dim], means[:, 1, :width, :dim] = side.mean.float(), side.sink.float()
    basis = torch.zeros(offsets, MEAN_RANK, device=device)
    basis[:, :width] = side.mean_basis.float()
    return SideTables(
        planes,
        len(channels),
        codec.layout.scale_offset[name],
        decode.half() if name == "k" else decode,
        unit,
        encode,
        encode_unit,
        side.scale_weight.float()[:, channel] * first,
        side.guard_weight.float()[:, channel].contiguous(),
        shift.int(),
        2.0 ** (side.channel_bits()[channel] - 1).float(),
        means.flatten(1, 2),
        basis,
        torch.einsum("m,hcmp->hcp", basis[0], means).contiguous(),
    )


_rotations: dict[tuple[bytes, int, torch.device], torch.Tensor] = {}


def rope_tables(rope: RopeSpec, rope_block: int, device: torch.device, pairs: int | None = None) -> torch.Tensor:
    """(cos, sin) of rope block starts in two digits: [2, ROPE_ROWS, pairs, 2] float32; pairs: rotary_dim / 2 or more.

    Block b starts at the sum of the angles of row b % ROPE_ROWS of table 0 and row b // ROPE_ROWS of table 1:
    exact far beyond any context length in a few MB, and shared by all layers with the same frequencies.
    """
    freq = rope.inv_freq.to("cpu", torch.float64)
    if pairs is not None:
        freq = torch.nn.functional.pad(freq, (0, pairs - freq.numel()))  # pairs that do not turn
    key = (freq.numpy().tobytes(), rope_block, device)
    if key not in _rotations:
        start = torch.arange(ROPE_ROWS, dtype=torch.float64) * max(rope_block, 1)
        angle = torch.stack((start, start * ROPE_ROWS))[..., None] * freq
        _rotations[key] = torch.stack((angle.cos(), angle.sin()), -1).float().to(device).contiguous()
    return _rotations[key]
