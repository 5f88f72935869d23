// SPDX-License-Identifier: Apache-2.0
// What every host entry point asks of its tensors, and the stream it launches on. Stable ABI only.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <sstream>
#include <string>

namespace kqsvd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

// `t` is a CUDA tensor of `dtype` with these sizes (kAny: any) on device `device` (kAny: any).
inline void check_tensor(const Tensor& t, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes,
                         int device = kAny) {
  STD_TORCH_CHECK(t.is_cuda(), name, " must be a CUDA tensor");
  STD_TORCH_CHECK(device == kAny || t.get_device_index() == device, name, " is on device ", t.get_device_index(),
                  ", the others are on ", device);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have dtype ", torch::headeronly::toString(dtype), ", found ",
                  torch::headeronly::toString(t.scalar_type()));
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  std::ostringstream want;
  for (const int64_t size : sizes) {
    same = same && (size == kAny || t.size(i) == size);
    want << (i++ ? ", " : "");
    size == kAny ? want << "*" : want << size;
  }
  STD_TORCH_CHECK(same, name, " must have shape [", want.str(), "], found ", shape_of(t));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// Rows are read 16 bytes at a time: the last dimension is dense, the others step by whole vectors.
inline void check_vectors(const Tensor& t, const char* name) {
  const int64_t per_vector = 16 / static_cast<int64_t>(t.element_size());
  STD_TORCH_CHECK(t.stride(t.dim() - 1) == 1, name, " must be dense in its last dimension");
  bool aligned = reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) aligned = aligned && (t.size(i) <= 1 || t.stride(i) % per_vector == 0);
  STD_TORCH_CHECK(aligned, name, " must be aligned to 16 bytes in every row");
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Makes `t`'s device current and names torch's stream on it.
class Launch {
 public:
  explicit Launch(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~Launch() noexcept(false) {
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess && !std::uncaught_exceptions()) {
      STD_TORCH_CHECK(false, "kernel launch failed: ", cudaGetErrorString(error));
    }
  }
  cudaStream_t stream() const { return stream_; }
  int device() const { return device_; }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

struct DeviceLimits {
  int multiprocessors, shared_per_block, shared_per_multiprocessor, major;
};

inline const DeviceLimits& limits_of(int device) {
  static DeviceLimits known[64] = {};
  DeviceLimits& d = known[device];
  if (d.multiprocessors == 0) {
    check_cuda(cudaDeviceGetAttribute(&d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device");
    check_cuda(
        cudaDeviceGetAttribute(&d.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "device");
    check_cuda(cudaDeviceGetAttribute(&d.major, cudaDevAttrComputeCapabilityMajor, device), "device");
    check_cuda(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, device), "device");
  }
  return d;
}

template <typename Kernel>
void allow_shared(Kernel kernel, size_t shared) {
  if (shared > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
               "shared memory limit");
  }
}

// Launches `kernel` with `shared` bytes of dynamic shared memory, raising its limit where that is needed.
template <typename Kernel, typename Params>
void launch(Kernel kernel, const Params& params, dim3 grid, int threads, size_t shared, cudaStream_t stream) {
  allow_shared(kernel, shared);
  kernel<<<grid, threads, shared, stream>>>(params);
}

// As `launch`, but from sm_90 on the kernel may start while the previous one in the stream is still running: it has to
// call wait_for_previous_grid before it touches what others write.
template <typename Kernel, typename Params>
void launch_early(Kernel kernel, const Params& params, dim3 grid, int threads, size_t shared, const Launch& on) {
  allow_shared(kernel, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  config.stream = on.stream(), config.attrs = &attribute;
  config.numAttrs = limits_of(on.device()).major >= 9 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "kernel launch");
}

}  // namespace kqsvd
