// SPDX-License-Identifier: Apache-2.0
// Partial results: warps of a warpgroup joined into one, and the pieces of a request into another.
// A *record* is [kOutRows + 4][C] float: rows of the accumulator, then sum p, sum p s, sum p over sinks, maximum.
#pragma once

#include "decode_config.cuh"
#include "decode_schedule.cuh"
#include "mma.cuh"

namespace kqsvd::decode {

constexpr float kEmptyMax = -1e28f;  // maximum of no scores; masked scores are lower

// Results of one warp: columns 2t, 2t + 1 in lane (g, t).
struct Sums {
  float max[2], p[2], ps[2], sink[2];
};

// Merges four warps, in a fixed order, into two halves of a record: record[i] + record[kRecord + i]. Statistics rows are
// complete in the first half and 0 in the second. Fold: columns c and c + 4 belong together (two rope blocks).
// row(tile, half): record row of a lane's accumulator. Ends with a barrier.
template <class Cf, int Tiles, bool Fold, class Row>
__device__ __forceinline__ void merge_warps(float* record, float* exchange, float (&o)[Tiles][4], Sums s, Row row,
                                            int warp, int warpgroup, int lane) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int c = 0; c < 2; ++c)
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) {
      s.p[c] += __shfl_xor_sync(~0u, s.p[c], d);
      s.sink[c] += __shfl_xor_sync(~0u, s.sink[c], d);
    }
  if (g == 0) *reinterpret_cast<float2*>(exchange + warp * 8 + 2 * t) = make_float2(s.max[0], s.max[1]);
  warpgroup_barrier(warpgroup);  // also: the scratch is free
  float all[2], f[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    all[c] = kEmptyMax;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      all[c] = fmaxf(all[c], exchange[w * 8 + 2 * t + c]);
      if (Fold) all[c] = fmaxf(all[c], exchange[w * 8 + ((2 * t) ^ 4) + c]);
    }
    f[c] = exp2_fast(s.max[c] - all[c]);
    s.p[c] *= f[c], s.ps[c] *= f[c], s.sink[c] *= f[c];
    if (Fold) {
      s.p[c] += __shfl_xor_sync(~0u, s.p[c], 2);
      s.ps[c] += __shfl_xor_sync(~0u, s.ps[c], 2);
      s.sink[c] += __shfl_xor_sync(~0u, s.sink[c], 2);
    }
  }
#pragma unroll
  for (int i = 0; i < Tiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      o[i][e] *= f[e & 1];
      if (Fold) o[i][e] += __shfl_xor_sync(~0u, o[i][e], 2);
    }
  float* half = record + (warp & 1) * Cf::kRecord + 2 * t;
  float* stat = exchange + 32 + warp * 24 + 2 * t;  // [p, ps, sink][8]
  if (g == 0) {
    *reinterpret_cast<float2*>(stat) = make_float2(s.p[0], s.p[1]);
    *reinterpret_cast<float2*>(stat + 8) = make_float2(s.ps[0], s.ps[1]);
    *reinterpret_cast<float2*>(stat + 16) = make_float2(s.sink[0], s.sink[1]);
  }
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    if (warp >> 1 == round && 2 * t < Cf::C) {
#pragma unroll
      for (int i = 0; i < Tiles; ++i)
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          float2* at = reinterpret_cast<float2*>(half + row(i, y) * Cf::C);
          float2 sum = make_float2(o[i][2 * y], o[i][2 * y + 1]);
          if (round == 1) {
            const float2 old = *at;
            sum.x += old.x, sum.y += old.y;
          }
          *at = sum;
        }
    }
    if (round == 1 && warp == 0 && lane < 4 * Cf::C) {  // p, ps, sink, maximum of column lane % C
      const int r = lane / Cf::C, c = lane % Cf::C;
      float sum = 0.f;
      if (r < 3) {
#pragma unroll
        for (int w = 0; w < 4; ++w) sum += exchange[32 + w * 24 + r * 8 + c];
      } else {
        sum = kEmptyMax;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          sum = fmaxf(sum, exchange[w * 8 + c]);
          if (Fold) sum = fmaxf(sum, exchange[w * 8 + (c ^ 4)]);
        }
      }
      record[(Cf::kOutRows + r) * Cf::C + c] = sum;
      record[Cf::kRecord + (Cf::kOutRows + r) * Cf::C + c] = 0.f;
    }
    warpgroup_barrier(warpgroup);
  }
}

// The two halves that merge_warps left, as one in global memory. No barrier.
template <class Cf>
__device__ __forceinline__ void write_record(float* target, const float* halves, int thread) {
  const float4* half = reinterpret_cast<const float4*>(halves);
  for (int i = thread; i < Cf::kRecord / 4; i += 128) {
    const float4 a = half[i], b = half[i + Cf::kRecord / 4];
    __stcg(reinterpret_cast<float4*>(target) + i, make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w));
  }
}

// Where the result of a piece goes: at most two requests of a head are cut by a warpgroup's range, one at each end.
template <class Cf>
__device__ __forceinline__ int piece_slot(const Cut& cut, int max_phases, int cta, int part, int head, int begin,
                                          int unit_begin) {
  return ((cta * Cf::kWarpgroups + part) * max_phases + head - cut.first_head(cta)) * 2 + (begin > unit_begin ? 0 : 1);
}

constexpr int kMaxPieces = 512;  // of a request: the warpgroups of a grid are fewer

// Lists the pieces of a request that several warpgroups share, in the order of its positions; returns how many,
// or 0 where one warpgroup has all of it. One warp.
template <class Cf>
__device__ __forceinline__ int list_pieces(uint16_t* list, const Cut& cut, int max_phases, int head, int unit_begin,
                                           int unit_end, int lane) {
  constexpr int parts = Cf::kWarpgroups;
  int c0, c1, step, n = 0;
  cut.ctas_of(head, c0, c1, step);
#pragma unroll 1
  for (int i = lane; i - lane < ((c1 - c0) / step + 1) * parts; i += 32) {
    const int cta = c0 + i / parts * step, part = i % parts;
    int begin = 0, end = 0;
    if (cta <= c1) cut.part_range<parts>(cta, part, head, begin, end);
    const bool hit = max(begin, unit_begin) < min(end, unit_end);
    const bool whole = hit && begin <= unit_begin && unit_end <= end;
    const unsigned hits = __ballot_sync(~0u, hit);
    if (__any_sync(~0u, whole)) return 0;
    if (hit)
      list[n + __popc(hits & ((1u << lane) - 1u))] =
          static_cast<uint16_t>(piece_slot<Cf>(cut, max_phases, cta, part, head, begin, unit_begin));
    n += __popc(hits);
  }
  return n;
}

// Sums records of one request into `sum` in shared memory: record(i) is in global memory, i < n. A warpgroup is a part; it
// takes every Parts-th record, a thread a row of it, with the rows of kAhead records on their way at once. `parts`: shared,
// [Parts][kRecord], where Parts > 1; `weights`: shared, 64 * Parts floats of every warp. All threads of the block; ends with
// a barrier.
template <class Cf, int Parts, class Record>
__device__ __forceinline__ void merge_records(float* sum, float* parts, float* weights, Record record, int n, int thread) {
  constexpr int C = Cf::C, kAhead = 64 / C, kChunk = Parts * kAhead, kMax = (Cf::kOutRows + 3) * C;
  static_assert(kChunk <= 64);
  const int part = Parts == 1 ? 0 : thread >> 7, at = thread & 127, lane = thread & 31;
  const int row = min(at, Cf::kOutRows - 1), stat = Cf::kOutRows * C + at;
  const bool has_stat = at < 3 * C;
  weights += (thread >> 5) * (kChunk * C);
  float top[C], acc[C] = {}, stats = 0.f;
#pragma unroll
  for (int c = 0; c < C; ++c) top[c] = kEmptyMax;
#pragma unroll 1
  for (int start = 0; start < n; start += kChunk) {
    const int count = min(n - start, kChunk);
    float x[kAhead][C], y[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool there = part + Parts * j < count;
      const float* from = record(start + (there ? part + Parts * j : 0));
#pragma unroll
      for (int c = 0; c < C; c += 4) {
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (there) v = __ldcg(reinterpret_cast<const float4*>(from + row * C + c));
        *reinterpret_cast<float4*>(x[j] + c) = v;
      }
      y[j] = there && has_stat ? __ldcg(from + stat) : 0.f;
    }
    // Every warp finds the maxima and the weights of the chunk for itself.
    constexpr int kPerLane = kChunk > 32 ? 2 : 1;
    float m[kPerLane][C];
#pragma unroll
    for (int h = 0; h < kPerLane; ++h)
#pragma unroll
      for (int c = 0; c < C; c += 4) {
        float4 v = make_float4(kEmptyMax, kEmptyMax, kEmptyMax, kEmptyMax);
        if (lane + 32 * h < count) v = __ldcg(reinterpret_cast<const float4*>(record(start + lane + 32 * h) + kMax + c));
        *reinterpret_cast<float4*>(m[h] + c) = v;
      }
    __syncwarp();  // the weights before are used up
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float high = fmaxf(top[c], fmaxf(m[0][c], m[kPerLane - 1][c]));
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
      const float keep = exp2_fast(top[c] - high);
      top[c] = high;
      acc[c] *= keep;
      if (at % C == c) stats *= keep;
#pragma unroll
      for (int h = 0; h < kPerLane; ++h)
        if (lane + 32 * h < kChunk) weights[(lane + 32 * h) * C + c] = exp2_fast(m[h][c] - high);
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (part + Parts * j >= count) break;
      const float* w = weights + (part + Parts * j) * C;
#pragma unroll
      for (int c = 0; c < C; ++c) acc[c] += w[c] * x[j][c];
      stats += w[at % C] * y[j];
    }
  }
  float* mine = Parts == 1 ? sum : parts + part * Cf::kRecord;
  if (at < Cf::kOutRows) {
#pragma unroll
    for (int c = 0; c < C; ++c) mine[at * C + c] = acc[c];
  }
  if (has_stat) mine[stat] = stats;
  if (thread == 0) {
#pragma unroll
    for (int c = 0; c < C; ++c) sum[kMax + c] = top[c];
  }
  __syncthreads();
  if constexpr (Parts > 1) {
    for (int i = thread; i < kMax; i += 128 * Parts) {
      float x = 0.f;
#pragma unroll
      for (int k = 0; k < Parts; ++k) x += parts[k * Cf::kRecord + i];
      sum[i] = x;
    }
    __syncthreads();
  }
}

}  // namespace kqsvd::decode
