// SPDX-License-Identifier: Apache-2.0
// Who computes what. A *virtual head* is a KV head and a group of query columns. Its work is a line of units: the latent
// positions of each request in turn, four grains a unit. CTAs are dealt to virtual heads; a head's line is cut into equal
// ranges, one per CTA, and those into one part per warpgroup. Everything follows from the request table, so the grid is
// fixed and nothing is read on the host.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

// The cut of virtual heads into CTA ranges and warpgroup parts. While there are no more heads than CTAs a CTA serves one
// head: reloading a head's constants would make its warpgroups wait for each other.
struct Cut {
  int units;  // of one virtual head
  int heads, num_ctas;

  // First CTA of a head, where CTAs are dealt to heads.
  __device__ int first_cta(int head) const { return (head * num_ctas + heads - 1) / heads; }
  __device__ int first_head(int cta) const { return cta * heads / num_ctas; }
  __device__ int last_head(int cta) const { return heads <= num_ctas ? first_head(cta) : ((cta + 1) * heads - 1) / num_ctas; }

  // Units [begin, end) of `head` that belong to warpgroup `part` of `cta`, counted from the head's first unit.
  template <int parts>
  __device__ void part_range(int cta, int part, int head, int& begin, int& end) const {
    unsigned lo = 0, n = units;
    if (heads <= num_ctas) {
      const unsigned k = cta - first_cta(head), all = first_cta(head + 1) - first_cta(head);
      lo = units / all * k + units % all * k / all;
      n = units / all * (k + 1) + units % all * (k + 1) / all - lo;
    } else {  // in num_ctas-ths of a unit, so that no product overflows
      const int64_t first = static_cast<int64_t>(units) * heads * cta / num_ctas - static_cast<int64_t>(head) * units;
      const int64_t last = static_cast<int64_t>(units) * heads * (cta + 1) / num_ctas - static_cast<int64_t>(head) * units;
      lo = static_cast<unsigned>(max(first, int64_t{0}));
      n = static_cast<unsigned>(max(min(last, static_cast<int64_t>(units)) - lo, int64_t{0}));
    }
    begin = lo + n * part / parts;
    end = lo + n * (part + 1) / parts;
  }
  // CTAs [first, last] that may hold units of `head`.
  __device__ void ctas_of(int head, int& first, int& last) const {
    if (heads <= num_ctas) {
      first = first_cta(head), last = first_cta(head + 1) - 1;
    } else {
      first = static_cast<int>(static_cast<int64_t>(head) * num_ctas / heads);
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
