// SPDX-License-Identifier: Apache-2.0
// Who computes what. A *virtual head* is a KV head and a group of query columns. Its work is a line of units: the latent
// positions of each request in turn, four grains a unit. CTAs are dealt to virtual heads; a head's line is cut into equal
// ranges, one per CTA, and those into one part per warpgroup. Everything follows from the request table, so the grid is
// fixed and nothing is read on the host.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

// The cut of virtual heads into CTA ranges and warpgroup parts. While there are no more heads than CTAs a CTA serves one
// head: reloading a head's constants would make its warpgroups wait for each other. CTAs are dealt to heads in turn, so
// that every head has as many of the last ones, which begin late (grid_of) and get `late_units` less than the others.
struct Cut {
  int units;  // of one virtual head
  int heads, num_ctas, late_ctas, late_units;

  __device__ Cut(const DecodeParams& p, int units)
      : units(units), heads(p.num_kv_heads * p.column_groups), num_ctas(p.num_ctas), late_ctas(p.late_ctas),
        late_units(p.late_units) {}

  // How many of the first `ctas` CTAs a head has where they are dealt: head, head + heads, head + 2 heads, ...
  __device__ unsigned dealt(int head, int ctas) const { return ctas > head ? (ctas - head + heads - 1) / heads : 0; }
  __device__ int first_head(int cta) const { return heads <= num_ctas ? cta % heads : cta * heads / num_ctas; }
  __device__ int last_head(int cta) const { return heads <= num_ctas ? cta % heads : ((cta + 1) * heads - 1) / num_ctas; }

  // Units [begin, end) of `head` that belong to warpgroup `part` of `cta`, counted from the head's first unit.
  template <int parts>
  __device__ void part_range(int cta, int part, int head, int& begin, int& end) const {
    unsigned lo = 0, n = units;
    if (heads <= num_ctas) {
      const unsigned k = cta / heads, all = dealt(head, num_ctas), early = dealt(head, num_ctas - late_ctas);
      const unsigned less = early > 0 && early < all ? min(static_cast<unsigned>(late_units), units / early) : 0;
      const unsigned line = units + (all - early) * less;  // as if late CTAs had done `less` units before
      const auto end_of = [&](unsigned i) { return line / all * i + line % all * i / all - (max(i, early) - early) * less; };
      lo = end_of(k);
      n = end_of(k + 1) - lo;
    } else {  // in num_ctas-ths of a unit, so that no product overflows
      const int64_t first = static_cast<int64_t>(units) * heads * cta / num_ctas - static_cast<int64_t>(head) * units;
      const int64_t last = static_cast<int64_t>(units) * heads * (cta + 1) / num_ctas - static_cast<int64_t>(head) * units;
      lo = static_cast<unsigned>(max(first, int64_t{0}));
      n = static_cast<unsigned>(max(min(last, static_cast<int64_t>(units)) - lo, int64_t{0}));
    }
    begin = lo + n * part / parts;
    end = lo + n * (part + 1) / parts;
  }
  // CTAs first, first + step, ..., last may hold units of `head`.
  __device__ void ctas_of(int head, int& first, int& last, int& step) const {
    if (heads <= num_ctas) {
      first = head, step = heads, last = head + (dealt(head, num_ctas) - 1) * heads;
    } else {
      first = static_cast<int>(static_cast<int64_t>(head) * num_ctas / heads), step = 1;
      last = static_cast<int>((static_cast<int64_t>(head + 1) * num_ctas - 1) / heads);
    }
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
