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
constexpr int kPlaneInts = 20;               // bits, half, offset in the tile, count, groups[8], shifts[8]
constexpr int kPlanInts = kPlanHeader + kMaxPlanes * kPlaneInts;

struct PlanView {
  const int* data;
  __device__ int groups() const { return data[0]; }
  __device__ int planes() const { return data[1]; }
  __device__ int scale_offset() const { return data[2]; }
  __device__ int width(int group) const { return data[4 + group]; }
  __device__ const int* plane(int i) const { return data + kPlanHeader + i * kPlaneInts; }
};

// Columns 2t (low 16 bits) and 2t + 1 of one token in a plane: 16 bits each in a full plane, 8 bits in a half plane.
// `words[group]`, `stride` words apart, are the token's code words of this t.
__device__ __forceinline__ uint32_t gather_plane(const int* plane, const uint32_t* words, int stride) {
  const int bits = plane[0], count = plane[3];
  const uint32_t mask = 0x01010101u * ((1u << bits) - 1u);
  uint32_t out = 0;
  if (plane[1]) {
    for (int i = 0; i < count; ++i) {
      const uint32_t field = (words[plane[4 + i] * stride] >> plane[12 + i]) & mask;
      out |= ((field | field >> (8 - bits)) & 0x00ff00ffu) << (2 * i * bits);
    }
  } else {
    for (int i = 0; i < count; ++i) {
      out |= ((words[plane[4 + i] * stride] >> plane[12 + i]) & mask) << (i * bits);
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
