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

// Words of plane p as the products read them: rows 0-7 and 8-15 (channels) of tokens 2t.. , then of tokens 2t+8..
template <SidePlan V, int P>
__device__ __forceinline__ void value_words(uint32_t (&w)[4], const uint8_t* tile, int lane) {
  constexpr Plane plane = V.planes[P];
  constexpr int step = V.half_step(P, false), lift = V.lift(P);
  const auto shifted = [](uint32_t x, int right) { return right < 0 ? x << -right : x >> right; };
  const uint32_t* words = reinterpret_cast<const uint32_t*>(tile + V.plane_offset(P)) + (lane & 3) * 8 + (lane >> 2);
  const uint32_t first = words[0];
  if constexpr (V.is_open(P, false)) {
    w[0] = low_bytes(first), w[1] = high_bytes(first);
    if constexpr (plane.half) {
      w[2] = w[3] = w[1], w[1] = w[0];
    } else {
      w[2] = low_bytes(words[32]), w[3] = high_bytes(words[32]);
    }
  } else if constexpr (plane.half) {
    w[0] = first, w[1] = shifted(first, plane.bits - step);
    w[2] = first >> 8, w[3] = shifted(first, 8 + plane.bits - step);
  } else {
    w[0] = shifted(first, -lift), w[1] = shifted(first, 8 - step - lift);
    w[2] = shifted(words[32], -lift), w[3] = shifted(words[32], 8 - step - lift);
  }
}

// Fields `odd`, odd + 2, ... of V's plane p that are put together with those of its finer plane.
template <SidePlan V>
KQ_CONSTEXPR uint32_t merged_mask(int p, int odd, int y) {
  uint32_t mask = 0;
  for (int i = odd; i < V.planes[p].count; i += 2) {
    const int group = V.planes[p].groups[i];
    if (V.is_merged(V.merge_into(p).plane, group))
      mask |= field_mask(V.planes[p].bits, V.field_bit(p, group, y, false));
  }
  return mask;
}

// o[group] += codes(tile)^T * p: rows = channels (g, g + 8) of the group, columns = query columns.
// p0, p1: probabilities of tokens (2t, 2t+1), (2t+8, 2t+9) at column g; o is in units of each group's first plane.
template <SidePlan V>
__device__ __forceinline__ void add_values(float (&o)[V.num_groups][4], const uint8_t* tile, uint32_t p0, uint32_t p1,
                                           int lane) {
  static_for<V.num_planes>([&](auto ip) {
    constexpr int p = ip;
    constexpr Plane plane = V.planes[p];
    constexpr int finer = V.merge_into(p).plane;
    uint32_t w[4], mixed[2][4];  // mixed: with the finer plane's fields below those of every other field of this one
    value_words<V, p>(w, tile, lane);
    if constexpr (finer >= 0) {
      uint32_t below[4];
      value_words<V, finer>(below, tile, lane);
      static_for<2>([&](auto is) {
        constexpr int odd = is;
        static_for<2>([&](auto iy) {
          constexpr int y = iy;
          constexpr uint32_t mask = merged_mask<V>(p, odd, y);
          mixed[odd][y] = select_bits(mask, w[y], below[y]);
          mixed[odd][2 + y] = select_bits(mask, w[2 + y], below[2 + y]);
        });
      });
    }
    static_for<plane.count>([&](auto ii) {
      constexpr int i = ii;
      constexpr int group = plane.groups[i];
      constexpr int exponent = V.match_exponent(p, group, 0, false);
      constexpr bool is_top = V.is_open(p, false) && i == plane.count - 1;
      if constexpr (V.is_merged(p, group)) {
        static_assert(exponent == 0);
      } else if constexpr (finer >= 0 && V.is_merged(finer < 0 ? 0 : finer, group)) {
        constexpr int bits = plane.bits + V.planes[finer].bits;
        constexpr uint32_t m0 = field_mask(bits, V.field_bit(finer, group, 0, false));
        constexpr uint32_t m1 = field_mask(bits, V.field_bit(finer, group, 1, false));
        const uint32_t(&x)[4] = mixed[i % 2];
        mma_f16(o[group], x[0] & m0, x[1] & m1, x[2] & m0, x[3] & m1, p0, p1);
      } else {
        constexpr uint32_t m0 = is_top && !plane.half ? ~0u : field_mask(plane.bits, V.field_bit(p, group, 0, false));
        constexpr uint32_t m1 = is_top ? ~0u : field_mask(plane.bits, V.field_bit(p, group, 1, false));
        mma_f16(o[group], w[0] & m0, w[1] & m1, w[2] & m0, w[3] & m1, scaled_half2<exponent>(p0),
                scaled_half2<exponent>(p1));
      }
    });
  });
}

}  // namespace kqsvd::decode
