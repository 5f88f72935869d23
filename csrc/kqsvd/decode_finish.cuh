// SPDX-License-Identifier: Apache-2.0
// Second kernel of a decode layer: the exact window, the pieces of the latent part and the value basis make the output.
// One block per request and virtual head. It may start while latent CTAs are still at work: the window, which needs
// nothing of theirs, fills the multiprocessors that they leave.
#pragma once

#include "decode_window.cuh"

namespace kqsvd::decode {

// Weights of the latent and the exact part of a column in the normalised output; both 0 where nothing was visible.
template <class Cf>
__device__ __forceinline__ float2 part_weights(const float* record, int column, float lw, float mw) {
  const float l = record[Cf::kOutRows * Cf::C + column], m = record[(Cf::kOutRows + 3) * Cf::C + column];
  const float top = fmaxf(m, mw), f = exp2_fast(m - top), fw = exp2_fast(mw - top);
  const float sum = f * l + fw * lw, inverse = sum > 0.f ? approximate_reciprocal(sum) : 0.f;
  return make_float2(f * inverse, fw * inverse);
}

// What the rows of a group that is the highest field of an open plane hold beside it: the rows of the fields below.
// `sums`: column of a record; y: channel half of `channel`.
template <class Cf, int Group>
__device__ __forceinline__ float lower_fields(const float* sums, int channel, int y) {
  constexpr int p = Cf::V.first_plane(Group);
  constexpr Plane plane = Cf::V.planes[p];
  float sum = 0.f;
  if constexpr (Cf::V.is_open(p, false) && plane.groups[plane.count - 1] == Group) {
#pragma unroll
    for (int i = 0; i < plane.count; ++i) {
      const int lower = channel + 16 * (plane.groups[i] - Group);
      if (plane.groups[i] != Group && (!plane.half || y == 1)) sum += sums[lower * Cf::C];
      if (plane.half && y == 1) sum += sums[(lower - 8) * Cf::C];
    }
  }
  return sum;
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
    for (int c = 0; c < 2; ++c) {
      const int column = 2 * (lane & 3) + c;
      int row = 0, query_head = column0 + column % Cf::C;
      for (; query_head >= p.heads_per_kv; query_head -= p.heads_per_kv) ++row;
      to[c] = static_cast<uint16_t*>(p.out) + (r.row + row) * p.out_token_stride +
              (head * p.heads_per_kv + query_head) * p.out_head_stride;
      if (column >= Cf::C || row >= r.num_rows) to[c] = nullptr;
    }
  }
};

// out = decode_V^T (acc - z sum ps) + mean_V sum p + (sink - mean) sum p over sinks + exact part, normalised.
// `latent`: the merged record of the latent part; `exact`: two halves of the window's; `basis`: A fragments
// [head_dim / 16][groups][32]. All in shared memory. Warps: of the block; they share the 16-row tiles.
template <class Cf, int Warps>
__device__ __forceinline__ void write_output(const float* latent, const float* exact, const uint4* basis,
                                             const OutputPlace<Cf, Warps>& place, int is_bf16, int warp, int lane) {
  constexpr int C = Cf::C, D = Cf::D, GV = Cf::GV;
  const int g = lane >> 2, t = lane & 3;
  const int of_g = g % C;
  const float2 weights =
      part_weights<Cf>(latent, of_g, exact[Cf::kOutRows * C + of_g], exact[(Cf::kOutRows + 3) * C + of_g]);
  uint32_t b[GV][2];
  {
    const int column = of_g;
    const float weight = g < C ? weights.x : 0.f;
    const float ps = latent[(Cf::kOutRows + 1) * C + column];
    static_for<GV>([&](auto ig) {
      constexpr int group = ig;
      constexpr float units[2] = {static_cast<float>(power_of_two(24 - Cf::V.unit_exponent(group, 0, false))),
                                  static_cast<float>(power_of_two(24 - Cf::V.unit_exponent(group, 1, false)))};
      constexpr float zero = static_cast<float>(power_of_two(Cf::V.group_bits(group) - 1) - 0.5);
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 16 * group + 2 * t + (i & 1) + 8 * (i >> 1);
        const float sum = latent[channel * C + column] - lower_fields<Cf, group>(latent + column, channel, i >> 1);
        x[i] = (sum * units[i >> 1] - zero * ps) * weight;
      }
      b[group][0] = pack_f16(x[0], x[1]);
      b[group][1] = pack_f16(x[2], x[3]);
    });
  }
  float exact_weight[2], mean_sum[2], sink_sum[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = (2 * t + c) % C;
    const float weight = __shfl_sync(~0u, weights.x, 4 * column);  // lanes (g, t) have column g
    exact_weight[c] = __shfl_sync(~0u, weights.y, 4 * column);
    mean_sum[c] = latent[Cf::kOutRows * C + column] * weight;
    sink_sum[c] = latent[(Cf::kOutRows + 2) * C + column] * weight;
  }
#pragma unroll
  for (int k = 0; k < OutputPlace<Cf, Warps>::kTiles; ++k) {
    const int tile = warp + Warps * k;
    if (tile >= D / 16) break;
    float o[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < GV; ++i) {
      const uint4 a = basis[(tile * GV + i) * 32 + lane];
      mma_f16(o, a.x, a.y, a.z, a.w, b[i][0], b[i][1]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int y = e >> 1, c = e & 1, dim = 16 * tile + g + 8 * y, at = dim * C + (2 * t + c) % C;
      const float x = o[e] * place.factor + mean_sum[c] * place.mean[k][y] + sink_sum[c] * place.sink[k][y] +
                      exact_weight[c] * (exact[at] + exact[Cf::kRecord + at]);
      const uint16_t bits =
          is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
      if (place.to[c]) place.to[c][dim] = bits;
    }
  }
}

template <class Cf, int Parts>
struct FinishShared {
  alignas(128) uint4 basis[Cf::D / 16 * Cf::GV * 32];
  alignas(16) float latent[Cf::kRecord], exact[2 * Cf::kRecord], exchange[160];
  alignas(16) float parts[Parts > 1 ? Merging<Cf, Parts>::kGroups * Cf::kRecord : 1];
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
  merge_records<Cf, Parts>(s.latent, s.parts, record, !has_latent ? 0 : max(n, 1), thread);
  if (warp < Cf::D / 16) write_output<Cf>(s.latent, s.exact, s.basis, place, p.is_bf16, warp, lane);
}

}  // namespace kqsvd::decode
