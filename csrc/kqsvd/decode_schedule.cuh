// SPDX-License-Identifier: Apache-2.0
// Who computes what. A *virtual head* is a KV head and a group of query columns. Its work is a line of units: the latent
// positions of each request in turn, four grains a unit. CTAs are dealt to virtual heads; a head's line is cut into equal
// ranges, one per CTA, and those into one part per warpgroup. Everything follows from the request table, so the grid is
// fixed and nothing is read on the host.
#pragma once

#include "decode_params.h"

namespace kqsvd::decode {

// The cut of virtual heads into CTA ranges and warpgroup parts. While there are no more heads than CTAs a CTA serves one
// head: reloading a head's constants would make its warpgroups wait for each other. `big` heads have `most` CTAs, the others
// one less. The last CTAs of the grid begin late (grid_of) and get `late_units` less than the others; heads with more CTAs
// have more of those, so that all heads end at about the same time.
struct Cut {
  int units;  // of one virtual head
  int heads, num_ctas, late_ctas, late_units;
  int big, most, small_late;  // late CTAs of each head that is not big
  int join_from;  // pieces of a request from which on a CTA joins its own

  __device__ Cut(const DecodeParams& p, int units)
      : units(units), heads(p.num_kv_heads * p.column_groups), num_ctas(p.num_ctas), late_ctas(p.late_ctas),
        late_units(p.late_units), big(p.big_heads), most(p.most_ctas), small_late(0),
        join_from(p.join_from) {
    if (heads > num_ctas) return;
    const int small = heads - big;
    if (late_ctas == 0) return;
    if (small > 0 && late_units > 0) {  // one CTA more is worth units / most, an early one late_units more than a late one
      const int more = min(units / most / late_units, late_ctas), even = (late_ctas - big * more) / heads;
      const int left = late_ctas - big * (most - 1);  // where every big head has but one early CTA
      small_late = max(even, left > 0 ? (left + small - 1) / small : 0);
    }
    const int of_big = late_ctas - small * small_late;
    if (small_late > max(most - 2, 0) || of_big < 0 || of_big > big * (most - 1)) late_ctas = small_late = 0;  // so few CTAs
  }

  // CTAs of a head, and how many of them begin early. The late ones that other heads do not have are dealt to the big ones.
  __device__ int num_of(int head) const { return head < big ? most : most - 1; }
  __device__ int early_of(int head) const {
    if (head >= big) return most - 1 - small_late;
    return most - (late_ctas - (heads - big) * small_late - head + big - 1) / big;
  }
  // The k-th CTA of a head: early ones of the heads that are not big, early ones of the big ones, and late ones likewise.
  __device__ int cta_of(int head, int k) const {
    const int small = heads - big, early = early_of(head), late = num_ctas - late_ctas;
    if (head >= big) return head - big + (k < early ? k * small : late + (k - early) * small);
    return k < early ? small * (most - 1 - small_late) + k * big + big - 1 - head
                     : late + small * small_late + (k - early) * big + head;
  }
  __device__ void place(int cta, int& head, int& k) const {
    const int small = heads - big, late = num_ctas - late_ctas;
    if (cta < late) {
      const int of_small = small * (most - 1 - small_late);
      if (cta < of_small) {
        head = big + cta % small, k = cta / small;
      } else {
        head = big - 1 - (cta - of_small) % big, k = (cta - of_small) / big;
      }
    } else {
      const int at = cta - late, of_small = small * small_late;
      if (at < of_small) {
        head = big + at % small, k = at / small;
      } else {
        head = (at - of_small) % big, k = (at - of_small) / big;
      }
      k += early_of(head);
    }
  }
  __device__ int first_head(int cta) const {
    if (heads > num_ctas) return cta * heads / num_ctas;
    int head, k;
    place(cta, head, k);
    return head;
  }
  __device__ int last_head(int cta) const {
    return heads > num_ctas ? ((cta + 1) * heads - 1) / num_ctas : first_head(cta);
  }

  // A head's line where CTAs serve one head: the k-th CTA has units [end_of(k), end_of(k + 1)).
  struct Line {
    unsigned base, rest, early, less;
    __device__ unsigned end_of(unsigned k) const { return base * k + min(k, rest) - (max(k, early) - early) * less; }
  };
  __device__ Line line_of(int head) const {
    const unsigned all = num_of(head), early = early_of(head);
    const unsigned less = early > 0 && early < all ? min(static_cast<unsigned>(late_units), units / early) : 0;
    const unsigned line = units + (all - early) * less;  // as if late CTAs had done `less` units before
    return {line / all, line % all, early, less};
  }

  // Units of `head`, counted from its first one, that belong to a CTA.
  struct Range {
    unsigned begin, size;
    // Those of the first `part` of `parts` warpgroups end here.
    template <int parts>
    __device__ int end_of(int part) const {
      return begin + size * part / parts;
    }
  };
  __device__ Range range_of(int cta, int head) const {
    int own, k = 0;
    if (heads <= num_ctas) place(cta, own, k);
    return range_of(heads <= num_ctas ? line_of(head) : Line{}, cta, k, head);
  }
  __device__ Range range_of(const Line& line, int cta, int k, int head) const {
    if (heads <= num_ctas) return {line.end_of(k), line.end_of(k + 1) - line.end_of(k)};
    // In num_ctas-ths of a unit, so that no product overflows.
    const int64_t first = static_cast<int64_t>(units) * heads * cta / num_ctas - static_cast<int64_t>(head) * units;
    const int64_t last = static_cast<int64_t>(units) * heads * (cta + 1) / num_ctas - static_cast<int64_t>(head) * units;
    const unsigned lo = static_cast<unsigned>(max(first, int64_t{0}));
    return {lo, static_cast<unsigned>(max(min(last, static_cast<int64_t>(units)) - lo, int64_t{0}))};
  }
  // Whether the warpgroups of a CTA join their results before these leave the multiprocessor: where a CTA serves one head,
  // each of them has some of its units, all are of one request, and that is in so many pieces that a finishing block would
  // ask for them in turns.
  template <int parts>
  __device__ bool joins(const Range& all, int unit_begin, int unit_end) const {
    const int begin = all.begin, size = all.size;
    return heads <= num_ctas && size >= parts && unit_begin <= begin && begin + size <= unit_end + kChangeUnits &&
           all.end_of<parts>(parts - 1) < unit_end && (unit_end - unit_begin) * parts >= join_from * size;
  }
  // CTAs that may hold units of `head`: cta_with(head, i) for i < num_with(head), in the order of their units.
  __device__ int num_with(int head) const {
    if (heads <= num_ctas) return num_of(head);
    return cta_after(head + 1) - cta_with(head, 0) + 1;
  }
  __device__ int cta_with(int head, int i) const {
    return heads <= num_ctas ? cta_of(head, i) : static_cast<int>(static_cast<int64_t>(head) * num_ctas / heads) + i;
  }
  // Which of its heads a CTA is at.
  __device__ int phase(int cta, int head) const { return heads <= num_ctas ? 0 : head - first_head(cta); }

 private:
  __device__ int cta_after(int head) const { return static_cast<int>((static_cast<int64_t>(head) * num_ctas - 1) / heads); }
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
