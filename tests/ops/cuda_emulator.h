// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of csrc/kqsvd on a CPU: every thread of a block is a fiber, block barriers and warp collectives are
// rendezvous, and the instructions of instructions.cuh are written out from their definition. Slow, and exact in its
// indices; it catches wrong addresses, missing rows, wrong fragments and most missing barriers where there is no GPU.
#pragma once

#define KQSVD_INSTRUCTIONS_CUH  // replaced below
#define KQSVD_MMA_WGMMA_CUH
#define KQSVD_STORE_WGMMA_CUH
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)

using std::max;
using std::min;

namespace emulator {

struct Warp {
  int arrived = 0, generation = 0;
  uint32_t lane_data[32][16];
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false, waited = false;
  dim3 thread;
  std::vector<std::vector<Copy>> copies = {{}};  // groups of asynchronous copies under way, the last one open
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline int current, block_arrived, block_generation;
inline std::function<void()> body;
inline dim3 block_index, block_size, grid_size;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void rendezvous(int& arrived, int& generation, int count) {
  const int mine = generation;
  if (++arrived == count) {
    arrived = 0, ++generation;
  } else {
    while (generation == mine) yield();
  }
}

inline void finish_copies(size_t but) {  // of the thread's groups all but the latest `but`
  std::vector<std::vector<Copy>>& groups = fibers[current].copies;
  while (groups.size() > but) {
    for (const Copy& c : groups.front()) std::memcpy(c.to, c.from, c.bytes);
    groups.erase(groups.begin());
  }
  if (groups.empty()) groups.emplace_back();
}

inline Warp& my_warp() { return warps[current / 32]; }
inline int my_lane() { return current % 32; }
inline void sync_warp() { rendezvous(my_warp().arrived, my_warp().generation, 32); }

inline void entry() {
  body();
  fibers[current].done = true;
  while (true) yield();
}

template <typename Kernel, typename Params>
void launch(Kernel kernel, const Params& params, dim3 grid, int threads, char* shared, size_t shared_bytes) {
  grid_size = grid, block_size = dim3(threads);
  body = [&] { kernel(params); };
  for (unsigned by = 0; by < grid.y; ++by) {
    for (unsigned bx = 0; bx < grid.x; ++bx) {
      block_index = dim3(bx, by);
      std::memset(shared, 0xff, shared_bytes);  // NaN in every format
      fibers = std::vector<Fiber>(threads);
      warps = std::vector<Warp>(threads / 32);
      block_arrived = block_generation = 0;
      for (int i = 0; i < threads; ++i) {
        Fiber& f = fibers[i];
        f.stack = std::make_unique<char[]>(64 << 10);
        f.thread = dim3(i);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = 64 << 10;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, entry, 0);
      }
      const bool backwards = (bx + by) & 1;  // half of the missing barriers show in each order
      for (int left = threads; left > 0;) {
        for (int n = 0; n < threads; ++n) {
          const int i = backwards ? threads - 1 - n : n;
          if (fibers[i].done) continue;
          current = i;
          swapcontext(&scheduler, &fibers[i].context);
          left -= fibers[i].done;
        }
      }
    }
  }
}

}  // namespace emulator

#define threadIdx (emulator::fibers[emulator::current].thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() {
  emulator::rendezvous(emulator::block_arrived, emulator::block_generation, static_cast<int>(emulator::fibers.size()));
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  emulator::Warp& w = emulator::my_warp();
  std::memcpy(w.lane_data[emulator::my_lane()], &value, sizeof(T));
  emulator::sync_warp();
  std::memcpy(&value, w.lane_data[emulator::my_lane() ^ mask], sizeof(T));
  emulator::sync_warp();
  return value;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  emulator::Warp& w = emulator::my_warp();
  std::memcpy(w.lane_data[emulator::my_lane()], &value, sizeof(T));
  emulator::sync_warp();
  std::memcpy(&value, w.lane_data[from], sizeof(T));
  emulator::sync_warp();
  return value;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= unsigned(__shfl_sync(0xffffffffu, value, lane)) << lane;
  return all;
}
inline bool __any_sync(unsigned, bool value) {
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) any = __shfl_sync(0xffffffffu, value, lane) || any;
  return any;
}
inline bool __all_sync(unsigned, bool value) {
  bool all = true;
  for (int lane = 0; lane < 32; ++lane) all = __shfl_sync(0xffffffffu, value, lane) && all;
  return all;
}

inline void __syncwarp() { emulator::sync_warp(); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) { return static_cast<uint32_t>(__float_as_int(x)); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmaf_rd(float x, float y, float z) {
  const int mode = std::fegetround();
  std::fesetround(FE_DOWNWARD);
  volatile float a = x, b = y, c = z;
  const float sum = std::fma(a, b, c);
  std::fesetround(mode);
  return sum;
}
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.f), 1.f); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline void __trap() {
  std::fprintf(stderr, "trap in an emulated kernel\n");
  std::abort();
}

namespace kqsvd {

inline void copy_async(void* shared, const void* global, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes) __trap();
  emulator::fibers[emulator::current].copies.back().push_back({shared, global, bytes});  // arrives when it is waited for
}
inline void copy_async_16(void* shared, const void* global) { copy_async(shared, global, 16); }
inline void copy_async_8(void* shared, const void* global) { copy_async(shared, global, 8); }
inline void copy_async_wait() { emulator::finish_copies(0); }
inline void copy_async_commit() { emulator::fibers[emulator::current].copies.emplace_back(); }
inline void copy_async_wait_but_one() { emulator::finish_copies(2); }
inline float approximate_sqrt(float x) { return std::sqrt(x); }
inline float approximate_reciprocal(float x) { return 1.f / x; }
inline int uniform_warp_index() { return emulator::current / 32; }
inline void prefetch_to_l2(const void* p) {
  static volatile char seen;
  seen = *static_cast<const char*>(p);  // so that an address outside everything shows
}
inline std::function<void()> previous_grid;  // what the kernel before has done when the wait is over
inline void wait_for_previous_grid() {
  emulator::fibers[emulator::current].waited = true;
  if (previous_grid) previous_grid(), previous_grid = nullptr;
}
inline void release_next_grid_early() {}
inline void release_next_grid() {
  if (!emulator::fibers[emulator::current].waited) __trap();
}

// D = A B + C with A [16][16], B [16][8]; lane 4 g + t holds, of A, (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
// and their right neighbours, of B rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g, of C (g, 2t), (g + 8, 2t).
template <typename Value>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value) {
  emulator::Warp& w = emulator::my_warp();
  const int lane = emulator::my_lane(), g = lane / 4, t = lane % 4;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(w.lane_data[lane], mine, sizeof(mine));
  emulator::sync_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i >> 1), column = 2 * t + (i & 1);
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int pair = k % 8 / 2, high = k / 8, odd = k % 2;
      const uint32_t x = w.lane_data[4 * (row % 8) + pair][(row / 8) + 2 * high];
      const uint32_t y = w.lane_data[4 * column + pair][4 + high];
      sum += double(value(uint16_t(odd ? x >> 16 : x))) * value(uint16_t(odd ? y >> 16 : y));
    }
    c[i] = static_cast<float>(c[i] + sum);
  }
  emulator::sync_warp();
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(c, a, b0, b1, [](uint16_t x) { return __uint_as_float(uint32_t(x) << 16); });
}
inline void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(c, a, b0, b1, [](uint16_t x) {
    __half_raw raw;
    raw.x = x;
    return __half2float(__half(raw));
  });
}

// One warp's rows of a wgmma product: A as of mma, B at `b` in `shared`, rows of 128 bytes whose 16-byte parts are permuted
// by the row's number in its group of eight. Lane (g, t) gets rows g, g + 8, columns 2t, 2t + 1 of every n-tile.
template <int N, typename Value>
void wgmma(float (&d)[N], const uint32_t (&a)[4], const void* shared, uint32_t b, int accumulate, Value value) {
  emulator::Warp& w = emulator::my_warp();
  const int lane = emulator::my_lane(), g = lane / 4, t = lane % 4;
  std::memcpy(w.lane_data[lane], a, 16);
  emulator::sync_warp();
  float rows[2][16];
  for (int y = 0; y < 2; ++y)
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = w.lane_data[4 * g + k % 8 / 2][y + 2 * (k / 8)];
      rows[y][k] = value(static_cast<uint16_t>(k & 1 ? x >> 16 : x));
    }
  for (int i = 0; i < N; ++i) {
    const int column = i / 4 * 8 + 2 * t + (i & 1);
    double sum = accumulate ? d[i] : 0.;
    for (int k = 0; k < 16; ++k) {
      uint32_t at = b + column * 128 + 2 * k;
      at ^= (at >> 7 & 7) << 4;
      uint16_t bits;
      std::memcpy(&bits, static_cast<const char*>(shared) + at, 2);
      sum += double(rows[i >> 1 & 1][k]) * value(bits);
    }
    d[i] = static_cast<float>(sum);
  }
  emulator::sync_warp();
}

alignas(1024) inline char memory[256 << 10];  // the kernels' dynamic shared memory

inline void wgmma_begin() {}
inline void wgmma_end() {}
inline void fence_for_wgmma() {}
inline uint64_t wgmma_descriptor(const void* shared) {
  const auto at = static_cast<const char*>(shared) - memory;
  if (at % 1024) __trap();
  return at >> 4;
}
template <int N>
void wgmma_bf16(float (&d)[N], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  wgmma(d, a, memory, static_cast<uint32_t>(b) * 16, accumulate,
        [](uint16_t x) { return __uint_as_float(uint32_t(x) << 16); });
}

}  // namespace kqsvd
