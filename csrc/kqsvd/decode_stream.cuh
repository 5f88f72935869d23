// SPDX-License-Identifier: Apache-2.0
// The ring of page slots of one warp. A slot is 64 tokens of one KV head, fetched by bulk copies that report to an
// mbarrier. The warp's next 32 slots are worked out at once, one per lane (block table look-ups included); the lane that
// holds a slot issues its copies, so the main loop carries no addresses.
#pragma once

#include "decode_config.cuh"
#include "decode_params.h"
#include "mma.cuh"

namespace kqsvd::decode {

// The part of a request that lies in a warpgroup's range [begin, end) of units.
struct Item {
  int first, last;    // granules (of four grains) of the latent part
  bool has_window;    // this range owns the exact part
  int units;          // of the request in this range

  __device__ Item(const Request& r, int begin, int end, int window_units, int grain) {
    const int lo = max(begin, r.unit_begin) - r.unit_begin, hi = min(end, r.unit_end) - r.unit_begin;
    const int window = r.last < r.length ? window_units : 0;
    const int granules = (r.last - r.first + 4 * grain - 1) / (4 * grain);
    first = min(max(lo - window, 0), granules);
    last = min(max(hi - window, 0), granules);
    has_window = window > 0 && lo == 0 && hi > 0;
    units = hi - lo;
  }
};

// What the layout of slots works on; one per warp, in shared memory.
struct StreamState {
  int head, begin, end;  // virtual-head-local unit range
  int warp;              // in its warpgroup
  int request, offset;   // next request to lay out and how many of its slots are already laid out
};

// A slot as its lane keeps it: where its two chunks lie (in 16 bytes from `pages`), which of its four tiles exist
// (-1: no such slot), and the row of the rope table to fetch with it (-1: none).
struct Slot {
  uint32_t source[2];
  int tiles, rope_row;
};

// First token of warp `warp` in step `step` of an item, and how many grains it gets.
template <class Cf>
__device__ __forceinline__ int step_base(int first, const Item& item, int step, int warp, int& grains) {
  const int granule = item.first + step * Cf::kGrains;
  grains = min(Cf::kGrains, item.last - granule);
  return first + (4 * granule + warp * grains) * Cf::kGrain;
}

// Works out the warp's next 32 slots, one per lane. `odd`: sources of tiles 1 and 3 where a block is not whole chunks.
template <class Cf>
__device__ __noinline__ Slot lay_out(const DecodeParams& p, StreamState& state, uint2* odd, int lane) {
  const StreamState at = state;
  Slot slot{{0, 0}, -1, -1};
  int request = at.request, offset = at.offset, filled = 0;
  while (filled < 32 && request < p.num_requests) {
    const Request r = p.requests[request];
    if (r.unit_begin >= at.end) break;
    const Item item(r, at.begin, at.end, p.window_units, Cf::kGrain);
    const int slots = (item.last - item.first + Cf::kGrains - 1) / Cf::kGrains * Cf::kSlots;
    const int n = min(slots - offset, 32 - filled), index = offset + lane - filled;
    if (lane >= filled && lane < filled + n) {
      const int s = index % Cf::kSlots;
      int grains;
      const int base = step_base<Cf>(r.first, item, index / Cf::kSlots, at.warp, grains);
      const int token = base + s / Cf::kGrainSlots * Cf::kGrain + s % Cf::kGrainSlots * 32;
      slot.tiles = 0;
      if (s / Cf::kGrainSlots < grains) {
        const int* table = p.block_table + request * p.block_table_stride;
        const uint32_t page = static_cast<uint32_t>(p.page_stride / 16);
        const int tiles_per_page = p.block_size / kTileTokens;
        uint32_t source[4] = {0, 0, 0, 0};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int pos = token + (j >> 1) * Cf::kSecondChunk + (j & 1) * kTileTokens;
          if (pos >= r.last) continue;
          slot.tiles |= 1 << j;
          const int in_page = at.head * tiles_per_page + pos % p.block_size / kTileTokens;
          source[j] = static_cast<uint32_t>(table[pos / p.block_size]) * page + in_page * (Cf::kTileBytes / 16);
        }
        slot.source[0] = source[0], slot.source[1] = source[2];
        odd[lane] = make_uint2(source[1], source[3]);
      }
      if (s == 0 && slot.tiles) slot.rope_row = p.rope_table_moves ? base / Cf::T : 0;
    }
    filled += n;
    offset += n;
    if (offset == slots) ++request, offset = 0;
  }
  __syncwarp();
  if (lane == 0) state.request = request, state.offset = offset;
  __syncwarp();
  return slot;
}

template <class Cf>
struct SlotStream {
  uint32_t ring;  // shared address; rope rows, barriers follow (Config::kWarpBytes)
  StreamState* state;
  uint2* odd;
  Slot slot;  // this lane's

  __device__ uint32_t rope() const { return ring + Cf::kStages * Cf::kSlotBytes; }
  __device__ uint32_t bar(int stage) const { return rope() + Cf::kRopeStages * Cf::kRopeBytes + stage * 8; }

  // Starts the copies of stream slot n (collective over the warp); slots are issued in order from 0.
  __device__ __forceinline__ void issue(const DecodeParams& p, int n, int lane) {
    if (n % 32 == 0) slot = lay_out<Cf>(p, *state, odd, lane);
    if (lane == n % 32 && slot.tiles >= 0) {
      const int stage = n & 1;
      const uint32_t done = bar(stage), to = ring + stage * Cf::kSlotBytes;
      const int bytes = __popc(slot.tiles) * Cf::kTileBytes;
      mbarrier_expect(done, bytes + (slot.rope_row >= 0 ? Cf::kRopeBytes : 0));
      if (slot.rope_row >= 0)
        bulk_copy(rope() + (Cf::kRopeStages == 2 ? stage * Cf::kRopeBytes : 0),
                  p.rope_table + static_cast<int64_t>(slot.rope_row) * (Cf::kRopeRow / 4), Cf::kRopeBytes, done);
      const uint8_t* from = p.pages + slot.source[0] * uint64_t{16};
      if (Cf::kSecondChunk == 32 && p.block_size % 64 == 0) {
        if (bytes) bulk_copy(to, from, bytes, done);
      } else {
        issue_chunks(p, from, to, done, lane);
      }
    }
    __syncwarp();
  }

  __device__ void issue_chunks(const DecodeParams& p, const uint8_t* from, uint32_t to, uint32_t done, int lane) {
    constexpr int tile = Cf::kTileBytes;
    const uint8_t* second = p.pages + slot.source[1] * uint64_t{16};
    if (p.block_size % 32 == 0) {
      if (slot.tiles & 3) bulk_copy(to, from, __popc(slot.tiles & 3) * tile, done);
      if (slot.tiles & 12) bulk_copy(to + 2 * tile, second, __popc(slot.tiles & 12) * tile, done);
    } else {
      const uint2 more = odd[lane];
      if (slot.tiles & 1) bulk_copy(to, from, tile, done);
      if (slot.tiles & 2) bulk_copy(to + tile, p.pages + more.x * uint64_t{16}, tile, done);
      if (slot.tiles & 4) bulk_copy(to + 2 * tile, second, tile, done);
      if (slot.tiles & 8) bulk_copy(to + 3 * tile, p.pages + more.y * uint64_t{16}, tile, done);
    }
  }
};

}  // namespace kqsvd::decode
