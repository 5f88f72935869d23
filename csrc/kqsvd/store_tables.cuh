// SPDX-License-Identifier: Apache-2.0
// What the blocks of a store of many tokens keep in shared memory, and which tokens a warp takes.
#pragma once

#include "store_params.cuh"
#include "store_project.cuh"

namespace kqsvd {

constexpr int kWarpGroups = 8;  // channel groups of one warp

// Warps that share 16 tokens, and warps of a CTA: what registers allow.
__host__ __device__ constexpr int many_columns(int steps) { return steps > 8 ? 2 : 1; }
__host__ __device__ constexpr int many_warps(int steps) { return steps > 8 ? 8 : 12; }

// Dynamic shared memory begins with what warps leave for themselves and each other: codes, then parts of token scales.
__host__ __device__ constexpr int many_codes_bytes(int steps) { return many_warps(steps) * kWarpGroups * 2 * 32 * 4; }
__host__ __device__ constexpr int many_scratch_bytes(int steps) {
  return many_codes_bytes(steps) + (many_columns(steps) > 1 ? many_warps(steps) * kTile * 8 : 0);
}

// Offsets of a side's tables behind that; rows are padded so that the tokens of a warp hit different banks. `halves`:
// chunks have their two parts half a row apart, so that neighbours lie 16 bytes apart, not 32.
struct StoreTables {
  int mean_stride, class_stride, encode, mean, classes, weight, plan, end;
};

__host__ __device__ inline StoreTables store_tables(int dim, int steps, int groups, int period, bool halves,
                                                    bool tables_shared, int begin) {
  StoreTables l{};
  const int rank = groups * kGroup;
  l.mean_stride = tables_shared ? rank + 8 : rank;
  l.class_stride = tables_shared ? (dim + 31) / 32 * 32 + (halves ? 16 : 4) : dim;
  int at = (begin + 1023) / 1024 * 1024;
  l.encode = at, at += many_wgmma(steps, tables_shared) ? 2 * wgmma_term_bytes(steps)
                       : tables_shared                  ? groups * steps * 1024
                                                        : 0;
  l.mean = at, at += tables_shared ? period * l.mean_stride * 4 : 0;
  l.classes = at, at += tables_shared ? period * l.class_stride * 4 : 0;
  l.weight = at, at += 2 * rank * 4;
  l.plan = at, at += kPlanInts * 4;
  l.end = at;
  return l;
}

// Starts copies of a side's tables. All threads of the block; the tables are there after settle_tables().
template <int kSteps, bool kShared>
__device__ __forceinline__ void load_tables(const StoreSide& side, int dim, const StoreTables& l, char* memory) {
  const int tid = threadIdx.x, head = blockIdx.y, rank = side.groups * kGroup;
  if constexpr (kShared) {
    if constexpr (many_wgmma(kSteps, kShared)) {
      load_wgmma_image<kSteps>(memory + l.encode, side.operand + int64_t(head) * 4 * kSteps * rank, rank);
    } else {
      const uint4* encode = side.encode + int64_t(head) * side.groups * kSteps * 64;
      for (int i = tid; i < side.groups * kSteps * 64; i += blockDim.x) copy_async_16(memory + l.encode + 16 * i, encode + i);
    }
    const float* means = side.latent_mean + int64_t(head) * 2 * side.period * rank;
    for (int i = tid; i < side.period * rank / 4; i += blockDim.x) {
      const int row = 4 * i / rank, c = 4 * i - row * rank;
      copy_async_16(memory + l.mean + 4 * (row * l.mean_stride + c), means + 4 * i);
    }
    const float* classes = side.class_vector + int64_t(head) * side.period * dim;
    for (int i = tid; i < side.period * dim / 4; i += blockDim.x) {
      const int row = 4 * i / dim, c = 4 * i - row * dim;
      copy_async_16(memory + l.classes + 4 * (row * l.class_stride + c), classes + 4 * i);
    }
  }
  float* weights = reinterpret_cast<float*>(memory + l.weight);
  int* plan_ints = reinterpret_cast<int*>(memory + l.plan);
  for (int i = tid; i < 2 * rank; i += blockDim.x) weights[i] = side.weight[head * 2 * rank + i];
  for (int i = tid; i < side.plan_ints; i += blockDim.x) plan_ints[i] = side.plan[i];
}

__device__ __forceinline__ void settle_tables() {
  copy_async_wait();
  fence_for_wgmma();
  __syncthreads();
}

// Tiles of 16 tokens that a warp stores: `tile`, then every `stride`-th, as long as `lead` is one of the step's. Warps that
// meet have the same lead: those of a warpgroup that multiply together, or all where two share tokens.
struct StoreWalk {
  int lead, tile, stride;
};

// Of CTA `cta` of `ctas` that store a side. `rotated`: which warpgroup begins.
template <int kSteps, bool kShared>
__device__ __forceinline__ StoreWalk walk_of(int cta, int ctas, int rotated) {
  constexpr int kColumns = many_columns(kSteps), kWarps = many_warps(kSteps);
  const int warp = uniform_warp_index(), pair = warp / kColumns;
  if constexpr (many_wgmma(kSteps, kShared)) {
    constexpr int kWarpgroups = kWarps / 4;
    const int warpgroup = warp / 4 + (warp / 4 < rotated ? kWarpgroups - rotated : -rotated);
    const int lead = 4 * (cta + warpgroup * ctas);
    return {lead, lead + warp % 4, 4 * kWarpgroups * ctas};
  }
  const int tile = cta + pair * ctas;
  return {kColumns > 1 ? cta : tile, tile, ctas * (kWarps / kColumns)};
}

}  // namespace kqsvd
