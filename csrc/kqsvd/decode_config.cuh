// SPDX-License-Identifier: Apache-2.0
// Compile-time shape of one decode instantiation: sizes, the order of work inside a warp, the shared memory map.
#pragma once

#include "plan.cuh"

namespace kqsvd::decode {

// Columns: query columns (heads of a KV head x query rows) computed at once, 4 or 8. RopeBlock T: 32 or 64.
// One *pair* of wgmma rows g, g + 8 is an absorbed query fragment; with 4 columns a fragment carries two rope blocks.
// Plan: a type with `keys` and `values`.
template <class Plan, int HeadDim, int NumColumns, int RopeBlockTokens>
struct Config {
  static constexpr SidePlan K = Plan::keys, V = Plan::values;
  static constexpr int D = HeadDim, C = NumColumns, T = RopeBlockTokens;
  static_assert(C == 4 || C == 8);
  static_assert(T == 32 || T == 64);
  static_assert(D % 32 == 0 && D <= 128);
  static constexpr int GK = K.num_groups, GV = V.num_groups;

  static constexpr int kKeyScales = K.bytes() + V.bytes(), kValueScales = kKeyScales + 16;
  static constexpr int kTileBytes = kKeyScales + 32;

  // A warp step absorbs 16 rows = kBlocks rope blocks; a slot is two 32-token chunks, kSlots slots a step.
  static constexpr int kBlocks = 16 / C;
  static constexpr int kSlots = kBlocks * T / 64;
  static constexpr int kGrain = C == 4 ? 2 * T : 64;        // tokens of the smallest piece of a warp
  static constexpr int kGrains = kBlocks * T / kGrain;      // pieces of a full step
  static constexpr int kGrainSlots = kGrain / 64;
  static constexpr int kSecondChunk = C == 4 && T == 64 ? 64 : 32;  // tokens from a slot's first chunk to its second
  static constexpr int kSlotBytes = 4 * kTileBytes;

  static constexpr int kRows = kGroupChannels * (GK + 1);   // absorb matrix and mean rows
  static constexpr int kImageBytes = kRows * 128 * ((D + 63) / 64);
  static constexpr int kRopeRow = 2 * D;                    // bytes of one block start's (cos, sin)
  static constexpr int kRopeBytes = kBlocks * kRopeRow;
  static constexpr int kRopeStages = kSlots == 1 ? 2 : 1;
  static constexpr int kStages = 2;
  static constexpr int kMeanBytes = T / 16 * 512;

  static constexpr int kOutRows = 16 * GV > D ? 16 * GV : D;
  static constexpr int kRecordRows = kOutRows + 4;          // then l, ls, lc, m
  static constexpr int kRecord = kRecordRows * C;           // floats of one partial result
  static constexpr int kQueryBytes = D / 32 * 1024;
  static_assert(kOutRows <= 128, "a merging thread holds one row");
  // Scratch of a warpgroup: the query, then the same bytes two halves of a record; an exchange, the work item and
  // the query of the next item on its way.
  static constexpr int kRecordsBytes = 8 * kRecord > kQueryBytes ? 8 * kRecord : kQueryBytes;
  static constexpr int kExchange = kRecordsBytes;
  static constexpr int kNextQuery = (kExchange + 640 + 127) / 128 * 128;
  static constexpr int kScratchBytes = kNextQuery + 2 * D * C;

  static constexpr int kStateBytes = 112;  // of stream state and progress
  // Of one warp: ring, rope rows, two mbarriers, stream state and progress, sources of odd tiles.
  static constexpr int kWarpState = kStages * kSlotBytes + kRopeStages * kRopeBytes + 16;
  static constexpr int kWarpBytes = kWarpState + kStateBytes + 256 + 16;
  static constexpr int shared_bytes(int warpgroups) {
    return kImageBytes + kMeanBytes + warpgroups * (kScratchBytes + 4 * kWarpBytes) + 16;
  }
  static constexpr int kWarpgroups = shared_bytes(3) <= 232448 ? 3 : 2;
  static_assert(shared_bytes(kWarpgroups) <= 232448, "plan too wide for the shared memory ring");
  static constexpr int kThreads = 128 * kWarpgroups;
  static constexpr int kSharedBytes = shared_bytes(kWarpgroups);

  // Probabilities are scaled by 2^-kValueBias so that no secondary value plane overflows fp16.
  static constexpr int kValueBias = V.max_match_exponent(false);
};

}  // namespace kqsvd::decode
