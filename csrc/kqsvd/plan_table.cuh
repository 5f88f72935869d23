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
// bits | half << 8 | count << 16, offset in the tile, moves / 4, 0, (group | shift << 8)[8], then the moves,
// (rotation | group << 8, mask)[8]
constexpr int kPlaneInts = 28;
constexpr int kPlanInts = kPlanHeader + kMaxPlanes * kPlaneInts;
constexpr bool is_plan_size(int64_t ints) {
  return ints > kPlanHeader && ints <= kPlanInts && (ints - kPlanHeader) % kPlaneInts == 0;
}

struct PlaneView {
  const int* data;  // aligned to 16 bytes
  __device__ int bits() const { return data[0] & 255; }
  __device__ bool half() const { return data[0] >> 8 & 1; }
  __device__ int count() const { return data[0] >> 16; }
  __device__ int offset() const { return data[1]; }
  __device__ int group(int i) const { return data[4 + i] & 255; }
  __device__ int shift(int i) const { return data[4 + i] >> 8; }
  __device__ const int4* moves() const { return reinterpret_cast<const int4*>(data + 12); }  // two moves each
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
// plane. `words[kStride * group]` are the tokens' code words of this t. Four moves at a time: a word is rotated and the
// bits that belong here stay; the last ones may be empty.
template <int kStride, int kTokens>
__device__ __forceinline__ CodeWords<kTokens> gather_plane(PlaneView plane, int quads,
                                                           const CodeWords<kTokens>* words) {
  const int4* moves = plane.moves();
  CodeWords<kTokens> out{};
#pragma unroll 1
  for (; quads > 0; --quads, moves += 2) {
    const int4 a = moves[0], b = moves[1];
    const int move[4] = {a.x, a.z, b.x, b.z}, mask[4] = {a.y, a.w, b.y, b.w};
    CodeWords<kTokens> word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = words[kStride * (move[i] >> 8)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int y = 0; y < kTokens; ++y) out.of[y] |= __funnelshift_l(word[i].of[y], word[i].of[y], move[i]) & mask[i];
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
