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
  const float sum = f * l + fw * lw, inverse = sum > 0.f ? 1.f / sum : 0.f;
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

// A lane's rows of the means: of the 16-row tiles warp, warp + 4.
template <class Cf>
struct OutputMeans {
  static constexpr int kTiles = (Cf::D / 16 + 3) / 4;
  float mean[kTiles][2], sink[kTiles][2], factor;

  __device__ __forceinline__ OutputMeans(const DecodeParams& p, int head, int warp, int lane) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const float* from = p.value_mean + head * 2 * Cf::D + 16 * min(warp + 4 * k, Cf::D / 16 - 1) + (lane >> 2);
#pragma unroll
      for (int y = 0; y < 2; ++y) mean[k][y] = from[8 * y], sink[k][y] = from[Cf::D + 8 * y];
    }
    factor = p.value_factor[head];
  }
};

// out = decode_V^T (acc - z sum ps) + mean_V sum p + (sink - mean) sum p over sinks + exact part, normalised.
// `latent`: the merged record of the latent part; `exact`: two halves of the window's; `basis`: A fragments
// [head_dim / 16][groups][32]. All in shared memory.
template <class Cf>
__device__ __forceinline__ void write_output(const float* latent, const float* exact, const uint4* basis,
                                             const OutputMeans<Cf>& means, const DecodeParams& p, const Request& r,
                                             int head, int column0, int warp, int lane) {
  constexpr int C = Cf::C, D = Cf::D, GV = Cf::GV;
  const int g = lane >> 2, t = lane & 3;
  const auto weights = [&](int column) {
    return part_weights<Cf>(latent, column, exact[Cf::kOutRows * C + column], exact[(Cf::kOutRows + 3) * C + column]);
  };
  uint32_t b[GV][2];
  {
    const int column = g % C;
    const float weight = g < C ? weights(column).x : 0.f;
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
  uint16_t* to[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int column = (2 * t + c) % C;
    int row = 0, query_head = column0 + column;
    for (; query_head >= p.heads_per_kv; query_head -= p.heads_per_kv) ++row;
    const float2 weight = weights(column);
    exact_weight[c] = weight.y;
    mean_sum[c] = latent[Cf::kOutRows * C + column] * weight.x;
    sink_sum[c] = latent[(Cf::kOutRows + 2) * C + column] * weight.x;
    to[c] = static_cast<uint16_t*>(p.out) + (r.row + row) * p.out_token_stride +
            (head * p.heads_per_kv + query_head) * p.out_head_stride;
    if (2 * t + c >= C || row >= r.num_rows) to[c] = nullptr;
  }
#pragma unroll
  for (int k = 0; k < OutputMeans<Cf>::kTiles; ++k) {
    const int tile = warp + 4 * k;
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
      const float x = o[e] * means.factor + mean_sum[c] * means.mean[k][y] + sink_sum[c] * means.sink[k][y] +
                      exact_weight[c] * (exact[at] + exact[Cf::kRecord + at]);
      const uint16_t bits =
          p.is_bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
      if (to[c]) to[c][dim] = bits;
    }
  }
}

template <class Cf, int Parts>
struct FinishShared {
  alignas(128) uint4 basis[Cf::D / 16 * Cf::GV * 32];
  alignas(16) float latent[Cf::kRecord], exact[2 * Cf::kRecord], scratch[4 * Parts * (64 * Parts)];
  alignas(16) float parts[Parts > 1 ? Parts * Cf::kRecord : 1];
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
  const OutputMeans<Cf> means(p, head, warp & 3, lane);
  const bool has_latent = r.first < r.last;
  if (has_latent && warp == 4 * Parts - 1) {  // a warp with the fewest tokens of the window
    const Cut cut(p, p.requests[p.num_requests].unit_begin);
    const int n = list_pieces<Cf>(s.list, cut, p.max_phases, vh, r.unit_begin, r.unit_end, lane);
    if (lane == 0) s.pieces = n;
  }
  if (r.num_rows > 0 && r.last < r.length) {
    if (part == 0) {
      attend_window<Cf>(s.exact, s.scratch, p, r, request, head, column0, warp, lane);
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
  merge_records<Cf, Parts>(s.latent, s.parts, s.scratch, record, !has_latent ? 0 : max(n, 1), thread);
  if (part > 0) return;
  write_output<Cf>(s.latent, s.exact, s.basis, means, p, r, head, column0, warp, lane);
}

}  // namespace kqsvd::decode
