// SPDX-License-Identifier: Apache-2.0
// Who computes what. A *virtual head* is a KV head and a group of query columns. Its work is a line of units: for each
// request the exact window (`window_units`), then its latent positions, four grains a unit. The lines of all virtual
// heads, end to end, are cut into equal ranges, one per CTA; a CTA cuts each head's piece of its range into equal parts, one per warpgroup.
// Everything follows from the request table, so the grid is fixed and nothing is read on the host.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

// The cut of virtual heads into CTA ranges and warpgroup parts.
struct Cut {
  int64_t units, total;  // of one virtual head, of all
  int num_ctas, parts;

  __device__ Cut(int head_units, int virtual_heads, int num_ctas, int parts)
      : units(head_units), total(static_cast<int64_t>(head_units) * virtual_heads), num_ctas(num_ctas), parts(parts) {}
  __device__ int64_t cta_begin(int cta) const { return total * cta / num_ctas; }
  __device__ int cta_of(int64_t unit) const { return static_cast<int>(((unit + 1) * num_ctas - 1) / total); }

  // Units [begin, end) of `head` that belong to warpgroup `part` of `cta`, counted from the head's first unit.
  __device__ void part_range(int cta, int part, int head, int& begin, int& end) const {
    const int64_t lo = max(cta_begin(cta), head * units), hi = min(cta_begin(cta + 1), (head + 1) * units);
    const int64_t n = max(hi - lo, int64_t{0});
    begin = static_cast<int>(lo - head * units + n * part / parts);
    end = static_cast<int>(lo - head * units + n * (part + 1) / parts);
  }
};

// Last request whose unit_begin is <= unit (a warp searches 32 candidates at a time).
__device__ __forceinline__ int find_request(const Request* requests, int num_requests, int unit, int lane) {
  int lo = 0, n = num_requests;
  while (n > 1) {
    const int step = (n + 31) / 32, i = lo + lane * step;
    const bool le = i < lo + n && requests[i].unit_begin <= unit;
    const int last = 31 - __clz(__ballot_sync(~0u, le) | 1u);
    const int end = lo + n;
    lo += last * step;
    n = min(step, end - lo);
  }
  return lo;
}

}  // namespace kqsvd::decode
