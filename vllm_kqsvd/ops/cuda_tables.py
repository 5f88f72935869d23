# SPDX-License-Identifier: Apache-2.0
"""A layer's constants as the CUDA store and dequantize kernels read them: fragments, plan tables, rotations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.codec import SINK_RATIO, LayerCodec, SideCodec
from vllm_kqsvd.errors import UnsupportedError
from vllm_kqsvd.layout import TILE, LatentLayout
from vllm_kqsvd.ops.rope_block import RopeSpec
from vllm_kqsvd.plan import GROUP, Plane

MAX_GROUPS = 16
MAX_PLANES = 32
TURN_ROWS = 1024  # coarse and fine rows: 2^20 rope blocks


def plan_table(layout: LatentLayout, side: str) -> torch.Tensor:
    """The side's plan as csrc/kqsvd/plan_table.cuh reads it: [20 + 28 planes] int32."""
    plan = layout.side(side)
    table = [plan.num_groups, len(plan.planes), layout.scale_offset[side], 0]
    table += [*plan.group_bits, *[0] * (MAX_GROUPS - plan.num_groups)]
    for p, (plane, base) in enumerate(zip(plan.planes, layout.plane_offsets[side], strict=True)):
        fields = [(g, plan.shift(p, g)) for g in plane.groups]
        moves = plane_moves(plane, fields)
        quads = -(-len(moves) // 4)
        table += [plane.num_bits | int(plane.is_half) << 8 | len(fields) << 16, base, quads, 0]
        table += [g | shift << 8 for g, shift in fields]
        table += [0] * (8 - len(fields))
        table += [x - (1 << 32) if x >> 31 else x for move in moves for x in move]
        table += [0] * (16 - 2 * len(moves))
    return torch.tensor(table, dtype=torch.int32)


def plane_moves(plane: Plane, fields: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """How code words make a plane's bytes: (left rotation | group << 8, mask of the bits that stay) of each step.

    fields: (group, shift) of each of the plane's groups. A word holds channels 2t, 2t + 8, 2t + 1, 2t + 9 in bytes 0
    to 3. A full plane's bytes follow it; a half plane takes bytes 0 and 2, with channel + 8 in the bits behind.
    """
    bits, moves = plane.num_bits, []
    low = (1 << bits) - 1
    for i, (group, shift) in enumerate(fields):
        at = i * bits * (2 if plane.is_half else 1)
        if plane.is_half:
            steps = [(at - shift, 0x00010001 * low << at), (at + bits - 8 - shift, 0x00010001 * low << (at + bits))]
        else:
            steps = [(at - shift, 0x01010101 * low << at)]
        moves += [(turn % 32 | group << 8, mask) for turn, mask in steps]
    return moves


def chunk_order(dim: int, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    """[d / 8, 8]: the elements of every chunk of a row (csrc/kqsvd/primitives.cuh); rotated pairs stay whole."""
    chunk = torch.arange(dim // 8)[:, None]
    eight = torch.arange(8)[None]
    paired = 4 * chunk + eight % 4 + (rotary_dim // 2) * (eight >= 4)
    apart = (8 * chunk < rotary_dim) & (not interleaved)
    return torch.where(apart, paired, 8 * chunk + eight)


def store_steps(dim: int, groups: int) -> int:
    """k-steps of the store kernels compiled for a head width and a number of channel groups (store_params.cuh)."""
    if groups > 8 or dim > 128:
        return 16
    return 4 if dim <= 64 else 8


def encode_image(encode: torch.Tensor, order: torch.Tensor, steps: int) -> torch.Tensor:
    """encode [H, d, R], order [d / 8, 8] -> [H, R / 16, steps, 2, 32, 8] bf16: B fragments of `mma.m16n8k16`.

    Term 0 is the rounded matrix, term 1 what is left. Chunk 4 c + t is lane t's part (of every quad) of steps 2 c and
    2 c + 1: lane 4 g + t holds, for each of the group's two n-tiles, column g of four elements of the chunk. Rows
    beyond d are zero.
    """
    heads, dim, rank = encode.shape
    chunks = 2 * steps
    rows = encode.new_zeros(heads, chunks * 8, rank)
    rows[:, :dim] = encode[:, order.flatten().to(encode.device)]
    high = rows.to(torch.bfloat16)
    low = (rows.double() - high.double()).to(torch.bfloat16)
    x = torch.stack((high, low), 1).view(heads, 2, chunks // 4, 4, 2, 4, rank // 16, 2, 8)
    x = x.permute(0, 6, 2, 4, 1, 8, 3, 7, 5)  # head, group, chunk / 4, step, term, g, t, tile, element
    return x.reshape(heads, rank // 16, steps, 2, 32, 8).contiguous()


def operand_image(fragments: torch.Tensor) -> torch.Tensor:
    """`encode_image` [H, R / 16, steps, 2, 32, 8] -> [H, 2, steps / 4, R, 64] bf16: the B operand of `wgmma`.

    A channel's row holds its k-steps in their order, in spans of 64 elements; the 16-byte parts of a row are swizzled
    by its number (128-byte swizzle). Empty beyond 8 steps, where the kernels do not use it.
    """
    heads, groups, steps = fragments.shape[:3]
    if steps > 8:
        return fragments.new_zeros(0)
    x = fragments.view(heads, groups, steps // 4, 4, 2, 8, 4, 2, 2, 2)  # span, step, term, g, t, tile, half, element
    x = x.permute(0, 4, 2, 1, 7, 5, 3, 8, 6, 9).reshape(heads, 2, steps // 4, 16 * groups, 8, 8)
    row = torch.arange(16 * groups, device=x.device)[:, None]
    part = torch.arange(8, device=x.device) ^ (row % 8)
    return x[:, :, :, row, part].reshape(heads, 2, steps // 4, 16 * groups, 64).contiguous()


def decode_image(decode: torch.Tensor, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """decode [H, R, d], order [d / 8, 8] -> (fp16 B fragments over the unit, unit [H], a power of two).

    Fragments [H, ceil(d / 32), R / 16, 2, 32, 8]: of four n-tiles, columns 2 t and 2 t + 1 are two elements of chunk
    4 j + t, so that lane t of every quad gets the whole chunk. Columns beyond d are zero.
    """
    heads, rank, dim = decode.shape
    peak = decode.double().abs().amax((1, 2)).clamp_min(2.0**-100)
    unit = torch.exp2(torch.floor(torch.log2(peak)))
    spans = -(-dim // 32)
    columns = decode.new_zeros(heads, rank, spans * 32, dtype=torch.float64)
    columns[..., :dim] = (decode.double() / unit[:, None, None])[..., order.flatten().to(decode.device)]
    # [H, group, half, t (of the rows), pair, span, chunk, tile / 2, tile, element]
    x = columns.half().view(heads, rank // 16, 2, 4, 2, spans, 4, 2, 2, 2)
    # head, span, group, tile / 2, g = (chunk, element), t, tile, half, pair
    x = x.permute(0, 5, 1, 7, 6, 9, 3, 8, 2, 4)
    return x.reshape(heads, spans, rank // 16, 2, 32, 8).contiguous(), unit.float()


_TURNS: dict[tuple[object, ...], torch.Tensor] = {}


def turn_table(rope: RopeSpec, rope_block: int, device: torch.device) -> torch.Tensor:
    """(cos, sin) of fine and coarse block starts, [2, 1024, rotary_dim / 2, 2] float32; shared by equal layers."""
    freq = rope.inv_freq.to("cpu", torch.float64)
    key = (freq.numpy().tobytes(), rope_block, str(device))
    if key not in _TURNS:
        starts = torch.arange(TURN_ROWS, dtype=torch.float64) * rope_block
        angle = torch.stack((starts, starts * TURN_ROWS))[..., None] * freq
        _TURNS[key] = torch.stack((angle.cos(), angle.sin()), -1).float().to(device)
    return _TURNS[key]


@dataclass(frozen=True)
class SideTables:
    """Constants of one side; shapes in csrc/store_latent.cu and csrc/dequantize.cu."""

    encode: torch.Tensor
    operand: torch.Tensor
    weight: torch.Tensor
    latent_mean: torch.Tensor
    class_vector: torch.Tensor
    class_offset: torch.Tensor
    plan: torch.Tensor
    decode: torch.Tensor
    decode_unit: torch.Tensor
    mean: torch.Tensor
    first_byte: int
    num_bytes: int

    @property
    def encoder(self) -> tuple[torch.Tensor, ...]:
        """Arguments of store_latent."""
        means = (self.latent_mean, self.class_vector, self.class_offset)
        return (self.encode, self.operand, self.weight, *means, self.plan)

    @property
    def decoder(self) -> tuple[torch.Tensor | int, ...]:
        """Arguments of dequantize."""
        return (self.decode, self.decode_unit, self.mean, self.plan, self.first_byte, self.num_bytes)


def side_tables(side: SideCodec, layout: LatentLayout, name: str, order: torch.Tensor, steps: int) -> SideTables:
    """Constants of side `name` ("k" or "v") on the codec's device; `chunk_order` and `store_steps` of the layer."""
    both = torch.stack((side.mean, side.sink), 1).double()  # [H, 2, M, d]
    mean = torch.einsum("pm,hcmd->hcpd", side.mean_basis.double(), both)
    ordinary, sink = mean.unbind(1)
    image, unit = decode_image(side.decode, order)
    fragments = encode_image(side.encode, order, steps)
    return SideTables(
        encode=fragments,
        operand=operand_image(fragments),
        weight=torch.stack((side.scale_weight, side.guard_weight), -1).float().contiguous(),
        latent_mean=torch.einsum("hcpd,hdr->hcpr", mean, side.encode.double()).float().contiguous(),
        class_vector=(2 * (sink - SINK_RATIO * ordinary)).float().contiguous(),
        class_offset=(sink.square().sum(-1) - SINK_RATIO * ordinary.square().sum(-1)).float().contiguous(),
        plan=plan_table(layout, name).to(side.encode.device),
        decode=image,
        decode_unit=unit,
        mean=mean.float().contiguous(),
        first_byte=layout.plane_offsets[name][0],
        num_bytes=TILE * layout.side(name).bytes_per_token,
    )


@dataclass(frozen=True)
class LayerTables:
    """Constants of a layer."""

    k: SideTables
    v: SideTables
    rope_table: torch.Tensor
    rope_block: int
    interleaved: bool
    tile_bytes: int


def layer_tables(codec: LayerCodec) -> LayerTables:
    """Constants of `codec` on its device. Raises UnsupportedError for what the kernels cannot hold."""
    rotary, dim, device = codec.rope.rotary_dim, codec.head_dim, codec.k.encode.device
    if dim % 16 or not 16 <= dim <= 256:
        raise UnsupportedError(f"head_dim {dim} asked for; the CUDA kernels take multiples of 16 up to 256; use triton")
    if codec.rope_block and (rotary % 8 or rotary > dim):
        raise UnsupportedError(f"rotary width {rotary} asked for; the CUDA kernels take multiples of 8; use triton")
    for plan in (codec.plan.k, codec.plan.v):
        if plan.num_groups > MAX_GROUPS or len(plan.planes) > MAX_PLANES:
            raise UnsupportedError(
                f"{GROUP * plan.num_groups} latent channels in {len(plan.planes)} planes asked for; the CUDA kernels "
                f"take up to {GROUP * MAX_GROUPS} in {MAX_PLANES}; calibrate with fewer"
            )
    if codec.rope_block and rotary:
        table = turn_table(codec.rope, codec.rope_block, device)
    else:
        table = torch.zeros(0, device=device)
    layout = codec.layout
    turned = rotary if codec.rope_block else 0
    steps = store_steps(dim, max(codec.plan.k.num_groups, codec.plan.v.num_groups))
    return LayerTables(
        side_tables(codec.k, layout, "k", chunk_order(dim, turned, codec.rope.interleaved), steps),
        side_tables(codec.v, layout, "v", chunk_order(dim, 0, False), steps),
        table,
        codec.rope_block,
        codec.rope.interleaved,
        layout.tile_bytes,
    )
