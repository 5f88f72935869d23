# SPDX-License-Identifier: Apache-2.0
"""Constants of one layer in the order in which the decode kernel's threads hold them (fragments.py).

Columns of a plane are in fragment order: bytes and fields of a half word (`f`), then the eight lanes' columns. A field
at bit b of its half counts 2^b times as a float16 subnormal; the matrices are divided by that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.ops.triton.tables import PlaneSpec, SideTables

KEY_HEADROOM = 9  # log2 of the factor that keeps decode rows of the highest fields out of float16's subnormals


@dataclass(frozen=True)
class FragmentTables:
    """H heads, P padded head_dim, C columns, all on the codec's device.

    k_decode [H, P / 32, C / 8, 256] float16: tiles of the key decode matrix, 2^KEY_HEADROOM times its rows over 2^b.
    k_means [H, P / 32, 8, 256] float16: ordinary and sink means, high terms, then their low terms.
    k_basis [offsets, 4, 8] float16: for every t columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9, high terms, then low.
    v_decode [H, C, P] float32: value decode rows over 2^b. v_middle [C] float32: middle of the codes times 2^b.
    """

    k_decode: torch.Tensor
    k_means: torch.Tensor
    k_basis: torch.Tensor
    v_decode: torch.Tensor
    v_middle: torch.Tensor


def fragment_order(planes: tuple[PlaneSpec, ...]) -> tuple[list[int], list[int], list[int]]:
    """For every column in fragment order: its column in stored order, the bit of its field, its plane's width."""
    columns, bits, widths = [], [], []
    for width, groups, is_half, _, first in planes:
        for f in range(2 * groups):
            shifted = not is_half and (f + 1) * width > 10
            low = 8 // width if width > 2 else 10 // width  # first field that `fragments.unpack` shifts
            for lane in range(8):
                at = 16 * (f // 2) + lane + 8 * (f % 2) if is_half else 16 * (f % groups) + 2 * lane + f // groups
                columns.append(first + at)
                bits.append((f - low if shifted else f) * width)
                widths.append(width)
    return columns, bits, widths


def pair_channels(padded: int, rotary: int, interleaved: bool) -> torch.Tensor:
    """Channels of every pair that is rotated together, then of pairs that are not: [P / 2, 2] int64."""
    half = rotary // 2
    pair = torch.arange(padded // 2)
    if interleaved:
        return torch.stack((2 * pair, 2 * pair + 1), -1)
    first = torch.where(pair < half, pair, pair + half)
    return torch.stack((first, first + torch.where(pair < half, half, padded // 2 - half)), -1)


def absorbed_channels(padded: int, rotary: int, interleaved: bool) -> torch.Tensor:
    """Channel of every row of the absorb product: rows are [u, t, member], the pair is t * P / 8 + u."""
    pairs = pair_channels(padded, rotary, interleaved).view(4, padded // 8, 2)
    return pairs.transpose(0, 1).flatten()


def operand_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """[H, K, N] -> [H, K / 32, N / 8, 256]: second operands of two `mma.m16n8k16` each, in thread order.

    Rows are [u, t, member] as in `absorbed_channels`; four consecutive u are 2 hi + p, and thread 4 g + t holds of
    column g the values [p, hi, member]: product p takes both hi from neighbouring registers.
    """
    h, k, n = matrix.shape
    tiles = matrix.view(h, k // 32, 2, 2, 4, 2, n // 8, 8)  # [H, k32, hi, p, t, e, n8, g]
    return tiles.permute(0, 1, 6, 7, 4, 3, 2, 5).reshape(h, k // 32, n // 8, 256).contiguous()


def fragment_tables(k: SideTables, v: SideTables, rotary: int, interleaved: bool) -> FragmentTables:
    """Reorder the tables of a layer."""
    device, padded = k.decode.device, k.decode.shape[-1]
    columns, bits, _ = fragment_order(k.planes)
    rows = absorbed_channels(padded, rotary, interleaved).to(device)
    weight = 2.0 ** (KEY_HEADROOM - torch.tensor(bits, device=device, dtype=torch.float32))
    decode = (k.decode[:, columns].float() * weight[:, None])[..., rows].transpose(1, 2)
    means = k.means[..., rows].transpose(1, 2)
    high = means.half()
    terms = torch.cat((high, (means - high.float()).half()), -1)  # ordinary, sink, their low terms
    high = k.basis.half()
    low = (k.basis - high.float()).half()
    basis = torch.stack([x.view(-1, 2, 4, 2).transpose(1, 2) for x in (high, low)], 2)  # [offsets, t, term, k8, e]

    v_columns, v_bits, widths = fragment_order(v.planes)
    v_weight = 2.0 ** torch.tensor(v_bits, device=device, dtype=torch.float32)
    middle = (2.0 ** torch.tensor(widths, device=device, dtype=torch.float32) - 1) / 2 * v_weight
    return FragmentTables(
        operand_tiles(decode.half()),
        operand_tiles(terms),
        basis.flatten(2),
        (v.decode[:, v_columns] / v_weight[:, None]).contiguous(),
        middle,
    )
