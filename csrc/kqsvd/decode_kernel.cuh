// SPDX-License-Identifier: Apache-2.0
// Decode attention on latent pages (sm_90a). One persistent CTA per SM, two or three warpgroups; see decode_schedule.cuh
// for the division of work and docs/format.md for what the numbers mean.
#pragma once

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

  // Raises the maximum only when some score exceeds it by 8 (scores are in log2 units): p stays below 2^8.
  __device__ void raise(float x0, float x1) {
    constexpr float slack = 8.f - Cf::kValueBias;
    if (__any_sync(~0u, x0 > max[0] + slack || x1 > max[1] + slack)) {
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
  int visible_begin, visible_end;  // latent positions outside need per-element masks
  int key_exponent;
};

// Views of a warpgroup's scratch.
template <class Cf>
struct Scratch {
  uint8_t* base;
  __device__ uint4* query() const { return reinterpret_cast<uint4*>(base); }    // while scores are computed
  __device__ float* record() const { return reinterpret_cast<float*>(base); }   // while results are merged
  __device__ uint16_t* list() const { return reinterpret_cast<uint16_t*>(base + Cf::kRecordsBytes); }
  __device__ float* exchange() const { return reinterpret_cast<float*>(base + Cf::kExchange); }
  __device__ int* flag() const { return reinterpret_cast<int*>(base + Cf::kExchange + 512); }
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

// 64 tokens: scores against fragment(s) b, softmax, values. `token` is the slot's first; `half` selects mean rows when a
// rope block spans two slots; `base` is the first token of the warp's step, whose fragment `fragment` b[0] is.
template <class Cf>
__device__ __forceinline__ void process_slot(Softmax<Cf>& acc, const DecodeParams& p, Scratch<Cf> scratch,
                                             const uint4* mean_tile, const uint8_t* slot,
                                             const uint32_t (&b)[2][2 * (Cf::GK + 1)], const float2 (&zero)[2], int token,
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
  uint32_t cls = 0;  // bit 4 i + j: class of byte[i][j]
  const bool has_class = __any_sync(~0u, any & 0x80u);
  if (__builtin_expect(has_class, 0)) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        cls |= (byte[i][j] >> 7) << (4 * i + j);
        byte[i][j] &= 0x7fu;
      }
  }

  float s[kTiles][4];
  static_for<2>([&](auto ii) {
    constexpr int i = ii;
    if constexpr (kPaired) {
      const uint8_t* const tile[2] = {slot + i * kTB, slot + (2 + i) * kTB};
      const float2 z = zero[0];
      float c[2][4] = {{z.x, z.y, z.x, z.y}, {z.x, z.y, z.x, z.y}};
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
      const float2 z = zero[f];
      float c[2][4] = {{z.x, z.y, z.x, z.y}, {z.x, z.y, z.x, z.y}};
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

  const bool edge = token < x->visible_begin || token + Cf::kSecondChunk + 32 > x->visible_end;
  if (__builtin_expect(has_class || edge || p.soft_cap_log2 > 0.f, 0)) {
    float rare[4 * kTiles];
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) rare[i] = s[i / 4][i % 4];
    adjust_scores<Cf>(rare, p, scratch, mean_tile, slot, token, half, base, fragment, has_class, edge);
#pragma unroll
    for (int i = 0; i < 4 * kTiles; ++i) s[i / 4][i % 4] = rare[i];
  }

  float x0 = s[0][0], x1 = s[0][1];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) x0 = fmaxf(x0, fmaxf(s[i][0], s[i][2])), x1 = fmaxf(x1, fmaxf(s[i][1], s[i][3]));
  acc.raise(x0, x1);

#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float e0 = exp2_fast(s[i][0] - acc.max[0]), e1 = exp2_fast(s[i][1] - acc.max[1]);
    const float e2 = exp2_fast(s[i][2] - acc.max[0]), e3 = exp2_fast(s[i][3] - acc.max[1]);
    acc.p[0] += e0 + e2, acc.p[1] += e1 + e3;
    if (__builtin_expect(has_class, 0)) {
      if (cls >> (4 * i + 2) & 1) acc.sink[0] += e0, acc.sink[1] += e1;
      if (cls >> (4 * i + 3) & 1) acc.sink[0] += e2, acc.sink[1] += e3;
    }
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

// What a warp remembers between items; in shared memory, so that it does not occupy registers inside one.
struct Progress {
  Cut cut;
  int vh, begin, end, request;
};

// Hands the joined record of an item on: straight to the output, or to the partial results, which the last piece of a
// request to arrive merges. One warpgroup.
template <class Cf>
__device__ __noinline__ void finish_item(const DecodeParams& p, Scratch<Cf> scratch, const Progress* at) {
  const int thread = threadIdx.x & 127, warpgroup = threadIdx.x >> 7;
  const WorkItem* x = scratch.item();
  const Request* r = &x->r;
  float* record = scratch.record();
  const int vh = at->vh, all = r->unit_end - r->unit_begin;
  const int mine = min(at->end, r->unit_end) - max(at->begin, r->unit_begin);
  const int64_t cell = static_cast<int64_t>(at->request) * (p.num_kv_heads * p.column_groups) + vh;
  if (mine < all) {
    const int slot = piece_slot<Cf>(at->cut, p.max_phases, blockIdx.x, warpgroup, vh, at->begin, r->unit_begin);
    join_halves<Cf>(record, p.partials + static_cast<int64_t>(slot) * Cf::kRecord, thread);
    warpgroup_barrier(warpgroup);
    int* flag = scratch.flag();
    if (thread == 0) {
      // With the barriers around it this orders all that the warpgroups wrote before all that the last one reads.
      const bool last = count_up(&p.counters[cell], mine) + mine == all;
      if (last) p.counters[cell] = 0;
      *flag = last;
    }
    warpgroup_barrier(warpgroup);
    if (!*flag) return;
    merge_pieces<Cf>(record, scratch.list(), flag + 1, p, at->cut, r, vh, warpgroup, thread);
  } else {
    join_halves<Cf>(record, nullptr, thread);
    warpgroup_barrier(warpgroup);
  }
  const float* window = r->last < r->length ? p.window_partials + cell * Cf::kRecord : nullptr;
  write_output<Cf>(record, window, p, r, x->head, x->column0, thread >> 5, thread & 31);
}

// Next item of this warpgroup in its range; false at the end. Fills the shared work item.
template <class Cf>
__device__ __noinline__ bool next_item(const DecodeParams& p, Scratch<Cf> scratch, Progress* at, Item& item) {
  const int thread = threadIdx.x & 127, warpgroup = threadIdx.x >> 7;
  const int vh = at->vh, begin = at->begin, end = at->end;
  int request = at->request;
  Request r;
  for (;;) {
    if (++request >= p.num_requests) return false;
    r = p.requests[request];
    if (r.unit_begin >= end) return false;
    if (r.unit_end > begin && r.unit_end > r.unit_begin) break;
  }
  item = Item(r, begin, end, p.window_units, Cf::kGrain);
  warpgroup_barrier(warpgroup);  // everyone is done with the previous item
  if (thread % 32 == 0) at->request = request;
  if (thread == 0) {
    const int head = vh / p.column_groups;
    *scratch.item() = WorkItem{r,
                               head,
                               vh % p.column_groups * Cf::C,
                               p.sliding_window > 0 ? r.length - p.sliding_window : 0,
                               min(r.last, r.p0 + 1),
                               p.key_exponent[head]};
  }
  if (item.first < item.last)
    load_query<Cf>(scratch.query(), p, r, vh / p.column_groups, vh % p.column_groups * Cf::C, thread);
  warpgroup_barrier(warpgroup);
  return true;
}

// The latent part of one item: steps of absorb + slots.
template <class Cf>
__device__ __forceinline__ void attend_latent(Softmax<Cf>& acc, SlotStream<Cf>& stream, const DecodeParams& p,
                                              Scratch<Cf> scratch, const uint4* mean_tile, uint64_t image,
                                              const Item& item, const uint8_t* ring) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  const int last = scratch.item()->r.last;
  int left = item.last - item.first, at = scratch.item()->r.first + 4 * item.first * Cf::kGrain;
#pragma unroll 1
  for (; left > 0; left -= Cf::kGrains, at += 4 * Cf::kGrains * Cf::kGrain) {
    const int grains = min(Cf::kGrains, left), base = at + warp * grains * Cf::kGrain;
    if (base < last) mbarrier_wait(stream.bar(stream.n & 1), stream.parity >> (stream.n & 1) & 1);
    uint32_t b[2][2 * (Cf::GK + 1)];
    absorb<Cf>(b, scratch.query(),
               ring + Cf::kStages * Cf::kSlotBytes + (Cf::kRopeStages == 2 ? (stream.n & 1) * Cf::kRopeBytes : 0), image,
               lane);
    float2 zero[2] = {zero_point_term<Cf>(b[0]), zero_point_term<Cf>(b[1])};
#pragma unroll(Cf::kSlots > 2 ? 1 : 2)
    for (int s = 0; s < Cf::kSlots; ++s) {  // b[0] serves the first half of the slots, then b[1] takes its place
      const int stage = stream.n & 1;
      const int token = base + s / Cf::kGrainSlots * Cf::kGrain + s % Cf::kGrainSlots * 32;
      if (s / Cf::kGrainSlots < grains && token < last) {
        mbarrier_wait(stream.bar(stage), stream.parity >> stage & 1);
        process_slot<Cf>(acc, p, scratch, mean_tile, ring + stage * Cf::kSlotBytes, b, zero, token, s % Cf::kGrainSlots,
                         base, s * 2 / Cf::kSlots);
      }
      stream.parity ^= 1u << stage;
      __syncwarp();
      stream.issue(p, stream.n + 2, lane);
      ++stream.n;
      if (Cf::kSlots > 1 && (s + 1) % ((Cf::kSlots + 1) / 2) == 0) {
#pragma unroll
        for (int i = 0; i < 2 * (Cf::GK + 1); ++i) b[0][i] = b[1][i];
        zero[0] = zero[1];
      }
    }
  }
}

template <class Cf>
__global__ void __launch_bounds__(Cf::kThreads, 1) decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const SharedMap<Cf> map{shared};
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, warpgroup = warp >> 2;
  const uint32_t image_bar = shared_u32(map.image_bar());
  const uint8_t* ring = map.ring(warp);
  const Scratch<Cf> scratch{map.scratch(warpgroup)};
  SlotStream<Cf> stream{shared_u32(ring), 0, 0, {}};
  Progress* at = reinterpret_cast<Progress*>(map.ring(warp) + Cf::kWarpState + 32);

  if (lane < 2) mbarrier_init(stream.bar(lane), 1);
  if (thread == 0) mbarrier_init(image_bar, 1);
  proxy_fence();
  __syncthreads();
  auto load_head = [&](int head) {
    mbarrier_expect(image_bar, Cf::kImageBytes + Cf::kMeanBytes);
    bulk_copy(shared_u32(map.image()), p.key_image + static_cast<int64_t>(head) * Cf::kImageBytes, Cf::kImageBytes,
              image_bar);
    bulk_copy(shared_u32(map.mean()), p.mean_tile + static_cast<int64_t>(head) * (Cf::kMeanBytes / 16), Cf::kMeanBytes,
              image_bar);
  };
  // The head of this CTA's first unit does not depend on the schedule: fetch its constants before anything else. The
  // window kernel before this one had waited for everything earlier when it let this one start.
  const int virtual_heads = p.num_kv_heads * p.column_groups;
  int loaded = blockIdx.x * virtual_heads / p.num_ctas / p.column_groups;
  uint32_t loads = 1;  // of head constants so far
  if (thread == 0) load_head(loaded);
  grid_launch_dependents();  // the next window kernel waits for all of this grid before it touches anything
  {  // the output's constants are wanted last; have them in L2 by then
    constexpr int bytes = Cf::D * Cf::GV * 32;
    const uint8_t* basis = reinterpret_cast<const uint8_t*>(p.value_basis) + static_cast<int64_t>(loaded) * bytes;
    for (int i = thread * 128; i < bytes; i += Cf::kThreads * 128) prefetch_l2(basis + i);
  }
  if (lane == 0) {
    const Cut cut{__ldcg(&p.requests[p.num_requests].unit_begin), virtual_heads, p.num_ctas};
    *at = Progress{cut, cut.first_head(blockIdx.x) - 1, 0, 0, 0};
  }
  __syncwarp();

#pragma unroll 1
  for (;;) {
    const Cut cut = at->cut;
    const int vh = at->vh + 1;
    if (vh > cut.last_head(blockIdx.x)) break;
    const int head = vh / p.column_groups;
    if (head != loaded) {
      mbarrier_wait(image_bar, (loads - 1) & 1);
      __syncthreads();
      if (thread == 0) load_head(head);
      loaded = head;
      ++loads;
    }
    int begin, end;
    cut.template part_range<Cf::kWarpgroups>(blockIdx.x, warpgroup, vh, begin, end);
    const int first = begin < end ? find_request(p.requests, p.num_requests, begin, lane) : p.num_requests;
    if (lane == 0) {
      at->vh = vh, at->begin = begin, at->end = end, at->request = first - 1;
      *stream.state(map.ring(warp)) = StreamState{head, begin, end, warp & 3, first, 0};
    }
    __syncwarp();
    if (begin >= end) continue;
    stream.n = 0;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) stream.issue(p, i, lane);
    Item item;
#pragma unroll 1
    while (next_item<Cf>(p, scratch, at, item)) {
      mbarrier_wait(image_bar, (loads - 1) & 1);
      Softmax<Cf> acc;
      acc.reset();
      attend_latent<Cf>(acc, stream, p, scratch, map.mean(), swizzled_descriptor(shared_u32(map.image())), item, ring);
      const Sums sums{
          {acc.max[0], acc.max[1]}, {acc.p[0], acc.p[1]}, {acc.ps[0], acc.ps[1]}, {acc.sink[0], acc.sink[1]}};
      const int g = lane >> 2;
      merge_warps<Cf, Cf::GV, Cf::C == 4>(scratch.record(), scratch.exchange(), acc.o, sums,
                                          [&](int i, int y) { return 16 * i + 8 * y + g; }, warp & 3, warpgroup, lane);
      finish_item<Cf>(p, scratch, at);
    }
  }
  mbarrier_wait(image_bar, (loads - 1) & 1);  // no copy may outlive the CTA
  grid_dependency_wait();
}

}  // namespace kqsvd::decode
