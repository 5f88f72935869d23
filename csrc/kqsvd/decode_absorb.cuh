// SPDX-License-Identifier: Apache-2.0
// Query absorption: turn the query back to a rope block's start in registers, multiply it by the decode matrix with
// wgmma; the accumulators, packed to fp16, are the B operand of the score product.
#pragma once

#include "decode_config.cuh"
#include "decode_params.h"
#include "mma.cuh"
#include "mma_wgmma.cuh"

namespace kqsvd::decode {

// Dimensions of rotation plane i: (i, i + r/2) or (2i, 2i + 1) inside the rotary part r, pairs of neighbours after it.
__device__ __forceinline__ void plane_dims(int i, int rotary_dim, bool interleaved, int& re, int& im) {
  const bool split = !interleaved && 2 * i < rotary_dim;
  re = split ? i : 2 * i;
  im = split ? i + rotary_dim / 2 : 2 * i + 1;
}

__device__ __forceinline__ float float_of(uint16_t bits, int is_bf16) {
  return is_bf16 ? __uint_as_float(static_cast<uint32_t>(bits) << 16) : __half2float(__ushort_as_half(bits));
}

// A thread's part of the way of a query from global to shared memory: four planes of one column, (re, im) pairs of 16 bits.
// Asked for while the item before is finished, used when its own item begins; in shared memory. Lanes of columns that
// repeat (4 columns of 8) have none.
struct QueryPart {
  uint2 re, im;
};

// Columns are row * heads_per_kv + query head; those without a row are 0.
template <class Cf>
__device__ __forceinline__ void fetch_query(QueryPart* parts, const DecodeParams& p, int first_row, int num_rows, int head,
                                            int column0, int thread) {
  const int k = thread >> 5, lane = thread & 31, plane = 16 * k + 4 * (lane & 3);
  if (thread >= Cf::D || lane >= 4 * Cf::C) return;
  QueryPart* part = parts + k * 4 * Cf::C + lane;
  int row = 0, query_head = column0 + (lane >> 2);
  for (; query_head >= p.heads_per_kv; query_head -= p.heads_per_kv) ++row;
  if (row >= num_rows) {
    *part = QueryPart{{0, 0}, {0, 0}};
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(p.query) + (first_row + row) * p.query_token_stride +
                         (head * p.heads_per_kv + query_head) * p.query_head_stride;
  if (p.rotary_dim == Cf::D && !p.rotary_interleaved) {  // four neighbours in each half
    copy_async_8(&part->re, from + plane);
    copy_async_8(&part->im, from + plane + Cf::D / 2);
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(part);
#pragma unroll 1
    for (int e = 0; e < 4; ++e) {
      int re, im;
      plane_dims(plane + e, p.rotary_dim, p.rotary_interleaved, re, im);
      to[e] = from[re], to[4 + e] = from[im];
    }
  }
}

// What fetch_query brought, as a lane rotates it: for each quad of planes the words (re, im) and, 32 vectors further,
// (im, -re). Lane (g, t) holds planes 16 k + 4 t .. + 3 of column g mod C.
template <class Cf>
__device__ __forceinline__ void store_query(uint4* query, const QueryPart* parts, int is_bf16, int thread) {
  copy_async_wait();
  const int k = thread >> 5, lane = thread & 31;
  if (thread >= Cf::D || lane >= 4 * Cf::C) return;
  const QueryPart part = parts[k * 4 * Cf::C + lane];
  const uint32_t re[2] = {part.re.x, part.re.y}, im[2] = {part.im.x, part.im.y};
  uint32_t plain[4], turned[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const float a = float_of(static_cast<uint16_t>(re[e >> 1] >> 16 * (e & 1)), is_bf16);
    const float b = float_of(static_cast<uint16_t>(im[e >> 1] >> 16 * (e & 1)), is_bf16);
    plain[e] = pack_f16(a, b);
    turned[e] = pack_f16(b, -a);
  }
#pragma unroll
  for (int i = lane; i < 32; i += 4 * Cf::C) {
    query[k * 64 + i] = make_uint4(plain[0], plain[1], plain[2], plain[3]);
    query[k * 64 + 32 + i] = make_uint4(turned[0], turned[1], turned[2], turned[3]);
  }
}

// (re, im) cos + (im, -re) sin: the plane turned back.
__device__ __forceinline__ uint32_t turn_back(uint32_t q, uint32_t x, uint32_t cos_sin) {
  const __half2 cs = as_half2(cos_sin);
  const __half2 r = __hfma2(as_half2(x), __high2half2(cs), __hmul2(as_half2(q), __low2half2(cs)));
  return *reinterpret_cast<const uint32_t*>(&r);
}

// A fragments of the k steps 2k, 2k + 1. `rope`: (cos, sin) rows of the step's rope blocks.
template <class Cf>
__device__ __forceinline__ void rotated_quad(uint32_t (&a)[2][4], const uint4* query, const uint8_t* rope, int k,
                                             int lane) {
  const int g = lane >> 2, t = lane & 3;
  const int block0 = Cf::C == 8 ? 0 : g >> 2, block1 = Cf::C == 8 ? 1 : 2 + (g >> 2);
  const uint4 q = query[k * 64 + lane], x = query[k * 64 + 32 + lane];
  const uint4 u = reinterpret_cast<const uint4*>(rope + block0 * Cf::kRopeRow)[4 * k + t];
  const uint4 v = reinterpret_cast<const uint4*>(rope + block1 * Cf::kRopeRow)[4 * k + t];
  a[0][0] = turn_back(q.x, x.x, u.x), a[0][1] = turn_back(q.x, x.x, v.x);
  a[0][2] = turn_back(q.y, x.y, u.y), a[0][3] = turn_back(q.y, x.y, v.y);
  a[1][0] = turn_back(q.z, x.z, u.z), a[1][1] = turn_back(q.z, x.z, v.z);
  a[1][2] = turn_back(q.w, x.w, u.w), a[1][3] = turn_back(q.w, x.w, v.w);
}

// Rows [16 Begin, 16 (Begin + Count)) of the absorb matrix, packed into both B fragments. (Both chains in flight at once
// need 3 % more instructions and take as long.)
template <class Cf, int Begin, int Count>
__device__ __forceinline__ void absorb_chain(uint32_t (&b)[2][2 * (Cf::GK + 1)], const uint32_t (&a)[Cf::D / 16][4],
                                             uint64_t image) {
  float acc[8 * Count];
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < Cf::D / 16; ++k)
    wgmma_f16(acc, a[k], image + Begin * 128 + (k >> 2) * (Cf::kRows * 8) + (k & 3) * 2, k > 0);
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int j = 0; j < Count; ++j)
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      b[f][2 * (Begin + j)] = pack_f16(acc[8 * j + 2 * f], acc[8 * j + 2 * f + 1]);
      b[f][2 * (Begin + j) + 1] = pack_f16(acc[8 * j + 4 + 2 * f], acc[8 * j + 5 + 2 * f]);
    }
}

// Absorbed queries of the step's 16 rows per warp (collective over the warpgroup): b[f] serves the rope blocks of
// fragment f; its last two words are the mean columns.
template <class Cf>
__device__ __forceinline__ void absorb(uint32_t (&b)[2][2 * (Cf::GK + 1)], const uint4* query, const uint8_t* rope,
                                       uint64_t image, int lane) {
  uint32_t a[Cf::D / 16][4];
#pragma unroll
  for (int k = 0; k < Cf::D / 32; ++k) {
    uint32_t quad[2][4];
    rotated_quad<Cf>(quad, query, rope, k, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[2 * k + i / 4][i % 4] = quad[i / 4][i % 4];
  }
  constexpr int blocks = Cf::GK + 1, first = blocks > 4 ? (blocks + 1) / 2 : blocks;
  static_assert(first <= 5);
  absorb_chain<Cf, 0, first>(b, a, image);
  if constexpr (first < blocks) absorb_chain<Cf, first, blocks - first>(b, a, image);
}

// Minus the zero-point terms of the scores of both fragments, in accumulator units: columns 2t, 2t + 1, twice. Computed from the
// rounded query, so that rounding errors meet centred codes.
// A group's four words of both fragments are one A operand: rows g hold its channels 0-7, rows g + 8 its channels 8-15,
// inner indices 0-7 are fragment 0 and 8-15 fragment 1. So even columns of B sum fragment 0, odd columns fragment 1.
template <class Cf>
__device__ __forceinline__ void zero_point_terms(float4 (&zero)[2], const uint32_t (&b)[2][2 * (Cf::GK + 1)], int lane) {
  const uint32_t even = lane & 4 ? 0u : 0x3c003c00u, odd = even ^ 0x3c003c00u;
  float both[2][4] = {}, lower[4] = {}, upper[4] = {};  // groups whose channel halves weigh alike; others, one half each
  static_for<Cf::GK>([&](auto ig) {
    constexpr int group = ig;
    static_assert(is_half(Cf::K.key_zero_point(group, 0)) && is_half(Cf::K.key_zero_point(group, 1)));
    constexpr uint32_t z0 = half2_constant(-Cf::K.key_zero_point(group, 0));
    constexpr uint32_t z1 = half2_constant(-Cf::K.key_zero_point(group, 1));
    const auto add = [&](float (&c)[4], uint32_t z) {
      mma_f16(c, b[0][2 * group], b[0][2 * group + 1], b[1][2 * group], b[1][2 * group + 1], mul_half2(even, z),
              mul_half2(odd, z));
    };
    if constexpr (z0 == z1) {
      add(both[group % 2], z0);
    } else {
      add(lower, z0);
      add(upper, z1);
    }
  });
  constexpr float unit = 1.f / 16777216.f;  // codes enter as fp16 subnormals, 2^-24 each
  float sum[2];
#pragma unroll
  for (int f = 0; f < 2; ++f)
    sum[f] = ((both[0][f] + both[0][2 + f]) + (both[1][f] + both[1][2 + f]) + (lower[f] + upper[2 + f])) * unit;
  const int from = (lane & 3) * 8;  // lane (g, t) has the sum of column g
#pragma unroll
  for (int f = 0; f < 2; ++f) {
    const float x = __shfl_sync(~0u, sum[f], from), y = __shfl_sync(~0u, sum[f], from + 4);
    zero[f] = make_float4(x, y, x + 0.f, y + 0.f);  // four registers to start from, not two to copy each time
  }
}

// Absorbed sink-minus-mean columns of fragment f: the two B words. Rare, so it re-rotates the query from global tables.
template <class Cf>
__device__ __noinline__ uint2 absorb_sink(const uint4* query, const uint8_t* rope, const uint4* sink, int f, int lane) {
  float lo[4] = {0.f, 0.f, 0.f, 0.f}, hi[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
  for (int k = 0; k < Cf::D / 32; ++k) {
    uint32_t a[2][4];
    rotated_quad<Cf>(a, query, rope, k, lane);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint4 w = sink[(2 * k + j) * 32 + lane];
      mma_f16(lo, a[j][0], a[j][1], a[j][2], a[j][3], w.x, w.y);
      mma_f16(hi, a[j][0], a[j][1], a[j][2], a[j][3], w.z, w.w);
    }
  }
  return f == 0 ? make_uint2(pack_f16(lo[0], lo[1]), pack_f16(hi[0], hi[1]))
                : make_uint2(pack_f16(lo[2], lo[3]), pack_f16(hi[2], hi[3]));
}

}  // namespace kqsvd::decode
