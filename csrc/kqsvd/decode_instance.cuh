// SPDX-License-Identifier: Apache-2.0
// One compiled decode kernel: launcher and registration. Included by the generated csrc/decode_*.cu files.
#pragma once

#include "decode_finish.cuh"
#include "decode_finish_many.cuh"
#include "decode_kernel.cuh"
#include "decode_launch.h"

namespace kqsvd::decode {

// The kernel that finishes a layer: which, and how it is launched.
struct Finish {
  void (*kernel)(DecodeParams);
  int threads, shared;
  cudaError_t prepare() const {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  }
};
template <class Cf>
constexpr Finish kFinishes[3] = {{finish_kernel<Cf, 1>, 128, sizeof(FinishShared<Cf, 1>)},
                                 {finish_kernel<Cf, kFewParts>, 128 * kFewParts, sizeof(FinishShared<Cf, kFewParts>)},
                                 {finish_many_kernel<Cf>, 128, sizeof(FinishManyShared<Cf>)}};

template <class Cf>
cudaError_t launch_instance(const DecodeParams& params, cudaStream_t stream) {
  static bool prepared[64] = {};  // per device; setting the attribute twice is harmless
  int device = 0;
  if (params.num_requests <= 0) return cudaSuccess;
  if (cudaError_t e = cudaGetDevice(&device)) return e;
  if (device >= 64 || !prepared[device]) {
    if (cudaError_t e = cudaFuncSetAttribute(decode_kernel<Cf>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             Cf::kSharedBytes))
      return e;
    for (const Finish& finish : kFinishes<Cf>)
      if (cudaError_t e = finish.prepare()) return e;
    if (device < 64) prepared[device] = true;
  }
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.stream = stream;
  config.attrs = &dependent;
  config.numAttrs = 1;
  config.gridDim = dim3(params.num_ctas);
  config.blockDim = dim3(Cf::kThreads);
  config.dynamicSmemBytes = Cf::kSharedBytes;
  if (cudaError_t e = cudaLaunchKernelEx(&config, decode_kernel<Cf>, params)) return e;
  const int heads = params.num_kv_heads * params.column_groups;
  const bool many = params.finish_blocks > 0;
  const Finish& finish = kFinishes<Cf>[many ? 2 : params.finish_parts > 1];
  config.gridDim = dim3(heads, many ? params.finish_blocks : params.num_requests);
  config.blockDim = dim3(finish.threads);
  config.dynamicSmemBytes = finish.shared;
  return cudaLaunchKernelEx(&config, finish.kernel, params);
}

template <class Cf>
struct Registration {
  Instance instance;
  explicit Registration(const char* name)
      : instance{instance_key(name), Cf::kRecord, Cf::kWarpgroups, Cf::kGrain,
                 Cf::kGrain / 4 * Cf::kTileBytes, &launch_instance<Cf>, nullptr} {
    instance.next = register_instance(&instance);
  }
};

}  // namespace kqsvd::decode
