// SPDX-License-Identifier: Apache-2.0
// Building blocks shared by the store and dequantize kernels: 16-bit conversions, chunks of rows, the turn by a rope
// block's start and the scale byte.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "instructions.cuh"

namespace kqsvd {

constexpr int kTile = 16;   // tokens per page tile
constexpr int kGroup = 16;  // latent channels per group

__device__ __forceinline__ float2 unpack2(uint32_t bits, __nv_bfloat16) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}
__device__ __forceinline__ float2 unpack2(uint32_t bits, __half) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
__device__ __forceinline__ uint32_t pack2(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack2(float x, float y, __half) {
  const __half2 v = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Rotations by block starts. cos and sin of block b are the product of a coarse and a fine table row,
// b = 1024 * coarse + fine, so that 2 x 1024 rows serve every position.
constexpr int kFineBits = 10;
constexpr int kTurnRows = 1 << kFineBits;

struct RopeTurn {
  const float4* table;  // [2 (fine, coarse)][1024][rotary_dim / 2] (cos, sin), read as pairs
  int rotary_dim;       // a multiple of 8; 0: no rotation
  int block_shift;      // log2 of the rope block
  bool interleaved;     // pairs (2i, 2i + 1); otherwise (i, i + rotary_dim / 2)
};

// A chunk is 8 elements of a row that one lane owns: 4 at `a` and 4 at `b`, so that rotated pairs stay together.
struct Chunk {
  int a, b;
  bool turned;
};

__device__ __forceinline__ Chunk chunk_of(int index, const RopeTurn& rope) {
  const bool turned = 8 * index < rope.rotary_dim;
  if (turned && !rope.interleaved) return {4 * index, 4 * index + rope.rotary_dim / 2, true};
  return {8 * index, 8 * index + 4, turned};
}

__device__ __forceinline__ void turn_pair(float& re, float& im, float cosine, float sine) {
  const float u = re * cosine - im * sine;
  im = im * cosine + re * sine;
  re = u;
}

// Rows of a block's fine and coarse turns, from the first chunk of lane t of a quad; chunk 4 c + t is 8 c further.
struct TurnRows {
  const float4 *fine, *coarse;
  bool far;  // beyond the first coarse row, which is the identity
};

__device__ __forceinline__ TurnRows turn_rows(int block, int t, const RopeTurn& rope) {
  const int row4 = rope.rotary_dim / 4;  // float4 per table row; 4 pairs of a chunk are adjacent
  return {rope.table + (block & (kTurnRows - 1)) * row4 + 2 * t,
          rope.table + (kTurnRows + (block >> kFineBits)) * row4 + 2 * t, block >> kFineBits != 0};
}

// (cos, sin) of the 4 pairs of a chunk; load_near_turn: of blocks in the first coarse row.
__device__ __forceinline__ void load_near_turn(float4 (&turn)[2], const TurnRows& rows, int at) {
#pragma unroll
  for (int i = 0; i < 2; ++i) turn[i] = __ldg(rows.fine + at + i);
}
__device__ __forceinline__ void load_turn(float4 (&turn)[2], const TurnRows& rows, int at) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float4 f = __ldg(rows.fine + at + i);
    if (rows.far) {
      const float4 c = __ldg(rows.coarse + at + i);
      f = make_float4(f.x * c.x - f.y * c.y, f.x * c.y + f.y * c.x, f.z * c.z - f.w * c.w, f.z * c.w + f.w * c.z);
    }
    turn[i] = f;
  }
}

// Turns the 8 elements of a chunk; sign -1 turns back.
__device__ __forceinline__ void apply_turn(float (&x)[8], const float4 (&turn)[2], bool interleaved, float sign) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float cos0 = turn[i].x, sin0 = sign * turn[i].y, cos1 = turn[i].z, sin1 = sign * turn[i].w;
    if (interleaved) {
      turn_pair(x[4 * i], x[4 * i + 1], cos0, sin0);
      turn_pair(x[4 * i + 2], x[4 * i + 3], cos1, sin1);
    } else {
      turn_pair(x[2 * i], x[2 * i + 4], cos0, sin0);
      turn_pair(x[2 * i + 1], x[2 * i + 5], cos1, sin1);
    }
  }
}

// Four operand registers that lie side by side in shared memory.
__device__ __forceinline__ void load_operand(uint32_t (&a)[4], const uint32_t (&from)[4]) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
}

// Scale byte: bit 7 the class, bits 0-6 a minifloat with 4 exponent and 3 mantissa bits (docs/format.md, 2).
constexpr uint32_t kScaleBias = (127 - 8) << 23;

__device__ __forceinline__ uint32_t encode_scale(float scale) {
  const float s = fminf(fmaxf(scale, 0.00390625f), 240.0f);
  const int code = (__float_as_int(s) - static_cast<int>(kScaleBias) + (1 << 19)) >> 20;
  return min(max(code, 0), 127);
}
__device__ __forceinline__ float decode_scale(uint32_t byte) {
  return __uint_as_float(((byte & 127u) << 20) + kScaleBias);
}

}  // namespace kqsvd
