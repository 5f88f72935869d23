// SPDX-License-Identifier: Apache-2.0
// The schedule of a step: what each request computes and where its units lie in a virtual head's line of units.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

__device__ __forceinline__ int align_down(int x, int a) { return x - x % a; }

// Whether no latent page that a request reads has tokens of this step: then decode kernels may read pages while the kernel
// that stores this step's tokens is still at work. A request reads no latents of its own new tokens where a window is kept.
// Those of another one can only be in a page that both have, and requests share full pages alone: pages that this step
// fills are looked up in every other request's table. All threads of the block; `row_of(i)` is row i of `requests`, asked
// for by thread i % Threads.
template <int Threads, class RowOf>
__device__ __forceinline__ bool pages_are_settled(const ScheduleParams& p, RowOf&& row_of) {
  constexpr int kMost = 1024;
  struct Filled {
    int request, block, page;
  };
  __shared__ Filled filled[kMost];
  __shared__ int num_filled, conflict;
  if (p.block_table == nullptr || p.window <= 0) return false;
  if (p.num_requests == 1) return true;
  if (threadIdx.x == 0) num_filled = conflict = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.num_requests; i += Threads) {
    const Request r = row_of(i);
    for (int block = r.p0 / p.block_size; r.num_rows > 0 && (block + 1) * p.block_size <= r.length; ++block) {
      const int at = atomicAdd(&num_filled, 1);
      if (at < kMost) filled[at] = {i, block, p.block_table[i * p.block_table_stride + block]};
    }
  }
  __syncthreads();
  bool found = num_filled > kMost;
  for (int i = threadIdx.x; i < p.num_requests && num_filled > 0 && !found; i += Threads) {
    const int last = row_of(i).last;
#pragma unroll 4
    for (int k = 0; k < num_filled; ++k)
      found |= filled[k].request != i && filled[k].block * p.block_size < last &&
               p.block_table[i * p.block_table_stride + filled[k].block] == filled[k].page;
  }
  if (found) conflict = 1;
  __syncthreads();
  return conflict == 0;
}

// One block of 1024 threads; fills `requests` by a running sum over the batch.
template <int Threads>
__global__ void __launch_bounds__(Threads) schedule_kernel(const __grid_constant__ ScheduleParams p) {
  constexpr int kWarps = Threads / 32;
  __shared__ int warp_sum[kWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int base = 0;
  Request r{};
  for (int start = 0; start < p.num_requests; start += Threads) {
    const int i = start + threadIdx.x;
    r = Request{};
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
    const int taken = units > 0 ? units + kChangeUnits : 0;
    int sum = taken;
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
    r.unit_begin = base + before + sum - taken;
    r.unit_end = r.unit_begin + units;
    if (i < p.num_requests) p.requests[i] = r;
    base += all;
    __syncthreads();
  }
  const bool only = p.num_requests <= Threads;  // then every thread still has its row
  Request rest{};
  rest.first = pages_are_settled<Threads>(p, [&](int i) { return only ? r : p.requests[i]; });
  rest.unit_begin = rest.unit_end = max(base - kChangeUnits, 0);  // no distance after the last one
  for (int i = p.num_requests + threadIdx.x; i < p.table_rows; i += Threads) p.requests[i] = rest;
  __threadfence();  // the latent kernel may start as soon as this one ends, and reads the table without waiting
}

}  // namespace kqsvd::decode
