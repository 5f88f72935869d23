// SPDX-License-Identifier: Apache-2.0
// Who computes what. A *virtual head* is a KV head and a group of query columns. Its work is a line of units: the latent
// positions of each request in turn, four grains a unit. The heads' lines, one after the other, are cut into equal ranges,
// one per CTA, and those into one part per warpgroup. Everything follows from the request table, so the grid is fixed and
// nothing is read on the host.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

// Units that a CTA could do in the time in which it changes from one head to the next: its warpgroups wait for each
// other, then for the head's constants and first pages.
constexpr int kSwitchUnits = 5;

// The cut of the heads' lines into CTA ranges and warpgroup parts. `line_heads` heads share `line_ctas` CTAs, as few as go
// without remainder; between two of their lines lies a gap that costs what the change of head costs.
struct Cut {
  int units;  // of one virtual head
  int line_heads, line_ctas;

  __device__ unsigned pitch() const { return max(units + (line_heads > 1 ? kSwitchUnits : 0), 1); }
  __device__ unsigned length() const { return pitch() * (line_heads - 1) + units; }
  // Where the range of the CTA begins in its line, `cta` counted in the line.
  __device__ unsigned bound(unsigned cta) const {
    const unsigned all = length(), n = line_ctas;
    return all / n * cta + all % n * cta / n;
  }
  // Heads [first, last] that may have units in the CTA's range; none if first > last.
  __device__ int first_head(int cta) const {
    const unsigned from = bound(cta % line_ctas), head = from / pitch();
    return cta / line_ctas * line_heads + min(head + (from >= head * pitch() + units ? 1 : 0), line_heads - 1u);
  }
  __device__ int last_head(int cta) const {
    const unsigned to = max(bound(cta % line_ctas + 1), 1u) - 1;
    return cta / line_ctas * line_heads + min(to / pitch(), line_heads - 1u);
  }
  // Units [begin, end) of `head` that belong to warpgroup `part` of `cta`, counted from the head's first unit.
  template <int parts>
  __device__ void part_range(int cta, int part, int head, int& begin, int& end) const {
    const int origin = head % line_heads * pitch(), k = cta % line_ctas;
    const int lo = max(static_cast<int>(bound(k)) - origin, 0);
    const int n = max(min(static_cast<int>(bound(k + 1)) - origin, units) - lo, 0);
    begin = lo + n * part / parts;
    end = lo + n * (part + 1) / parts;
  }
  // CTAs [first, last] that may hold units of `head`, which has some.
  __device__ void ctas_of(int head, int& first, int& last) const {
    const unsigned origin = head % line_heads * pitch();
    const int cta = head / line_heads * line_ctas;
    // The last CTA that begins at or before a unit.
    const auto holder = [&](unsigned unit) {
      return cta + static_cast<int>((uint64_t{unit + 1} * line_ctas - 1) / length());
    };
    first = holder(origin), last = holder(origin + units - 1);
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
