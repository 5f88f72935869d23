// SPDX-License-Identifier: Apache-2.0
// Store of a prefill chunk: persistent CTAs of one side and head keep their tables in shared memory, and every warp
// takes 16 tokens at a time from global memory to page bytes on its own: rows, operands, latents and codes stay in its
// registers. Where the tables fit, the four warps of a warpgroup multiply together (wgmma), each its own 16 tokens. Wide
// heads (d or R beyond 128) share 16 tokens between two warps, half of the groups each.
#pragma once

#include "store_params.cuh"
#include "store_project.cuh"

namespace kqsvd {

constexpr int kWarpGroups = 8;  // channel groups of one warp

// Warps that share 16 tokens, and warps of a CTA: what registers allow.
__host__ __device__ constexpr int many_columns(int steps) { return steps > 8 ? 2 : 1; }
__host__ __device__ constexpr int many_warps(int steps) { return steps > 8 ? 8 : 12; }

// Offsets of the tables in dynamic shared memory; rows are padded so that the tokens of a warp hit different banks.
// `halves`: chunks have their two parts half a row apart, so that neighbours lie 16 bytes apart, not 32.
struct StoreManyLayout {
  int mean_stride, class_stride, encode, mean, classes, weight, plan, partial, codes, bytes;
};

__host__ __device__ inline StoreManyLayout store_many_layout(int dim, int steps, int groups, int period, bool halves,
                                                             bool tables_shared) {
  StoreManyLayout l{};
  const int rank = groups * kGroup, columns = many_columns(steps), warps = many_warps(steps);
  l.mean_stride = tables_shared ? rank + 8 : rank;
  l.class_stride = tables_shared ? (dim + 31) / 32 * 32 + (halves ? 16 : 4) : dim;
  int at = 0;
  l.encode = at, at += many_wgmma(steps, tables_shared) ? 2 * wgmma_term_bytes(steps)
                       : tables_shared                  ? groups * steps * 1024
                                                        : 0;
  l.mean = at, at += tables_shared ? period * l.mean_stride * 4 : 0;
  l.classes = at, at += tables_shared ? period * l.class_stride * 4 : 0;
  l.weight = at, at += 2 * rank * 4;
  l.plan = at, at += kPlanInts * 4;
  l.partial = at, at += columns > 1 ? warps * kTile * 8 : 0;
  l.codes = at, at += warps * kWarpGroups * 2 * 32 * 4;
  l.bytes = at;
  return l;
}

// What is known of a row when the kernel is compiled: nothing, or that it has 16 kSteps elements and is not rotated
// (kStraight) or rotated as a whole in pairs half a row apart (kHalves). Then chunks lie at constant distances.
enum class Rows { kAny, kStraight, kHalves };

template <Rows kRows, int kSteps>
__device__ __forceinline__ Chunk chunk_at(int index, const RopeTurn& rope) {
  if constexpr (kRows == Rows::kStraight) return {8 * index, 8 * index + 4, false};
  if constexpr (kRows == Rows::kHalves) return {4 * index, 4 * index + 8 * kSteps, true};
  return chunk_of(index, rope);
}

// kFull: R = 16 kSteps too, so that every warp has the same number of groups.
template <typename T, int kSteps, bool kShared, bool kSplit, Rows kRows, bool kFull>
__device__ __forceinline__ void store_many_side(const StoreParams& p, const StoreSide& side, bool is_value, int first,
                                                int ctas) {
  constexpr int kColumns = many_columns(kSteps), kWarps = many_warps(kSteps), kPairs = kWarps / kColumns;
  constexpr bool kWgmma = many_wgmma(kSteps, kShared);
  constexpr int kChunks = kSteps / 2;
  constexpr int kMine = kFull || kWgmma ? kSteps / kColumns : kWarpGroups;  // groups of the warp, at most
  extern __shared__ __align__(1024) char memory[];
  const int tid = threadIdx.x, lane = tid & 31, g = lane >> 2, t = lane & 3, head = blockIdx.y;
  const int warp = uniform_warp_index(), pair = warp / kColumns, column = warp % kColumns;
  const int groups = kFull ? kSteps : side.groups, rank = groups * kGroup, period = side.period;
  const int dim = kRows == Rows::kAny ? p.dim : 16 * kSteps;
  const bool halves = kRows == Rows::kHalves || (kRows == Rows::kAny && side.rotate && !p.rope.interleaved);
  const StoreManyLayout l = store_many_layout(dim, kSteps, groups, period, halves, kShared);

  const uint4* encode = side.encode + int64_t(head) * groups * kSteps * 64;
  const float* global_means = side.latent_mean + int64_t(head) * 2 * period * rank;
  const float* classes = side.class_vector + int64_t(head) * period * dim;
  const float* means = global_means;
  const float* biases = side.class_offset + head * period;
  float* weights = reinterpret_cast<float*>(memory + l.weight);
  int* plan_ints = reinterpret_cast<int*>(memory + l.plan);
  if constexpr (kShared) {
    if constexpr (kWgmma) {
      load_wgmma_image<kSteps>(memory + l.encode, encode, groups);
    } else {
      for (int i = tid; i < groups * kSteps * 64; i += blockDim.x) copy_async_16(memory + l.encode + 16 * i, encode + i);
    }
    for (int i = tid; i < period * rank / 4; i += blockDim.x) {
      const int row = 4 * i / rank, c = 4 * i - row * rank;
      copy_async_16(memory + l.mean + 4 * (row * l.mean_stride + c), means + 4 * i);
    }
    for (int i = tid; i < period * dim / 4; i += blockDim.x) {
      const int row = 4 * i / dim, c = 4 * i - row * dim;
      copy_async_16(memory + l.classes + 4 * (row * l.class_stride + c), classes + 4 * i);
    }
    encode = reinterpret_cast<const uint4*>(memory + l.encode);
    means = reinterpret_cast<const float*>(memory + l.mean);
    classes = reinterpret_cast<const float*>(memory + l.classes);
  }
  for (int i = tid; i < 2 * rank; i += blockDim.x) weights[i] = side.weight[head * 2 * rank + i];
  for (int i = tid; i < side.plan_ints; i += blockDim.x) plan_ints[i] = side.plan[i];
  wait_for_previous_grid();
  release_next_grid();

  const T* x = static_cast<const T*>(side.x) + head * side.head_stride;
  const int num_tiles = (p.num_tokens + kTile - 1) / kTile, stride = ctas * kPairs;
  StoreSlots next;
  const auto ask = [&](int tile) {  // slots of the tile's rows; the rows themselves on their way to L2
    const int n = tile * kTile + (lane & 15);
    next = load_slots(p, n);
    if (column == 0 && n < p.num_tokens) {
      const T* row = x + n * side.token_stride;
      for (int at = 64 * (lane >> 4); at < dim; at += 128) prefetch_to_l2(row + at);
    }
  };
  ask(first + pair * ctas);
  copy_async_wait();
  __syncthreads();

  const PlanView plan{plan_ints};
  bool guards = false;  // groups with a guard weight
  for (int c = 0; lane < groups && c < kGroup; ++c) guards |= weights[2 * (kGroup * lane + c) + 1] > 0.f;
  const uint32_t guarded = __ballot_sync(0xffffffffu, guards);
  auto* codes = reinterpret_cast<CodeWords<2>*>(memory + l.codes) + pair * kColumns * kWarpGroups * 32 + lane;
  float2* partial = reinterpret_cast<float2*>(memory + l.partial) + pair * kColumns * kTile;
  RopeTurn rope = p.rope;
  if (kRows == Rows::kStraight || !side.rotate) rope.rotary_dim = 0;
  if constexpr (kRows == Rows::kHalves) rope.rotary_dim = dim, rope.interleaved = false;
  // Warps that meet take the same number of turns: those of a warpgroup, or with two columns all; else each its own.
  const int ahead = kColumns > 1 ? 0 : (kWgmma ? pair & ~3 : pair) * ctas;
  const uint64_t image = kWgmma ? wgmma_descriptor(memory + l.encode) : 0;
  for (int base = first; base + ahead < num_tiles; base += stride) {
    const int tile = base + pair * ctas;
    // Rows g and g + 8 of step k, in the order of the operand's registers; raw elements first, so that all loads are
    // under way together.
    uint32_t high[kSteps][4], low[kSplit ? kSteps : 1][4];
    float norm[2] = {}, dot[2] = {};
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int n = tile * kTile + g + 8 * y;
      const T* row = x + n * side.token_stride;
      const bool inside = n < p.num_tokens;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int index = 4 * c + t;
        const Chunk chunk = chunk_at<kRows, kSteps>(index, rope);
        uint2 a{}, b{};
        if (inside && (kRows != Rows::kAny || 8 * index < dim)) {
          a = *reinterpret_cast<const uint2*>(row + chunk.a), b = *reinterpret_cast<const uint2*>(row + chunk.b);
        }
        high[2 * c][y] = a.x, high[2 * c][2 + y] = a.y, high[2 * c + 1][y] = b.x, high[2 * c + 1][2 + y] = b.y;
      }
    }
    const StoreRow mine = place_row(p, side, head, next, is_value);
    int64_t window[2];
    int offset[2], block[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int from = g + 8 * y;
      window[y] = __shfl_sync(0xffffffffu, mine.window, from);
      offset[y] = __shfl_sync(0xffffffffu, mine.offset, from);
      block[y] = __shfl_sync(0xffffffffu, mine.block, from);
    }
    const float bias[2] = {__ldg(biases + offset[0]), __ldg(biases + offset[1])};  // of the class rule
    if (column == 0 && __any_sync(0xffffffffu, (window[0] & window[1]) >= 0)) {  // exact copy
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        T* out = static_cast<T*>(p.window) + window[y];
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const Chunk chunk = chunk_at<kRows, kSteps>(4 * c + t, rope);
          if (window[y] >= 0 && (kRows != Rows::kAny || 8 * (4 * c + t) < dim)) {
            *reinterpret_cast<uint2*>(out + chunk.a) = make_uint2(high[2 * c][y], high[2 * c][2 + y]);
            *reinterpret_cast<uint2*>(out + chunk.b) = make_uint2(high[2 * c + 1][y], high[2 * c + 1][2 + y]);
          }
        }
      }
    }
    const bool rotate = kRows == Rows::kHalves || (kRows == Rows::kAny && kSplit && side.rotate);
    const TurnRows turns[2] = {turn_rows(block[0], t, rope), turn_rows(block[1], t, rope)};
    const bool one_block = __all_sync(0xffffffffu, block[0] == block[1]);
    const bool near = one_block && __all_sync(0xffffffffu, !turns[0].far);
    // A zero that the compiler cannot see keeps operands apart from the pairs that are loaded.
    const uint32_t zero = static_cast<uint32_t>(p.num_tokens >> 31);
    const auto split = [&](auto simple) {  // simple: one rotation for all rows, its factors one load away
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int index = 4 * c + t;
        const Chunk chunk = chunk_at<kRows, kSteps>(index, rope);
        const bool inside = kRows != Rows::kAny || 8 * index < dim;
        float4 turn[2] = {make_float4(1.f, 0.f, 1.f, 0.f), make_float4(1.f, 0.f, 1.f, 0.f)};
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          if constexpr (simple) {
            if (y == 0 && rotate) load_near_turn(turn, turns[0], 8 * c);
          } else if (rotate && chunk.turned && (y == 0 || !one_block)) {
            load_turn(turn, turns[y], 8 * c);
          }
          const uint2 a = make_uint2(high[2 * c][y], high[2 * c][2 + y]);
          const uint2 b = make_uint2(high[2 * c + 1][y], high[2 * c + 1][2 + y]);
          const float* w = classes + offset[y] * l.class_stride;
          const float4 wa = *reinterpret_cast<const float4*>(w + (inside ? chunk.a : 0));
          const float4 wb = *reinterpret_cast<const float4*>(w + (inside ? chunk.b : 0));
          uint32_t h[4], m[4];
          split_chunk<T, kSplit>(a, b, rotate, rope.interleaved, turn, wa, wb, norm[y], dot[y], h, m);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            high[2 * c + (i >> 1)][2 * (i & 1) + y] = kSplit ? h[i] : h[i] ^ zero;
            if constexpr (kSplit) low[2 * c + (i >> 1)][2 * (i & 1) + y] = m[i];
          }
        }
      }
    };
    if constexpr (kRows == Rows::kHalves) {
      near ? split(std::true_type()) : split(std::false_type());
    } else {
      split(std::false_type());
    }
    ask(tile + stride);
    bool sink[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
#pragma unroll
      for (int m = 1; m < 4; m <<= 1) {
        norm[y] += __shfl_xor_sync(0xffffffffu, norm[y], m);
        dot[y] += __shfl_xor_sync(0xffffffffu, dot[y], m);
      }
      sink[y] = 0.7f * norm[y] - dot[y] + bias[y] < 0.f;
    }

    float u[8 * kMine] = {};  // 8 group + 4 n-tile + register
    if constexpr (kWgmma) {
      project_rows<kSteps>(u, high, low, image);
    } else {
#pragma unroll
      for (int i = 0; i < kMine; i += 2) {  // two groups at a time: four independent accumulators
        const int left = column * kWarpGroups + i, right = kFull ? left + 1 : min(left + 1, groups - 1);
        if (kFull || left < groups) {
          float(&tile)[4][4] = *reinterpret_cast<float(*)[4][4]>(u + 8 * i);
#pragma unroll
          for (int k = 0; k < kSteps; ++k) {
            const uint4* at = encode + (left * kSteps + k) * 64 + lane;
            const uint4* beside = encode + (right * kSteps + k) * 64 + lane;
            const uint4 eh = at[0], el = at[32], fh = beside[0], fl = beside[32];
            mma_bf16(tile[0], high[k], eh.x, eh.y);
            mma_bf16(tile[1], high[k], eh.z, eh.w);
            mma_bf16(tile[2], high[k], fh.x, fh.y);
            mma_bf16(tile[3], high[k], fh.z, fh.w);
            mma_bf16(tile[0], high[k], el.x, el.y);
            mma_bf16(tile[1], high[k], el.z, el.w);
            mma_bf16(tile[2], high[k], fl.x, fl.y);
            mma_bf16(tile[3], high[k], fl.z, fl.w);
            if constexpr (kSplit) {
              mma_bf16(tile[0], low[k], eh.x, eh.y);
              mma_bf16(tile[1], low[k], eh.z, eh.w);
              mma_bf16(tile[2], low[k], fh.x, fh.y);
              mma_bf16(tile[3], low[k], fh.z, fh.w);
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
    for (int i = 0; i < kMine; ++i) {
      const int group = column * kWarpGroups + i;
      if (kFull || group < groups) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int channel = group * kGroup + 8 * n;
          const float4 w = *reinterpret_cast<const float4*>(weights + 2 * (channel + 2 * t));
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const float2 mu = *reinterpret_cast<const float2*>(mean_of[y] + channel);
            float& u0 = u[8 * i + 4 * n + 2 * y];
            float& u1 = u[8 * i + 4 * n + 2 * y + 1];
            u0 -= mu.x, u1 -= mu.y;
            sum[y] += w.x * u0 * u0, sum[y] += w.z * u1 * u1;
            if (guarded >> group & 1) peak[y] = fmaxf(peak[y], fmaxf(w.y * fabsf(u0), w.w * fabsf(u1)));
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
    int64_t page[2];
    int token[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      page[y] = __shfl_sync(0xffffffffu, mine.page, g + 8 * y);
      token[y] = __shfl_sync(0xffffffffu, mine.token, g + 8 * y);
      const uint32_t byte = encode_scale(fmaxf(approximate_sqrt(sum[y]), peak[y]));
      inverse[y] = approximate_reciprocal(decode_scale(byte));
      if (t == 0 && column == 0 && page[y] >= 0) {
        p.pages[page[y] + plan.scale_offset() + token[y]] = byte | (sink[y] ? 128u : 0u);
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int group = column * kWarpGroups + i;
      if (kFull || group < groups) {
        const int width = plan.width(group);
        codes[32 * group] = {quantize_word(u + 8 * i, u + 8 * i + 4, 0, inverse[0], width),
                             quantize_word(u + 8 * i, u + 8 * i + 4, 1, inverse[1], width)};
      }
    }
    if constexpr (kColumns > 1) __syncthreads();  // else every lane reads what it wrote itself

    // Where columns 2t, 2t + 1 of the lane's tokens are in a full plane and in a half one.
    int full[2], half[2];
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      full[y] = column_offset(is_value, false, token[y], 2 * t), half[y] = column_offset(is_value, true, token[y], 2 * t);
    }
#pragma unroll 1
    for (int i = column; i < plan.planes(); i += kColumns) {
      const PlaneView plane = plan.plane(i);
      const int4 header = *reinterpret_cast<const int4*>(plane.data);
      const CodeWords<2> bytes = gather_plane<32>(plane, header.z, codes);
      const bool is_half = header.x & 256;
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        uint8_t* at = p.pages + page[y] + header.y + (is_half ? half[y] : full[y]);
        if (page[y] >= 0) write_pair(at, is_value, is_half, bytes.of[y]);
      }
    }
  }
}

// Grid (key_ctas + value_ctas, heads).
template <typename T, int kSteps, bool kShared>
__global__ void __launch_bounds__(32 * many_warps(kSteps), 1)
    store_many_kernel(const __grid_constant__ StoreParams p) {
  const int x = blockIdx.x;
  const bool is_value = x >= p.key_ctas;
  const StoreSide& side = p.side[is_value];
  const int first = is_value ? x - p.key_ctas : x, ctas = is_value ? gridDim.x - p.key_ctas : p.key_ctas;
  constexpr bool kTwoTerms = !std::is_same<T, __nv_bfloat16>::value;  // of elements that are not rotated
  if constexpr (kShared && kSteps <= 8) {  // tables of wider heads hardly ever fit into shared memory
    const bool turned = side.rotate && p.rope.rotary_dim == p.dim && !p.rope.interleaved, full = side.groups == kSteps;
    if (p.dim == 16 * kSteps && turned) {
      return full ? store_many_side<T, kSteps, kShared, true, Rows::kHalves, true>(p, side, is_value, first, ctas)
                  : store_many_side<T, kSteps, kShared, true, Rows::kHalves, false>(p, side, is_value, first, ctas);
    }
    if (p.dim == 16 * kSteps && !side.rotate && full) {
      return store_many_side<T, kSteps, kShared, kTwoTerms, Rows::kStraight, true>(p, side, is_value, first, ctas);
    }
  }
  if (side.rotate || kTwoTerms) {
    store_many_side<T, kSteps, kShared, true, Rows::kAny, false>(p, side, is_value, first, ctas);
  } else {
    store_many_side<T, kSteps, kShared, false, Rows::kAny, false>(p, side, is_value, first, ctas);
  }
}

}  // namespace kqsvd
