// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated store and dequantize kernels, called through ctypes by test_cuda_emulated.py.
// The launch shapes repeat those of csrc/store_latent.cu and csrc/dequantize.cu.
#include "cuda_emulator.h"

#include "kqsvd/dequantize.cuh"
#include "kqsvd/store_few.cuh"
#include "kqsvd/store_many.cuh"

namespace kqsvd {

// Runs a kernel with `shared` bytes of shared memory and traps if it writes beyond them.
template <typename Kernel, typename Params>
void launch_guarded(Kernel kernel, const Params& params, dim3 grid, int threads, size_t shared) {
  constexpr size_t kGuard = 4096;
  if (shared + kGuard > sizeof(memory)) __trap();
  std::memset(memory + shared, 0x5a, kGuard);
  emulator::launch(kernel, params, grid, threads, memory, shared);
  for (size_t i = 0; i < kGuard; ++i) {
    if (memory[shared + i] != 0x5a) __trap();
  }
}

template <typename T, int kColumns>
void emulate_many(StoreParams& p, int heads, int ctas, bool in_shared) {
  constexpr int kWarps = kManyWarps<kColumns>;
  const int tiles = (p.num_tokens + kTile - 1) / kTile;
  p.key_ctas = std::min(tiles, ctas);
  size_t shared = 0;
  for (const StoreSide& side : p.side) {
    const StoreManyLayout l = store_many_layout(p.dim, p.steps, side.groups, side.period, kColumns, kWarps, in_shared);
    shared = std::max<size_t>(shared, l.bytes);
  }
  const dim3 grid(2 * p.key_ctas, heads);
  if (in_shared) {
    launch_guarded(store_many_kernel<T, kColumns, true>, p, grid, 32 * kWarps, shared);
  } else {
    launch_guarded(store_many_kernel<T, kColumns, false>, p, grid, 32 * kWarps, shared);
  }
}

template <typename T>
void emulate_store_dtype(StoreParams& p, int heads, bool many, int ctas, bool in_shared) {
  const int groups = std::max(p.side[0].groups, p.side[1].groups);
  const bool wide = p.dim > 128 || groups > kWarpGroups;
  if (many) {
    wide ? emulate_many<T, 2>(p, heads, ctas, in_shared) : emulate_many<T, 1>(p, heads, ctas, in_shared);
    return;
  }
  const dim3 grid(2 * ((p.num_tokens + kTile - 1) / kTile), heads);
  if (wide) {
    launch_guarded(store_few_kernel<T, 16, 1>, p, grid, 32 * groups, sizeof(StoreFewShared<16>));
  } else {
    launch_guarded(store_few_kernel<T, 8, 1>, p, grid, 32 * groups, sizeof(StoreFewShared<8>));
  }
}

template <typename T, int GPW>
void emulate_dequantize(const DequantizeParams& p, int heads, int ctas, bool in_shared) {
  const int groups = std::max(p.side[0].groups, p.side[1].groups);
  const int bytes = std::max(p.side[0].num_bytes, p.side[1].num_bytes);
  const size_t shared = dequantize_shared_bytes(p.dim, groups, bytes, in_shared);
  const dim3 grid(2 * ctas, heads);
  if (in_shared) {
    launch_guarded(dequantize_kernel<T, GPW, true>, p, grid, kDequantizeThreads, shared);
  } else {
    launch_guarded(dequantize_kernel<T, GPW, false>, p, grid, kDequantizeThreads, shared);
  }
}

}  // namespace kqsvd

extern "C" {

size_t store_params_size() { return sizeof(kqsvd::StoreParams); }
size_t dequantize_params_size() { return sizeof(kqsvd::DequantizeParams); }

void store(kqsvd::StoreParams* p, int heads, bool bf16, bool many, int ctas, bool in_shared) {
  if (bf16) {
    kqsvd::emulate_store_dtype<__nv_bfloat16>(*p, heads, many, ctas, in_shared);
  } else {
    kqsvd::emulate_store_dtype<__half>(*p, heads, many, ctas, in_shared);
  }
}

void dequantize(kqsvd::DequantizeParams* p, int heads, bool bf16, int ctas, bool in_shared) {
  using namespace kqsvd;
  if (bf16) {
    p->dim <= 128 ? emulate_dequantize<__nv_bfloat16, 1>(*p, heads, ctas, in_shared)
                  : emulate_dequantize<__nv_bfloat16, 2>(*p, heads, ctas, in_shared);
  } else {
    p->dim <= 128 ? emulate_dequantize<__half, 1>(*p, heads, ctas, in_shared)
                  : emulate_dequantize<__half, 2>(*p, heads, ctas, in_shared);
  }
}
}
