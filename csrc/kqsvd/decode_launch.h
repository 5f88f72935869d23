// SPDX-License-Identifier: Apache-2.0
// Host side of the decode kernel: compiled instantiations register themselves under the hash of their name.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string_view>

#include "decode_params.h"

namespace kqsvd::decode {

// FNV-1a of an instantiation's name; the same in vllm_kqsvd/plan_catalog.py.
constexpr uint64_t instance_key(std::string_view name) {
  uint64_t h = 0xcbf29ce484222325ull;
  for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return h;
}

struct Instance {
  uint64_t key;
  int record_floats;  // size of one partial result
  int parts;          // warpgroups per CTA
  int grain;          // tokens; see ScheduleParams
  int unit_bytes;     // of four grains
  cudaError_t (*launch)(const DecodeParams&, cudaStream_t);
  const Instance* next;
};

// All instantiations linked into this library; registering returns the previous head.
const Instance* register_instance(Instance* instance);
const Instance* find_instance(uint64_t key);  // nullptr: not compiled

cudaError_t launch_schedule(const ScheduleParams& params, cudaStream_t stream);

}  // namespace kqsvd::decode
