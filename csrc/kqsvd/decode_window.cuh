// SPDX-License-Identifier: Apache-2.0
// Attention over the exact positions [last, length) of one request: at most W + 15 + query rows tokens, 16 a warp at a
// time, straight from global memory. Head dimensions are permuted freely inside a lane's 16-byte loads.
#pragma once

#include "decode_merge.cuh"

namespace kqsvd::decode {

// Dimension of row g + 8 y of the i-th 16-row tile of the output: such that a lane's 16-byte load of values, transposed 8 x 8,
// is an operand. Rows of the value basis are in the same order (cuda_decode_constants.py: output_order).
__device__ __forceinline__ int output_dim(int i, int y, int g) {
  return 32 * (i >> 1) + 8 * (g >> 1) + 4 * (i & 1) + 2 * y + (g & 1);
}

// K and V of 16 exact positions: lane (g, t) has elements 8 t, ... of every 32 of rows g, g + 8.
template <class Cf>
struct WindowChunk {
  static constexpr int Q = Cf::D / 32;  // 16-byte vectors of a lane per row
  uint4 key[2][Q], value[2][Q];

  // Positions `offset`, ... of a window block. Chunks start at multiples of 16, so that one block has all of a chunk. Behind
  // the `left`-th further one there may be anything: that one is read again.
  __device__ __forceinline__ WindowChunk(const DecodeParams& p, int block, int head, int offset, int left, int lane) {
    const uint16_t* page = static_cast<const uint16_t*>(p.window_pages) + block * p.window_block_stride +
                           head * p.window_head_stride + 8 * (lane & 3);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint16_t* at = page + (offset + min((lane >> 2) + 8 * i, left)) * p.window_token_stride;
#pragma unroll
      for (int k = 0; k < Q; ++k) {
        key[i][k] = *reinterpret_cast<const uint4*>(at + 32 * k);
        value[i][k] = *reinterpret_cast<const uint4*>(at + Cf::D + 32 * k);
      }
    }
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

// Adds a chunk to the results of a warp: o, maxima and sums of columns 2t, 2t + 1, whose queries are at `position`.
// query(k): vector k of the lane's query.
template <class Cf, class Query>
__device__ __forceinline__ void attend_chunk(float (&o)[Cf::D / 16][4], Sums& s, const WindowChunk<Cf>& chunk,
                                             Query&& query, const DecodeParams& p, int start, int length,
                                             const int (&position)[2], int lane) {
  constexpr int Q = Cf::D / 32;
  const int g = lane >> 2;
  float score[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int k = 0; k < Q; ++k) {
    const uint4 a = chunk.key[0][k], b = chunk.key[1][k], q = query(k);
    if (p.is_bf16) {
      mma_bf16(score, a.x, b.x, a.y, b.y, q.x, q.y);
      mma_bf16(score, a.z, b.z, a.w, b.w, q.z, q.w);
    } else {
      mma_f16(score, a.x, b.x, a.y, b.y, q.x, q.y);
      mma_f16(score, a.z, b.z, a.w, b.w, q.z, q.w);
    }
  }
  float prob[4], scale[2];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float x = score[e] * p.scale_log2;
    if (p.soft_cap_log2 > 0.f) x = p.soft_cap_log2 * tanhf(x / p.soft_cap_log2);
    const int pos = start + g + 8 * (e >> 1), at = position[e & 1];
    const bool visible = pos < length && pos <= at && (p.sliding_window <= 0 || pos > at - p.sliding_window);
    score[e] = visible ? x : -1e30f;
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    float top = fmaxf(s.max[c], fmaxf(score[c], score[2 + c]));
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    scale[c] = exp2_fast(s.max[c] - top);
    s.max[c] = top;
    prob[c] = exp2_fast(score[c] - top);
    prob[2 + c] = exp2_fast(score[2 + c] - top);
    s.p[c] = s.p[c] * scale[c] + prob[c] + prob[2 + c];
  }
#pragma unroll
  for (int i = 0; i < 2 * Q; ++i) o[i][0] *= scale[0], o[i][1] *= scale[1], o[i][2] *= scale[0], o[i][3] *= scale[1];

  // Probabilities as the sum of two 16-bit numbers: the exact part keeps float accuracy.
  uint32_t high[2], low[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float x = prob[2 * i], y = prob[2 * i + 1];
    if (p.is_bf16) {
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
    const uint32_t v0[4] = {chunk.value[0][k].x, chunk.value[0][k].y, chunk.value[0][k].z, chunk.value[0][k].w};
    const uint32_t v1[4] = {chunk.value[1][k].x, chunk.value[1][k].y, chunk.value[1][k].z, chunk.value[1][k].w};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t a0 = transpose8x8(v0[2 * h]), a1 = transpose8x8(v0[2 * h + 1]);
      const uint32_t a2 = transpose8x8(v1[2 * h]), a3 = transpose8x8(v1[2 * h + 1]);
      if (p.is_bf16) {
        mma_bf16(o[2 * k + h], a0, a1, a2, a3, high[0], high[1]);
        mma_bf16(o[2 * k + h], a0, a1, a2, a3, low[0], low[1]);
      } else {
        mma_f16(o[2 * k + h], a0, a1, a2, a3, high[0], high[1]);
        mma_f16(o[2 * k + h], a0, a1, a2, a3, low[0], low[1]);
      }
    }
  }
}

// Leaves the two halves of the record of (request, virtual head) in `record`; its rows are those of the output's tiles
// (output_dim). 128 threads; ends with a barrier.
template <class Cf>
__device__ __forceinline__ void attend_window(float* record, float* exchange, const DecodeParams& p, const Request& r,
                                              int request, int head, int column0, int warp, int lane) {
  constexpr int warpgroup = 0, Q = Cf::D / 32;
  const int g = lane >> 2, t = lane & 3;
  const uint16_t* query = query_of_lane<Cf>(p, r.row, r.num_rows, head, column0, lane);
  uint4 q[Q];
#pragma unroll
  for (int k = 0; k < Q; ++k)
    q[k] = query ? *reinterpret_cast<const uint4*>(query + 32 * k) : make_uint4(0, 0, 0, 0);
  const int position[2] = {r.p0 + (column0 + 2 * t) / p.heads_per_kv, r.p0 + (column0 + 2 * t + 1) / p.heads_per_kv};

  float o[2 * Q][4];
#pragma unroll
  for (int i = 0; i < 2 * Q; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
  Sums s{{kEmptyMax, kEmptyMax}, {0.f, 0.f}, {0.f, 0.f}, {0.f, 0.f}};
#pragma unroll 1
  for (int start = r.last + 16 * warp; start < r.length; start += 64) {
    const unsigned size = p.window_block_size, at = start;
    const int block = p.window_table[request * p.window_table_stride + at / size];
    const WindowChunk<Cf> chunk(p, block, head, at % size, r.length - 1 - start, lane);
    attend_chunk<Cf>(o, s, chunk, [&](int k) { return q[k]; }, p, start, r.length, position, lane);
  }
  auto row = [&](int i, int y) { return 16 * i + 8 * y + g; };
  merge_warps<Cf, 2 * Q, false>(record, exchange, o, s, row, warp, warpgroup, lane);
}

}  // namespace kqsvd::decode
