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

  // Adds up what the lanes g of a column have; the maximum and sum p s are the same in all of them.
  __device__ __forceinline__ void add_rows() { add_up(p), add_up(sink); }
  static __device__ __forceinline__ void add_up(float (&x)[2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) x[c] += __shfl_xor_sync(~0u, x[c], d);
  }
};

// Merges four warps, in a fixed order, into two halves of a record: record[i] + record[kRecord + i]. Statistics rows are
// complete in the first half and 0 in the second. Fold: columns c and c + 4 belong together (two rope blocks).
// row(tile, half): record row of a lane's accumulator. Ends with a barrier.
template <class Cf, int Tiles, bool Fold, class Row>
__device__ __forceinline__ void merge_warps(float* record, float* exchange, float (&o)[Tiles][4], Sums s, Row row,
                                            int warp, int warpgroup, int lane) {
  const int g = lane >> 2, t = lane & 3;
  s.add_rows();
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

// The end of a warpgroup's range: its four warps' results as one record in global or shared memory. No more pages will
// come, so the warps' rings serve as room: merge_warps has to do with a record's. `rings`: of the first warp, `stride`
// bytes apart.
template <class Cf, bool Fold, int Tiles>
__device__ __forceinline__ void write_last_record(float* target, uint8_t* rings, int stride, float* exchange,
                                                  const float (&o)[Tiles][4], Sums s, int thread, int warpgroup) {
  constexpr int C = Cf::C, kMax = (Cf::kOutRows + 3) * 8;  // rows of 8 columns, then the maxima
  static_assert((Cf::kOutRows + 4) * 32 <= Cf::kStages * Cf::kSlotBytes);
  const int warp = thread >> 5, lane = thread & 31, g = lane >> 2, t = lane & 3;
  float* mine = reinterpret_cast<float*>(rings + warp * stride) + 2 * t;
#pragma unroll
  for (int i = 0; i < Tiles; ++i)
#pragma unroll
    for (int y = 0; y < 2; ++y)
      *reinterpret_cast<float2*>(mine + (16 * i + 8 * y + g) * 8) = make_float2(o[i][2 * y], o[i][2 * y + 1]);
  s.add_rows();
  if (g == 0) {
    float* stat = mine + Cf::kOutRows * 8;
    *reinterpret_cast<float2*>(stat) = make_float2(s.p[0], s.p[1]);
    *reinterpret_cast<float2*>(stat + 8) = make_float2(s.ps[0], s.ps[1]);
    *reinterpret_cast<float2*>(stat + 16) = make_float2(s.sink[0], s.sink[1]);
    *reinterpret_cast<float2*>(stat + 24) = make_float2(s.max[0], s.max[1]);
  }
  warpgroup_barrier(warpgroup);
  const auto results = [&](int w) { return reinterpret_cast<const float*>(rings + w * stride); };
  const float own = results(lane >> 3)[kMax + (lane & 7)];  // of warp lane / 8, column lane % 8
  float top = fmaxf(own, __shfl_xor_sync(~0u, own, 8));
  top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
  if (Fold) top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
  float* factors = exchange + warp * 32;
  factors[lane] = exp2_fast(own - top);
  __syncwarp();
  if (warp == 3 && lane < C) target[(Cf::kOutRows + 3) * C + lane] = top;
#pragma unroll 1
  for (int row = thread; row < Cf::kOutRows + 3; row += 128) {
    float4 sum[2] = {make_float4(0.f, 0.f, 0.f, 0.f), make_float4(0.f, 0.f, 0.f, 0.f)};
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 x = reinterpret_cast<const float4*>(results(w) + row * 8)[h];
        const float4 f = reinterpret_cast<const float4*>(factors + w * 8)[h];
        float4& to = sum[Fold ? 0 : h];
        to.x += f.x * x.x, to.y += f.y * x.y, to.z += f.z * x.z, to.w += f.w * x.w;
      }
    float4* at = reinterpret_cast<float4*>(target + row * C);
    at[0] = sum[0];
    if (!Fold) at[1] = sum[1];
  }
}

// The records that the warpgroups of a CTA left in shared memory, each at the start of its scratch, as one in global memory.
// All threads of the CTA, behind a barrier. Not inlined: that costs the main loop registers.
template <class Cf>
__device__ __noinline__ void join_records(float* target, const float* first, int thread) {
  constexpr int kMax = (Cf::kOutRows + 3) * Cf::C / 4, kApart = Cf::kScratchBytes / 16;
  for (int i = thread; i < Cf::kRecord / 4; i += Cf::kThreads) {
    const float4* from = reinterpret_cast<const float4*>(first);
    float4 m[Cf::kWarpgroups], sum = make_float4(0.f, 0.f, 0.f, 0.f);
    float4 top = make_float4(kEmptyMax, kEmptyMax, kEmptyMax, kEmptyMax);
#pragma unroll
    for (int w = 0; w < Cf::kWarpgroups; ++w) {
      m[w] = from[w * kApart + kMax + i % (Cf::C / 4)];
      top.x = fmaxf(top.x, m[w].x), top.y = fmaxf(top.y, m[w].y), top.z = fmaxf(top.z, m[w].z), top.w = fmaxf(top.w, m[w].w);
    }
#pragma unroll
    for (int w = 0; w < Cf::kWarpgroups; ++w) {
      const float4 x = from[w * kApart + i];
      sum.x += exp2_fast(m[w].x - top.x) * x.x, sum.y += exp2_fast(m[w].y - top.y) * x.y;
      sum.z += exp2_fast(m[w].z - top.z) * x.z, sum.w += exp2_fast(m[w].w - top.w) * x.w;
    }
    __stcg(reinterpret_cast<float4*>(target) + i, i < kMax ? sum : top);
  }
}

// Where the result of a piece goes: at most two requests of a head are cut by a warpgroup's range, one at each end.
template <class Cf>
__device__ __forceinline__ int piece_slot(const Cut& cut, int max_phases, int cta, int part, int head, int begin,
                                          int unit_begin) {
  return ((cta * Cf::kWarpgroups + part) * max_phases + cut.phase(cta, head)) * 2 + (begin > unit_begin ? 0 : 1);
}

constexpr int kMaxPieces = 512;  // of a request: the warpgroups of a grid are fewer

// Lists the pieces of a request that several warpgroups share, in the order of its positions; returns how many,
// or 0 where one warpgroup has all of it. One warp.
template <class Cf>
__device__ __forceinline__ int list_pieces(uint16_t* list, const Cut& cut, int max_phases, int head, int unit_begin,
                                           int unit_end, int lane) {
  constexpr int parts = Cf::kWarpgroups;
  const int ctas = cut.num_with(head);
  const Cut::Line line = cut.heads <= cut.num_ctas ? cut.line_of(head) : Cut::Line{};
  int n = 0;
#pragma unroll 1
  for (int i = lane; i - lane < ctas * parts; i += 32) {
    const int k = min(i / parts, ctas - 1), cta = cut.cta_with(head, k), part = i % parts;
    int begin = 0, end = 0;
    if (i < ctas * parts) {
      const Cut::Range all = cut.range_of(line, cta, k, head);
      begin = all.end_of<parts>(part), end = all.end_of<parts>(part + 1);
      if (part > 0 && cut.joins<parts>(all, unit_begin, unit_end)) end = begin;  // the first warpgroup stands for all
    }
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

// How the threads of a finishing block, or of one warp, share the pieces of a request: groups of warps take every
// kGroups-th record, a thread the same vectors of each, kAhead records on their way at once.
template <class Cf, int Threads>
struct Merging {
  static constexpr int kVectors = Cf::kRecord / 4;  // of 16 bytes, in a record
  static constexpr int kGroups = Threads <= 128 ? 1 : Threads / 8 / Cf::C, kWidth = Threads / kGroups;
  static constexpr int kEach = (kVectors + kWidth - 1) / kWidth;
  static constexpr int kAhead = Threads == 32 ? (Cf::C == 4 ? 2 : 1) : Threads == 128 ? 4 : 3;
  static_assert(kWidth % 32 == 0);
};

// Sums records of one request into `sum` in shared memory: record(i) is in global memory, i < n. `parts`: shared,
// [kGroups][kRecord], where there are groups. All threads of the block, or a warp; ends with a barrier of these.
template <class Cf, int Threads, class Record>
__device__ __forceinline__ void merge_records(float* sum, float* parts, Record record, int n, int thread) {
  using M = Merging<Cf, Threads>;
  constexpr int C = Cf::C, kMax = (Cf::kOutRows + 3) * C / 4;  // the vector where the maxima begin
  const int group = thread / M::kWidth, at = thread % M::kWidth, quad = at % (C / 4);  // columns 4 quad, ... of all vectors
  float top[4] = {kEmptyMax, kEmptyMax, kEmptyMax, kEmptyMax}, acc[M::kEach][4] = {};
#pragma unroll 1
  for (int first = group; first < n; first += M::kGroups * M::kAhead) {
    float m[M::kAhead][4], x[M::kAhead][M::kEach][4];
#pragma unroll
    for (int j = 0; j < M::kAhead; ++j) {
      const bool there = first + M::kGroups * j < n;
      const float4* from = reinterpret_cast<const float4*>(record(there ? first + M::kGroups * j : first)) + at;
      float4 v = make_float4(kEmptyMax, kEmptyMax, kEmptyMax, kEmptyMax);
      if (there) v = __ldcg(from - at + kMax + quad);
      *reinterpret_cast<float4*>(m[j]) = v;
#pragma unroll
      for (int i = 0; i < M::kEach; ++i) {
        v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (there && at + M::kWidth * i < kMax) v = __ldcg(from + M::kWidth * i);
        *reinterpret_cast<float4*>(x[j][i]) = v;
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float high = top[c];
#pragma unroll
      for (int j = 0; j < M::kAhead; ++j) high = fmaxf(high, m[j][c]);
      const float keep = exp2_fast(top[c] - high);
      top[c] = high;
#pragma unroll
      for (int i = 0; i < M::kEach; ++i) acc[i][c] *= keep;
#pragma unroll
      for (int j = 0; j < M::kAhead; ++j) {
        const float weight = exp2_fast(m[j][c] - high);
#pragma unroll
        for (int i = 0; i < M::kEach; ++i) acc[i][c] += weight * x[j][i][c];
      }
    }
  }
  float4* mine = reinterpret_cast<float4*>(M::kGroups == 1 ? sum : parts + group * Cf::kRecord);
#pragma unroll
  for (int i = 0; i < M::kEach; ++i) {
    const int v = at + M::kWidth * i;
    if (v < kMax) mine[v] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
    else if (v < M::kVectors) mine[v] = make_float4(top[0], top[1], top[2], top[3]);
  }
  if constexpr (Threads == 32)
    __syncwarp();
  else
    __syncthreads();
  if constexpr (M::kGroups > 1) {  // a thread has half of the columns of a row
    constexpr int kHalf = C / 2;
    static_assert(Cf::kRecord / kHalf <= Threads);
    const int i = thread * kHalf, column = i % C;
    if (i < Cf::kRecord) {
      float high[kHalf], x[kHalf] = {};
#pragma unroll
      for (int c = 0; c < kHalf; ++c) high[c] = kEmptyMax;
#pragma unroll
      for (int k = 0; k < M::kGroups; ++k)
#pragma unroll
        for (int c = 0; c < kHalf; ++c) high[c] = fmaxf(high[c], parts[k * Cf::kRecord + 4 * kMax + column + c]);
#pragma unroll
      for (int k = 0; k < M::kGroups; ++k)
#pragma unroll
        for (int c = 0; c < kHalf; ++c)
          x[c] += exp2_fast(parts[k * Cf::kRecord + 4 * kMax + column + c] - high[c]) * parts[k * Cf::kRecord + i + c];
#pragma unroll
      for (int c = 0; c < kHalf; ++c) sum[i + c] = i < 4 * kMax ? x[c] : high[c];
    }
    __syncthreads();
  }
}

}  // namespace kqsvd::decode
