// SPDX-License-Identifier: Apache-2.0
// The second kernel of a decode layer where requests are many: a warp finishes a request and virtual head alone, one
// after another, and shares nothing with other warps but the constants of the head. Latencies of one warp are then
// hidden by the others of a multiprocessor, which never wait for each other, and constants are loaded once.
#pragma once

#include <type_traits>

#include "decode_output.cuh"

namespace kqsvd::decode {

// What a warp knows of its request is in shared memory: registers are full of the window's pages.
template <class Cf>
struct FinishManyShared {
  struct Warp {
    alignas(16) float latent[Cf::kRecord];  // before that: the query, as its lanes need it
    Request row, next;
    int entries[32];  // of the window table
    uint16_t list[kMaxPieces];
  };
  static_assert(Cf::D * 16 <= Cf::kRecord * 4);
  alignas(128) uint4 basis[Cf::D / 16 * Cf::GV * 32];
  float mean[2 * Cf::D];  // mean, sink minus mean
  Warp warps[4];
};

// The value basis with its rows in the order of the window's accumulators (output_dim), which an item's latent part then
// meets in the same lane. 128 threads.
template <class Cf>
__device__ __forceinline__ void load_turned_basis(uint32_t* to, const uint4* from) {
#pragma unroll 4
  for (int i = threadIdx.x; i < Cf::D / 16 * Cf::GV * 32; i += 128) {
    const uint4 a = from[i];
    const int t = i & 3, group = i / 32 % Cf::GV, first = 16 * (i / 32 / Cf::GV) + (i >> 2 & 7);
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int dim = first + 8 * y, tile = 2 * (dim >> 5) + (dim >> 2 & 1), g = 2 * (dim >> 3 & 3) + (dim & 1);
      uint32_t* at = to + ((tile * Cf::GV + group) * 32 + 4 * g + t) * 4 + (dim >> 1 & 1);
      at[0] = y ? a.y : a.x, at[2] = y ? a.w : a.z;
    }
  }
}

// A lane's entry of a request's window table, counted from block `first`.
__device__ __forceinline__ int window_entry(const DecodeParams& p, int request, const Request& r, int first, int lane) {
  const int block = first + lane;
  return r.num_rows > 0 && block * p.window_block_size < r.length
             ? p.window_table[request * p.window_table_stride + block]
             : 0;
}

// The window of a warp's request. While values of a chunk are added the next one's keys are on their way, and while its
// scores are computed its values: the registers of a chunk, and no more, keep loads in flight nearly all the time.
template <class Cf, bool Bf16>
__device__ __forceinline__ void attend_alone(float (&o)[Cf::D / 16][4], Sums& sums,
                                             typename FinishManyShared<Cf>::Warp& w, const DecodeParams& p, int request,
                                             int head, int column0, int lane) {
  constexpr int Q = Cf::D / 32;
  WindowSums<Cf, std::bool_constant<Bf16>> window(o, sums, {});
  int left = w.row.length - 1 - w.row.last;
  if (w.row.num_rows == 0 || left < 0) return;
  int offset = w.row.last % p.window_block_size, index = 0;
  uint4* query = reinterpret_cast<uint4*>(w.latent) + lane;  // vector k at 32 k
  uint4 q[Q];
  WindowRows<Cf> keys, values;
  const uint16_t* from = query_of_lane<Cf>(p, w.row.row, w.row.num_rows, head, column0, lane);
#pragma unroll
  for (int k = 0; k < Q; ++k) q[k] = from ? *reinterpret_cast<const uint4*>(from + 32 * k) : make_uint4(0, 0, 0, 0);
  keys.load_keys(p, w.entries[0], head, offset, left, lane);
  values.load_values(p, w.entries[0], head, offset, left, lane);
#pragma unroll
  for (int k = 0; k < Q; ++k) query[32 * k] = q[k];
#pragma unroll 1
  for (;;) {
    __syncwarp();  // what is in shared memory is read where it is needed
    float x[4];
    window.scores(x, keys, [&](int k) { return query[32 * k]; });
    left -= 16;
    if (left >= 0) {
      offset += 16;
      if (offset == p.window_block_size) {
        offset = 0;
        if (++index == 32) {
          index = 0;
          __syncwarp();
          w.entries[lane] = window_entry(p, request, w.row, (w.row.length - 1 - left) / p.window_block_size, lane);
          __syncwarp();
        }
      }
      keys.load_keys(p, w.entries[index], head, offset, left, lane);
    }
    window.probabilities(x, p, left + 16, w.row.length - w.row.p0, column0, lane);
    window.add(x, values);
    if (left < 0) break;
    values.load_values(p, w.entries[index], head, offset, left, lane);
  }
}

// Grid: virtual heads x p.finish_blocks; 128 threads. As finish_kernel it may start while latent CTAs are still at
// work: the window of a warp's first request comes before their results are waited for. `out` is written in 16-byte
// vectors.
template <class Cf>
__global__ void __launch_bounds__(128, 4) finish_many_kernel(const __grid_constant__ DecodeParams p) {
  KQ_DYNAMIC_SHARED(shared);
  FinishManyShared<Cf>& s = *reinterpret_cast<FinishManyShared<Cf>*>(shared);
  static_assert(4 * (sizeof(s) + 1024) <= 228 << 10, "four blocks share a multiprocessor");
  const int vh = blockIdx.x, head = vh / p.column_groups, column0 = (vh - head * p.column_groups) * Cf::C;
  const int warp = uniform_warp_index(), lane = threadIdx.x & 31;
  release_next_grid_early();  // see finish_kernel
  load_turned_basis<Cf>(reinterpret_cast<uint32_t*>(s.basis), p.value_basis + head * (Cf::D / 16 * Cf::GV * 32));
  for (int i = threadIdx.x; i < 2 * Cf::D; i += 128) s.mean[i] = p.value_mean[head * 2 * Cf::D + i];
  auto& w = s.warps[warp];
  const auto ask = [&](int request) {  // for its row; behind the last request there is an empty one
    if (lane < 2)
      copy_async_16(reinterpret_cast<uint4*>(&w.next) + lane,
                    reinterpret_cast<const uint4*>(p.requests + min(request, p.num_requests)) + lane);
  };
  const auto entry_of_next = [&](int request) {
    copy_async_wait();
    __syncwarp();
    return window_entry(p, request, w.next, w.next.last / p.window_block_size, lane);
  };
  const auto take_next = [&](int entry) {
    w.entries[lane] = entry;
    if (lane < 8) reinterpret_cast<int*>(&w.row)[lane] = reinterpret_cast<const int*>(&w.next)[lane];
    __syncwarp();
  };
  const int begin = blockIdx.y + gridDim.y * warp;  // warps that have one more than others are in all blocks
  ask(begin);
  take_next(entry_of_next(begin));
  __syncthreads();
#pragma unroll 1
  for (int request = begin;;) {
    const int next = request + 4 * gridDim.y;
    ask(next);
    float o[Cf::D / 16][4];
    Sums sums;
    if (p.is_bf16)
      attend_alone<Cf, true>(o, sums, w, p, request, head, column0, lane);
    else
      attend_alone<Cf, false>(o, sums, w, p, request, head, column0, lane);
    const int entry = entry_of_next(next);
    const Request r = w.row;
    const bool has_latent = r.first < r.last;
    int pieces = 0;
    if (has_latent) {
      const Cut cut(p, p.requests[p.num_requests].unit_begin);
      pieces = list_pieces<Cf>(w.list, cut, p.max_phases, vh, r.unit_begin, r.unit_end, lane);
    }
    if (request == begin) wait_for_previous_grid();
    if (r.num_rows > 0) {
      __syncwarp();  // the list is there, and nobody needs the query any more
      const float* whole = p.whole_partials + (static_cast<int64_t>(request) * gridDim.x + vh) * Cf::kRecord;
      const auto record = [&](int i) {
        return pieces == 0 ? whole : p.partials + static_cast<int64_t>(w.list[i]) * Cf::kRecord;
      };
      merge_records<Cf, 32>(w.latent, nullptr, record, !has_latent ? 0 : max(pieces, 1), lane);
      Sums::add_up(sums.p);
      const int column = 2 * (lane & 3) + (lane >> 2 & 1);  // as write_whole_output deals them
      uint16_t* to = output_row<Cf>(p, r.row, r.num_rows, head, column0, column);
      write_whole_output<Cf>(w.latent, s.basis, s.mean, o, sums, p.value_factor[head], to, p.is_bf16, lane);
    }
    __syncwarp();  // the next query comes where the record was
    take_next(entry);
    request = next;
    if (request >= p.num_requests) break;
  }
}

}  // namespace kqsvd::decode
