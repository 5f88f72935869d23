// SPDX-License-Identifier: Apache-2.0
// The instructions of csrc/kqsvd/mma.cuh and mma_wgmma.cuh written out from their definition, on the fibers of
// cuda_emulator.h. A bulk copy spoils its target when it is asked for and brings the data only once somebody waits for its
// mbarrier, so that a missing wait, or a copy into bytes still in use, gives wrong results.
#pragma once

#define KQSVD_MMA_CUH
#include "cuda_emulator.h"

#undef __shared__
#define __shared__ static
#undef __grid_constant__
#define __grid_constant__

#define __noinline__
#define KQ_DYNAMIC_SHARED(name) uint8_t* name = kqsvd::decode::dynamic_shared

#include <map>

template <typename T>
T emulated_shuffle(T value, int from) {
  emulator::Warp& w = emulator::my_warp();
  std::memcpy(w.lane_data[emulator::my_lane()], &value, sizeof(T));
  emulator::sync_warp();
  std::memcpy(&value, w.lane_data[from & 31], sizeof(T));
  emulator::sync_warp();
  return value;
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = emulator::my_lane();
  return emulated_shuffle(value, lane >= by ? lane - by : lane);
}
template <typename T>
T atomicAdd(T* p, T x) {
  const T old = *p;
  *p = old + x;
  return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {  // the product is exact in float
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(x.x * y.x + z.x, x.y * y.y + z.y);
}
template <typename T>
void __stcg(T* p, T x) {
  *p = x;
}

namespace kqsvd::decode {

alignas(1024) inline uint8_t dynamic_shared[240 << 10];
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - dynamic_shared);
}
inline void* generic_of(uint32_t at) { return dynamic_shared + at; }

struct Barrier {
  int count, arrived, bytes, phase;
};
struct Copy {
  uint8_t* to;
  const uint8_t* from;
  uint32_t bytes, barrier;
};
inline std::map<uint32_t, Barrier> barriers;
inline std::vector<Copy> copies;
inline struct {
  int arrived, generation;
} warpgroups[16];

inline void check_phase(Barrier& b) {
  if (b.arrived == b.count && b.bytes == 0) b.arrived = 0, b.phase ^= 1;
}
inline void mbarrier_init(uint32_t bar, int count) { barriers[bar] = Barrier{count, 0, 0, 0}; }
inline void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  Barrier& b = barriers.at(bar);
  if (b.arrived == b.count) __trap();  // the phase before is not over
  b.bytes += bytes, ++b.arrived;
  check_phase(b);
}
inline void mbarrier_wait(uint32_t bar, uint32_t parity) {
  for (long turns = 0; static_cast<uint32_t>(barriers.at(bar).phase) == (parity & 1); ++turns) {
    for (size_t i = 0; i < copies.size();) {
      const Copy c = copies[i];
      if (c.barrier != bar) {
        ++i;
        continue;
      }
      std::memcpy(c.to, c.from, c.bytes);
      copies.erase(copies.begin() + i);
      Barrier& b = barriers.at(bar);
      b.bytes -= c.bytes;
      check_phase(b);
    }
    if (turns > 1000000) __trap();
    if (static_cast<uint32_t>(barriers.at(bar).phase) == (parity & 1)) emulator::yield();
  }
}
inline void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t bar) {
  if (shared % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) __trap();
  uint8_t* to = static_cast<uint8_t*>(generic_of(shared));
  std::memset(to, 0xff, bytes);  // NaN, largest codes and scales
  copies.push_back(Copy{to, static_cast<const uint8_t*>(global), bytes, bar});
}
inline void bulk_copy_once(uint32_t shared, const void* global, uint32_t bytes, uint32_t bar) {
  bulk_copy(shared, global, bytes, bar);
}
inline void bulk_prefetch(const void*, uint32_t) {}
inline void proxy_fence() {}
inline void warpgroup_barrier(int warpgroup) {
  emulator::rendezvous(warpgroups[warpgroup].arrived, warpgroups[warpgroup].generation, 128);
}
inline void __threadfence() {}
inline int thread_index() { return threadIdx.x; }

inline float half_value(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (int i = 0; i < 65536; ++i) {
      __half_raw raw;
      raw.x = static_cast<uint16_t>(i);
      t[i] = __half2float(__half(raw));
    }
    return t;
  }();
  return table[bits];
}
inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t a[4] = {a0, a1, a2, a3};
  kqsvd::mma(c, a, b0, b1, half_value);
}
inline void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t a[4] = {a0, a1, a2, a3};
  kqsvd::mma_bf16(c, a, b0, b1);
}
inline uint32_t transpose8x8(uint32_t x) {  // lane (g, t) holds (g, 2t), (g, 2t + 1) and gets (2t, g), (2t + 1, g)
  emulator::Warp& w = emulator::my_warp();
  const int lane = emulator::my_lane(), g = lane / 4, t = lane % 4;
  w.lane_data[lane][0] = x;
  emulator::sync_warp();
  const auto at = [&](int row) { return w.lane_data[4 * row + g / 2][0] >> 16 * (g % 2) & 0xffffu; };
  const uint32_t y = at(2 * t) | at(2 * t + 1) << 16;
  emulator::sync_warp();
  return y;
}

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
inline uint32_t pack_f16(float lo, float hi) {
  const __half2 h = __floats2half2_rn(lo, hi);
  uint32_t bits;
  std::memcpy(&bits, &h, 4);
  return bits;
}
inline uint32_t pack_bf16(float lo, float hi) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  uint32_t bits;
  std::memcpy(&bits, &h, 4);
  return bits;
}
inline __half2 as_half2(uint32_t x) {
  __half2 h;
  std::memcpy(&h, &x, 4);
  return h;
}
inline uint32_t mul_half2(uint32_t a, uint32_t b) {
  return pack_f16(half_value(a) * half_value(b), half_value(a >> 16) * half_value(b >> 16));
}
inline uint32_t multiply_subtract_half2(uint32_t a, uint32_t b, uint32_t c) {
  return pack_f16(half_value(a) * half_value(b) - half_value(c),
                  half_value(a >> 16) * half_value(b >> 16) - half_value(c >> 16));
}
inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int Pending>
void wgmma_wait() {}
inline uint64_t swizzled_descriptor(uint32_t shared) { return (shared & 0x3ffff) >> 4; }
template <int N>
void wgmma_f16(float (&d)[N], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  kqsvd::wgmma(d, a, dynamic_shared, static_cast<uint32_t>(b) * 16, accumulate, half_value);
}

}  // namespace kqsvd::decode

#define __cvta_shared_to_generic(at) kqsvd::decode::generic_of(at)
