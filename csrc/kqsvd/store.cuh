// SPDX-License-Identifier: Apache-2.0
// Store: turn keys back to their rope block, project K and V on tensor cores, quantize, pack and scatter; in the
// same pass copy the rows exactly into the window pages (docs/format.md, 1 and 2).
//
// One CTA owns one side (K or V) of one head and walks over tiles of tokens; its encode matrix stays in shared
// memory. x is split into two bf16 terms and so is the matrix, and three of the four products are kept, which
// leaves about 16 bits of the latents: codes equal those of exact arithmetic but for values on a rounding boundary.
// Values (and unrotated keys) of bf16 models are one term already. The mean is subtracted after the projection.
#pragma once

#include "plan_table.cuh"
#include "primitives.cuh"

namespace kqsvd {

struct StoreSide {
  const void* x;  // [N, H, d]
  int64_t token_stride, head_stride;
  const uint4* encode;        // [H][groups][d / 16][2 (high, low)][32 lanes]: B fragments of two n-tiles
  const float* weight;        // [H][R][2]: scale and guard weight
  const float* latent_mean;   // [H][2 (ordinary, sink)][period][R]
  const float* class_vector;  // [H][period][d]: 2 (sink - 0.3 mean)
  const float* class_offset;  // [H][period]: |sink|^2 - 0.3 |mean|^2
  const int* plan;
  int plan_ints, groups, period;
  bool rotate;
};

struct StoreParams {
  StoreSide side[2];
  RopeTurn rope;
  uint8_t* pages;
  int64_t page_stride;  // bytes
  void* window;
  int64_t window_stride[3];  // block, head, token; elements
  const int64_t *slots, *window_slots, *positions;
  int num_tokens, dim, chunk_lanes_log2, block_size, tiles_per_block, tile_bytes, window_block_size, key_ctas;
};

template <int kTokens, int kWarpColumns>
struct StoreShared {
  int64_t page[2][kTokens];    // byte offset of the token's tile, -1: no latent row (two steps are in flight)
  int64_t window[2][kTokens];  // element offset of the exact row, -1: none
  int block[2][kTokens], offset[2][kTokens], token[2][kTokens];
  int mean_row[kTokens];
  float inverse[kTokens];
  float2 partial[kWarpColumns][kTokens];
  float weight[2 * kGroup * kMaxGroups];
  alignas(16) int plan[kPlanInts];
};

struct StoreRow {
  int64_t slot, window_slot, position;
};

__device__ __forceinline__ StoreRow load_row(const StoreParams& p, int n) {
  StoreRow row{-1, -1, 0};
  if (n < p.num_tokens) {
    row.slot = p.slots[n];
    if (p.window_slots != nullptr) row.window_slot = p.window_slots[n];
    row.position = p.positions[n];
  }
  return row;
}

// The low terms of the rows and, once these are consumed, the codes share one region.
__host__ __device__ constexpr int code_row_words(int groups) { return 4 * (groups | 1); }
__host__ __device__ constexpr int low_row_bytes(int dim, int groups) {
  return padded_row(dim) > 4 * code_row_words(groups) ? padded_row(dim) : 4 * code_row_words(groups);
}

// Bytes of dynamic shared memory; `encode_shared` false leaves the matrix in global memory.
template <int kTokens, int kWarpColumns>
inline size_t store_shared_bytes(int dim, int groups, bool encode_shared) {
  const size_t encode = encode_shared ? size_t(groups) * (dim / 16) * 1024 : 0;
  const size_t rows = size_t(kTokens) * (padded_row(dim) + low_row_bytes(dim, groups));
  return encode + rows + sizeof(StoreShared<kTokens, kWarpColumns>);
}

template <typename T, int WM, int MW, int GPW, int kWarpColumns, bool kEncodeShared, bool kSplit>
__device__ __forceinline__ void store_side(const StoreParams& p, const StoreSide& side, bool is_value, int first,
                                           int stride) {
  constexpr int kTokens = WM * MW * 16;
  using Shared = StoreShared<kTokens, kWarpColumns>;
  extern __shared__ __align__(16) char memory[];
  const int steps = p.dim / 16, groups = side.groups, rank = groups * kGroup;
  const int row_bytes = padded_row(p.dim), code_stride = code_row_words(groups);
  char* high = memory + (kEncodeShared ? groups * steps * 1024 : 0);
  char* low = high + kTokens * row_bytes;
  uint32_t* codes = reinterpret_cast<uint32_t*>(low);
  Shared& s = *reinterpret_cast<Shared*>(low + kTokens * low_row_bytes(p.dim, groups));

  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, num_warps = blockDim.x >> 5;
  const int head = blockIdx.y, wm = warp % WM, wn = warp / WM, warp_columns = num_warps / WM;
  const int num_tiles = (p.num_tokens + kTokens - 1) / kTokens;
  if (first >= num_tiles) return;

  const T* x = static_cast<const T*>(side.x) + head * side.head_stride;
  const auto fetch = [&](int tile) {
    const int vectors = p.dim / 8;
    for (int i = tid; i < kTokens * vectors; i += blockDim.x) {
      const int row = i / vectors, c = i - row * vectors, n = tile * kTokens + row;
      if (n < p.num_tokens) copy_async_16(high + row * row_bytes + 16 * c, x + n * side.token_stride + 8 * c);
    }
  };
  const auto place = [&](const StoreRow& row, int buffer) {  // by the thread `tid` of row `tid`
    int64_t page = -1, window = -1;
    int token = 0, block = 0, offset = 0;
    if (row.slot >= 0) {
      const uint32_t slot = static_cast<uint32_t>(row.slot), size = p.block_size;
      const uint32_t in_block = slot % size;
      page = int64_t(slot / size) * p.page_stride + int64_t(head * p.tiles_per_block + in_block / kTile) * p.tile_bytes;
      token = in_block % kTile;
      offset = static_cast<int>(row.position) & (side.period - 1);
      if (side.rotate) {
        const int64_t b = row.position >> p.rope.block_shift;
        if (b < 0 || b >= kTurnRows * kTurnRows) __trap();  // outside every table: better dead than wrong
        block = static_cast<int>(b);
      }
    }
    if (row.window_slot >= 0) {
      const uint32_t slot = static_cast<uint32_t>(row.window_slot), size = p.window_block_size;
      window = int64_t(slot / size) * p.window_stride[0] + head * p.window_stride[1] +
               int64_t(slot % size) * p.window_stride[2] + (is_value ? p.dim : 0);
    }
    s.page[buffer][tid] = page, s.window[buffer][tid] = window;
    s.token[buffer][tid] = token, s.block[buffer][tid] = block, s.offset[buffer][tid] = offset;
  };

  StoreRow row{-1, -1, 0};
  if (tid < kTokens) row = load_row(p, first * kTokens + tid);
  fetch(first);
  const uint4* encode = side.encode + int64_t(head) * groups * steps * 64;
  if constexpr (kEncodeShared) {
    for (int i = tid; i < groups * steps * 64; i += blockDim.x) copy_async_16(memory + 16 * i, encode + i);
    encode = reinterpret_cast<const uint4*>(memory);
  }
  for (int i = tid; i < side.plan_ints; i += blockDim.x) s.plan[i] = side.plan[i];
  for (int i = tid; i < 2 * rank; i += blockDim.x) s.weight[i] = side.weight[head * 2 * rank + i];
  if (tid < kTokens) place(row, 0);
  const PlanView plan{s.plan};

  int buffer = 0;
  for (int tile = first; tile < num_tiles; tile += stride, buffer ^= 1) {
    copy_async_wait();
    __syncthreads();

    // Few tokens: latency counts, so the ordinary mean's latents are asked for before the class is known.
    const int g = lane >> 2, t = lane & 3;
    const float* means = side.latent_mean + int64_t(head) * 2 * side.period * rank + 2 * t;
    float2 early[2][2];
    if constexpr (kTokens == kTile) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int channel = min(wn, groups - 1) * kGroup + 8 * n;
          early[y][n] = __ldg(reinterpret_cast<const float2*>(means + s.offset[buffer][g + 8 * y] * rank + channel));
        }
      }
    }

    {  // rows: exact copy, turn back, class, split into two terms
      const int lanes = 1 << p.chunk_lanes_log2, index = lane & (lanes - 1), rows = 32 >> p.chunk_lanes_log2;
      RopeTurn rope = p.rope;
      if (!side.rotate) rope.rotary_dim = 0;
      const Chunk chunk = chunk_of(index, rope);
      for (int base = warp * rows; base < kTokens; base += num_warps * rows) {
        const int r = base + (lane >> p.chunk_lanes_log2);
        const bool coded = s.page[buffer][r] >= 0;
        float norm = 0.f, dot = 0.f;
        if (index < p.dim / 8 && (coded || s.window[buffer][r] >= 0)) {
          uint2* at_a = reinterpret_cast<uint2*>(high + r * row_bytes + 2 * chunk.a);
          uint2* at_b = reinterpret_cast<uint2*>(high + r * row_bytes + 2 * chunk.b);
          const uint2 a = *at_a, b = *at_b;
          if (s.window[buffer][r] >= 0) {
            T* out = static_cast<T*>(p.window) + s.window[buffer][r];
            *reinterpret_cast<uint2*>(out + chunk.a) = a;
            *reinterpret_cast<uint2*>(out + chunk.b) = b;
          }
          if (coded) {
            const float2 x0 = unpack2(a.x, T()), x1 = unpack2(a.y, T()), x2 = unpack2(b.x, T()), x3 = unpack2(b.y, T());
            float v[8] = {x0.x, x0.y, x1.x, x1.y, x2.x, x2.y, x3.x, x3.y};
            if (chunk.turned) turn_chunk(v, index, s.block[buffer][r], rope, -1.f);
            const float* w = side.class_vector + (int64_t(head) * side.period + s.offset[buffer][r]) * p.dim;
            const float4 wa = __ldg(reinterpret_cast<const float4*>(w + chunk.a));
            const float4 wb = __ldg(reinterpret_cast<const float4*>(w + chunk.b));
#pragma unroll
            for (int i = 0; i < 8; ++i) norm += v[i] * v[i];
            dot = v[0] * wa.x + v[1] * wa.y + v[2] * wa.z + v[3] * wa.w;
            dot += v[4] * wb.x + v[5] * wb.y + v[6] * wb.z + v[7] * wb.w;
            if constexpr (kSplit) {
              uint32_t h[4], l[4];
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                h[i] = pack2(v[2 * i], v[2 * i + 1], __nv_bfloat16());
                const float2 back = unpack2(h[i], __nv_bfloat16());
                l[i] = pack2(v[2 * i] - back.x, v[2 * i + 1] - back.y, __nv_bfloat16());
              }
              *at_a = make_uint2(h[0], h[1]);
              *at_b = make_uint2(h[2], h[3]);
              *reinterpret_cast<uint2*>(low + r * row_bytes + 2 * chunk.a) = make_uint2(l[0], l[1]);
              *reinterpret_cast<uint2*>(low + r * row_bytes + 2 * chunk.b) = make_uint2(l[2], l[3]);
            }
          }
        }
        for (int m = lanes >> 1; m > 0; m >>= 1) {
          norm += __shfl_xor_sync(0xffffffffu, norm, m);
          dot += __shfl_xor_sync(0xffffffffu, dot, m);
        }
        if (index == 0) {
          const int j = s.offset[buffer][r];
          const bool sink = 0.7f * norm - dot + __ldg(side.class_offset + head * side.period + j) < 0.f;
          s.mean_row[r] = (sink ? side.period : 0) + j;
        }
      }
    }
    __syncthreads();

    float u[MW][GPW][2][4] = {};
    for (int k = 0; k < steps; ++k) {
      uint32_t h[MW][4], l[MW][4];
#pragma unroll
      for (int m = 0; m < MW; ++m) {
        const int at = (wm * MW + m) * 16 * row_bytes + 32 * k;
        load_fragment_a(h[m], high + at, row_bytes, lane);
        if constexpr (kSplit) load_fragment_a(l[m], low + at, row_bytes, lane);
      }
#pragma unroll
      for (int i = 0; i < GPW; ++i) {
        const int group = wn + i * warp_columns;
        if (group < groups) {
          const uint4* e = encode + (group * steps + k) * 64 + lane;
          const uint4 eh = e[0], el = e[32];
#pragma unroll
          for (int m = 0; m < MW; ++m) {
            mma_bf16(u[m][i][0], h[m], eh.x, eh.y);
            mma_bf16(u[m][i][1], h[m], eh.z, eh.w);
            mma_bf16(u[m][i][0], h[m], el.x, el.y);
            mma_bf16(u[m][i][1], h[m], el.z, el.w);
            if constexpr (kSplit) {
              mma_bf16(u[m][i][0], l[m], eh.x, eh.y);
              mma_bf16(u[m][i][1], l[m], eh.z, eh.w);
            }
          }
        }
      }
    }

    // Subtract the mean's latents; partial sums of the token scale. Lane (g, t) holds tokens g, g + 8 and channels
    // 2t, 2t + 1 of each n-tile.
#pragma unroll
    for (int m = 0; m < MW; ++m) {
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const int r = (wm * MW + m) * 16 + g + 8 * y;
        const float* mean = means + s.mean_row[r] * rank;
        const bool ordinary = s.mean_row[r] < side.period;
        float sum = 0.f, peak = 0.f;
#pragma unroll
        for (int i = 0; i < GPW; ++i) {
          const int group = wn + i * warp_columns;
          if (group < groups) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              const int channel = group * kGroup + 8 * n;
              float2 mu;
              if (kTokens == kTile && ordinary) {
                mu = early[y][n];
              } else {
                mu = __ldg(reinterpret_cast<const float2*>(mean + channel));
              }
              const float4 w = *reinterpret_cast<const float4*>(s.weight + 2 * (channel + 2 * t));
              float& u0 = u[m][i][n][2 * y];
              float& u1 = u[m][i][n][2 * y + 1];
              u0 -= mu.x, u1 -= mu.y;
              sum += w.x * u0 * u0 + w.z * u1 * u1;
              peak = fmaxf(peak, fmaxf(w.y * fabsf(u0), w.w * fabsf(u1)));
            }
          }
        }
#pragma unroll
        for (int mask = 1; mask < 4; mask <<= 1) {
          sum += __shfl_xor_sync(0xffffffffu, sum, mask);
          peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, mask));
        }
        if (t == 0) s.partial[wn][r] = make_float2(sum, peak);
      }
    }
    __syncthreads();

    // The rows are consumed: fetch the next ones behind the rest of this tile.
    if (tile + stride < num_tiles) {
      fetch(tile + stride);
      if (tid < kTokens) row = load_row(p, (tile + stride) * kTokens + tid);
    }
    if (tid < kTokens) {
      float sum = 0.f, peak = 0.f;
      for (int i = 0; i < warp_columns; ++i) {
        const float2 part = s.partial[i][tid];
        sum += part.x, peak = fmaxf(peak, part.y);
      }
      const uint32_t byte = encode_scale(fmaxf(sqrtf(sum), peak));
      s.inverse[tid] = 1.f / decode_scale(byte);
      if (s.page[buffer][tid] >= 0) {
        const uint32_t sink = s.mean_row[tid] >= side.period ? 128u : 0u;
        p.pages[s.page[buffer][tid] + plan.scale_offset() + s.token[buffer][tid]] = byte | sink;
      }
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < GPW; ++i) {
      const int group = wn + i * warp_columns;
      if (group < groups) {
        const float half = static_cast<float>(1 << (plan.width(group) - 1)), top = 2.f * half - 0.5f;
#pragma unroll
        for (int m = 0; m < MW; ++m) {
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const int r = (wm * MW + m) * 16 + g + 8 * y;
            const float inverse = s.inverse[r];
            uint32_t word = 0;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                const float level = fminf(fmaxf(u[m][i][n][2 * y + e] * inverse + half, 0.f), top);
                // Adding 2^23 and rounding down leaves the floor in the low bits.
                word |= (__float_as_uint(__fadd_rd(level, 8388608.f)) & 255u) << (16 * e + 8 * n);
              }
            }
            codes[r * code_stride + 4 * group + t] = word;
          }
        }
      }
    }
    __syncthreads();

    for (int i = tid; i < plan.planes() * kTokens * 4; i += blockDim.x) {
      const int c = i & 3, r = (i >> 2) % kTokens;
      const PlaneView plane = plan.plane((i >> 2) / kTokens);
      const int64_t page = s.page[buffer][r];
      if (page < 0) continue;
      const int4 head = *reinterpret_cast<const int4*>(plane.data);
      const uint32_t bytes = gather_plane(head, plane.data + 4, codes + r * code_stride + c);
      const bool half = head.x & 256;
      uint8_t* out = p.pages + page + head.y;
      const int token = s.token[buffer][r];
      uint8_t* at = out + column_offset(is_value, half, token, 2 * c);
      uint8_t* next = out + column_offset(is_value, half, token, 2 * c + 1);
      if (half) {
        *at = bytes, *next = bytes >> 16;
      } else if (is_value) {
        *reinterpret_cast<uint16_t*>(at) = bytes, *reinterpret_cast<uint16_t*>(next) = bytes >> 16;
      } else {
        *reinterpret_cast<uint32_t*>(at) = bytes;
      }
    }
    if (tid < kTokens) place(row, buffer ^ 1);
  }
}

// Grid (key_ctas + value_ctas, heads); block 32 * WM * (warps over the groups).
template <typename T, int WM, int MW, int GPW, int kWarpColumns, bool kEncodeShared>
__global__ void __launch_bounds__(512) store_kernel(const __grid_constant__ StoreParams p) {
  const int x = blockIdx.x;
  const bool is_value = x >= p.key_ctas;
  const StoreSide& side = p.side[is_value];
  const int first = is_value ? x - p.key_ctas : x, stride = is_value ? gridDim.x - p.key_ctas : p.key_ctas;
  if (side.rotate || !std::is_same<T, __nv_bfloat16>::value) {
    store_side<T, WM, MW, GPW, kWarpColumns, kEncodeShared, true>(p, side, is_value, first, stride);
  } else {
    store_side<T, WM, MW, GPW, kWarpColumns, kEncodeShared, false>(p, side, is_value, first, stride);
  }
}

}  // namespace kqsvd
