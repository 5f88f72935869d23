// SPDX-License-Identifier: Apache-2.0
// Tile planes -> tensor-core products. A field of b bits masked out of both halves of a word *is* a pair of fp16
// subnormals, so unpacking costs one AND per two elements and one shift per word; in an open plane (SidePlan::is_open)
// the bytes themselves serve as the highest field, and the shift is saved.
#pragma once

#include "mma.cuh"
#include "plan.cuh"

namespace kqsvd::decode {

KQ_CONSTEXPR uint32_t field_mask(int bits, int bit) { return (((1u << bits) - 1u) << bit) * 0x00010001u; }

// Low and high bytes of both halves of a word.
__device__ __forceinline__ uint32_t low_bytes(uint32_t w) { return w & 0x00ff00ffu; }
__device__ __forceinline__ uint32_t high_bytes(uint32_t w) { return __byte_perm(w, 0, 0x4341); }

// b * 2^Exponent.
template <int Exponent>
__device__ __forceinline__ uint32_t scaled_half2(uint32_t b) {
  if constexpr (Exponent == 0) return b;
  return mul_half2(b, half2_constant(power_of_two(Exponent)));
}
// b * 2^Exponent - c.
template <int Exponent>
__device__ __forceinline__ uint32_t scaled_difference(uint32_t b, uint32_t c) {
  return multiply_subtract_half2(b, half2_constant(power_of_two(Exponent)), c);
}

// acc[j] += codes(tile j) * query for `Tiles` tiles that share the absorbed query `b` [2 words per group].
// Rows = tokens (g, g + 8), columns = the 8 query columns. Tiles are interleaved to keep their chains apart.
template <SidePlan K, int Tiles>
__device__ __forceinline__ void score_tiles(float (&acc)[Tiles][4], const uint8_t* const (&tile)[Tiles],
                                            const uint32_t* b, int lane) {
  static_for<K.num_planes>([&](auto ip) {
    constexpr int p = ip;
    constexpr Plane plane = K.planes[p];
    constexpr bool open = K.is_open(p, true);
    constexpr int top = plane.groups[plane.count - 1];
    uint32_t w0[Tiles], w1[Tiles], h0[Tiles], h1[Tiles];
#pragma unroll
    for (int j = 0; j < Tiles; ++j) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(tile[j] + K.plane_offset(p)) + lane;
      w0[j] = words[0];
      h0[j] = open ? high_bytes(w0[j]) : w0[j] >> 8;
      if (open) w0[j] = low_bytes(w0[j]);
      if constexpr (!plane.half) {
        w1[j] = words[32];
        h1[j] = open ? high_bytes(w1[j]) : w1[j] >> 8;
        if (open) w1[j] = low_bytes(w1[j]);
      }
    }
    // The query words of the highest fields: of both channel halves, in a half plane of the second for all.
    const uint32_t top1 = scaled_half2<K.match_exponent(p, top, 1, true)>(b[2 * top + 1]);
    const uint32_t top0 = plane.half ? top1 : scaled_half2<K.match_exponent(p, top, 0, true)>(b[2 * top]);
    static_for<plane.count>([&](auto ii) {
      constexpr int i = ii;
      constexpr int group = plane.groups[i];
      constexpr bool is_top = open && i == plane.count - 1;
      constexpr int e0 = K.match_exponent(p, group, 0, true), e1 = K.match_exponent(p, group, 1, true);
      uint32_t b0 = b[2 * group], b1 = b[2 * group + 1];
      if constexpr (!K.is_first(p, i)) {
        b0 = !open || (is_top && !plane.half) ? scaled_half2<e0>(b0) : scaled_difference<e0>(b0, top0);
        b1 = !open || is_top ? scaled_half2<e1>(b1) : scaled_difference<e1>(b1, top1);
      }
      constexpr uint32_t m0 = is_top && !plane.half ? ~0u : field_mask(plane.bits, K.field_bit(p, group, 0, true));
      constexpr uint32_t m1 = is_top ? ~0u : field_mask(plane.bits, K.field_bit(p, group, 1, true));
#pragma unroll
      for (int j = 0; j < Tiles; ++j) {
        if constexpr (K.planes[p].half)
          mma_f16(acc[j], w0[j] & m0, h0[j] & m0, w0[j] & m1, h0[j] & m1, b0, b1);
        else
          mma_f16(acc[j], w0[j] & m0, w1[j] & m0, h0[j] & m1, h1[j] & m1, b0, b1);
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
    constexpr bool open = V.is_open(p, false);
    constexpr int step = V.half_step(p, false);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(tile + V.plane_offset(p)) + word;
    uint32_t w0 = words[0], w1;  // rows 0-7 and 8-15 of tokens 2t.. ; x0, x1: of tokens 2t+8..
    uint32_t x0, x1;
    if constexpr (plane.half) {
      const auto second_half = [](uint32_t w, int by) { return by < 0 ? w << -by : w >> by; };
      x0 = open ? high_bytes(w0) : w0 >> 8;
      x1 = step == plane.bits ? x0 : second_half(w0, 8 + plane.bits - step);
      w1 = step == plane.bits ? w0 : second_half(w0, plane.bits - step);
      if (open) w0 = w1 = low_bytes(w0);
    } else {
      x0 = words[32];
      w1 = open ? high_bytes(w0) : w0 >> (8 - step);
      x1 = open ? high_bytes(x0) : x0 >> (8 - step);
      if (open) w0 = low_bytes(w0), x0 = low_bytes(x0);
    }
    static_for<plane.count>([&](auto ii) {
      constexpr int i = ii;
      constexpr int group = plane.groups[i];
      constexpr int exponent = V.match_exponent(p, group, 0, false);
      constexpr bool is_top = open && i == plane.count - 1;
      constexpr uint32_t m0 = is_top && !plane.half ? ~0u : field_mask(plane.bits, V.field_bit(p, group, 0, false));
      constexpr uint32_t m1 = is_top ? ~0u : field_mask(plane.bits, V.field_bit(p, group, 1, false));
      mma_f16(o[group], w0 & m0, w1 & m1, x0 & m0, x1 & m1, scaled_half2<exponent>(p0), scaled_half2<exponent>(p1));
    });
  });
}

}  // namespace kqsvd::decode
