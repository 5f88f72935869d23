// SPDX-License-Identifier: Apache-2.0
// Store of a decode step's tokens: latency is all that counts. One CTA per side, head and 16 tokens, one warp per
// group of channels; each warp loads its part of the encode matrix straight into operand registers, and its part of
// other tables by the positions it finds, before it waits for the kernel that makes the rows.
#pragma once

#include "store_params.cuh"

namespace kqsvd {

template <int kSteps>
struct StoreFewShared {
  alignas(16) uint32_t operand[2][kSteps][32][4];  // A fragments: high and low terms
  uint32_t codes[2][kMaxGroups][32];               // words of lane 4 g + t for tokens g and g + 8
  float2 partial[kMaxGroups][kTile];               // sum and peak of the token scale
  int64_t page[kTile];                             // byte offset of the token's tile, -1: not stored
  int token[kTile], mean_row[kTile];
  alignas(16) int plan[kPlanInts];
};

// kEarly: registers allow to load what hangs on positions before the wait.
template <typename T, int kSteps, bool kSplit, bool kEarly>
__device__ __forceinline__ void store_few_side(const StoreParams& p, const StoreSide& side, bool is_value, int tile,
                                               StoreFewShared<kSteps>& s) {
  constexpr bool kPreload = kSteps <= 8;
  const int tid = threadIdx.x, lane = tid & 31, g = lane >> 2, t = lane & 3, head = blockIdx.y;
  const int warp = uniform_warp_index(), groups = side.groups, rank = groups * kGroup, group = min(warp, groups - 1);

  // Constants: not written by any kernel of the step, so read before the previous one has ended.
  const uint4* encode = side.encode + (int64_t(head) * groups + group) * kSteps * 64 + lane;
  uint4 high[kPreload ? kSteps : 1], low[kPreload ? kSteps : 1];
  if constexpr (kPreload) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      high[k] = __ldg(encode + 64 * k), low[k] = __ldg(encode + 64 * k + 32);
    }
  }
  const float4* weights = reinterpret_cast<const float4*>(side.weight + 2 * (head * rank + group * kGroup));
  const float4 weight[2] = {__ldg(weights + t), __ldg(weights + 4 + t)};
  for (int i = tid; i < side.plan_ints; i += blockDim.x) s.plan[i] = side.plan[i];
  // What hangs on positions as well, by those found now: the kernel that writes them is many before this one. Should
  // they turn out to be others after the wait, it is asked for again.
  constexpr int kSlots = 2 * kSteps, kRows = 32 / kSlots;  // chunks of a row, rows of a warp
  const int index = lane % kSlots, r0 = warp * kRows + lane / kSlots, last = p.num_tokens - 1;
  RopeTurn rope = p.rope;
  if (!side.rotate) rope.rotary_dim = 0;
  const Chunk chunk = chunk_of(index, rope);
  const float* means = side.latent_mean + int64_t(head) * 2 * side.period * rank + group * kGroup + 2 * t;
  const float* classes = side.class_vector + int64_t(head) * side.period * p.dim;
  float2 mean[2][2];
  const auto load_means = [&](int y, int mean_row) {
    const float* from = means + mean_row * rank;
#pragma unroll
    for (int n = 0; n < 2; ++n) mean[y][n] = __ldg(reinterpret_cast<const float2*>(from + 8 * n));
  };
  float4 wa{}, wb{}, turn[2] = {};
  float bias = 0.f;  // of the class rule
  const auto load_frame = [&](int position, int block) {
    const int offset = position & (side.period - 1);
    bias = __ldg(side.class_offset + head * side.period + offset);
    if (index >= p.dim / 8) return;
    const float* from = classes + offset * p.dim;
    wa = __ldg(reinterpret_cast<const float4*>(from + chunk.a));
    wb = __ldg(reinterpret_cast<const float4*>(from + chunk.b));
    if (chunk.turned) load_turn(turn, turn_rows(block, index & 3, rope), 8 * (index >> 2));
  };
  const int tokens[3] = {tile * kTile + g, tile * kTile + g + 8, tile * kTile + r0};
  int found[3] = {};
  if constexpr (kEarly) {
#pragma unroll
    for (int i = 0; i < 3; ++i) found[i] = low_word(p.positions, min(tokens[i], last));
#pragma unroll
    for (int y = 0; y < 2; ++y) load_means(y, found[y] & (side.period - 1));  // of the ordinary class
    load_frame(found[2], min(max(found[2] >> rope.block_shift, 0), kTurnRows * kTurnRows - 1));
  }
  wait_for_previous_grid();
  release_next_grid();

  {  // rows: exact copy, turn back, class, split into two terms
    const auto load_row = [&](int n, uint2& a, uint2& b) {
      if (index >= p.dim / 8 || n > last) return;
      const T* x = static_cast<const T*>(side.x) + n * side.token_stride + head * side.head_stride;
      a = *reinterpret_cast<const uint2*>(x + chunk.a);
      b = *reinterpret_cast<const uint2*>(x + chunk.b);
    };
    uint2 a{}, b{};
    StoreSlots slots{-1, -1, 0};
    if (kEarly && r0 < kTile) load_row(tokens[2], a, b), slots = load_slots(p, tokens[2]);
    for (int r = r0; r < kTile; r += (blockDim.x >> 5) * kRows) {
      const int n = tile * kTile + r;
      if (!kEarly || r != r0) load_row(n, a, b), slots = load_slots(p, n);
      const StoreRow row = place_row(p, side, head, slots, is_value);
      if (!kEarly || r != r0 || slots.position != found[2]) load_frame(slots.position, row.block);
      float norm = 0.f, dot = 0.f;
      {
        uint32_t h[4] = {}, l[4] = {};
        if (index < p.dim / 8 && n <= last) {
          if (row.window >= 0) {
            T* out = static_cast<T*>(p.window) + row.window;
            *reinterpret_cast<uint2*>(out + chunk.a) = a;
            *reinterpret_cast<uint2*>(out + chunk.b) = b;
          }
          split_chunk<T, kSplit>(a, b, chunk.turned, rope.interleaved, turn, wa, wb, norm, dot, h, l);
        }
        const int to = 4 * (r & 7) + (index & 3), step = index >> 2 << 1, y = r >> 3;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s.operand[0][step + (i >> 1)][to][2 * (i & 1) + y] = h[i];
          if constexpr (kSplit) s.operand[1][step + (i >> 1)][to][2 * (i & 1) + y] = l[i];
        }
      }
#pragma unroll
      for (int m = kSlots / 2; m > 0; m >>= 1) {
        norm += __shfl_xor_sync(0xffffffffu, norm, m);
        dot += __shfl_xor_sync(0xffffffffu, dot, m);
      }
      if (index == 0) {
        s.mean_row[r] = (0.7f * norm - dot + bias < 0.f ? side.period : 0) + row.offset;
        s.page[r] = row.page, s.token[r] = row.token;
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int y = 0; y < 2; ++y) {
    const int mean_row = s.mean_row[g + 8 * y];
    if (!kEarly || mean_row != (found[y] & (side.period - 1))) load_means(y, mean_row);
  }

  float u[2][4] = {};
  {
    float more[2][2][4] = {};  // a chain of its own for every product
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint4 eh = kPreload ? high[kPreload ? k : 0] : __ldg(encode + 64 * k);
      const uint4 el = kPreload ? low[kPreload ? k : 0] : __ldg(encode + 64 * k + 32);
      uint32_t a[4];
      load_operand(a, s.operand[0][k][lane]);
      mma_bf16(u[0], a, eh.x, eh.y);
      mma_bf16(u[1], a, eh.z, eh.w);
      mma_bf16(more[0][0], a, el.x, el.y);
      mma_bf16(more[0][1], a, el.z, el.w);
      if constexpr (kSplit) {
        load_operand(a, s.operand[1][k][lane]);
        mma_bf16(more[1][0], a, eh.x, eh.y);
        mma_bf16(more[1][1], a, eh.z, eh.w);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) u[n][i] += more[0][n][i] + more[1][n][i];
    }
  }

#pragma unroll
  for (int y = 0; y < 2; ++y) {
    float sum = 0.f, peak = 0.f;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 mu = mean[y][n];
      float& u0 = u[n][2 * y];
      float& u1 = u[n][2 * y + 1];
      u0 -= mu.x, u1 -= mu.y;
      sum += weight[n].x * u0 * u0, sum += weight[n].z * u1 * u1;
      peak = fmaxf(peak, fmaxf(weight[n].y * fabsf(u0), weight[n].w * fabsf(u1)));
    }
#pragma unroll
    for (int m = 1; m < 4; m <<= 1) {
      sum += __shfl_xor_sync(0xffffffffu, sum, m);
      peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, m));
    }
    if (t == 0 && warp < groups) s.partial[warp][g + 8 * y] = make_float2(sum, peak);
  }
  __syncthreads();

  const PlanView plan{s.plan};
  {  // lane r and lane r + 16 add up the scale of token r
    const int r = lane & 15;
    float sum = 0.f, peak = 0.f;
    for (int w = lane >> 4; w < groups; w += 2) {
      const float2 part = s.partial[w][r];
      sum += part.x, peak = fmaxf(peak, part.y);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    peak = fmaxf(peak, __shfl_xor_sync(0xffffffffu, peak, 16));
    const uint32_t byte = encode_scale(fmaxf(approximate_sqrt(sum), peak));
    const float inverse = approximate_reciprocal(decode_scale(byte));
    if (warp == 0 && lane < kTile && s.page[r] >= 0) {
      p.pages[s.page[r] + plan.scale_offset() + s.token[r]] = byte | (s.mean_row[r] >= side.period ? 128u : 0u);
    }
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const float mine = __shfl_sync(0xffffffffu, inverse, g + 8 * y);
      const uint32_t word = quantize_word(u[0], u[1], y, mine, plan.width(group));
      if (warp < groups) s.codes[y][warp][lane] = word;
    }
  }
  __syncthreads();

  for (int i = warp; i < 2 * plan.planes(); i += blockDim.x >> 5) {
    const int y = i & 1, token = s.token[g + 8 * y];
    const int64_t page = s.page[g + 8 * y];
    const PlaneView plane = plan.plane(i >> 1);
    const int4 header = *reinterpret_cast<const int4*>(plane.data);
    if (page < 0) continue;
    const auto* words = reinterpret_cast<const CodeWords<1>*>(&s.codes[y][0][lane]);
    const CodeWords<1> bytes = gather_plane<32>(plane, header.z, words);
    write_columns(p.pages + page + header.y, is_value, header.x & 256, token, t, bytes.of[0]);
  }
}

// Grid (2 tiles, heads); block 32 * groups. kResident: CTAs that have to fit on a multiprocessor.
template <typename T, int kSteps, int kResident>
__global__ void __launch_bounds__(kSteps > 8 ? 512 : 256, kResident)
    store_few_kernel(const __grid_constant__ StoreParams p) {
  extern __shared__ __align__(1024) char memory[];
  StoreFewShared<kSteps>& shared = *reinterpret_cast<StoreFewShared<kSteps>*>(memory);
  const bool is_value = blockIdx.x & 1;
  const StoreSide& side = p.side[is_value];
  if (side.rotate || !std::is_same<T, __nv_bfloat16>::value) {
    store_few_side<T, kSteps, true, kResident == 1>(p, side, is_value, blockIdx.x >> 1, shared);
  } else {
    store_few_side<T, kSteps, false, kResident == 1>(p, side, is_value, blockIdx.x >> 1, shared);
  }
}

}  // namespace kqsvd
