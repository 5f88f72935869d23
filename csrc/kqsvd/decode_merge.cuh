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
__device__ __forceinline__ int piece_slot(const DecodeParams& p, int cta, int part, int head, int begin,
                                          int unit_begin) {
  const int first_head = cta * p.num_kv_heads * p.column_groups / p.num_ctas;
  return ((cta * Cf::kWarpgroups + part) * p.max_phases + head - first_head) * 2 + (begin > unit_begin ? 0 : 1);
}

// Merges all pieces of a request into `record`, in the order of its positions. `list` is shared scratch.
template <class Cf>
__device__ __noinline__ void merge_pieces(float* record, uint16_t* list, int* count, const DecodeParams& p,
                                             const Cut& cut, const Request* at_work, int head, int warpgroup, int thread) {
  const Request r = *at_work;
  if (thread < 32) {
    const int c0 = cut.cta_of(head * cut.units + r.unit_begin), c1 = cut.cta_of(head * cut.units + r.unit_end - 1);
    constexpr int parts = Cf::kWarpgroups;
    int n = 0;
    for (int i = thread; i - thread < (c1 - c0 + 1) * parts; i += 32) {
      const int cta = c0 + i / parts, part = i % parts;
      bool hit = false;
      int slot = 0;
      if (cta <= c1) {
        int begin, end;
        cut.part_range<parts>(cta, part, head, begin, end);
        hit = max(begin, r.unit_begin) < min(end, r.unit_end);
        slot = piece_slot<Cf>(p, cta, part, head, begin, r.unit_begin);
      }
      const unsigned hits = __ballot_sync(~0u, hit);
      if (hit) list[n + __popc(hits & ((1u << thread) - 1u))] = static_cast<uint16_t>(slot);
      n += __popc(hits);
    }
    if (thread == 0) *count = n;
  }
  warpgroup_barrier(warpgroup);
  const int n = *count;
  // A thread merges one row; three threads also a row of statistics. Four pieces are in flight at once.
  constexpr int kAhead = 4;
  const bool has_row = thread < Cf::kOutRows, has_stat = thread >= 125;
  float acc[Cf::C], stat[Cf::C], top[Cf::C];
#pragma unroll
  for (int c = 0; c < Cf::C; ++c) acc[c] = stat[c] = 0.f, top[c] = kEmptyMax;
#pragma unroll 1
  for (int start = 0; start < n; start += kAhead) {
    float m[kAhead][Cf::C], x[kAhead][Cf::C], y[kAhead][Cf::C];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const bool live = start + j < n;
      const float* piece = p.partials + static_cast<int64_t>(list[live ? start + j : start]) * Cf::kRecord;
#pragma unroll
      for (int c = 0; c < Cf::C; c += 4) {
        float4 a = __ldcg(reinterpret_cast<const float4*>(piece + (Cf::kOutRows + 3) * Cf::C + c));
        if (!live) a = make_float4(kEmptyMax, kEmptyMax, kEmptyMax, kEmptyMax);
        *reinterpret_cast<float4*>(m[j] + c) = a;
        float4 b = make_float4(0.f, 0.f, 0.f, 0.f), d = b;
        if (live && has_row) b = __ldcg(reinterpret_cast<const float4*>(piece + thread * Cf::C + c));
        if (live && has_stat)
          d = __ldcg(reinterpret_cast<const float4*>(piece + (Cf::kOutRows + thread - 125) * Cf::C + c));
        *reinterpret_cast<float4*>(x[j] + c) = b;
        *reinterpret_cast<float4*>(y[j] + c) = d;
      }
    }
#pragma unroll
    for (int c = 0; c < Cf::C; ++c) {
      float high = top[c];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) high = fmaxf(high, m[j][c]);
      const float keep = exp2_fast(top[c] - high);
      acc[c] *= keep, stat[c] *= keep;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const float f = exp2_fast(m[j][c] - high);
        acc[c] += f * x[j][c], stat[c] += f * y[j][c];
      }
      top[c] = high;
    }
  }
#pragma unroll
  for (int c = 0; c < Cf::C; ++c) {
    if (has_row) record[thread * Cf::C + c] = acc[c];
    if (has_stat) record[(Cf::kOutRows + thread - 125) * Cf::C + c] = stat[c];
    if (thread == 0) record[(Cf::kOutRows + 3) * Cf::C + c] = top[c];
  }
  warpgroup_barrier(warpgroup);
}

// Weights of the latent and the exact part of a column in the normalised output; both 0 where nothing was visible.
template <class Cf>
__device__ __forceinline__ float2 part_weights(const float* record, const float* window, int column) {
  const float l = record[Cf::kOutRows * Cf::C + column], m = record[(Cf::kOutRows + 3) * Cf::C + column];
  float lw = 0.f, mw = kEmptyMax;
  if (window) {
    lw = __ldcg(window + Cf::kOutRows * Cf::C + column);
    mw = __ldcg(window + (Cf::kOutRows + 3) * Cf::C + column);
  }
  const float top = fmaxf(m, mw), f = exp2_fast(m - top), fw = exp2_fast(mw - top);
  const float sum = f * l + fw * lw, inverse = sum > 0.f ? 1.f / sum : 0.f;
  return make_float2(f * inverse, fw * inverse);
}

// out = decode_V^T (acc - z sum ps) + mean_V sum p + (sink - mean) sum p over sinks + exact part, normalised.
template <class Cf>
__device__ __noinline__ void write_output(const float* record, const float* window, const DecodeParams& p,
                                          const Request* at_work, int head, int column0, int warp, int lane) {
  const Request r = *at_work;
  constexpr int C = Cf::C, D = Cf::D, GV = Cf::GV;
  const int g = lane >> 2, t = lane & 3;
  uint32_t b[GV][2];
  {
    const bool live = g < C;
    const int column = live ? g : 0;
    const float weight = live ? part_weights<Cf>(record, window, column).x : 0.f;
    const float ps = record[(Cf::kOutRows + 1) * C + column];
    static_for<GV>([&](auto ig) {
      constexpr int group = ig;
      constexpr float unit = static_cast<float>(power_of_two(24 - Cf::V.unit_exponent(group, 0, false)));
      constexpr float zero = static_cast<float>(power_of_two(Cf::V.group_bits(group) - 1) - 0.5);
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 16 * group + 2 * t + (i & 1) + 8 * (i >> 1);
        x[i] = (record[channel * C + column] * unit - zero * ps) * weight;
      }
      b[group][0] = pack_f16(x[0], x[1]);
      b[group][1] = pack_f16(x[2], x[3]);
    });
  }
  float2 weight[2];
  float mean_sum[2], sink_sum[2];
  int64_t at[2];
  bool live[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = (2 * t + c) % C, global = column0 + column, row = global / p.heads_per_kv;
    weight[c] = part_weights<Cf>(record, window, column);
    mean_sum[c] = record[Cf::kOutRows * C + column] * weight[c].x;
    sink_sum[c] = record[(Cf::kOutRows + 2) * C + column] * weight[c].x;
    live[c] = 2 * t + c < C && row < r.num_rows;
    at[c] = (r.row + row) * p.out_token_stride +
            (head * p.heads_per_kv + global % p.heads_per_kv) * p.out_head_stride;
  }
  const float factor = p.value_factor[head];
  const float* mean = p.value_mean + head * 2 * D;
#pragma unroll 1
  for (int tile = warp; tile < D / 16; tile += 4) {
    const uint4* basis = p.value_basis + static_cast<int64_t>(head * (D / 16) + tile) * GV * 32 + lane;
    float o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < GV; ++i) {
      const uint4 a = basis[i * 32];
      mma_f16(o, a.x, a.y, a.z, a.w, b[i][0], b[i][1]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int dim = 16 * tile + g + 8 * (e >> 1), c = e & 1;
      if (!live[c]) continue;
      float x = o[e] * factor + mean_sum[c] * mean[dim] + sink_sum[c] * mean[D + dim];
      if (window) x += weight[c].y * __ldcg(window + dim * C + (2 * t + c) % C);
      uint16_t bits = p.is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
      static_cast<uint16_t*>(p.out)[at[c] + dim] = bits;
    }
  }
}

}  // namespace kqsvd::decode
