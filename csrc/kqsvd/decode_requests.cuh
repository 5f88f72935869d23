// SPDX-License-Identifier: Apache-2.0
// The schedule of a step: what each request computes and where its units lie in a virtual head's line of units.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

__device__ __forceinline__ int align_down(int x, int a) { return x - x % a; }

// One block of 1024 threads; fills `requests` by a running sum over the batch.
template <int Threads>
__global__ void __launch_bounds__(Threads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  constexpr int kWarps = Threads / 32;
  __shared__ int warp_sum[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int base = 0;
  for (int start = 0; start < p.table_rows; start += Threads) {
    const int i = start + threadIdx.x;
    Request r{};
    int units = 0;
    if (i < p.num_requests) {
      r.row = p.query_start_loc[i];
      r.num_rows = p.query_start_loc[i + 1] - r.row;
      r.length = p.seq_lens[i];
      if (r.num_rows > 0) {
        r.length = max(r.length, 0);
        r.p0 = max(r.length - r.num_rows, 0);
        r.last = p.window > 0 ? min(align_down(max(r.p0 + 1 - p.window, 0), 16), r.length) : r.length;
        r.first = p.sliding_window > 0 ? align_down(max(r.p0 + 1 - p.sliding_window, 0), p.grain) : 0;
        r.first = min(r.first, align_down(r.last, p.grain));
        const int grains = (r.last - r.first + p.grain - 1) / p.grain;
        units = max((grains + 3) / 4, 1);
      } else {
        r.num_rows = 0;
      }
    }
    int sum = units;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sum[warp] = sum;
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += warp_sum[w];
      all += warp_sum[w];
    }
    r.unit_end = base + before + sum;
    r.unit_begin = r.unit_end - units;
    if (i < p.table_rows) p.requests[i] = r;
    base += all;
    __syncthreads();
  }
  __threadfence();  // the latent kernel may start as soon as this one ends, and reads the table without waiting
}

}  // namespace kqsvd::decode
