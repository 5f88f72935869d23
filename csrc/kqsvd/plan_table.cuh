// SPDX-License-Identifier: Apache-2.0
// The bit plan of one side as integers (made by vllm_kqsvd/ops/cuda_tables.py), and the code words it splits
// into planes. A code word holds four codes of one token and group: channels 2t, 2t + 8, 2t + 1, 2t + 9 in bytes
// 0..3, i.e. the two columns 2t and 2t + 1 of every plane, whatever the side.
#pragma once

#include <cstdint>

namespace kqsvd {

constexpr int kMaxGroups = 16;
constexpr int kMaxPlanes = 32;
constexpr int kPlanHeader = 4 + kMaxGroups;  // groups, planes, offset of the scale bytes, 0, code widths
constexpr int kPlaneInts = 12;  // bits | half << 8 | count << 16, offset in the tile, 0, 0, (group | shift << 8)[8]
constexpr int kPlanInts = kPlanHeader + kMaxPlanes * kPlaneInts;

struct PlaneView {
  const int* data;  // aligned to 16 bytes
  __device__ int bits() const { return data[0] & 255; }
  __device__ bool half() const { return data[0] >> 8 & 1; }
  __device__ int count() const { return data[0] >> 16; }
  __device__ int offset() const { return data[1]; }
  __device__ int group(int i) const { return data[4 + i] & 255; }
  __device__ int shift(int i) const { return data[4 + i] >> 8; }
};

struct PlanView {
  const int* data;
  __device__ int groups() const { return data[0]; }
  __device__ int planes() const { return data[1]; }
  __device__ int scale_offset() const { return data[2]; }
  __device__ int width(int group) const { return data[4 + group]; }
  __device__ PlaneView plane(int i) const { return {data + kPlanHeader + i * kPlaneInts}; }
};

// Code words of one group and t, for kTokens tokens.
template <int kTokens>
struct alignas(4 * kTokens) CodeWords {
  uint32_t of[kTokens];
};

// Columns 2t (low 16 bits) and 2t + 1 of kTokens tokens in a plane: 16 bits each in a full plane, 8 bits in a half
// plane. `words[kStride * group]` are the tokens' code words of this t.
template <int kStride, int kTokens>
__device__ __forceinline__ CodeWords<kTokens> gather_plane(const int4& head, const int* entries,
                                                           const CodeWords<kTokens>* words) {
  const int bits = head.x & 255, count = head.x >> 16;
  const bool half = head.x & 256;
  const uint32_t mask = 0x01010101u * ((1u << bits) - 1u);
  CodeWords<kTokens> out{};
  int at = 0;
#pragma unroll 1
  for (int i = 0; i < count; i += 2) {  // planes of one group have count 1: the entry behind it is masked
    const int2 e = *reinterpret_cast<const int2*>(entries + i);
    const CodeWords<kTokens> left = words[kStride * (e.x & 255)], right = words[kStride * (e.y & 255)];
    const uint32_t there = i + 1 < count ? mask : 0u;
    if (!half) {  // from where the bits are to where they go in one rotation: none of them leaves its byte
      const int a = at - (e.x >> 8), b = at + bits - (e.y >> 8);
#pragma unroll
      for (int y = 0; y < kTokens; ++y) {
        out.of[y] |= __funnelshift_l(left.of[y], left.of[y], a) & mask << at;
        out.of[y] |= __funnelshift_l(right.of[y], right.of[y], b) & there << (at + bits);
      }
      at += 2 * bits;
    } else {
#pragma unroll
      for (int y = 0; y < kTokens; ++y) {
        const uint32_t a = left.of[y] >> (e.x >> 8) & mask, b = right.of[y] >> (e.y >> 8) & there;
        out.of[y] |= ((a | a >> (8 - bits)) & 0x00ff00ffu) << at;
        out.of[y] |= ((b | b >> (8 - bits)) & 0x00ff00ffu) << (at + 2 * bits);
      }
      at += 4 * bits;
    }
  }
  return out;
}

// Offset in the tile of column `c` of token r: a 16-bit half of a full plane, a byte of a half plane.
__device__ __forceinline__ int column_offset(bool is_value, bool half, int r, int c) {
  if (is_value) {
    return half ? 32 * ((r >> 1) & 3) + 4 * c + 2 * (r & 1) + (r >> 3) : 32 * (r >> 1) + 4 * c + 2 * (r & 1);
  }
  return half ? 16 * (r & 7) + 2 * c + (r >> 3) : 16 * r + 2 * c;
}

}  // namespace kqsvd
