// SPDX-License-Identifier: Apache-2.0
// From partial results to the output: warps of a warpgroup, pieces of a request, exact window, value basis.
// A *record* is [kOutRows + 4][C] float: rows of the accumulator, then sum p, sum p s, sum p over sinks, maximum.
#pragma once

#include "decode_absorb.cuh"
#include "decode_schedule.cuh"

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

// The two halves that merge_warps left, as one: in place, or to `target` in global memory. No barrier.
template <class Cf>
__device__ __forceinline__ void join_halves(float* record, float* target, int thread) {
  const float4* half = reinterpret_cast<const float4*>(record);
  for (int i = thread; i < Cf::kRecord / 4; i += 128) {
    const float4 a = half[i], b = half[i + Cf::kRecord / 4];
    const float4 sum = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
    if (target)
      __stcg(reinterpret_cast<float4*>(target) + i, sum);
    else
      reinterpret_cast<float4*>(record)[i] = sum;
  }
}

// Where the result of a piece goes: at most two requests of a head are cut by a warpgroup's range, one at each end.
template <class Cf>
__device__ __forceinline__ int piece_slot(const Cut& cut, int max_phases, int cta, int part, int head, int begin,
                                          int unit_begin) {
  return ((cta * Cf::kWarpgroups + part) * max_phases + head - cut.first_head(cta)) * 2 + (begin > unit_begin ? 0 : 1);
}

// Merges all pieces of a request into `record`, in the order of its positions. `list` is shared scratch.
template <class Cf>
__device__ __noinline__ void merge_pieces(float* record, uint16_t* list, int* count, const DecodeParams& p,
                                          const Cut& cut, const Request* at_work, int head, int warpgroup, int thread) {
  constexpr int C = Cf::C, parts = Cf::kWarpgroups, kRoom = Cf::kRecordRows;
  float* weights = record + Cf::kRecord;  // [piece][C]
  const int unit_begin = at_work->unit_begin, unit_end = at_work->unit_end;
  if (thread < 32) {
    int c0, c1, n = 0;
    cut.ctas_of(head, c0, c1);
#pragma unroll 1
    for (int i = thread; i - thread < (c1 - c0 + 1) * parts; i += 32) {
      const int cta = c0 + i / parts, part = i % parts;
      int begin = 0, end = 0;
      if (cta <= c1) cut.part_range<parts>(cta, part, head, begin, end);
      const bool hit = max(begin, unit_begin) < min(end, unit_end);
      const unsigned hits = __ballot_sync(~0u, hit);
      if (hit)
        list[n + __popc(hits & ((1u << thread) - 1u))] =
            static_cast<uint16_t>(piece_slot<Cf>(cut, p.max_phases, cta, part, head, begin, unit_begin));
      n += __popc(hits);
    }
    if (thread == 0) *count = n;
  }
  warpgroup_barrier(warpgroup);
  const int n = *count;
  const int row = min(thread, Cf::kOutRows - 1), stat = Cf::kOutRows * C + thread % (3 * C);
  float top[C], acc[C], sum = 0.f;
#pragma unroll
  for (int c = 0; c < C; ++c) acc[c] = 0.f, top[c] = kEmptyMax;
#pragma unroll 1
  for (int start = 0; start < n; start += kRoom) {  // one pass unless a request is cut into more than kRoom pieces
    const int stop = min(n, start + kRoom);
    float high[C];
#pragma unroll
    for (int c = 0; c < C; ++c) high[c] = top[c];
#pragma unroll 1
    for (int i = start + thread % 32; i < stop; i += 32) {  // every warp for itself
      const float* m = p.partials + static_cast<int64_t>(list[i]) * Cf::kRecord + (Cf::kOutRows + 3) * C;
#pragma unroll
      for (int c = 0; c < C; c += 4) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(m + c));
        high[c] = fmaxf(high[c], x.x), high[c + 1] = fmaxf(high[c + 1], x.y);
        high[c + 2] = fmaxf(high[c + 2], x.z), high[c + 3] = fmaxf(high[c + 3], x.w);
        if (thread < 32) *reinterpret_cast<float4*>(weights + (i - start) * C + c) = x;
      }
    }
    float keep[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      high[c] = fmaxf(high[c], __shfl_xor_sync(~0u, high[c], 16));
      high[c] = fmaxf(high[c], __shfl_xor_sync(~0u, high[c], 8));
      high[c] = fmaxf(high[c], __shfl_xor_sync(~0u, high[c], 4));
      high[c] = fmaxf(high[c], __shfl_xor_sync(~0u, high[c], 2));
      high[c] = fmaxf(high[c], __shfl_xor_sync(~0u, high[c], 1));
      keep[c] = exp2_fast(top[c] - high[c]);
      acc[c] *= keep[c];
      top[c] = high[c];
      if (thread % C == c) sum *= keep[c];
    }
    warpgroup_barrier(warpgroup);
    float mine = high[0];
#pragma unroll
    for (int c = 1; c < C; ++c)
      if (thread % C == c) mine = high[c];
#pragma unroll 1
    for (int i = thread; i < (stop - start) * C; i += 128) weights[i] = exp2_fast(weights[i] - mine);
    warpgroup_barrier(warpgroup);
    constexpr int kAhead = 8;
#pragma unroll 1
    for (int i = start; i < stop; i += kAhead) {
      float x[kAhead][C], y[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float* piece = p.partials + static_cast<int64_t>(list[min(i + j, stop - 1)]) * Cf::kRecord;
#pragma unroll
        for (int c = 0; c < C; c += 4)
          *reinterpret_cast<float4*>(x[j] + c) = __ldcg(reinterpret_cast<const float4*>(piece + row * C + c));
        y[j] = __ldcg(piece + stat);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= stop) break;
        const float* w = weights + (i + j - start) * C;
#pragma unroll
        for (int c = 0; c < C; ++c) acc[c] += w[c] * x[j][c];
        sum += w[thread % C] * y[j];
      }
    }
    warpgroup_barrier(warpgroup);
  }
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (thread < Cf::kOutRows) record[thread * C + c] = acc[c];
    if (thread == 0) record[(Cf::kOutRows + 3) * C + c] = top[c];
  }
  if (thread < 3 * C) record[stat] = sum;
  warpgroup_barrier(warpgroup);
}

// Weights of the latent and the exact part of a column in the normalised output; both 0 where nothing was visible.
template <class Cf>
__device__ __forceinline__ float2 part_weights(const float* record, int column, float lw, float mw) {
  const float l = record[Cf::kOutRows * Cf::C + column], m = record[(Cf::kOutRows + 3) * Cf::C + column];
  const float top = fmaxf(m, mw), f = exp2_fast(m - top), fw = exp2_fast(mw - top);
  const float sum = f * l + fw * lw, inverse = sum > 0.f ? 1.f / sum : 0.f;
  return make_float2(f * inverse, fw * inverse);
}

// What the rows of a group that is the highest field of an open plane hold beside it: the rows of the fields below.
// `sums`: column of a record; y: channel half of `channel`.
template <class Cf, int Group>
__device__ __forceinline__ float lower_fields(const float* sums, int channel, int y) {
  constexpr int p = Cf::V.first_plane(Group);
  constexpr Plane plane = Cf::V.planes[p];
  float sum = 0.f;
  if constexpr (Cf::V.is_open(p, false) && plane.groups[plane.count - 1] == Group) {
#pragma unroll
    for (int i = 0; i < plane.count; ++i) {
      const int lower = channel + 16 * (plane.groups[i] - Group);
      if (plane.groups[i] != Group && (!plane.half || y == 1)) sum += sums[lower * Cf::C];
      if (plane.half && y == 1) sum += sums[(lower - 8) * Cf::C];
    }
  }
  return sum;
}

// out = decode_V^T (acc - z sum ps) + mean_V sum p + (sink - mean) sum p over sinks + exact part, normalised.
// `window`: record of the exact part in global memory, or null.
template <class Cf>
__device__ __noinline__ void write_output(const float* record, const float* window, const DecodeParams& p,
                                          const Request* at_work, int head, int column0, int warp, int lane) {
  constexpr int C = Cf::C, D = Cf::D, GV = Cf::GV;
  const int g = lane >> 2, t = lane & 3;
  const int columns[3] = {g % C, 2 * t % C, (2 * t + 1) % C};
  constexpr int kMine = (D / 16 + 3) / 4;  // 16-row tiles of a warp; all of its loads are asked for at once
  uint4 a[kMine][GV];
  float mean_at[kMine][2], sink_at[kMine][2], exact[kMine][4];
#pragma unroll
  for (int k = 0; k < kMine; ++k) {
    const int tile = min(warp + 4 * k, D / 16 - 1);
    const uint4* basis = p.value_basis + static_cast<int64_t>(head * (D / 16) + tile) * GV * 32 + lane;
    const float* mean = p.value_mean + head * 2 * D + 16 * tile + g;
#pragma unroll
    for (int i = 0; i < GV; ++i) a[k][i] = basis[i * 32];
#pragma unroll
    for (int y = 0; y < 2; ++y) mean_at[k][y] = mean[8 * y], sink_at[k][y] = mean[D + 8 * y];
  }
  grid_dependency_wait();  // for the window kernel's results
  float stat[2][3];  // of the exact part: sum and maximum of those columns
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    stat[0][i] = window ? __ldcg(window + Cf::kOutRows * C + columns[i]) : 0.f;
    stat[1][i] = window ? __ldcg(window + (Cf::kOutRows + 3) * C + columns[i]) : kEmptyMax;
  }
#pragma unroll
  for (int k = 0; k < kMine; ++k)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      exact[k][e] =
          window ? __ldcg(window + (16 * min(warp + 4 * k, D / 16 - 1) + g + 8 * (e >> 1)) * C + columns[1 + (e & 1)])
                 : 0.f;
  const float factor = p.value_factor[head];

  uint32_t b[GV][2];
  {
    const float weight = g < C ? part_weights<Cf>(record, columns[0], stat[0][0], stat[1][0]).x : 0.f;
    const float ps = record[(Cf::kOutRows + 1) * C + columns[0]];
    static_for<GV>([&](auto ig) {
      constexpr int group = ig;
      constexpr float units[2] = {static_cast<float>(power_of_two(24 - Cf::V.unit_exponent(group, 0, false))),
                                  static_cast<float>(power_of_two(24 - Cf::V.unit_exponent(group, 1, false)))};
      constexpr float zero = static_cast<float>(power_of_two(Cf::V.group_bits(group) - 1) - 0.5);
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 16 * group + 2 * t + (i & 1) + 8 * (i >> 1);
        const float sum = record[channel * C + columns[0]] - lower_fields<Cf, group>(record + columns[0], channel, i >> 1);
        x[i] = (sum * units[i >> 1] - zero * ps) * weight;
      }
      b[group][0] = pack_f16(x[0], x[1]);
      b[group][1] = pack_f16(x[2], x[3]);
    });
  }
  float2 weight[2];
  float mean_sum[2], sink_sum[2];
  uint16_t* to[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = columns[1 + c];
    int row = 0, query_head = column0 + column;
    for (; query_head >= p.heads_per_kv; query_head -= p.heads_per_kv) ++row;
    weight[c] = part_weights<Cf>(record, column, stat[0][1 + c], stat[1][1 + c]);
    mean_sum[c] = record[Cf::kOutRows * C + column] * weight[c].x;
    sink_sum[c] = record[(Cf::kOutRows + 2) * C + column] * weight[c].x;
    to[c] = static_cast<uint16_t*>(p.out) + (at_work->row + row) * p.out_token_stride +
            (head * p.heads_per_kv + query_head) * p.out_head_stride;
    if (2 * t + c >= C || row >= at_work->num_rows) to[c] = nullptr;
  }
#pragma unroll
  for (int k = 0; k < kMine; ++k) {
    const int tile = warp + 4 * k;
    float o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < GV; ++i) mma_f16(o, a[k][i].x, a[k][i].y, a[k][i].z, a[k][i].w, b[i][0], b[i][1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int y = e >> 1, c = e & 1;
      const float x =
          o[e] * factor + mean_sum[c] * mean_at[k][y] + sink_sum[c] * sink_at[k][y] + weight[c].y * exact[k][e];
      const uint16_t bits =
          p.is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
      if (tile < D / 16 && to[c]) to[c][16 * tile + g + 8 * y] = bits;
    }
  }
}

}  // namespace kqsvd::decode
