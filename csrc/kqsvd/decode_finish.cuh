// SPDX-License-Identifier: Apache-2.0
// Second kernel of a decode layer: the exact window, the pieces of the latent part and the value basis make the output.
// One block per request and virtual head. It may start while latent CTAs are still at work: the window, which needs
// nothing of theirs, fills the multiprocessors that they leave.
#pragma once

#include "decode_output.cuh"

namespace kqsvd::decode {

// Leaves the two halves of the record of (request, virtual head) in `record`; rows are head dimensions. 128 threads; ends
// with a barrier.
template <class Cf>
__device__ __forceinline__ void attend_window(float* record, float* exchange, const DecodeParams& p, const Request& r,
                                              int request, int head, int column0, int warp, int lane) {
  constexpr int warpgroup = 0, Q = Cf::D / 32;
  const uint16_t* query = query_of_lane<Cf>(p, r.row, r.num_rows, head, column0, lane);
  uint4 q[Q];
#pragma unroll
  for (int k = 0; k < Q; ++k) q[k] = query ? *reinterpret_cast<const uint4*>(query + 32 * k) : make_uint4(0, 0, 0, 0);
  float o[2 * Q][4];
  Sums s;
  WindowSums<Cf, bool> sums(o, s, p.is_bf16);
#pragma unroll 1
  for (int start = r.last + 16 * warp; start < r.length; start += 64) {
    const unsigned size = p.window_block_size, at = start;
    const int block = p.window_table[request * p.window_table_stride + at / size];
    WindowRows<Cf> keys, values;
    keys.load_keys(p, block, head, at % size, r.length - 1 - start, lane);
    values.load_values(p, block, head, at % size, r.length - 1 - start, lane);
    float x[4];
    sums.scores(x, keys, [&](int k) { return q[k]; });
    sums.probabilities(x, p, r.length - 1 - start, r.length - r.p0, column0, lane);
    sums.add(x, values);
  }
  auto row = [&](int i, int y) { return output_dim(i, y, lane >> 2); };
  merge_warps<Cf, 2 * Q, false>(record, exchange, o, s, row, warp, warpgroup, lane);
}

// What a lane needs for its part of the output and can know early. Its rows of the means are of the 16-row tiles warp,
// warp + Warps, ...; its columns are 2t, 2t + 1.
template <class Cf, int Warps>
struct OutputPlace {
  static constexpr int kTiles = (Cf::D / 16 + Warps - 1) / Warps;
  float mean[kTiles][2], sink[kTiles][2], factor;
  uint16_t* to[2];  // of columns 2t, 2t + 1; null where there is no row

  __device__ __forceinline__ OutputPlace(const DecodeParams& p, const Request& r, int head, int column0, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const float* from = p.value_mean + head * 2 * Cf::D + 16 * min(warp + Warps * k, Cf::D / 16 - 1) + (lane >> 2);
#pragma unroll
      for (int y = 0; y < 2; ++y) mean[k][y] = from[8 * y], sink[k][y] = from[Cf::D + 8 * y];
    }
    factor = p.value_factor[head];
#pragma unroll
    for (int c = 0; c < 2; ++c) to[c] = output_row<Cf>(p, r.row, r.num_rows, head, column0, 2 * (lane & 3) + c);
  }
};

// The output of a request and virtual head. `latent`: the merged record of the latent part; `exact`: two halves of the
// window's; `basis`: A fragments [head_dim / 16][groups][32]. All in shared memory. Warps: of the block; they share the tiles.
template <class Cf, int Warps>
__device__ __forceinline__ void write_output(const float* latent, const float* exact, const uint4* basis,
                                             const OutputPlace<Cf, Warps>& place, int is_bf16, int warp, int lane) {
  constexpr int C = Cf::C;
  const int g = lane >> 2, t = lane & 3;
  const LatentPart<Cf> part(latent, exact[Cf::kOutRows * C + g % C], exact[(Cf::kOutRows + 3) * C + g % C], lane);
#pragma unroll
  for (int k = 0; k < OutputPlace<Cf, Warps>::kTiles; ++k) {
    const int tile = warp + Warps * k;
    if (tile >= Cf::D / 16) break;
    float window[4], x[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* at = exact + (16 * tile + 8 * (e >> 1) + g) * C + (2 * t + (e & 1)) % C;
      window[e] = at[0] + at[Cf::kRecord];
    }
    part.tile(x, basis + tile * Cf::GV * 32, place.factor, place.mean[k], place.sink[k], window, lane);
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int dim = 16 * tile + 8 * y + g;
      const uint32_t bits = pack_output(is_bf16, x[2 * y], x[2 * y + 1]);
      if (place.to[0]) place.to[0][dim] = static_cast<uint16_t>(bits);
      if (place.to[1]) place.to[1][dim] = static_cast<uint16_t>(bits >> 16);
    }
  }
}

template <class Cf, int Parts>
struct FinishShared {
  alignas(128) uint4 basis[Cf::D / 16 * Cf::GV * 32];
  alignas(16) float latent[Cf::kRecord], exact[2 * Cf::kRecord], exchange[160];
  alignas(16) float parts[Parts > 1 ? Merging<Cf, 128 * Parts>::kGroups * Cf::kRecord : 1];
  uint64_t loaded;  // mbarrier of the basis
  int pieces;
  uint16_t list[kMaxPieces];
};

// Grid: virtual heads x requests; 128 * Parts threads: warpgroups that share the pieces of a request, where blocks are so
// few that one alone would wait for its loads. The latent kernel had waited for everything before it when it let this one
// start, so the query and the window's pages are there; its own results are waited for as late as possible.
template <class Cf, int Parts>
__global__ void __launch_bounds__(128 * Parts, Parts == 1 ? 4 : 1) finish_kernel(const __grid_constant__ DecodeParams p) {
  KQ_DYNAMIC_SHARED(shared);
  FinishShared<Cf, Parts>& s = *reinterpret_cast<FinishShared<Cf, Parts>*>(shared);
  constexpr int kBytes = sizeof(s.basis);
  const uint32_t loaded = shared_address(&s.loaded);
  const int vh = blockIdx.x, request = blockIdx.y;
  const int head = p.column_groups == 1 ? vh : vh / p.column_groups, column0 = (vh - head * p.column_groups) * Cf::C;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, part = Parts == 1 ? 0 : warp >> 2;
  // The next layer's CTAs get ready while these blocks wait: before their own wait they read the schedule and block table.
  release_next_grid_early();
  if (thread == 0) {
    mbarrier_init(loaded, 1);
    proxy_fence();
    mbarrier_expect(loaded, kBytes);
    bulk_copy(shared_address(s.basis), p.value_basis + static_cast<int64_t>(head) * (kBytes / 16), kBytes, loaded);
  }
  const Request r = p.requests[request];
  const OutputPlace<Cf, 4 * Parts> place(p, r, head, column0, warp, lane);
  const bool has_latent = r.first < r.last;
  if (has_latent && warp == 4 * Parts - 1) {  // a warp with the fewest tokens of the window
    const Cut cut(p, p.requests[p.num_requests].unit_begin);
    const int n = list_pieces<Cf>(s.list, cut, p.max_phases, vh, r.unit_begin, r.unit_end, lane);
    if (lane == 0) s.pieces = n;
  }
  if (r.num_rows > 0 && r.last < r.length) {
    if (part == 0) {
      attend_window<Cf>(s.exact, s.exchange, p, r, request, head, column0, warp, lane);
    } else {  // racecheck counts barriers, whichever they are: as many here as in merge_warps
      for (int i = 0; i < 3; ++i) warpgroup_barrier(part);
    }
  } else {
    for (int i = thread; i < 2 * Cf::kRecord; i += 128 * Parts)
      s.exact[i] = i / Cf::C == Cf::kOutRows + 3 ? kEmptyMax : 0.f;
  }
  __syncthreads();
  mbarrier_wait(loaded, 0);  // no copy may outlive the block
  wait_for_previous_grid();
  if (r.num_rows == 0) return;
  const int n = !has_latent ? 0 : s.pieces;
  const float* whole = p.whole_partials + (static_cast<int64_t>(request) * gridDim.x + vh) * Cf::kRecord;
  const auto record = [&](int i) {
    return n == 0 ? whole : p.partials + static_cast<int64_t>(s.list[i]) * Cf::kRecord;
  };
  merge_records<Cf, 128 * Parts>(s.latent, s.parts, record, !has_latent ? 0 : max(n, 1), thread);
  if (warp < Cf::D / 16) write_output<Cf>(s.latent, s.exact, s.basis, place, p.is_bf16, warp, lane);
}

}  // namespace kqsvd::decode
