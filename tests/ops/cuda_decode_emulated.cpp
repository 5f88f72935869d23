// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated decode kernels, called through ctypes by test_cuda_decode_emulated.py, which writes
// PLAN_SOURCE: the plan of an instantiation and its configuration as `Cf`.
#include "cuda_decode_emulator.h"

#include "kqsvd/decode_finish.cuh"
#include "kqsvd/decode_finish_many.cuh"
#include "kqsvd/decode_kernel.cuh"
#include "kqsvd/decode_requests.cuh"

#include PLAN_SOURCE

using namespace kqsvd::decode;

template <typename Kernel, typename Params>
void run(Kernel kernel, const Params& params, dim3 grid, int threads, size_t shared) {
  emulator::launch(kernel, params, grid, threads, reinterpret_cast<char*>(dynamic_shared), shared);
  if (!copies.empty()) __trap();  // a copy outlived its block
}

extern "C" {

size_t decode_params_size() { return sizeof(DecodeParams); }
size_t schedule_params_size() { return sizeof(ScheduleParams); }
int decode_record() { return Cf::kRecord; }
int decode_parts() { return Cf::kWarpgroups; }

void decode(const ScheduleParams* schedule, const DecodeParams* p) {
  ScheduleParams s = *schedule;
  s.grain = Cf::kGrain;
  run(schedule_kernel<64>, s, dim3(1), 64, 0);
  const int heads = p->num_kv_heads * p->column_groups;
  run(decode_kernel<Cf>, *p, dim3(p->num_ctas), Cf::kThreads, Cf::kSharedBytes);
  const dim3 grid(heads, p->num_requests);
  if (p->finish_blocks > 0)
    run(finish_many_kernel<Cf>, *p, dim3(heads, p->finish_blocks), 128, sizeof(FinishManyShared<Cf>));
  else if (p->finish_parts == 1)
    run(finish_kernel<Cf, 1>, *p, grid, 128, sizeof(FinishShared<Cf, 1>));
  else
    run(finish_kernel<Cf, kFewParts>, *p, grid, 128 * kFewParts, sizeof(FinishShared<Cf, kFewParts>));
}

void schedule(const ScheduleParams* p) { run(schedule_kernel<64>, *p, dim3(1), 64, 0); }

// [latent CTAs, warpgroups of a finishing block, late CTAs, finishing blocks of a head whose warps take requests]
void grid(int multiprocessors, int heads, int requests, int* out) {
  const Grid found = grid_of(multiprocessors, heads, requests);
  out[0] = found.num_ctas, out[1] = found.finish_parts, out[2] = found.late_ctas, out[3] = found.finish_blocks;
}

// How `ctas` CTAs share `heads` lines of `units`: ranges [cta][head][begin, end), heads_of [cta][first, last],
// ctas_of [head][num_with, cta_with 0, 1, ...] padded with -1 to `ctas` + 1.
void cut_lines(int units, int heads, int ctas, int late_ctas, int late_units, int* ranges, int* heads_of, int* ctas_of) {
  DecodeParams p{};
  p.num_kv_heads = heads, p.column_groups = 1, p.num_ctas = ctas, p.late_ctas = late_ctas, p.late_units = late_units;
  p.most_ctas = (ctas + heads - 1) / heads, p.big_heads = ctas - (p.most_ctas - 1) * heads;
  const Cut cut(p, units);
  for (int cta = 0; cta < ctas; ++cta) {
    heads_of[2 * cta] = cut.first_head(cta), heads_of[2 * cta + 1] = cut.last_head(cta);
    for (int head = heads_of[2 * cta]; head <= heads_of[2 * cta + 1]; ++head) {
      const Cut::Range all = cut.range_of(cta, head);
      ranges[2 * (cta * heads + head)] = all.begin, ranges[2 * (cta * heads + head) + 1] = all.begin + all.size;
    }
  }
  for (int head = 0; head < heads; ++head) {
    int* of = ctas_of + head * (ctas + 1);
    of[0] = cut.num_with(head);
    for (int i = 0; i < ctas; ++i) of[1 + i] = i < of[0] ? cut.cta_with(head, i) : -1;
  }
}
}
