// SPDX-License-Identifier: Apache-2.0
// Store of a prefill chunk: persistent CTAs of a head keep their tables in shared memory, and every warp takes 16 tokens
// at a time from global memory to page bytes on its own: rows, operands, latents and codes stay in its registers. Where
// the tables fit, the four warps of a warpgroup multiply together (wgmma), each its own 16 tokens; where those of both
// sides do, a CTA stores the values after the keys, else one side. Wide heads (d or R beyond 128) share 16 tokens between
// two warps, half of the groups each.
#pragma once

#include "store_tables.cuh"

namespace kqsvd {

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
// `settle`: the tables are on their way, and none of the CTA's threads has waited for them.
template <typename T, int kSteps, bool kShared, bool kSplit, Rows kRows, bool kFull>
__device__ __forceinline__ void store_tiles(const StoreParams& p, const StoreSide& side, bool is_value,
                                            const StoreTables& l, StoreWalk walk, bool settle) {
  constexpr int kColumns = many_columns(kSteps);
  constexpr bool kWgmma = many_wgmma(kSteps, kShared);
  constexpr int kChunks = kSteps / 2;
  constexpr int kMine = kFull || kWgmma ? kSteps / kColumns : kWarpGroups;  // groups of the warp, at most
  extern __shared__ __align__(1024) char memory[];
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, head = blockIdx.y;
  const int warp = uniform_warp_index(), pair = warp / kColumns, column = warp % kColumns;
  const int groups = kFull ? kSteps : side.groups, rank = groups * kGroup, period = side.period;
  const int dim = kRows == Rows::kAny ? p.dim : 16 * kSteps;
  const float* global_means = side.latent_mean + int64_t(head) * 2 * period * rank;
  const uint4* encode = kShared ? reinterpret_cast<const uint4*>(memory + l.encode)
                                : side.encode + int64_t(head) * groups * kSteps * 64;
  const float* means = kShared ? reinterpret_cast<const float*>(memory + l.mean) : global_means;
  const float* classes = kShared ? reinterpret_cast<const float*>(memory + l.classes)
                                 : side.class_vector + int64_t(head) * period * dim;
  const float* biases = side.class_offset + head * period;
  const float* weights = reinterpret_cast<const float*>(memory + l.weight);
  const T* x = static_cast<const T*>(side.x) + head * side.head_stride;
  const int num_tiles = (p.num_tokens + kTile - 1) / kTile;
  StoreSlots next;
  const auto ask = [&](int tile) {  // slots of the tile's rows; the rows themselves on their way to L2
    const int n = tile * kTile + (lane & 15);
    next = load_slots(p, n);
    if (column == 0 && n < p.num_tokens) {
      const T* row = x + n * side.token_stride;
      for (int at = 64 * (lane >> 4); at < dim; at += 128) prefetch_to_l2(row + at);
    }
  };
  ask(walk.tile);
  if (settle) settle_tables();

  const PlanView plan{reinterpret_cast<const int*>(memory + l.plan)};
  bool guards = false;  // groups with a guard weight
  for (int c = 0; lane < groups && c < kGroup; ++c) guards |= weights[2 * (kGroup * lane + c) + 1] > 0.f;
  const uint32_t guarded = __ballot_sync(0xffffffffu, guards);
  auto* codes = reinterpret_cast<CodeWords<2>*>(memory) + pair * kColumns * kWarpGroups * 32 + lane;
  float2* partial = reinterpret_cast<float2*>(memory + many_codes_bytes(kSteps)) + pair * kColumns * kTile;
  RopeTurn rope = p.rope;
  if (kRows == Rows::kStraight || !side.rotate) rope.rotary_dim = 0;
  if constexpr (kRows == Rows::kHalves) rope.rotary_dim = dim, rope.interleaved = false;
  const uint64_t image = kWgmma ? wgmma_descriptor(memory + l.encode) : 0;
  for (int tile = walk.tile; tile + walk.lead - walk.tile < num_tiles; tile += walk.stride) {
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
    ask(tile + walk.stride);
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
  extern __shared__ __align__(1024) char memory[];
  const int x = blockIdx.x;
  const bool is_value = x >= p.key_ctas;
  const StoreSide& side = p.side[is_value];
  const int ctas = is_value ? gridDim.x - p.key_ctas : p.key_ctas;
  const StoreWalk walk = walk_of<kSteps, kShared>(is_value ? x - p.key_ctas : x, ctas, 0);
  const bool halves = side.rotate && !p.rope.interleaved;
  const StoreTables l =
      store_tables(p.dim, kSteps, side.groups, side.period, halves, kShared, many_scratch_bytes(kSteps));
  load_tables<kSteps, kShared>(side, p.dim, l, memory);
  wait_for_previous_grid();
  release_next_grid();
  constexpr bool kTwoTerms = !std::is_same<T, __nv_bfloat16>::value;  // of elements that are not rotated
  if constexpr (kShared && kSteps <= 8) {  // tables of wider heads hardly ever fit into shared memory
    const bool turned = side.rotate && p.rope.rotary_dim == p.dim && halves, full = side.groups == kSteps;
    if (p.dim == 16 * kSteps && turned) {
      return full ? store_tiles<T, kSteps, kShared, true, Rows::kHalves, true>(p, side, is_value, l, walk, true)
                  : store_tiles<T, kSteps, kShared, true, Rows::kHalves, false>(p, side, is_value, l, walk, true);
    }
    if (p.dim == 16 * kSteps && !side.rotate && full) {
      return store_tiles<T, kSteps, kShared, kTwoTerms, Rows::kStraight, true>(p, side, is_value, l, walk, true);
    }
  }
  if (side.rotate || kTwoTerms) {
    store_tiles<T, kSteps, kShared, true, Rows::kAny, false>(p, side, is_value, l, walk, true);
  } else {
    store_tiles<T, kSteps, kShared, false, Rows::kAny, false>(p, side, is_value, l, walk, true);
  }
}

// Whether a step's rows are what store_both_kernel is compiled for; its tables have to fit as well.
inline bool stores_both(const StoreParams& p, int steps) {
  const StoreSide& keys = p.side[0];
  return steps <= 8 && p.dim == kTile * steps && keys.rotate && p.rope.rotary_dim == p.dim && !p.rope.interleaved;
}

// Its tables: keys', then values'.
__host__ __device__ inline StoreTables both_tables(const StoreParams& p, int steps, bool is_value) {
  const StoreTables keys = store_tables(p.dim, steps, p.side[0].groups, p.side[0].period, true, true, many_scratch_bytes(steps));
  return is_value ? store_tables(p.dim, steps, p.side[1].groups, p.side[1].period, false, true, keys.end) : keys;
}

// Grid (CTAs of a head, heads). Warpgroups take 64 tokens in turn; values begin with those that had fewer keys.
template <typename T, int kSteps>
__global__ void __launch_bounds__(32 * many_warps(kSteps), 1)
    store_both_kernel(const __grid_constant__ StoreParams p) {
  extern __shared__ __align__(1024) char memory[];
  constexpr int kWarpgroups = many_warps(kSteps) / 4;
  constexpr bool kTwoTerms = !std::is_same<T, __nv_bfloat16>::value;
  const StoreSide &keys = p.side[0], &values = p.side[1];
  const StoreTables of_keys = both_tables(p, kSteps, false), of_values = both_tables(p, kSteps, true);
  load_tables<kSteps, true>(keys, 16 * kSteps, of_keys, memory);
  load_tables<kSteps, true>(values, 16 * kSteps, of_values, memory);
  wait_for_previous_grid();
  release_next_grid();
  const int cta = blockIdx.x, ctas = gridDim.x;
  const StoreWalk first = walk_of<kSteps, true>(cta, ctas, 0);
  if (keys.groups == kSteps) {
    store_tiles<T, kSteps, true, true, Rows::kHalves, true>(p, keys, false, of_keys, first, true);
  } else {
    store_tiles<T, kSteps, true, true, Rows::kHalves, false>(p, keys, false, of_keys, first, true);
  }
  const int taken = ((p.num_tokens + 63) / 64 - cta + ctas - 1) / ctas;  // of the CTA's groups of 64 tokens
  const StoreWalk second = walk_of<kSteps, true>(cta, ctas, taken % kWarpgroups);
  if (values.groups == kSteps) {
    store_tiles<T, kSteps, true, kTwoTerms, Rows::kStraight, true>(p, values, true, of_values, second, false);
  } else {
    store_tiles<T, kSteps, true, kTwoTerms, Rows::kAny, false>(p, values, true, of_values, second, false);
  }
}

}  // namespace kqsvd
