// SPDX-License-Identifier: Apache-2.0
// The store's products on wgmma (sm_90a): [64 x 16] bf16 in a warpgroup's registers times [16 x N] bf16 in shared memory.
// The operand lists are spelled out because inline assembly cannot index a register array.
#ifndef KQSVD_STORE_WGMMA_CUH  // by name, so that a host build can replace it (tests/ops/cuda_emulator.h)
#define KQSVD_STORE_WGMMA_CUH

#include "instructions.cuh"
#include "mma.cuh"
#include "mma_wgmma.cuh"

namespace kqsvd {

// clang-format off
#define KQ_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

// d += a * b; d is overwritten where accumulate is 0. Lane (g, t) holds rows g, g + 8 of its warp's 16 and columns 2t,
// 2t + 1 of every n-tile, as after mma.m16n8k16.
__device__ __forceinline__ void wgmma_bf16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
      "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}"
      : KQ_D8(0), KQ_D8(8), KQ_D8(16), KQ_D8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
__device__ __forceinline__ void wgmma_bf16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
      "}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}"
      : KQ_D8(0), KQ_D8(8), KQ_D8(16), KQ_D8(24), KQ_D8(32), KQ_D8(40), KQ_D8(48), KQ_D8(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef KQ_D8
// clang-format on

__device__ __forceinline__ void wgmma_begin() { decode::wgmma_fence(); }
__device__ __forceinline__ void wgmma_end() {
  decode::wgmma_commit();
  decode::wgmma_wait<0>();
}

// Of an operand in shared memory with rows of 128 swizzled bytes, aligned to 1024.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* shared) {
  return decode::swizzled_descriptor(shared_address(shared));
}

// Between a thread's writes to shared memory and a barrier behind which wgmma reads them.
__device__ __forceinline__ void fence_for_wgmma() { decode::proxy_fence(); }

}  // namespace kqsvd

#endif
