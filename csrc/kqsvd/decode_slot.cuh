// SPDX-License-Identifier: Apache-2.0
// One warp's work on a slot of 64 tokens: scores from codes, running softmax, values; and the shared memory it works in.
#pragma once

#include "decode_absorb.cuh"
#include "decode_merge.cuh"
#include "decode_stream.cuh"
#include "unpack.cuh"

namespace kqsvd::decode {

// Running softmax of one warp. Lane (g, t): columns 2t, 2t + 1; o[group] rows (channels) g, g + 8.
template <class Cf>
struct Softmax {
  float o[Cf::GV][4];
  float ps[4];  // sum of p s, by a product with ones: sees the same rounded values as o
  float max[2], p[2], sink[2];

  __device__ void reset() {
#pragma unroll
    for (int i = 0; i < Cf::GV; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.f;
    ps[0] = ps[1] = ps[2] = ps[3] = 0.f;
    max[0] = max[1] = kEmptyMax;
    p[0] = p[1] = sink[0] = sink[1] = 0.f;
  }

  // The maximum is raised only when some score exceeds it by 8 (scores are in log2 units): p stays below 2^8.
  __device__ bool exceeded_by(float x0, float x1) const {
    constexpr float slack = 8.f - Cf::kValueBias;
    return x0 > max[0] + slack || x1 > max[1] + slack;
  }
  // To the largest score of the warp, of which this lane has x0 and x1.
  __device__ void raise(float x0, float x1) {
    float x[2] = {x0 + Cf::kValueBias, x1 + Cf::kValueBias};
    float f[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) x[c] = fmaxf(x[c], __shfl_xor_sync(~0u, x[c], d));
      const float top = fmaxf(max[c], x[c]);
      f[c] = exp2_fast(max[c] - top);
      max[c] = top;
      p[c] *= f[c], sink[c] *= f[c];
    }
#pragma unroll
    for (int i = 0; i < Cf::GV; ++i) o[i][0] *= f[0], o[i][1] *= f[1], o[i][2] *= f[0], o[i][3] *= f[1];
    ps[0] *= f[0], ps[1] *= f[1], ps[2] *= f[0], ps[3] *= f[1];
  }
};

// Shared memory of a CTA, in the order of Config::shared_bytes. All offsets are constants.
template <class Cf>
struct SharedMap {
  uint8_t* base;
  __device__ uint8_t* image() const { return base; }
  __device__ uint4* mean() const { return reinterpret_cast<uint4*>(base + Cf::kImageBytes); }
  __device__ uint8_t* scratch(int wg) const {
    return base + Cf::kImageBytes + Cf::kMeanBytes + wg * Cf::kScratchBytes;
  }
  __device__ uint8_t* ring(int warp) const { return scratch(Cf::kWarpgroups) + warp * Cf::kWarpBytes; }
  __device__ uint8_t* image_bar() const { return ring(4 * Cf::kWarpgroups); }
};

// The request and head a warpgroup works on; in its scratch.
struct WorkItem {
  Request r;
  int head, column0;
  int plain_begin, plain_count;  // first tokens of slots without soft cap and per-element masks
  int key_exponent;
};

// Views of a warpgroup's scratch.
template <class Cf>
struct Scratch {
  uint8_t* base;
  __device__ uint4* query() const { return reinterpret_cast<uint4*>(base); }    // while scores are computed
  __device__ float* record() const { return reinterpret_cast<float*>(base); }   // while results are merged
  __device__ float* exchange() const { return reinterpret_cast<float*>(base + Cf::kExchange); }
  __device__ QueryPart* next_query() const { return reinterpret_cast<QueryPart*>(base + Cf::kNextQuery); }
  __device__ WorkItem* item() const { return reinterpret_cast<WorkItem*>(base + Cf::kExchange + 544); }
};

// What few slots need: sink-minus-mean logits of class-1 tokens, soft cap, masks. `s`: scores [tile][4] of this lane.
template <class Cf>
__device__ __noinline__ void adjust_scores(float* s, const DecodeParams& p, Scratch<Cf> scratch, const uint4* mean_tile,
                                           const uint8_t* slot, int token, int half, int base, int fragment,
                                           bool has_class, bool edge) {
  const WorkItem* x = scratch.item();
  const int lane = threadIdx.x & 31, column0 = x->column0;
  const Request* r = &x->r;
  constexpr bool kPaired = Cf::C == 4;
  constexpr int kTiles = kPaired ? 2 : 4;
  const int g = lane >> 2, t = lane & 3;
  const bool second = kPaired && t >= 2;
  if (has_class) {
    const uint8_t* rope = reinterpret_cast<const uint8_t*>(p.rope_table) +
                          (p.rope_table_moves ? static_cast<int64_t>(base / Cf::T) * Cf::kRopeRow : 0);
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int mine = kPaired ? i & 1 : i;
      const bool keep = !kPaired || (i >> 1) == (second ? 1 : 0);
      const uint2 w = absorb_sink<Cf>(scratch.query(), rope, p.sink_rows + x->head * (Cf::D / 16) * 32, Cf::C == 8 && Cf::T == 32 ? i >> 1 : fragment,
                                       lane);
      const uint8_t* scale = slot + i * Cf::kTileBytes + Cf::kKeyScales + g;
      const uint32_t lo = (scale[0] & 0x80u) ? ~0u : 0u, hi = (scale[8] & 0x80u) ? ~0u : 0u;
      const int row = kPaired || Cf::T == 32 ? 2 * half + (i & 1) : i;
      const uint4 u = mean_tile[row * 32 + lane];
      float m[4] = {0.f, 0.f, 0.f, 0.f};
      mma_f16(m, u.x & lo, u.y & hi, u.z & lo, u.w & hi, w.x, w.y);
      for (int e = 0; e < 4; ++e)
        if (keep) s[4 * mine + e] += m[e];
    }
  }
  for (int i = 0; i < 4 * kTiles; ++i) {
    if (p.soft_cap_log2 > 0.f) s[i] = p.soft_cap_log2 * tanhf(s[i] / p.soft_cap_log2);
    if (edge) {
      const int pos = token + (second ? Cf::kSecondChunk : 0) + 16 * (i >> 2) + g + 8 * (i >> 1 & 1);
      const int own = r->p0 + (column0 + (2 * t + (i & 1)) % Cf::C) / p.heads_per_kv;
      const bool visible = pos < r->last && pos <= own && (p.sliding_window <= 0 || pos > own - p.sliding_window);
      if (!visible) s[i] = -1e30f;
    }
  }
}

// Sums of p over this lane's tokens of class 1, columns 2t, 2t + 1. `s`: scores [tile][4]; `scales`: V scale bytes.
template <class Cf>
__device__ __noinline__ float2 sink_sums(const float* s, const uint8_t* scales, float max0, float max1) {
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll 1
  for (int i = 0; i < (Cf::C == 4 ? 4 : 8); ++i) {  // rows g, g + 8 of each tile
    if (!(scales[(i >> 1) * Cf::kTileBytes + 8 * (i & 1)] & 0x80u)) continue;
    sum.x += exp2_fast(s[2 * i] - max0);
    sum.y += exp2_fast(s[2 * i + 1] - max1);
  }
  return sum;
}

// 64 tokens: scores against fragment(s) b, softmax, values. `token` is the slot's first; `half` selects mean rows when a
// rope block spans two slots; `base` is the first token of the warp's step, whose fragment `fragment` b[0] is.
template <class Cf>
__device__ __forceinline__ void process_slot(Softmax<Cf>& acc, const DecodeParams& p, Scratch<Cf> scratch,
                                             const uint4* mean_tile, const uint8_t* slot,
                                             const uint32_t (&b)[2][2 * (Cf::GK + 1)], const float4 (&zero)[2], int token,
                                             int half, int base, int fragment) {
  constexpr bool kPaired = Cf::C == 4;         // the two chunks share columns: lanes t < 2 keep the first
  constexpr int kTiles = kPaired ? 2 : 4;      // score tiles of a lane
  constexpr int kTB = Cf::kTileBytes;
  constexpr int kMean = 2 * Cf::GK;
  const WorkItem* x = scratch.item();
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const bool second = kPaired && t >= 2;

  // Scale bytes of this lane's tokens: K rows g, g + 8, V rows g, g + 8.
  uint32_t byte[kTiles][4], any = 0;
  const uint8_t* mine = slot + (second ? 2 * kTB : 0) + Cf::kKeyScales + g;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) any |= byte[i][j] = mine[i * kTB + 8 * j];
  const bool has_class = __any_sync(~0u, any & 0x80u);
  if (__builtin_expect(has_class, 0)) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) byte[i][j] &= 0x7fu;
  }

  float s[kTiles][4];
  static_for<2>([&](auto ii) {
    constexpr int i = ii;
    if constexpr (kPaired) {
      const uint8_t* const tile[2] = {slot + i * kTB, slot + (2 + i) * kTB};
      const float4 z = zero[0];
      float c[2][4] = {{z.x, z.y, z.z, z.w}, {z.x, z.y, z.z, z.w}};
      score_tiles<Cf::K, 2>(c, tile, b[0], lane);
      float m[4] = {0.f, 0.f, 0.f, 0.f};
      const uint4 u = mean_tile[(2 * half + i) * 32 + lane];
      mma_f16(m, u.x, u.y, u.z, u.w, b[0][kMean], b[0][kMean + 1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float ks = __uint_as_float(byte[i][e >> 1] * 0x100000u + x->key_exponent);
        s[i][e] = fmaf(second ? c[1][e] : c[0][e], ks, m[e]);
      }
    } else {
      constexpr int f = Cf::T == 32 ? i : 0;  // tiles 2 i, 2 i + 1
      const uint8_t* const tile[2] = {slot + 2 * i * kTB, slot + (2 * i + 1) * kTB};
      const float4 z = zero[f];
      float c[2][4] = {{z.x, z.y, z.z, z.w}, {z.x, z.y, z.z, z.w}};
      score_tiles<Cf::K, 2>(c, tile, b[f], lane);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float m[4] = {0.f, 0.f, 0.f, 0.f};
        const uint4 u = mean_tile[(Cf::T == 32 ? j : 2 * i + j) * 32 + lane];
        mma_f16(m, u.x, u.y, u.z, u.w, b[f][kMean], b[f][kMean + 1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float ks = __uint_as_float(byte[2 * i + j][e >> 1] * 0x100000u + x->key_exponent);
          s[2 * i + j][e] = fmaf(c[j][e], ks, m[e]);
        }
      }
    }
  });

  const auto column_max = [&](int c) {
    float top = fmaxf(s[0][c], s[0][2 + c]);
#pragma unroll
    for (int i = 1; i < kTiles; ++i) top = fmaxf(top, fmaxf(s[i][c], s[i][2 + c]));
    return top;
  };
  // One vote for all that few slots need, so that the products around it are not split into more blocks.
  const bool edge = static_cast<unsigned>(token - x->plain_begin) >= static_cast<unsigned>(x->plain_count);
  if (__any_sync(~0u, has_class || edge || acc.exceeded_by(column_max(0), column_max(1)))) {
    float rare[4 * kTiles];
    if (has_class || edge) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) rare[i] = s[i / 4][i % 4];
      adjust_scores<Cf>(rare, p, scratch, mean_tile, slot, token, half, base, fragment, has_class, edge);
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) s[i / 4][i % 4] = rare[i];
    }
    acc.raise(column_max(0), column_max(1));
    if (has_class) {
      const float2 sum = sink_sums<Cf>(rare, mine + 16, acc.max[0], acc.max[1]);
      acc.sink[0] += sum.x, acc.sink[1] += sum.y;
    }
  }

#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float e0 = exp2_fast(s[i][0] - acc.max[0]), e1 = exp2_fast(s[i][1] - acc.max[1]);
    const float e2 = exp2_fast(s[i][2] - acc.max[0]), e3 = exp2_fast(s[i][3] - acc.max[1]);
    acc.p[0] += e0 + e2, acc.p[1] += e1 + e3;
    // A scale byte as fp16, twice: exponent and mantissa move up by 7, the bias difference is 7.
    const uint32_t v0 = byte[i][2] * 0x00800080u + 0x1c001c00u, v1 = byte[i][3] * 0x00800080u + 0x1c001c00u;
    const uint32_t p0 = transpose8x8(mul_half2(pack_f16(e0, e1), v0));
    const uint32_t p1 = transpose8x8(mul_half2(pack_f16(e2, e3), v1));
    constexpr uint32_t one = 0x3c003c00u;
    mma_f16(acc.ps, one, one, one, one, p0, p1);
    if constexpr (kPaired) {
      const uint32_t first = g < 4 ? ~0u : 0u;
      add_values<Cf::V>(acc.o, slot + i * kTB + Cf::K.bytes(), p0 & first, p1 & first, lane);
      add_values<Cf::V>(acc.o, slot + (2 + i) * kTB + Cf::K.bytes(), p0 & ~first, p1 & ~first, lane);
    } else {
      add_values<Cf::V>(acc.o, slot + i * kTB + Cf::K.bytes(), p0, p1, lane);
    }
  }
}

}  // namespace kqsvd::decode
