// SPDX-License-Identifier: Apache-2.0
// Attention over the exact positions [last, length) of one request: at most W + 15 + query rows tokens, 16 a warp at a
// time, straight from global memory. Head dimensions are permuted freely inside a lane's 16-byte loads.
#pragma once

#include "decode_merge.cuh"

namespace kqsvd::decode {

// Dimension of row g + 8 y of the window's i-th accumulator: a lane's 16-byte load of values, transposed 8 x 8, is an operand.
__device__ __forceinline__ int output_dim(int i, int y, int g) {
  return 32 * (i >> 1) + 8 * (g >> 1) + 4 * (i & 1) + 2 * y + (g & 1);
}

// Keys or values of 16 exact positions: lane (g, t) has elements 8 t, ... of every 32 of rows g, g + 8.
template <class Cf>
struct WindowRows {
  static constexpr int Q = Cf::D / 32;  // 16-byte vectors of a lane per row
  uint4 row[2][Q];

  // Positions `offset`, ... of a window block. Chunks start at multiples of 16, so that one block has all of a chunk.
  // Behind the `left`-th further one there may be anything: that one is read again. Strides fit 31 bits
  // (decode_bindings.cu). `from`: where in a row.
  __device__ __forceinline__ void load(const DecodeParams& p, int block, int head, int offset, int left, int from,
                                       int lane) {
    const int stride = static_cast<int>(p.window_token_stride), first = from + 8 * (lane & 3);
    const uint16_t* page = static_cast<const uint16_t*>(p.window_pages) +
                           static_cast<int64_t>(block) * static_cast<int>(p.window_block_stride) +
                           head * static_cast<int>(p.window_head_stride);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint16_t* at = page + (offset + min((lane >> 2) + 8 * i, left)) * stride + first;
#pragma unroll
      for (int k = 0; k < Q; ++k) row[i][k] = *reinterpret_cast<const uint4*>(at + 32 * k);
    }
  }
  __device__ __forceinline__ void load_keys(const DecodeParams& p, int block, int head, int offset, int left,
                                            int lane) {
    load(p, block, head, offset, left, 0, lane);
  }
  __device__ __forceinline__ void load_values(const DecodeParams& p, int block, int head, int offset, int left,
                                              int lane) {
    load(p, block, head, offset, left, Cf::D, lane);
  }
};

// Where lane (g, t) finds its part of the query, the operand of column g; null where that column has no query row.
template <class Cf>
__device__ __forceinline__ const uint16_t* query_of_lane(const DecodeParams& p, int first_row, int num_rows, int head,
                                                         int column0, int lane) {
  const int g = lane >> 2, column = column0 + g, row = column / p.heads_per_kv;
  if (g >= Cf::C || row >= num_rows) return nullptr;
  return static_cast<const uint16_t*>(p.query) + (first_row + row) * p.query_token_stride +
         (head * p.heads_per_kv + column % p.heads_per_kv) * p.query_head_stride + 8 * (lane & 3);
}

__device__ __forceinline__ void mma_exact(bool is_bf16, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  if (is_bf16)
    mma_bf16(c, a0, a1, a2, a3, b0, b1);
  else
    mma_f16(c, a0, a1, a2, a3, b0, b1);
}

// What a warp has of exact positions so far: o, maxima and sums of columns 2t, 2t + 1. A chunk of 16 goes through
// `scores`, `probabilities` and `add` in turn: each needs registers that the others do not, and loads may lie between.
// IsBf16: bool, or std::bool_constant for code of its own for each dtype.
template <class Cf, class IsBf16>
struct WindowSums {
  static constexpr int Q = Cf::D / 32;
  float (&o)[2 * Q][4];
  Sums& s;
  const IsBf16 is_bf16;

  __device__ __forceinline__ WindowSums(float (&o)[2 * Q][4], Sums& s, IsBf16 is_bf16) : o(o), s(s), is_bf16(is_bf16) {
#pragma unroll
    for (int i = 0; i < 2 * Q; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    s = Sums{{kEmptyMax, kEmptyMax}, {0.f, 0.f}, {0.f, 0.f}, {0.f, 0.f}};
  }

  // query(k): vector k of the lane's query.
  template <class Query>
  __device__ __forceinline__ void scores(float (&score)[4], const WindowRows<Cf>& keys, Query&& query) {
    score[0] = score[1] = score[2] = score[3] = 0.f;
#pragma unroll
    for (int k = 0; k < Q; ++k) {
      const uint4 a = keys.row[0][k], b = keys.row[1][k], q = query(k);
      mma_exact(is_bf16, score, a.x, b.x, a.y, b.y, q.x, q.y);
      mma_exact(is_bf16, score, a.z, b.z, a.w, b.w, q.z, q.w);
    }
  }

  // Turns a chunk's scores into probabilities; everything before is scaled to the same maximum. `left`: positions of
  // the request behind the chunk's first one; `recent`: from its first query row on.
  __device__ __forceinline__ void probabilities(float (&x)[4], const DecodeParams& p, int left, int recent, int column0,
                                                int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= p.scale_log2;
    if (p.soft_cap_log2 > 0.f)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = p.soft_cap_log2 * tanhf(x[e] / p.soft_cap_log2);
    // All query rows see all of a chunk before the first of them, unless a sliding window begins in it.
    if (left < recent + 14 || (p.sliding_window > 0 && left >= p.sliding_window)) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {  // positions counted from the last one backwards
        const int pos = left - g - 8 * (e >> 1), at = recent - 1 - (column0 + 2 * t + (e & 1)) / p.heads_per_kv;
        const bool visible = pos >= max(at, 0) && (p.sliding_window <= 0 || pos < at + p.sliding_window);
        if (!visible) x[e] = -1e30f;
      }
    }
    float scale[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float top = fmaxf(s.max[c], fmaxf(x[c], x[2 + c]));
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
      scale[c] = exp2_fast(s.max[c] - top);
      s.max[c] = top;
      x[c] = exp2_fast(x[c] - top);
      x[2 + c] = exp2_fast(x[2 + c] - top);
      s.p[c] = s.p[c] * scale[c] + x[c] + x[2 + c];
    }
#pragma unroll
    for (int i = 0; i < 2 * Q; ++i) o[i][0] *= scale[0], o[i][1] *= scale[1], o[i][2] *= scale[0], o[i][3] *= scale[1];
  }

  __device__ __forceinline__ void add(const float (&prob)[4], const WindowRows<Cf>& values) {
    // Probabilities as the sum of two 16-bit numbers: the exact part keeps float accuracy.
    uint32_t high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = prob[2 * i], y = prob[2 * i + 1];
      if (is_bf16) {
        high[i] = pack_bf16(x, y);
        low[i] = pack_bf16(x - __uint_as_float(high[i] << 16), y - __uint_as_float(high[i] & 0xffff0000u));
      } else {
        high[i] = pack_f16(x, y);
        const float2 h = __half22float2(as_half2(high[i]));
        low[i] = pack_f16(x - h.x, y - h.y);
      }
      high[i] = transpose8x8(high[i]);
      low[i] = transpose8x8(low[i]);
    }
#pragma unroll
    for (int k = 0; k < Q; ++k) {
      const uint4 v = values.row[0][k], w = values.row[1][k];
      const uint32_t a[2][4] = {{transpose8x8(v.x), transpose8x8(v.y), transpose8x8(w.x), transpose8x8(w.y)},
                                {transpose8x8(v.z), transpose8x8(v.w), transpose8x8(w.z), transpose8x8(w.w)}};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        mma_exact(is_bf16, o[2 * k + h], a[h][0], a[h][1], a[h][2], a[h][3], high[0], high[1]);
        mma_exact(is_bf16, o[2 * k + h], a[h][0], a[h][1], a[h][2], a[h][3], low[0], low[1]);
      }
    }
  }
};

}  // namespace kqsvd::decode
