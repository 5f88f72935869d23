// SPDX-License-Identifier: Apache-2.0
// Store of a prefill chunk: persistent CTAs of one side and head keep their tables in shared memory, and every warp
// takes 16 tokens at a time from global memory to page bytes on its own: rows, operands, latents and codes stay in its
// registers. Wide heads (d or R beyond 128) share 16 tokens between two warps, half of the groups each.
#pragma once

#include "store_params.cuh"

namespace kqsvd {

constexpr int kWarpGroups = 8;  // channel groups of one warp

template <int kColumns>
constexpr int kManyWarps = kColumns == 1 ? 12 : 8;  // what registers allow

// Offsets of the tables in dynamic shared memory; rows are padded so that the tokens of a warp hit different banks.
struct StoreManyLayout {
  int mean_stride, class_stride, encode, mean, classes, weight, plan, partial, codes, bytes;
};

__host__ __device__ inline StoreManyLayout store_many_layout(int dim, int steps, int groups, int period, int columns,
                                                             int warps, bool tables_shared) {
  StoreManyLayout l{};
  const int rank = groups * kGroup;
  l.mean_stride = tables_shared ? rank + 8 : rank;
  l.class_stride = tables_shared ? (dim + 31) / 32 * 32 + 16 : dim;
  int at = 0;
  l.encode = at, at += tables_shared ? groups * steps * 1024 : 0;
  l.mean = at, at += tables_shared ? period * l.mean_stride * 4 : 0;
  l.classes = at, at += tables_shared ? period * l.class_stride * 4 : 0;
  l.weight = at, at += 2 * rank * 4;
  l.plan = at, at += kPlanInts * 4;
  l.partial = at, at += columns > 1 ? warps * kTile * 8 : 0;
  l.codes = at, at += warps * kWarpGroups * 2 * 32 * 4;
  l.bytes = at;
  return l;
}

template <typename T, int kColumns, bool kShared, bool kSplit>
__device__ __forceinline__ void store_many_side(const StoreParams& p, const StoreSide& side, bool is_value, int first,
                                                int ctas) {
  constexpr int kSteps = 8 * kColumns, kChunks = kSteps / 2, kPairs = kManyWarps<kColumns> / kColumns;
  extern __shared__ __align__(16) char memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane >> 2, t = lane & 3, head = blockIdx.y;
  const int pair = warp / kColumns, column = warp % kColumns;
  const int steps = p.steps, groups = side.groups, rank = groups * kGroup, period = side.period;
  const StoreManyLayout l =
      store_many_layout(p.dim, steps, groups, period, kColumns, kManyWarps<kColumns>, kShared);

  const uint4* encode = side.encode + int64_t(head) * groups * steps * 64;
  const float* global_means = side.latent_mean + int64_t(head) * 2 * period * rank;
  const float* classes = side.class_vector + int64_t(head) * period * p.dim;
  const float* means = global_means;
  float* weights = reinterpret_cast<float*>(memory + l.weight);
  int* plan_ints = reinterpret_cast<int*>(memory + l.plan);
  if constexpr (kShared) {
    for (int i = tid; i < groups * steps * 64; i += blockDim.x) copy_async_16(memory + l.encode + 16 * i, encode + i);
    for (int i = tid; i < period * rank / 4; i += blockDim.x) {
      const int row = 4 * i / rank, c = 4 * i - row * rank;
      copy_async_16(memory + l.mean + 4 * (row * l.mean_stride + c), means + 4 * i);
    }
    for (int i = tid; i < period * p.dim / 4; i += blockDim.x) {
      const int row = 4 * i / p.dim, c = 4 * i - row * p.dim;
      copy_async_16(memory + l.classes + 4 * (row * l.class_stride + c), classes + 4 * i);
    }
    encode = reinterpret_cast<const uint4*>(memory + l.encode);
    means = reinterpret_cast<const float*>(memory + l.mean);
    classes = reinterpret_cast<const float*>(memory + l.classes);
  }
  for (int i = tid; i < 2 * rank; i += blockDim.x) weights[i] = side.weight[head * 2 * rank + i];
  for (int i = tid; i < side.plan_ints; i += blockDim.x) plan_ints[i] = side.plan[i];
  copy_async_wait();
  __syncthreads();
  wait_for_previous_grid();
  release_next_grid();

  const PlanView plan{plan_ints};
  const T* x = static_cast<const T*>(side.x) + head * side.head_stride;
  uint32_t* codes = reinterpret_cast<uint32_t*>(memory + l.codes) + pair * kColumns * kWarpGroups * 64 + lane;
  float2* partial = reinterpret_cast<float2*>(memory + l.partial) + pair * kColumns * kTile;
  RopeTurn rope = p.rope;
  if (!side.rotate) rope.rotary_dim = 0;
  const int num_tiles = (p.num_tokens + kTile - 1) / kTile, stride = ctas * kPairs;

  StoreRow next = place_row(p, side, head, (first + pair * ctas) * kTile + (lane & 15), is_value);
  // With one column warps never meet; with two all of them take the same number of turns.
  for (int base = first; base + (kColumns > 1 ? 0 : pair * ctas) < num_tiles; base += stride) {
    const int tile = base + pair * ctas;
    int64_t page[2], window[2];
    int token[2], offset[2], block[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int from = g + 8 * y;
      page[y] = __shfl_sync(0xffffffffu, next.page, from);
      window[y] = __shfl_sync(0xffffffffu, next.window, from);
      token[y] = __shfl_sync(0xffffffffu, next.token, from);
      offset[y] = __shfl_sync(0xffffffffu, next.offset, from);
      block[y] = __shfl_sync(0xffffffffu, next.block, from);
    }

    uint32_t high[kChunks][2][4], low[kSplit ? kChunks : 1][2][4];
    float norm[2] = {}, dot[2] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {  // all loads first; operands take the place of the raw elements
      const int index = 4 * c + t;
      const Chunk chunk = chunk_of(index, rope);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const int n = tile * kTile + g + 8 * y;
        uint2 a{}, b{};
        if (8 * index < p.dim && n < p.num_tokens) {
          const T* row = x + n * side.token_stride;
          a = *reinterpret_cast<const uint2*>(row + chunk.a), b = *reinterpret_cast<const uint2*>(row + chunk.b);
        }
        high[c][y][0] = a.x, high[c][y][1] = a.y, high[c][y][2] = b.x, high[c][y][3] = b.y;
      }
    }
    const bool one_block = __all_sync(0xffffffffu, block[0] == block[1]);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int index = 4 * c + t;
      const Chunk chunk = chunk_of(index, rope);
      if (8 * index < p.dim) {
        float4 turn[2] = {};
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const uint2 a = make_uint2(high[c][y][0], high[c][y][1]), b = make_uint2(high[c][y][2], high[c][y][3]);
          if (window[y] >= 0 && column == 0) {
            T* out = static_cast<T*>(p.window) + window[y];
            *reinterpret_cast<uint2*>(out + chunk.a) = a;
            *reinterpret_cast<uint2*>(out + chunk.b) = b;
          }
          if (kSplit && chunk.turned && (y == 0 || !one_block)) load_turn(turn, index, block[y], rope);
          const float* w = classes + offset[y] * l.class_stride;
          split_chunk<T, kSplit>(a, b, kSplit && chunk.turned, rope.interleaved, turn,
                                 *reinterpret_cast<const float4*>(w + chunk.a),
                                 *reinterpret_cast<const float4*>(w + chunk.b), norm[y], dot[y], high[c][y],
                                 low[kSplit ? c : 0][y]);
        }
      } else if constexpr (kSplit) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
#pragma unroll
          for (int i = 0; i < 4; ++i) low[c][y][i] = 0;
        }
      }
    }
    if (tile + stride < num_tiles) {
      next = place_row(p, side, head, (tile + stride) * kTile + (lane & 15), is_value);
    } else {
      next.page = next.window = -1;
    }
    bool sink[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
#pragma unroll
      for (int m = 1; m < 4; m <<= 1) {
        norm[y] += __shfl_xor_sync(0xffffffffu, norm[y], m);
        dot[y] += __shfl_xor_sync(0xffffffffu, dot[y], m);
      }
      sink[y] = 0.7f * norm[y] - dot[y] + __ldg(side.class_offset + head * period + offset[y]) < 0.f;
    }

    float u[kWarpGroups][2][4] = {};
#pragma unroll
    for (int i = 0; i < kWarpGroups; i += 2) {  // two groups at a time: four independent accumulators
      const int left = column * kWarpGroups + i, right = min(left + 1, groups - 1);
      if (left < groups) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          if (k < steps) {
            const int c = k >> 1, e = k & 1 ? 2 : 0;
            const uint32_t h[4] = {high[c][0][e], high[c][1][e], high[c][0][e + 1], high[c][1][e + 1]};
            const uint4* at = encode + (left * steps + k) * 64 + lane;
            const uint4* beside = encode + (right * steps + k) * 64 + lane;
            const uint4 eh = at[0], el = at[32], fh = beside[0], fl = beside[32];
            mma_bf16(u[i][0], h, eh.x, eh.y);
            mma_bf16(u[i][1], h, eh.z, eh.w);
            mma_bf16(u[i + 1][0], h, fh.x, fh.y);
            mma_bf16(u[i + 1][1], h, fh.z, fh.w);
            mma_bf16(u[i][0], h, el.x, el.y);
            mma_bf16(u[i][1], h, el.z, el.w);
            mma_bf16(u[i + 1][0], h, fl.x, fl.y);
            mma_bf16(u[i + 1][1], h, fl.z, fl.w);
            if constexpr (kSplit) {
              const uint32_t m[4] = {low[c][0][e], low[c][1][e], low[c][0][e + 1], low[c][1][e + 1]};
              mma_bf16(u[i][0], m, eh.x, eh.y);
              mma_bf16(u[i][1], m, eh.z, eh.w);
              mma_bf16(u[i + 1][0], m, fh.x, fh.y);
              mma_bf16(u[i + 1][1], m, fh.z, fh.w);
            }
          }
        }
      }
    }

    // Subtract the mean's latents; the token scale. Lane (g, t) holds tokens g, g + 8 and channels 2t, 2t + 1 of each
    // n-tile.
    float sum[2] = {}, peak[2] = {};
    const float* mean_of[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      mean_of[y] = sink[y] ? global_means + (period + offset[y]) * rank : means + offset[y] * l.mean_stride;
      mean_of[y] += 2 * t;
    }
#pragma unroll
    for (int i = 0; i < kWarpGroups; ++i) {
      const int group = column * kWarpGroups + i;
      if (group < groups) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int channel = group * kGroup + 8 * n;
          const float4 w = *reinterpret_cast<const float4*>(weights + 2 * (channel + 2 * t));
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const float2 mu = *reinterpret_cast<const float2*>(mean_of[y] + channel);
            float& u0 = u[i][n][2 * y];
            float& u1 = u[i][n][2 * y + 1];
            u0 -= mu.x, u1 -= mu.y;
            sum[y] += w.x * u0 * u0 + w.z * u1 * u1;
            peak[y] = fmaxf(peak[y], fmaxf(w.y * fabsf(u0), w.w * fabsf(u1)));
          }
        }
      }
    }
#pragma unroll
    for (int y = 0; y < 2; ++y) {
#pragma unroll
      for (int m = 1; m < 4; m <<= 1) {
        sum[y] += __shfl_xor_sync(0xffffffffu, sum[y], m);
        peak[y] = fmaxf(peak[y], __shfl_xor_sync(0xffffffffu, peak[y], m));
      }
    }
    if constexpr (kColumns > 1) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        if (t == 0) partial[column * kTile + g + 8 * y] = make_float2(sum[y], peak[y]);
      }
      __syncthreads();
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const float2 a = partial[g + 8 * y], b = partial[kTile + g + 8 * y];
        sum[y] = a.x + b.x, peak[y] = fmaxf(a.y, b.y);
      }
    }
    float inverse[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const uint32_t byte = encode_scale(fmaxf(sqrtf(sum[y]), peak[y]));
      inverse[y] = 1.f / decode_scale(byte);
      if (t == 0 && column == 0 && page[y] >= 0) {
        p.pages[page[y] + plan.scale_offset() + token[y]] = byte | (sink[y] ? 128u : 0u);
      }
    }
#pragma unroll
    for (int i = 0; i < kWarpGroups; ++i) {
      const int group = column * kWarpGroups + i;
      if (group < groups) {
        const float half = static_cast<float>(1 << (plan.width(group) - 1));
#pragma unroll
        for (int y = 0; y < 2; ++y) codes[64 * group + 32 * y] = quantize_word(u[i][0], u[i][1], y, inverse[y], half);
      }
    }
    if constexpr (kColumns > 1) __syncthreads();  // else every lane reads what it wrote itself

    for (int i = column; i < plan.planes(); i += kColumns) {
      const PlaneView plane = plan.plane(i);
      const int4 header = *reinterpret_cast<const int4*>(plane.data);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const uint32_t bytes = gather_plane<64>(header, plane.data + 4, codes + 32 * y);
        if (page[y] >= 0) {
          write_columns(p.pages + page[y] + header.y, is_value, header.x & 256, token[y], t, bytes);
        }
      }
    }
  }
}

// Grid (key_ctas + value_ctas, heads).
template <typename T, int kColumns, bool kShared>
__global__ void __launch_bounds__(32 * kManyWarps<kColumns>, 1)
    store_many_kernel(const __grid_constant__ StoreParams p) {
  const int x = blockIdx.x;
  const bool is_value = x >= p.key_ctas;
  const StoreSide& side = p.side[is_value];
  const int first = is_value ? x - p.key_ctas : x, ctas = is_value ? gridDim.x - p.key_ctas : p.key_ctas;
  if (side.rotate || !std::is_same<T, __nv_bfloat16>::value) {
    store_many_side<T, kColumns, kShared, true>(p, side, is_value, first, ctas);
  } else {
    store_many_side<T, kColumns, kShared, false>(p, side, is_value, first, ctas);
  }
}

}  // namespace kqsvd
