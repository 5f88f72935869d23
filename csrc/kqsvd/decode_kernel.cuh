// SPDX-License-Identifier: Apache-2.0
// Decode attention on latent pages (sm_90a). One persistent CTA per SM, two or three warpgroups; see decode_schedule.cuh
// for the division of work and docs/format.md for what the numbers mean.
#pragma once

#include "decode_merge.cuh"
#include "decode_slot.cuh"
#include "decode_stream.cuh"

namespace kqsvd::decode {

// What a warp remembers between items; in shared memory, so that it does not occupy registers inside one.
struct Progress {
  Cut cut;
  int vh, begin, end, request;
  int none;                          // value of `request` before the first one
  int head, column0, key_exponent;  // of vh
  int settled;  // whether pages may be read before the previous kernel has ended (pages_are_settled)
  int join_begin;  // where the CTA's range begins if its warpgroups join their results, else -1
};

// Where the record of the item goes: a request that this warpgroup serves alone has a place of its own.
template <class Cf>
__device__ __forceinline__ float* record_target(const DecodeParams& p, Scratch<Cf> scratch, const Progress* at) {
  const Request* r = &scratch.item()->r;
  const int warpgroup = threadIdx.x >> 7;
  if (at->begin <= r->unit_begin && r->unit_end <= at->end)
    return p.whole_partials +
           (static_cast<int64_t>(at->request) * (p.num_kv_heads * p.column_groups) + at->vh) * Cf::kRecord;
  const bool joins = at->join_begin >= 0;
  const int slot = piece_slot<Cf>(at->cut, p.max_phases, blockIdx.x, joins ? 0 : warpgroup, at->vh,
                                  joins ? at->join_begin : at->begin, r->unit_begin);
  return p.partials + static_cast<int64_t>(slot) * Cf::kRecord;
}

// Finds the next request with latent tokens in this warpgroup's range, after `request`; false at the end.
__device__ __forceinline__ bool find_item(const DecodeParams& p, const Progress* at, int grain, int& request, Request& r,
                                          Item& item) {
  const int begin = at->begin, end = at->end;
  for (;;) {
    if (++request >= p.num_requests) return false;
    r = p.requests[request];
    if (r.unit_begin >= end) return false;
    if (r.unit_end <= begin || r.unit_end == r.unit_begin) continue;
    item = Item(r, begin, end, grain);
    if (item.first < item.last) return true;
  }
}

// Asks for the exact positions of a request, which the finishing block reads later, to be brought into L2. One warp.
__device__ __forceinline__ void prefetch_window(const DecodeParams& p, const Request& r, int request, int head, int lane) {
  const int size = p.window_block_size, block = r.last / size + lane;
  if (block * size >= r.length) return;
  const int page = p.window_table[request * p.window_table_stride + block];
  const uint16_t* at = static_cast<const uint16_t*>(p.window_pages) + page * p.window_block_stride + head * p.window_head_stride;
  bulk_prefetch(at, static_cast<uint32_t>(size * p.window_token_stride * 2));
}

// The latent part of one item: steps of absorb + slots.
template <class Cf>
__device__ __forceinline__ void attend_latent(Softmax<Cf>& acc, SlotStream<Cf>& stream, const DecodeParams& p,
                                              Scratch<Cf> scratch, const uint4* mean_tile, uint64_t image,
                                              const Item& item, const uint8_t* ring) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  const int last = scratch.item()->r.last;
  // An even number of slots in a step: every step begins with stage 0, and both stages have the same parity.
  constexpr bool kPairs = Cf::kSlots % 2 == 0;
  int left = item.last - item.first, at = scratch.item()->r.first + 4 * item.first * Cf::kGrain;
#pragma unroll 1
  for (; left > 0; left -= Cf::kGrains, at += 4 * Cf::kGrains * Cf::kGrain) {
    const int grains = min(Cf::kGrains, left), base = at + warp * grains * Cf::kGrain;
    const int stage0 = kPairs ? 0 : stream.n & 1;
    // Rope rows come with the first slot of a step; those of the first step came with the query.
    if (base < last && stream.n > 0) mbarrier_wait(stream.bar(stage0), stream.parity >> stage0 & 1);
    uint32_t b[2][2 * (Cf::GK + 1)];
    absorb<Cf>(b, scratch.query(),
               ring + Cf::kStages * Cf::kSlotBytes + (Cf::kRopeStages == 2 ? (stream.n & 1) * Cf::kRopeBytes : 0), image,
               lane);
    if (stream.n == 0) stream.issue(p, 1, 1, Cf::kSlots == 1, lane);  // not sooner: see begins in decode_kernel
    float4 zero[2];
    zero_point_terms<Cf>(zero, b, lane);
#pragma unroll(Cf::kSlots > 2 ? 1 : 2)
    for (int s = 0; s < Cf::kSlots; ++s) {  // b[0] serves the first half of the slots, then b[1] takes its place
      const int stage = kPairs ? s & 1 : stage0;
      const int token = base + s / Cf::kGrainSlots * Cf::kGrain + s % Cf::kGrainSlots * 32;
      if (s / Cf::kGrainSlots < grains && token < last) {
        if (s > 0 || stream.n == 0) mbarrier_wait(stream.bar(stage), stream.parity >> stage & 1);
        process_slot<Cf>(acc, p, scratch, mean_tile, ring + stage * Cf::kSlotBytes, b, zero, token, s % Cf::kGrainSlots,
                         base, s * 2 / Cf::kSlots);
      }
      stream.parity ^= 1u << stage;
      __syncwarp();
      stream.issue(p, stream.n + 2, stage, (s + 2) % Cf::kSlots == 0, lane);
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
  KQ_DYNAMIC_SHARED(shared);
  const SharedMap<Cf> map{shared};
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, warpgroup = warp >> 2;
  const uint32_t image_bar = shared_address(map.image_bar());
  const Scratch<Cf> scratch{map.scratch(warpgroup)};
  SlotStream<Cf> stream{shared_address(map.ring(warp)), 0, 0, {}};
  Progress* at = reinterpret_cast<Progress*>(map.ring(warp) + Cf::kWarpState + 32);

  if (lane < 2) mbarrier_init(stream.bar(lane), 1);
  if (thread == 0) mbarrier_init(image_bar, 1);
  proxy_fence();
  __syncthreads();
  auto load_head = [&](int head) {
    mbarrier_expect(image_bar, Cf::kImageBytes + Cf::kMeanBytes);
    bulk_copy(shared_address(map.image()), p.key_image + static_cast<int64_t>(head) * Cf::kImageBytes, Cf::kImageBytes,
              image_bar);
    bulk_copy(shared_address(map.mean()), p.mean_tile + static_cast<int64_t>(head) * (Cf::kMeanBytes / 16), Cf::kMeanBytes,
              image_bar);
  };
  // Neither the constants of this CTA's first head nor the schedule and the block table are written by the kernel before
  // this one: read them while it ends. (decode.cu: a schedule kernel directly before has ended.)
  static_assert(sizeof(StreamState) <= 32 && 32 + sizeof(Progress) <= Cf::kStateBytes);
  const Request* total = p.requests + p.num_requests;
  const Cut whole(p, __ldcg(&total->unit_begin));
  const int first_head = whole.first_head(blockIdx.x);
  int loaded = first_head / p.column_groups;
  uint32_t loads = 1;  // of head constants so far
  if (thread == 0) load_head(loaded);
  if (lane == 0) *at = Progress{whole, first_head - 1, 0, 0, 0, 0, 0, 0, 0, __ldcg(&total->first), -1};
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
    const Cut::Range all = cut.range_of(blockIdx.x, vh);
    const int begin = all.template end_of<Cf::kWarpgroups>(warpgroup), end = all.template end_of<Cf::kWarpgroups>(warpgroup + 1);
    const int first = begin < end ? find_request(p.requests, p.num_requests, begin, lane) : p.num_requests;
    __syncwarp();  // every lane has read what lane 0 overwrites
    if (lane == 0) {
      at->vh = vh, at->begin = begin, at->end = end, at->request = at->none = first - 1;
      at->head = head, at->column0 = (vh - head * p.column_groups) * Cf::C, at->key_exponent = p.key_exponent[head];
      *stream.state(map.ring(warp)) = StreamState{head, begin, end, warp & 3, first, 0};
    }
    __syncwarp();
    if (begin >= end) continue;
    stream.begin(p, lane);
    stream.fetch_first_rope(p, lane);
    if (at->settled) stream.issue(p, 0, 0, false, lane);
    if (lane == 0) {  // behind the first pages, which would wait for the request's row
      const Request* r = p.requests + first;
      at->join_begin = cut.template joins<Cf::kWarpgroups>(all, r->unit_begin, r->unit_end) ? static_cast<int>(all.begin) : -1;
    }
    Softmax<Cf> acc;
    acc.reset();
#pragma unroll 1
    for (;;) {
      // Read again what follows from the thread's number, so that the main loop has the registers.
      const int thread = thread_index(), lane = thread & 31, warp = thread >> 5, warpgroup = warp >> 2;
      const Scratch<Cf> scratch{map.scratch(warpgroup)};
      Progress* at = reinterpret_cast<Progress*>(map.ring(warp) + Cf::kWarpState + 32);
      Request r;
      Item item;
      int request = at->request;
      const bool begins = at->request == at->none;
      // The last item of a range shows itself: nothing has to be read before its record can go out.
      const bool over = !begins && scratch.item()->r.unit_end + kChangeUnits >= at->end;
      const bool more = !over && find_item(p, at, Cf::kGrain, request, r, item);
      if (begins) {
        wait_for_previous_grid();  // for the query, and for pages of other requests if this step fills some
        release_next_grid();  // the finishing blocks may be here early
      }
      if (more) fetch_query<Cf>(scratch.next_query(), p, r.row, r.num_rows, at->head, at->column0, thread & 127);
      // First pages long before the query or behind it, which else waits for megabytes of them; second pages when it is used.
      if (begins && !at->settled) stream.issue(p, 0, 0, false, lane);
      if (p.prefetch_window && more && r.unit_end <= at->end && (warp & 3) == 3) prefetch_window(p, r, request, at->head, lane);
      if (!begins) {  // the item before
        const Sums sums{
            {acc.max[0], acc.max[1]}, {acc.p[0], acc.p[1]}, {acc.ps[0], acc.ps[1]}, {acc.sink[0], acc.sink[1]}};
        float* target = record_target<Cf>(p, scratch, at);
        if (over) {
          const bool joins = at->join_begin >= 0;
          write_last_record<Cf, Cf::C == 4>(joins ? scratch.record() : target, map.ring(4 * warpgroup), Cf::kWarpBytes,
                                            scratch.exchange(), acc.o, sums, thread & 127, warpgroup);
          if (joins) {  // then all warpgroups come here, once
            __syncthreads();
            join_records<Cf>(target, reinterpret_cast<const float*>(map.scratch(0)), thread);
          }
          break;
        }
        const int g = lane >> 2;
        merge_warps<Cf, Cf::GV, Cf::C == 4>(scratch.record(), scratch.exchange(), acc.o, sums,
                                            [&](int i, int y) { return 16 * i + 8 * y + g; }, warp & 3, warpgroup, lane);
        write_record<Cf>(target, scratch.record(), thread & 127);
      }
      if (!more) break;
      warpgroup_barrier(warpgroup);  // everyone is done with the item before
      if (lane == 0) at->request = request;
      if ((thread & 127) == 0) {
        const int visible_begin = p.sliding_window > 0 ? r.length - p.sliding_window : 0;
        const int visible_end = min(r.last, r.p0 + 1);
        *scratch.item() = WorkItem{r,
                                   at->head,
                                   at->column0,
                                   visible_begin,
                                   p.soft_cap_log2 > 0.f ? 0 : max(visible_end - visible_begin - Cf::kSecondChunk - 31, 0),
                                   at->key_exponent};
      }
      store_query<Cf>(scratch.query(), scratch.next_query(), p.is_bf16, thread & 127);
      if (begins) proxy_fence();  // bulk copies will follow where the rope rows are
      warpgroup_barrier(warpgroup);
      mbarrier_wait(image_bar, (loads - 1) & 1);
      acc.reset();
      attend_latent<Cf>(acc, stream, p, scratch, map.mean(), swizzled_descriptor(shared_address(map.image())), item,
                        map.ring(warp));
    }
    warpgroup_barrier(warpgroup);  // the next head's pages will come where others still read
    proxy_fence();
  }
  mbarrier_wait(image_bar, (loads - 1) & 1);  // no copy may outlive the CTA
  wait_for_previous_grid();
  release_next_grid();
}

}  // namespace kqsvd::decode
