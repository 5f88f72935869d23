// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated store and dequantize kernels, called through ctypes by test_cuda_emulated.py.
// The launch shapes repeat those of csrc/store_latent.cu and csrc/dequantize.cu.
#include "cuda_emulator.h"

#include "kqsvd/dequantize.cuh"
#include "kqsvd/store.cuh"

namespace kqsvd {

template <typename T, int WM, int MW, int GPW, int kWarpColumns>
void emulate_store(StoreParams& p, int heads, int ctas, bool in_shared) {
  constexpr int kTokens = WM * MW * 16;
  const int tiles = (p.num_tokens + kTokens - 1) / kTokens, groups = std::max(p.side[0].groups, p.side[1].groups);
  const int threads = 32 * WM * ((groups + GPW - 1) / GPW);
  p.key_ctas = std::min(tiles, ctas);
  const size_t shared = store_shared_bytes<kTokens, kWarpColumns>(p.dim, groups, in_shared);
  if (shared > sizeof(memory)) __trap();
  const dim3 grid(2 * p.key_ctas, heads);
  if (in_shared) {
    emulator::launch(store_kernel<T, WM, MW, GPW, kWarpColumns, true>, p, grid, threads, memory, shared);
  } else {
    emulator::launch(store_kernel<T, WM, MW, GPW, kWarpColumns, false>, p, grid, threads, memory, shared);
  }
}

template <typename T>
void emulate_store_dtype(StoreParams& p, int heads, bool many, int ctas, bool in_shared) {
  if (many) {
    emulate_store<T, 2, 2, 2, 8>(p, heads, ctas, in_shared);
  } else {
    emulate_store<T, 1, 1, 1, 16>(p, heads, ctas, in_shared);
  }
}

template <typename T, int GPW>
void emulate_dequantize(const DequantizeParams& p, int heads, int ctas, bool in_shared) {
  const int groups = std::max(p.side[0].groups, p.side[1].groups);
  const int bytes = std::max(p.side[0].num_bytes, p.side[1].num_bytes);
  const size_t shared = dequantize_shared_bytes(p.dim, groups, bytes, in_shared);
  if (shared > sizeof(memory)) __trap();
  const dim3 grid(2 * ctas, heads);
  if (in_shared) {
    emulator::launch(dequantize_kernel<T, GPW, true>, p, grid, kDequantizeThreads, memory, shared);
  } else {
    emulator::launch(dequantize_kernel<T, GPW, false>, p, grid, kDequantizeThreads, memory, shared);
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
