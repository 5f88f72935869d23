// SPDX-License-Identifier: Apache-2.0
// The second kernel of a decode layer where requests are many: a warp finishes a request and virtual head alone, one after
// another, and shares nothing with other warps but the constants of the head. Latencies of one warp are then hidden by the
// others of a multiprocessor, which never wait for each other, and constants are loaded once.
#pragma once

#include <cstddef>

#include "decode_output.cuh"

namespace kqsvd::decode {

template <class Cf>
struct FinishManyShared {
  struct Warp {
    alignas(16) float latent[Cf::kRecord];  // before that: the query, as its lanes need it
    uint16_t list[kMaxPieces];
  };
  static_assert(Cf::D * 16 <= Cf::kRecord * 4);
  alignas(128) uint4 basis[Cf::D / 16 * Cf::GV * 32];
  alignas(16) float mean[2 * Cf::D];  // mean, sink minus mean
  Warp warps[4];
  uint64_t loaded;  // mbarrier of basis and means
};

// A request's row of the table, a field a lane: one register while a warp is at work elsewhere. All 0 behind the last one.
struct RequestRow {
  int field;

  __device__ __forceinline__ RequestRow(const DecodeParams& p, int request, int lane)
      : field(lane < sizeof(Request) / 4 && request < p.num_requests
                  ? reinterpret_cast<const int*>(p.requests + request)[lane]
                  : 0) {}
  __device__ __forceinline__ int get(size_t offset) const { return __shfl_sync(~0u, field, static_cast<int>(offset / 4)); }
};

// Entries of a request's window table from block `first` on, an entry a lane.
__device__ __forceinline__ int window_entries(const DecodeParams& p, int request, int first, int length, int lane) {
  const int block = first + lane;
  return block * p.window_block_size < length ? p.window_table[request * p.window_table_stride + block] : 0;
}

// The output of a request and virtual head by one warp. `o`: the window's accumulators, in the order of the basis' rows, with
// sum p and maximum of columns 2t, 2t + 1 in all lanes.
template <class Cf>
__device__ __forceinline__ void write_whole_output(const FinishManyShared<Cf>& s, const float* latent,
                                                   const float (&o)[Cf::D / 16][4], const Sums& sums, float factor,
                                                   uint16_t* to, int is_bf16, int lane) {
  const int g = lane >> 2, from = g % Cf::C >> 1;  // a lane that has column g % C
  const float l[2] = {__shfl_sync(~0u, sums.p[0], from), __shfl_sync(~0u, sums.p[1], from)};
  const float m[2] = {__shfl_sync(~0u, sums.max[0], from), __shfl_sync(~0u, sums.max[1], from)};
  const bool odd = g & 1;
  const LatentPart<Cf> part(latent, odd ? l[1] : l[0], odd ? m[1] : m[0], lane);
#pragma unroll
  for (int i = 0; i < Cf::D / 32; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int tile = 2 * i + h;
      float mean[2], sink[2], x[4];
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const float* at = s.mean + output_dim(tile, y, g);
        mean[y] = at[0], sink[y] = at[Cf::D];
      }
      part.tile(x, s.basis + tile * Cf::GV * 32, factor, mean, sink, o[tile], lane);
      // Lanes g, g ^ 1 have every other dimension of two columns; afterwards each has all of one.
      const uint32_t even_column = pack_output(is_bf16, x[0], x[2]), odd_column = pack_output(is_bf16, x[1], x[3]);
      const uint32_t other = __shfl_xor_sync(~0u, odd ? even_column : odd_column, 4);
      const uint32_t low = odd ? other : even_column, high = odd ? odd_column : other;
      words[2 * h] = __byte_perm(low, high, 0x5410), words[2 * h + 1] = __byte_perm(low, high, 0x7632);
    }
    if (to) *reinterpret_cast<uint4*>(to + 32 * i + 8 * (g >> 1)) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Grid: virtual heads x p.finish_blocks; 128 threads. As finish_kernel it may start while latent CTAs are still at work: the
// window of a warp's first request comes before their results are waited for. `out` is written in 16-byte vectors.
template <class Cf>
__global__ void __launch_bounds__(128, 4) finish_many_kernel(const __grid_constant__ DecodeParams p) {
  KQ_DYNAMIC_SHARED(shared);
  FinishManyShared<Cf>& s = *reinterpret_cast<FinishManyShared<Cf>*>(shared);
  constexpr int Q = Cf::D / 32, kBasis = sizeof(s.basis), kMean = sizeof(s.mean);
  const uint32_t loaded = shared_address(&s.loaded);
  const int vh = blockIdx.x, head = vh / p.column_groups, column0 = (vh - head * p.column_groups) * Cf::C;
  const int warp = uniform_warp_index(), lane = threadIdx.x & 31, t = lane & 3;
  release_next_grid_early();  // see finish_kernel
  if (threadIdx.x == 0) {
    mbarrier_init(loaded, 1);
    proxy_fence();
    mbarrier_expect(loaded, kBasis + kMean);
    bulk_copy(shared_address(s.basis), p.value_basis + static_cast<int64_t>(head) * (kBasis / 16), kBasis, loaded);
    bulk_copy(shared_address(s.mean), p.value_mean + head * 2 * Cf::D, kMean, loaded);
  }
  float* latent = s.warps[warp].latent;
  uint4* query = reinterpret_cast<uint4*>(latent) + lane;  // vector k at 32 k
  uint16_t* list = s.warps[warp].list;
  int request = blockIdx.y + gridDim.y * warp;  // those that have one more than others are spread over all blocks
  RequestRow row(p, request, lane);
  const int total = p.requests[p.num_requests].unit_begin;
  int entry = window_entries(p, request, row.get(offsetof(Request, last)) / p.window_block_size,
                             row.get(offsetof(Request, length)), lane);
  __syncthreads();  // the mbarrier is there
  bool first = true;
#pragma unroll 1
  do {
    const int next = request + 4 * gridDim.y;
    const RequestRow next_row(p, next, lane);
    const int num_rows = row.get(offsetof(Request, num_rows));
    const int last = row.get(offsetof(Request, last)), length = num_rows > 0 ? row.get(offsetof(Request, length)) : 0;
    {
      const uint16_t* from = query_of_lane<Cf>(p, row.get(offsetof(Request, row)), num_rows, head, column0, lane);
#pragma unroll
      for (int k = 0; k < Q; ++k) {
        if (from) copy_async_16(query + 32 * k, from + 32 * k);
        else query[32 * k] = make_uint4(0, 0, 0, 0);
      }
    }
    const int p0 = row.get(offsetof(Request, p0));
    const int position[2] = {p0 + (column0 + 2 * t) / p.heads_per_kv, p0 + (column0 + 2 * t + 1) / p.heads_per_kv};
    float o[2 * Q][4];
#pragma unroll
    for (int i = 0; i < 2 * Q; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    Sums sums{{kEmptyMax, kEmptyMax}, {0.f, 0.f}, {0.f, 0.f}, {0.f, 0.f}};
    int offset = last % p.window_block_size, index = 0;  // of a chunk in its block, of that block's entry
#pragma unroll 1
    for (int start = last; start < length; start += 16) {
      const WindowChunk<Cf> chunk(p, __shfl_sync(~0u, entry, index), head, offset, length - 1 - start, lane);
      copy_async_wait();  // the query, asked for before the first chunk
      attend_chunk<Cf>(o, sums, chunk, [&](int k) { return query[32 * k]; }, p, start, length, position, lane);
      offset += 16;
      if (offset == p.window_block_size) {
        offset = 0;
        if (++index == 32) {
          index = 0;
          entry = window_entries(p, request, (start + 16) / p.window_block_size, length, lane);
        }
      }
    }
    copy_async_wait();
    entry = window_entries(p, next, next_row.get(offsetof(Request, last)) / p.window_block_size,
                           next_row.get(offsetof(Request, length)), lane);
    const int unit_begin = row.get(offsetof(Request, unit_begin)), unit_end = row.get(offsetof(Request, unit_end));
    const bool has_latent = row.get(offsetof(Request, first)) < last;
    const int pieces =
        has_latent ? list_pieces<Cf>(list, Cut(p, total), p.max_phases, vh, unit_begin, unit_end, lane) : 0;
    if (first) {
      mbarrier_wait(loaded, 0);
      wait_for_previous_grid();
      first = false;
    }
    if (num_rows > 0) {
      __syncwarp();  // the list is there, and nobody needs the query any more
      const float* whole = p.whole_partials + (static_cast<int64_t>(request) * gridDim.x + vh) * Cf::kRecord;
      const auto record = [&](int i) {
        return pieces == 0 ? whole : p.partials + static_cast<int64_t>(list[i]) * Cf::kRecord;
      };
      merge_records<Cf, 32>(latent, nullptr, record, !has_latent ? 0 : max(pieces, 1), lane);
      Sums::add_up(sums.p);
      uint16_t* to = output_row<Cf>(p, row.get(offsetof(Request, row)), num_rows, head, column0, 2 * t + (lane >> 2 & 1));
      write_whole_output<Cf>(s, latent, o, sums, p.value_factor[head], to, p.is_bf16, lane);
    }
    __syncwarp();  // the next query comes where the record was
    row = next_row;
    request = next;
  } while (request < p.num_requests);
}

}  // namespace kqsvd::decode
