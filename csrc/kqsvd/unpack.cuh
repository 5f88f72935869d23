// SPDX-License-Identifier: Apache-2.0
// Tile planes -> tensor-core products. A field of b bits masked out of both halves of a word *is* a pair of fp16
// subnormals, so unpacking costs one AND per two elements and one shift per word.
#pragma once

#include "mma.cuh"
#include "plan.cuh"

namespace kqsvd::decode {

KQ_CONSTEXPR uint32_t field_mask(int bits, int bit) { return (((1u << bits) - 1u) << bit) * 0x00010001u; }

// acc[j] += codes(tile j) * query for `Tiles` tiles that share the absorbed query `b` [2 words per group].
// Rows = tokens (g, g + 8), columns = the 8 query columns. Tiles are interleaved to keep their chains apart.
template <SidePlan K, int Tiles>
__device__ __forceinline__ void score_tiles(float (&acc)[Tiles][4], const uint8_t* const (&tile)[Tiles],
                                            const uint32_t* b, int lane) {
  static_for<K.num_planes>([&](auto ip) {
    constexpr int p = ip;
    constexpr Plane plane = K.planes[p];
    uint32_t w0[Tiles], w1[Tiles], h0[Tiles], h1[Tiles];
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(tile[j] + K.plane_offset(p)) + lane;
      w0[j] = words[0];
      h0[j] = w0[j] >> 8;
      if constexpr (!plane.half) {
        w1[j] = words[32];
        h1[j] = w1[j] >> 8;
      }
    }
    static_for<plane.count>([&](auto ii) {
      constexpr int i = ii;
      constexpr int group = plane.groups[i];
      uint32_t b0 = b[2 * group], b1 = b[2 * group + 1];
      if constexpr (!K.is_first(p, i)) {
        constexpr uint32_t s0 = half2_constant(power_of_two(K.match_exponent(p, group, 0, true)));
        constexpr uint32_t s1 = half2_constant(power_of_two(K.match_exponent(p, group, 1, true)));
        b0 = mul_half2(b0, s0);
        b1 = mul_half2(b1, s1);
      }
      constexpr uint32_t m0 = field_mask(plane.bits, K.field_bit(p, group, 0, true));
      constexpr uint32_t m1 = field_mask(plane.bits, K.field_bit(p, group, 1, true));
#pragma unroll
      for (int j = 0; j < Tiles; ++j) {
        if constexpr (K.planes[p].half)
          mma_f16(acc[j], w0[j] & m0, h0[j] & m0, w0[j] & m1, h0[j] & m1, b0, b1);
        else
          mma_f16(acc[j], w0[j] & m0, w1[j] & m0, h0[j] & m0, h1[j] & m0, b0, b1);
      }
    });
  });
}

// o[group] += codes(tile)^T * p: rows = channels (g, g + 8) of the group, columns = query columns.
// p0, p1: probabilities of tokens (2t, 2t+1), (2t+8, 2t+9) at column g; o is in units of each group's first plane.
template <SidePlan V>
__device__ __forceinline__ void add_values(float (&o)[V.num_groups][4], const uint8_t* tile, uint32_t p0, uint32_t p1,
                                           int lane) {
  const int word = (lane & 3) * 8 + (lane >> 2);
  static_for<V.num_planes>([&](auto ip) {
    constexpr int p = ip;
    constexpr Plane plane = V.planes[p];
    const uint32_t* words = reinterpret_cast<const uint32_t*>(tile + V.plane_offset(p)) + word;
    uint32_t w0 = words[0], w1;  // rows 0-7 and 8-15 of tokens 2t.. ; x0, x1: of tokens 2t+8..
    uint32_t x0, x1;
    if constexpr (plane.half) {
      w1 = w0 >> plane.bits;
      x0 = w0 >> 8;
      x1 = w0 >> (8 + plane.bits);
    } else {
      w1 = w0 >> 8;
      x0 = words[32];
      x1 = x0 >> 8;
    }
    static_for<plane.count>([&](auto ii) {
      constexpr int i = ii;
      constexpr int group = plane.groups[i];
      uint32_t q0 = p0, q1 = p1;
      if constexpr (!V.is_first(p, i)) {
        constexpr uint32_t s = half2_constant(power_of_two(V.match_exponent(p, group, 0, false)));
        q0 = mul_half2(p0, s);
        q1 = mul_half2(p1, s);
      }
      constexpr uint32_t m = field_mask(plane.bits, V.field_bit(p, group, 0, false));
      mma_f16(o[group], w0 & m, w1 & m, x0 & m, x1 & m, q0, q1);
    });
  });
}

}  // namespace kqsvd::decode
