// SPDX-License-Identifier: Apache-2.0
// Registry of compiled decode kernels and the launch of the step schedule.
#include "kqsvd/decode_launch.h"
#include "kqsvd/decode_requests.cuh"

namespace kqsvd::decode {
namespace {

const Instance*& head() {
  static const Instance* first = nullptr;
  return first;
}

}  // namespace

const Instance* register_instance(Instance* instance) {
  const Instance* previous = head();
  head() = instance;
  return previous;
}

const Instance* find_instance(uint64_t key) {
  for (const Instance* i = head(); i; i = i->next)
    if (i->key == key) return i;
  return nullptr;
}

cudaError_t launch_schedule(const ScheduleParams& params, cudaStream_t stream) {
  schedule_kernel<1024><<<1, 1024, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace kqsvd::decode
