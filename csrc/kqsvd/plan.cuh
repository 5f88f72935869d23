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

KQ_CONSTEXPR double power_of_two(int e) {
  double v = 1;
  for (; e > 0; --e) v *= 2;
  for (; e < 0; ++e) v /= 2;
  return v;
}

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
  KQ_CONSTEXPR bool only_in(int p, int group) const {
    for (int i = 0; i < num_planes; ++i)
      if (i != p && lists(i, group)) return false;
    return true;
  }
  // V groups of a full plane that lie in one other plane too, next to each other once this plane's words are shifted left
  // by `lift`, are put together before their product (three or more of them: fewer ANDs and products, two shifts more).
  struct Merge {
    int plane, lift, count;
  };
  KQ_CONSTEXPR int place(int p, int group) const {  // bit of channel half 0 in the page
    int i = 0;
    while (planes[p].groups[i] != group) ++i;
    return (planes[p].half ? 2 * i : i) * planes[p].bits;
  }
  KQ_CONSTEXPR int gap(int q, int p, int group) const {  // lift of q that makes plane p's field adjoin plane q's
    return place(p, group) + planes[p].bits - place(q, group);
  }
  KQ_CONSTEXPR bool only_in_both(int q, int p, int group) const {
    for (int i = 0; i < num_planes; ++i)
      if (lists(i, group) != (i == q || i == p)) return false;
    return true;
  }
  KQ_CONSTEXPR Merge merge_into(int q) const {
    Merge best{-1, 0, 2};
    if (planes[q].half) return best;
    for (int p = q + 1; p < num_planes; ++p)
      for (int lift = 0; lift <= 2 && planes[p].bits <= planes[q].bits; ++lift) {
        int count = 0;
        bool fits = true;
        for (int f = 0; f < planes[q].count; ++f) {
          const int group = planes[q].groups[f];
          if (only_in(q, group)) continue;
          const bool both = only_in_both(q, p, group);
          count += both && gap(q, p, group) == lift;
          fits = fits && both && gap(q, p, group) >= lift;  // others keep weights of at most 1
        }
        if (fits && count > best.count) best = Merge{p, lift, count};
      }
    return best;
  }
  KQ_CONSTEXPR int lift(int p) const { return merge_into(p).plane < 0 ? 0 : merge_into(p).lift; }
  // Whether V's plane p adds to `group` through the group's first plane.
  KQ_CONSTEXPR bool is_merged(int p, int group) const {
    const int q = first_plane(group);
    return merge_into(q).plane == p && only_in_both(q, p, group) && gap(q, p, group) == lift(q);
  }
  // Bits by which plane p's fields of channel half 1 are read higher than those of half 0. K half planes keep both halves
  // where they lie (the query is scaled per channel). A V group needs one step in all its planes (both halves meet the
  // same probabilities), so planes that share groups have that of one of their half planes, which then needs no shift.
  KQ_CONSTEXPR int half_step(int p, bool is_key) const {
    if (is_key) return planes[p].half ? planes[p].bits : 0;
    bool joined[kMaxPlanes] = {};
    joined[p] = true;
    for (int round = 0; round < num_planes; ++round)
      for (int i = 0; i < num_planes; ++i)
        for (int k = 0; k < num_planes; ++k)
          for (int f = 0; f < planes[i].count; ++f)
            if (joined[k] && lists(k, planes[i].groups[f])) joined[i] = true;
    int most = 8, step = 0, saved = 0;  // a code and its step stay below bit 10: fp16 subnormals
    for (int i = 0; i < num_planes; ++i)
      if (joined[i] && !planes[i].half && most > 2 - lift(i)) most = 2 - lift(i);
    for (int i = 0; i < num_planes; ++i) {
      if (!joined[i] || !planes[i].half || planes[i].bits > most) continue;
      int like = 0;
      for (int k = 0; k < num_planes; ++k) like += joined[k] && planes[k].half && planes[k].bits == planes[i].bits;
      if (like > saved) step = planes[i].bits, saved = like;
    }
    return step;
  }
  // Bit position of `group` in plane p as the kernel reads it; `y` = channel half.
  KQ_CONSTEXPR int field_bit(int p, int group, int y, bool is_key) const {
    return place(p, group) + y * half_step(p, is_key) + (is_key ? 0 : lift(p));
  }
  // Whether the highest field of each byte of plane p is read without a mask of its own: as the whole byte, the sum of
  // all its fields. What that adds is taken back in constants: the query of a lower field that lies in no other plane is
  // absorbed less that of the highest; that of a secondary plane is computed here anyway; of value sums the lower fields'
  // are subtracted at the end.
  KQ_CONSTEXPR bool is_open(int p, bool is_key) const {
    const Plane& plane = planes[p];
    const int top = plane.count - 1;
    for (int i = 0; i < plane.count; ++i) {
      if (i == top && !plane.half) continue;
      const int group = plane.groups[i];
      if (is_key ? first_plane(group) == p && !only_in(p, group) : !only_in(p, group)) return false;
    }
    if (is_key) return true;
    return first_plane(plane.groups[top]) == p && half_step(p, false) == (plane.half ? plane.bits : 0);
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
  // What the kernel subtracts for K, in accumulator units: the weight of the absorbed query of (group, y).
  KQ_CONSTEXPR double key_zero_point(int group, int y) const;
  // What one unit of a code of `group` weighs in an accumulator fed by its first plane, as a power of two (+ 24).
  KQ_CONSTEXPR int unit_exponent(int group, int y, bool is_key) const {
    const int p = first_plane(group);
    return field_bit(p, group, y, is_key) - shift(p, group);
  }
};

KQ_CONSTEXPR double SidePlan::key_zero_point(int group, int y) const {
  const auto centre = [&](int g, int half) {
    return (power_of_two(group_bits(g) - 1) - 0.5) * power_of_two(unit_exponent(g, half, true));
  };
  double sum = centre(group, y);
  for (int p = 0; p < num_planes; ++p) {  // planes whose highest field this is: their lower ones lack its query
    const Plane& plane = planes[p];
    if (!is_open(p, true) || plane.groups[plane.count - 1] != group || (plane.half && y == 0)) continue;
    const double scale = power_of_two(match_exponent(p, group, y, true));
    for (int i = 0; i < plane.count; ++i) {
      const int lower = plane.groups[i];
      if (first_plane(lower) != p) continue;
      if (lower != group) sum += scale * centre(lower, y);
      if (plane.half) sum += scale * centre(lower, 0);
    }
  }
  return sum;
}

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

// Whether fp16 holds `value` exactly (normal values only).
KQ_CONSTEXPR bool is_half(double value) {
  double v = value < 0 ? -value : value;
  if (v < 6.103515625e-05 || v > 65504) return v == 0;
  while (v < 1024) v *= 2;
  while (v >= 2048) v /= 2;
  return v == static_cast<int>(v);
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

}  // namespace kqsvd::decode
