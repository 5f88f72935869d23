// SPDX-License-Identifier: Apache-2.0
// Compile-time bit plans (docs/format.md, 2): which plane holds which bits of which latent group, where a
// plane lies in a tile and by which power of two each field is weighted when it is read as an fp16 subnormal.
#pragma once

#include <cstdint>
#include <utility>

// Host and device alike, where nvcc compiles it.
#ifdef __CUDACC__
#define KQ_CONSTEXPR __host__ __device__ constexpr
#else
#define KQ_CONSTEXPR constexpr
#endif

namespace kqsvd::decode {

constexpr int kTileTokens = 16;
constexpr int kGroupChannels = 16;
constexpr int kMaxPlanes = 12;

// `bits` bits of every channel of `groups[0..count)`. Full: 16 bytes per token; half: 8.
struct Plane {
  int bits;
  bool half;
  int count;
  int groups[8];
};

struct SidePlan {
  int num_planes;
  int num_groups;
  Plane planes[kMaxPlanes];

  KQ_CONSTEXPR int plane_bytes(int p) const { return kTileTokens * (planes[p].half ? 8 : 16); }
  KQ_CONSTEXPR int plane_offset(int p) const {
    int at = 0;
    for (int i = 0; i < p; ++i) at += plane_bytes(i);
    return at;
  }
  KQ_CONSTEXPR int bytes() const { return plane_offset(num_planes); }  // of 16 tokens, scale bytes excluded

  KQ_CONSTEXPR bool lists(int p, int group) const {
    for (int i = 0; i < planes[p].count; ++i)
      if (planes[p].groups[i] == group) return true;
    return false;
  }
  KQ_CONSTEXPR int first_plane(int group) const {
    for (int p = 0; p < num_planes; ++p)
      if (lists(p, group)) return p;
    return -1;
  }
  KQ_CONSTEXPR bool is_first(int p, int field) const { return first_plane(planes[p].groups[field]) == p; }

  // Bits of the code of `group` below those of plane p.
  KQ_CONSTEXPR int shift(int p, int group) const {
    int below = 0;
    for (int i = p + 1; i < num_planes; ++i)
      if (lists(i, group)) below += planes[i].bits;
    return below;
  }
  KQ_CONSTEXPR int group_bits(int group) const {
    const int p = first_plane(group);
    return planes[p].bits + shift(p, group);
  }
  // Bit position of `group` in plane p as the kernel reads it; `y` = channel half. K half planes keep both
  // halves where they lie (the query is scaled per channel); V half planes are shifted to the y = 0 place.
  KQ_CONSTEXPR int field_bit(int p, int group, int y, bool is_key) const {
    int i = 0;
    while (planes[p].groups[i] != group) ++i;
    return planes[p].half ? (2 * i + (is_key ? y : 0)) * planes[p].bits : i * planes[p].bits;
  }
  // A field's tensor-core value is 2^(field_bit - 24) * field and means 2^shift * field.
  // Exponent by which the other operand of a secondary plane is multiplied to match the group's first plane.
  KQ_CONSTEXPR int match_exponent(int p, int group, int y, bool is_key) const {
    const int q = first_plane(group);
    return (shift(p, group) - field_bit(p, group, y, is_key)) - (shift(q, group) - field_bit(q, group, y, is_key));
  }
  KQ_CONSTEXPR int max_match_exponent(bool is_key) const {
    int worst = 0;
    for (int p = 0; p < num_planes; ++p)
      for (int i = 0; i < planes[p].count; ++i)
        for (int y = 0; y < 2; ++y) {
          const int e = match_exponent(p, planes[p].groups[i], y, is_key);
          worst = e > worst ? e : worst;
        }
    return worst;
  }
  // What one unit of a code of `group` weighs in an accumulator fed by its first plane, as a power of two (+ 24).
  KQ_CONSTEXPR int unit_exponent(int group, int y, bool is_key) const {
    const int p = first_plane(group);
    return field_bit(p, group, y, is_key) - shift(p, group);
  }
};

template <int I>
struct Index {
  KQ_CONSTEXPR operator int() const { return I; }
};

// for (i = 0; i < N; ++i) f(i) with i a compile-time constant.
template <int N, class F>
__host__ __device__ __forceinline__ constexpr void static_for(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f(Index<I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// fp16 bits of `value` (a small multiple of a power of two, exactly representable), in both halves of a word.
KQ_CONSTEXPR uint32_t half2_constant(double value) {
  const bool negative = value < 0;
  double v = negative ? -value : value;
  if (v == 0) return 0;
  int e = 0;
  while (v >= 2) v /= 2, ++e;
  while (v < 1) v *= 2, --e;
  const uint32_t bits = (static_cast<uint32_t>(e + 15) << 10) | static_cast<uint32_t>((v - 1) * 1024 + 0.5);
  const uint32_t h = bits | (negative ? 0x8000u : 0u);
  return h | (h << 16);
}
KQ_CONSTEXPR double power_of_two(int e) {
  double v = 1;
  for (; e > 0; --e) v *= 2;
  for (; e < 0; ++e) v /= 2;
  return v;
}

}  // namespace kqsvd::decode
