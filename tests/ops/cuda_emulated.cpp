// SPDX-License-Identifier: Apache-2.0
// C entry points of the emulated store and dequantize kernels, called through ctypes by test_cuda_emulated.py.
// The launch shapes repeat those of csrc/store_latent.cu and csrc/dequantize.cu.
#include "cuda_emulator.h"

#include <string>
#include <utility>

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

template <typename T, int kSteps>
void emulate_store_steps(StoreParams& p, int heads, int many, int ctas, bool in_shared) {
  const int tiles = (p.num_tokens + kTile - 1) / kTile, groups = std::max(p.side[0].groups, p.side[1].groups);
  if (!many) {
    const dim3 grid(2 * tiles, heads);
    launch_guarded(store_few_kernel<T, kSteps, 1>, p, grid, 32 * groups, sizeof(StoreFewShared<kSteps>));
    return;
  }
  constexpr int kThreads = 32 * many_warps(kSteps);
  if constexpr (kSteps <= 8) {
    if (many == 1 && in_shared && stores_both(p, kSteps)) {
      const dim3 grid(std::min((tiles + 3) / 4, ctas), heads);
      return launch_guarded(store_both_kernel<T, kSteps>, p, grid, kThreads, both_tables(p, kSteps, true).end);
    }
  }
  p.key_ctas = std::min(tiles, ctas);
  size_t shared = 0;
  for (const StoreSide& side : p.side) {
    const bool halves = side.rotate && !p.rope.interleaved;
    const StoreTables l =
        store_tables(p.dim, kSteps, side.groups, side.period, halves, in_shared, many_scratch_bytes(kSteps));
    shared = std::max<size_t>(shared, l.end);
  }
  const dim3 grid(2 * p.key_ctas, heads);
  if (in_shared) {
    launch_guarded(store_many_kernel<T, kSteps, true>, p, grid, kThreads, shared);
  } else {
    launch_guarded(store_many_kernel<T, kSteps, false>, p, grid, kThreads, shared);
  }
}

template <typename T>
void emulate_store_dtype(StoreParams& p, int heads, int steps, int many, int ctas, bool in_shared) {
  switch (steps) {
    case 4: return emulate_store_steps<T, 4>(p, heads, many, ctas, in_shared);
    case 8: return emulate_store_steps<T, 8>(p, heads, many, ctas, in_shared);
    default: return emulate_store_steps<T, 16>(p, heads, many, ctas, in_shared);
  }
}

template <typename T, int kGroups>
void emulate_dequantize(const DequantizeParams& p, int heads, int ctas, bool in_shared) {
  size_t shared = 0;
  for (const DequantizeSide& side : p.side) {
    const bool halves = side.rotate && !p.rope.interleaved;
    const DequantizeLayout l =
        dequantize_layout(p.dim, side.groups, side.period, side.num_bytes, halves, in_shared);
    shared = std::max<size_t>(shared, l.bytes);
  }
  const dim3 grid(2 * ctas, heads);
  if (in_shared) {
    launch_guarded(dequantize_kernel<T, kGroups, true>, p, grid, kDequantizeThreads, shared);
  } else {
    launch_guarded(dequantize_kernel<T, kGroups, false>, p, grid, kDequantizeThreads, shared);
  }
}

template <typename T>
void emulate_dequantize_dtype(const DequantizeParams& p, int heads, int ctas, bool in_shared) {
  const bool wide = std::max(p.side[0].groups, p.side[1].groups) > 8;
  wide ? emulate_dequantize<T, 16>(p, heads, ctas, in_shared) : emulate_dequantize<T, 8>(p, heads, ctas, in_shared);
}

// Takes what the kernels before the store write away until it has waited for them.
struct Inputs {
  std::vector<std::pair<char*, std::string>> kept;

  void hide(const void* from, size_t bytes) {
    char* at = const_cast<char*>(static_cast<const char*>(from));
    kept.emplace_back(at, std::string(at, bytes));
    std::memset(at, 0x7e, bytes);
  }
  Inputs(const StoreParams& p, int heads) {
    for (const StoreSide& side : p.side) {
      for (int i = 0; i < p.num_tokens * heads; ++i) {
        const char* x = static_cast<const char*>(side.x);
        hide(x + 2 * (i / heads * side.token_stride + i % heads * side.head_stride), 2 * p.dim);
      }
    }
    for (const int64_t* numbers : {p.slots, p.positions, p.window_slots}) {
      if (numbers != nullptr) hide(numbers, 8 * p.num_tokens);
    }
    previous_grid = [this] {
      for (const auto& [at, bytes] : kept) std::memcpy(at, bytes.data(), bytes.size());
    };
  }
};

}  // namespace kqsvd

extern "C" {

size_t store_params_size() { return sizeof(kqsvd::StoreParams); }
size_t dequantize_params_size() { return sizeof(kqsvd::DequantizeParams); }

// many: 0 for few tokens, 1 for many, 2 for many with one side a CTA where both would fit.
void store(kqsvd::StoreParams* p, int heads, bool bf16, int steps, int many, int ctas, bool in_shared) {
  const kqsvd::Inputs inputs(*p, heads);
  if (bf16) {
    kqsvd::emulate_store_dtype<__nv_bfloat16>(*p, heads, steps, many, ctas, in_shared);
  } else {
    kqsvd::emulate_store_dtype<__half>(*p, heads, steps, many, ctas, in_shared);
  }
}

void dequantize(kqsvd::DequantizeParams* p, int heads, bool bf16, int ctas, bool in_shared) {
  if (bf16) {
    kqsvd::emulate_dequantize_dtype<__nv_bfloat16>(*p, heads, ctas, in_shared);
  } else {
    kqsvd::emulate_dequantize_dtype<__half>(*p, heads, ctas, in_shared);
  }
}
}
