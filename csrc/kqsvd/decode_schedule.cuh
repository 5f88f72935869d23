// SPDX-License-Identifier: Apache-2.0
// Who computes what. A *virtual head* is a KV head and a group of query columns. Its work is a line of units: for each
// request the exact window (`window_units`), then its latent positions, four grains a unit. The lines of all virtual
// heads, end to end, are cut into equal ranges, one per CTA; a CTA cuts each head's piece of its range into equal parts, one per warpgroup.
// Everything follows from the request table, so the grid is fixed and nothing is read on the host.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

// The cut of virtual heads into CTA ranges and warpgroup parts. 32-bit: 2^31 / 132 units are four billion tokens and heads.
struct Cut {
  unsigned units, total;  // of one virtual head, of all
  unsigned num_ctas, each, rest;
  float inverse;

  __device__ Cut(int head_units, int virtual_heads, int num_ctas)
      : units(head_units), total(head_units * virtual_heads), num_ctas(num_ctas), each(total / num_ctas),
        rest(total - each * num_ctas), inverse(1.f / num_ctas) {}
  // total * cta / num_ctas; the rounded division is exact for rest * cta < 2^15.
  __device__ unsigned cta_begin(unsigned cta) const {
    return each * cta + static_cast<unsigned>((static_cast<float>(rest * cta) + 0.5f) * inverse);
  }
  __device__ unsigned cta_of(unsigned unit) const {  // the only candidates are next to the proportional one
    unsigned c = static_cast<unsigned>(__fdividef(static_cast<float>(unit) * num_ctas, static_cast<float>(total)));
    c = min(c, num_ctas - 1);
    while (c > 0 && cta_begin(c) > unit) --c;
    while (c + 1 < num_ctas && cta_begin(c + 1) <= unit) ++c;
    return c;
  }

  // Units [begin, end) of `head` that belong to warpgroup `part` of `cta`, counted from the head's first unit.
  template <int parts>
  __device__ void part_range(unsigned cta, unsigned part, unsigned head, int& begin, int& end) const {
    const unsigned lo = max(cta_begin(cta), head * units), hi = min(cta_begin(cta + 1), (head + 1) * units);
    const unsigned n = hi > lo ? hi - lo : 0;
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
