// SPDX-License-Identifier: Apache-2.0
// out = decode_V^T (acc - z sum ps) + mean_V sum p + (sink - mean) sum p over sinks + exact part, normalised: what both
// finishing kernels make of a merged latent record and the window's results.
#pragma once

#include "decode_window.cuh"

namespace kqsvd::decode {

// Weights of the latent and the exact part of a column in the normalised output; both 0 where nothing was visible.
template <class Cf>
__device__ __forceinline__ float2 part_weights(const float* record, int column, float lw, float mw) {
  const float l = record[Cf::kOutRows * Cf::C + column], m = record[(Cf::kOutRows + 3) * Cf::C + column];
  const float top = fmaxf(m, mw), f = exp2_fast(m - top), fw = exp2_fast(mw - top);
  const float sum = f * l + fw * lw, inverse = sum > 0.f ? approximate_reciprocal(sum) : 0.f;
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

// What a warp needs of the latent part for any rows of the output: operands of the value product, sums and weights of
// columns 2t, 2t + 1 in lane (g, t).
template <class Cf>
struct LatentPart {
  uint32_t b[Cf::GV][2];
  float exact_weight[2], mean_sum[2], sink_sum[2];

  // latent: the merged record, in shared memory; lw, mw: sum p and maximum of the exact part in column g % C.
  __device__ __forceinline__ LatentPart(const float* latent, float lw, float mw, int lane) {
    constexpr int C = Cf::C;
    const int g = lane >> 2, t = lane & 3, of_g = g % C;
    const float2 weights = part_weights<Cf>(latent, of_g, lw, mw);
    const float weight = g < C ? weights.x : 0.f;
    const float ps = latent[(Cf::kOutRows + 1) * C + of_g];
    static_for<Cf::GV>([&](auto ig) {
      constexpr int group = ig;
      constexpr float units[2] = {static_cast<float>(power_of_two(24 - Cf::V.unit_exponent(group, 0, false))),
                                  static_cast<float>(power_of_two(24 - Cf::V.unit_exponent(group, 1, false)))};
      constexpr float zero = static_cast<float>(power_of_two(Cf::V.group_bits(group) - 1) - 0.5);
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 16 * group + 2 * t + (i & 1) + 8 * (i >> 1);
        const float sum = latent[channel * C + of_g] - lower_fields<Cf, group>(latent + of_g, channel, i >> 1);
        x[i] = (sum * units[i >> 1] - zero * ps) * weight;
      }
      b[group][0] = pack_f16(x[0], x[1]);
      b[group][1] = pack_f16(x[2], x[3]);
    });
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = (2 * t + c) % C;
      const float own = __shfl_sync(~0u, weights.x, 4 * column);  // lanes (g, t) have column g
      exact_weight[c] = __shfl_sync(~0u, weights.y, 4 * column);
      mean_sum[c] = latent[Cf::kOutRows * C + column] * own;
      sink_sum[c] = latent[(Cf::kOutRows + 2) * C + column] * own;
    }
  }

  // Rows g, g + 8 of a 16-row tile. basis: its A fragments [groups][32]; mean, sink: of its two rows; exact: the
  // window's.
  __device__ __forceinline__ void tile(float (&x)[4], const uint4* basis, float factor, const float (&mean)[2],
                                       const float (&sink)[2], const float (&exact)[4], int lane) const {
    float o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < Cf::GV; ++i) {
      const uint4 a = basis[i * 32 + lane];
      mma_f16(o, a.x, a.y, a.z, a.w, b[i][0], b[i][1]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int y = e >> 1, c = e & 1;
      x[e] = o[e] * factor + mean_sum[c] * mean[y] + sink_sum[c] * sink[y] + exact_weight[c] * exact[e];
    }
  }
};

// Two numbers in the dtype of the output.
__device__ __forceinline__ uint32_t pack_output(int is_bf16, float x, float y) {
  return is_bf16 ? pack_bf16(x, y) : pack_f16(x, y);
}

// Where a column's row of the output is; null where there is none.
template <class Cf>
__device__ __forceinline__ uint16_t* output_row(const DecodeParams& p, int first_row, int num_rows, int head,
                                                int column0, int column) {
  int row = 0, query_head = column0 + column % Cf::C;
  for (; query_head >= p.heads_per_kv; query_head -= p.heads_per_kv) ++row;
  uint16_t* to = static_cast<uint16_t*>(p.out) + (first_row + row) * p.out_token_stride +
                 (head * p.heads_per_kv + query_head) * p.out_head_stride;
  return column >= Cf::C || row >= num_rows ? nullptr : to;
}

// The output of a request and virtual head by one warp. `o`: the window's accumulators, rows in the order of the basis;
// `sums`: sum p and maximum of columns 2t, 2t + 1 in all lanes. `means`: mean, sink minus mean; it, `latent` and
// `basis` in shared memory. `to`: row of column 2t + g % 2, null where there is none.
template <class Cf>
__device__ __forceinline__ void write_whole_output(const float* latent, const uint4* basis, const float* means,
                                                   const float (&o)[Cf::D / 16][4], const Sums& sums, float factor,
                                                   uint16_t* to, int is_bf16, int lane) {
  const int g = lane >> 2, from = g % Cf::C >> 1;  // a lane that has column g % C
  const float l[2] = {__shfl_sync(~0u, sums.p[0], from), __shfl_sync(~0u, sums.p[1], from)};
  const float m[2] = {__shfl_sync(~0u, sums.max[0], from), __shfl_sync(~0u, sums.max[1], from)};
  const bool odd = g & 1;
  const LatentPart<Cf> part(latent, odd ? l[1] : l[0], odd ? m[1] : m[0], lane);
#pragma unroll
  for (int i = 0; i < Cf::D / 32; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int tile = 2 * i + h;
      float mean[2], sink[2], x[4];
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const float* at = means + output_dim(tile, y, g);
        mean[y] = at[0], sink[y] = at[Cf::D];
      }
      part.tile(x, basis + tile * Cf::GV * 32, factor, mean, sink, o[tile], lane);
      // Lanes g, g ^ 1 have every other dimension of two columns; afterwards each has all of one.
      const uint32_t even_column = pack_output(is_bf16, x[0], x[2]), odd_column = pack_output(is_bf16, x[1], x[3]);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? even_column : odd_column, 4);
      const uint32_t low = odd ? other : even_column, high = odd ? odd_column : other;
      words[2 * h] = __byte_perm(low, high, 0x5410), words[2 * h + 1] = __byte_perm(low, high, 0x7632);
    }
    if (to) *reinterpret_cast<uint4*>(to + 32 * i + 8 * (g >> 1)) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

}  // namespace kqsvd::decode
