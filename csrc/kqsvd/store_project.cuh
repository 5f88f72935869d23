// SPDX-License-Identifier: Apache-2.0
// Latents of a warpgroup's rows: the encode matrix in shared memory as wgmma reads it, and the products.
#pragma once

#include "store_wgmma.cuh"

namespace kqsvd {

// Whether products are wgmma's: N = 16 `steps` columns, of which those beyond the side's groups are never read.
__host__ __device__ constexpr bool many_wgmma(int steps, bool tables_shared) { return tables_shared && steps <= 8; }

// Its operand, the encode matrix: two terms, each of 64-element spans of the rows' k-steps, each of N rows of 128 bytes.
__host__ __device__ constexpr int wgmma_span_bytes(int steps) { return 16 * steps * 128; }
__host__ __device__ constexpr int wgmma_term_bytes(int steps) { return steps / 4 * wgmma_span_bytes(steps); }

// Starts copies of the operand, whose rows are the side's channels: k-steps in their order, 16-byte parts of eight rows
// swizzled (cuda_tables.py, operand_image). All threads of the block; fence_for_wgmma() when they are done.
template <int kSteps>
__device__ __forceinline__ void load_wgmma_image(char* image, const uint4* operand, int rank) {
#pragma unroll
  for (int span = 0; span < kSteps / 2; ++span) {
    for (int i = threadIdx.x; i < 8 * rank; i += blockDim.x)
      copy_async_16(image + span * wgmma_span_bytes(kSteps) + 16 * i, operand + span * 8 * rank + i);
  }
}

// Latents of the warpgroup's rows: u[8 group + 4 n-tile + register].
template <int kSteps, int kLow>
__device__ __forceinline__ void project_rows(float (&u)[8 * kSteps], const uint32_t (&high)[kSteps][4],
                                             const uint32_t (&low)[kLow][4], uint64_t image) {
  wgmma_begin();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint64_t at = image + (k / 4 * wgmma_span_bytes(kSteps) + k % 4 * 32) / 16;
    wgmma_bf16(u, high[k], at, k > 0);
    wgmma_bf16(u, high[k], at + wgmma_term_bytes(kSteps) / 16, 1);
    if constexpr (kLow == kSteps) wgmma_bf16(u, low[k], at, 1);
  }
  wgmma_end();
}

}  // namespace kqsvd
