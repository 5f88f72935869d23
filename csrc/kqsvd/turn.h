// SPDX-License-Identifier: Apache-2.0
// Host side of the rotation tables, shared by store and dequantize.
#pragma once

#include "check.h"
#include "primitives.cuh"

#include "../ops.h"

namespace kqsvd {

// Checked view of the tables; rotary_dim is 0 where keys are coded as they arrive.
inline RopeTurn turn_of(const RopeTensors& rope, int device) {
  RopeTurn turn{};
  if (rope.block == 0 || rope.table.numel() == 0) return turn;
  STD_TORCH_CHECK((rope.block & (rope.block - 1)) == 0, "rope block ", rope.block, " must be a power of two");
  check_tensor(rope.table, "rope_table", ScalarType::Float, {2, kTurnRows, kAny, 2}, device);
  check_contiguous(rope.table, "rope_table");
  const int64_t rotary_dim = 2 * rope.table.size(2);
  STD_TORCH_CHECK(rotary_dim % 8 == 0, "rotary width ", rotary_dim, " must be a multiple of 8");
  turn.table = data<const float4>(rope.table);
  turn.rotary_dim = static_cast<int>(rotary_dim);
  while ((int64_t(1) << turn.block_shift) < rope.block) ++turn.block_shift;
  turn.interleaved = rope.interleaved;
  return turn;
}

}  // namespace kqsvd
