// SPDX-License-Identifier: Apache-2.0
// Store: turn keys back to their rope block, project K and V on tensor cores, quantize, pack and scatter; in the
// same pass copy the rows exactly into the window pages (docs/format.md, 1 and 2). Here: what both kernels take,
// where a row goes, and how its elements become operands.
//
// x is split into two bf16 terms and so is the encode matrix, and three of the four products are kept, which leaves
// about 16 bits of the latents: codes equal those of exact arithmetic but for values on a rounding boundary. Values
// (and unrotated keys) of bf16 models are one term already. The mean is subtracted after the projection.
//
// A lane of the A operand holds whole chunks (primitives.cuh): chunk 4 c + t of rows g and g + 8 is lane 4 g + t's
// part of k-steps 2 c and 2 c + 1. The encode image is made in this order, so that rows go from global memory to
// operand registers in sectors of 32 bytes, and rotated pairs meet in one lane.
#pragma once

#include "plan_table.cuh"
#include "primitives.cuh"

namespace kqsvd {

struct StoreSide {
  const void* x;  // [N, H, d]
  int64_t token_stride, head_stride;
  const uint4* encode;        // [H][groups][steps][2 (high, low)][32 lanes]: B fragments of two n-tiles
  const uint4* operand;       // [H][2][steps / 4][R][8]: the same for wgmma (store_project.cuh); null beyond 8 steps
  const float* weight;        // [H][R][2]: scale and guard weight
  const float* latent_mean;   // [H][2 (ordinary, sink)][period][R]
  const float* class_vector;  // [H][period][d]: 2 (sink - 0.3 mean)
  const float* class_offset;  // [H][period]: |sink|^2 - 0.3 |mean|^2
  const int* plan;
  int plan_ints, groups, period;
  bool rotate;
};

struct StoreParams {
  StoreSide side[2];
  RopeTurn rope;
  uint8_t* pages;
  int64_t page_stride;  // bytes
  void* window;
  int64_t window_stride[3];  // block, head, token; elements
  const int64_t *slots, *window_slots, *positions;
  int num_tokens, dim, block_size, tiles_per_block, tile_bytes, window_block_size, key_ctas;
  int block_shift, window_shift;  // log2 of the block sizes, -1 where they are no powers of two
};

// k-steps of an encode image, padded to what the kernels are compiled for.
__host__ __device__ constexpr int store_steps(int dim) { return dim <= 64 ? 4 : dim <= 128 ? 8 : 16; }

struct StoreRow {
  int64_t page, window;  // byte offset of the token's tile, element offset of its exact row; -1: none
  int token, offset, block;
};

__device__ __forceinline__ uint32_t block_of(uint32_t slot, int size, int shift) {
  return shift >= 0 ? slot >> shift : slot / static_cast<uint32_t>(size);
}

// What the step says of a row; slots below 0 are not written. Low words of the step's 64-bit integers are enough: the
// caches have less than 2^31 slots.
struct StoreSlots {
  int slot, window, position;
};

__device__ __forceinline__ int low_word(const int64_t* from, int n) {
  return __ldcg(reinterpret_cast<const int*>(from) + 2 * n);  // past L1, which may hold what was there before the wait
}

__device__ __forceinline__ StoreSlots load_slots(const StoreParams& p, int n) {
  if (n >= p.num_tokens) return {-1, -1, 0};
  const int window = p.window_slots != nullptr ? low_word(p.window_slots, n) : -1;
  return {low_word(p.slots, n), window, low_word(p.positions, n)};
}

__device__ __forceinline__ StoreRow place_row(const StoreParams& p, const StoreSide& side, int head,
                                              const StoreSlots& from, bool is_value) {
  StoreRow row{-1, -1, 0, 0, 0};
  if (from.slot >= 0) {
    const uint32_t at = from.slot, block = block_of(at, p.block_size, p.block_shift);
    const uint32_t rest = at - block * p.block_size;
    row.page = int64_t(block) * p.page_stride + int64_t(head * p.tiles_per_block + rest / kTile) * p.tile_bytes;
    row.token = rest % kTile;
    row.offset = from.position & (side.period - 1);
    if (side.rotate) {
      const int b = from.position >> p.rope.block_shift;
      if (b < 0 || b >= kTurnRows * kTurnRows) __trap();  // outside every table: better dead than wrong
      row.block = b;
    }
  }
  if (from.window >= 0) {
    const uint32_t at = from.window, block = block_of(at, p.window_block_size, p.window_shift);
    row.window = block * p.window_stride[0] + head * p.window_stride[1] +
                 (at - block * p.window_block_size) * p.window_stride[2] + (is_value ? p.dim : 0);
  }
  return row;
}

// One chunk of a row: its 8 elements in the coding frame, as two bf16 terms (`low` is left alone where one is enough).
// Word i belongs to step i / 2 of the chunk's two, register 2 (i % 2) + row.
template <typename T, bool kSplit>
__device__ __forceinline__ void split_chunk(uint2 a, uint2 b, bool rotate, bool interleaved, const float4 (&turn)[2],
                                            const float4& wa, const float4& wb, float& norm, float& dot,
                                            uint32_t (&high)[4], uint32_t (&low)[4]) {
  const float2 x0 = unpack2(a.x, T()), x1 = unpack2(a.y, T()), x2 = unpack2(b.x, T()), x3 = unpack2(b.y, T());
  float v[8] = {x0.x, x0.y, x1.x, x1.y, x2.x, x2.y, x3.x, x3.y};
  if (rotate) apply_turn(v, turn, interleaved, -1.f);
#pragma unroll
  for (int i = 0; i < 8; ++i) norm += v[i] * v[i];
  const float w[8] = {wa.x, wa.y, wa.z, wa.w, wb.x, wb.y, wb.z, wb.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) dot += v[i] * w[i];
  if constexpr (kSplit) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      high[i] = pack2(v[2 * i], v[2 * i + 1], __nv_bfloat16());
      const float2 back = unpack2(high[i], __nv_bfloat16());
      low[i] = pack2(v[2 * i] - back.x, v[2 * i + 1] - back.y, __nv_bfloat16());
    }
  } else {
    high[0] = a.x, high[1] = a.y, high[2] = b.x, high[3] = b.y;
  }
}

// Codes of a group that lane 4 g + t holds for token g: channels 2t, 2t + 8, 2t + 1, 2t + 9 in bytes 0..3, from the
// group's two accumulator tiles.
__device__ __forceinline__ uint32_t quantize_word(const float* first, const float* second, int y, float inverse,
                                                  int width) {
  const float latent[4] = {first[2 * y], second[2 * y], first[2 * y + 1], second[2 * y + 1]};
  const float range = __uint_as_float((127 + width) << 23), unit = inverse * __uint_as_float((127 - width) << 23);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = __saturatef(__fmaf_rn(latent[i], unit, 0.5f));
    // Just below `range`, so that 1 falls into the last code; adding 2^23 and rounding down leaves the floor.
    word |= (__float_as_uint(__fmaf_rd(x, range * 0.99999994f, 8388608.f)) & 255u) << (8 * i);
  }
  return word;
}

// Writes columns 2t and 2t + 1 of one token of a plane, of which the first is at `at`.
__device__ __forceinline__ void write_pair(uint8_t* at, bool is_value, bool half, uint32_t bytes) {
  if (half) {
    at[0] = bytes, at[is_value ? 4 : 2] = bytes >> 16;
  } else if (is_value) {
    *reinterpret_cast<uint16_t*>(at) = bytes, *reinterpret_cast<uint16_t*>(at + 4) = bytes >> 16;
  } else {
    *reinterpret_cast<uint32_t*>(at) = bytes;
  }
}
__device__ __forceinline__ void write_columns(uint8_t* plane, bool is_value, bool half, int token, int t,
                                              uint32_t bytes) {
  write_pair(plane + column_offset(is_value, half, token, 2 * t), is_value, half, bytes);
}

}  // namespace kqsvd
