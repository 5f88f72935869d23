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
  int units;          // of the request in this range

  Item() = default;
  __device__ Item(const Request& r, int begin, int end, int grain) {
    const int lo = max(begin, r.unit_begin) - r.unit_begin, hi = min(end, r.unit_end) - r.unit_begin;
    const int granules = (r.last - r.first + 4 * grain - 1) / (4 * grain);
    first = min(lo, granules);
    last = min(max(hi, 0), granules);
    units = hi - lo;
  }
};

// What the layout of slots works on; one per warp, in shared memory.
struct StreamState {
  int head, begin, end;  // virtual-head-local unit range
  int warp;              // in its warpgroup
  int request, offset;   // next request to lay out and how many of its slots are already laid out
};

constexpr unsigned kSourceUnit = 32;  // bytes: 32 bits of them reach 128 GiB of pages

// A slot as its lane keeps it: where its two chunks lie (in source units from `pages`), which of its four tiles exist (bits
// 0 to 3) plus how many bytes they have (-1: no such slot), and the row of the rope table to fetch with it (-1: none).
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

// Offset of a tile in its page, in source units.
template <class Cf>
__device__ __forceinline__ uint32_t tile_at(unsigned head, unsigned block, unsigned token) {
  return (head * (block / kTileTokens) + token / kTileTokens) * (Cf::kTileBytes / kSourceUnit);
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
    const Item item(r, at.begin, at.end, Cf::kGrain);
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
        const unsigned page = static_cast<unsigned>(p.page_stride / kSourceUnit), block = p.block_size;
        uint32_t source[4] = {0, 0, 0, 0};
        const bool aligned = block % 32 == 0;  // a chunk is inside one block
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const unsigned pos = token + c * Cf::kSecondChunk, left = max(r.last - static_cast<int>(pos), 0);
          slot.tiles |= (left > kTileTokens ? 3 : left ? 1 : 0) << 2 * c;
          if (left) slot.source[c] = table[pos / block] * page + tile_at<Cf>(at.head, block, pos % block);
          if (!aligned && left > kTileTokens) {
            const unsigned second = pos + kTileTokens;
            source[c] = table[second / block] * page + tile_at<Cf>(at.head, block, second % block);
          }
        }
        if (!aligned) odd[lane] = make_uint2(source[0], source[1]);
      }
      if (s == 0 && slot.tiles) slot.rope_row = p.rope_table_moves ? base / Cf::T : 0;
      static_assert(Cf::kTileBytes % kSourceUnit == 0);
      slot.tiles |= __popc(slot.tiles) * Cf::kTileBytes;
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

// Copies of a slot whose tiles are not contiguous.
template <class Cf>
__device__ __noinline__ void issue_chunks(const DecodeParams& p, Slot slot, const uint2* odd, uint32_t to,
                                          uint32_t done) {
  constexpr int tile = Cf::kTileBytes;
  const bool aligned = p.block_size % 32 == 0;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int tiles = slot.tiles >> 2 * c & 3;
    const uint8_t* from = p.pages + slot.source[c] * uint64_t{kSourceUnit};
    if (tiles) bulk_copy_once(to + 2 * c * tile, from, (aligned && tiles == 3 ? 2 : 1) * tile, done);
    if (!aligned && tiles == 3)
      bulk_copy_once(to + (2 * c + 1) * tile, p.pages + (c ? odd->y : odd->x) * uint64_t{kSourceUnit}, tile, done);
  }
}

template <class Cf>
struct SlotStream {
  uint32_t ring;    // shared address; rope rows, barriers follow (Config::kWarpBytes)
  int n;            // slots consumed
  uint32_t parity;  // of the two stages' barriers
  Slot slot;        // this lane's

  __device__ uint32_t rope() const { return ring + Cf::kStages * Cf::kSlotBytes; }
  __device__ uint32_t bar(int stage) const { return rope() + Cf::kRopeStages * Cf::kRopeBytes + stage * 8; }

  static __device__ StreamState* state(uint8_t* ring) { return reinterpret_cast<StreamState*>(ring + Cf::kWarpState); }
  static __device__ uint2* odd(uint8_t* ring) { return reinterpret_cast<uint2*>(ring + Cf::kWarpState + Cf::kStateBytes); }
  __device__ uint8_t* generic() const { return static_cast<uint8_t*>(__cvta_shared_to_generic(ring)); }

  // Lays out the first slots of a range, before anything of it is copied.
  __device__ __forceinline__ void begin(const DecodeParams& p, int lane) {
    n = 0;
    slot = lay_out<Cf>(p, *state(generic()), odd(generic()), lane);
  }

  // The rope rows of the first step, by the threads themselves: they are there with the query, long before the pages.
  __device__ __forceinline__ void fetch_first_rope(const DecodeParams& p, int lane) {
    const int row = __shfl_sync(~0u, slot.rope_row, 0);
    if (row < 0) return;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(p.rope_table) + static_cast<int64_t>(row) * Cf::kRopeRow;
    uint8_t* to = generic() + Cf::kStages * Cf::kSlotBytes;
    for (int i = 16 * lane; i < Cf::kRopeBytes; i += 512) copy_async_16(to + i, from + i);
  }

  // Starts the copies of stream slot n into stage n % 2 (collective over the warp); slots are issued in order from 0.
  // begins_step: n is a multiple of the slots of a step, so rope rows may come with it (and 32 slots are whole steps).
  __device__ __forceinline__ void issue(const DecodeParams& p, unsigned n, int stage, bool begins_step, int lane) {
    static_assert(32 % Cf::kSlots == 0);
    if (begins_step && n % 32 == 0 && n > 0) slot = lay_out<Cf>(p, *state(generic()), odd(generic()), lane);
    if (lane == n % 32 && slot.tiles >= 0) {
      const uint32_t done = bar(stage), to = ring + stage * Cf::kSlotBytes;
      const int bytes = slot.tiles & ~15;
      const bool with_rope = begins_step && slot.rope_row >= 0;
      mbarrier_expect(done, bytes + (with_rope ? Cf::kRopeBytes : 0));
      if (with_rope)
        bulk_copy(rope() + (Cf::kRopeStages == 2 ? stage * Cf::kRopeBytes : 0),
                  p.rope_table + static_cast<int64_t>(slot.rope_row) * (Cf::kRopeRow / 4), Cf::kRopeBytes, done);
      const uint8_t* from = p.pages + slot.source[0] * uint64_t{kSourceUnit};
      if (Cf::kSecondChunk == 32 && p.block_size % 64 == 0) {
        if (bytes) bulk_copy_once(to, from, bytes, done);
      } else {
        issue_chunks<Cf>(p, slot, odd(generic()) + lane, to, done);
      }
    }
    __syncwarp();
  }
};

}  // namespace kqsvd::decode
