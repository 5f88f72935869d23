// SPDX-License-Identifier: Apache-2.0
// Two small kernels of a step: positions of its tokens, and the merge of two attentions by log-sum-exp.
#include <algorithm>

#include "kqsvd/check.h"
#include "kqsvd/primitives.cuh"
#include "ops.h"

namespace kqsvd {
namespace {

__global__ void positions_kernel(const int* query_start_loc, const int* seq_lens, int64_t* positions, int num_requests,
                                 int num_rows) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= num_rows) return;
  int low = 0, high = num_requests;  // the last request that starts at or before the row
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    (query_start_loc[middle] <= row ? low : high) = middle;
  }
  const int end = query_start_loc[low + 1];
  positions[row] = row < end ? max(0, seq_lens[low] - (end - row)) : 0;  // rows past the last request: padding
}

// A lane merges 8 elements of a (token, head) row; `lanes` of them a row. Weights use base-e log-sum-exp; -inf or +inf
// (no visible key) counts for nothing.
template <typename T>
__global__ void merge_kernel(T* out, float* lse, const T* more_out, const float* more_lse, int tokens, int heads,
                             int lanes, int64_t token_stride, int64_t head_stride, int64_t more_token_stride,
                             int64_t more_head_stride, int64_t lse_stride, int64_t more_lse_stride) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, row = i / lanes, part = i - row * lanes;
  const bool inside = row < tokens * heads;
  const int token = inside ? row / heads : 0, head = inside ? row - token * heads : 0;
  uint4* o = reinterpret_cast<uint4*>(out + token * token_stride + head * head_stride) + part;
  const uint4* m = reinterpret_cast<const uint4*>(more_out + token * more_token_stride + head * more_head_stride);
  float* total_lse = lse + head * lse_stride + token;
  uint4 x{}, y{};
  float a = -INFINITY, b = -INFINITY;
  if (inside) x = *o, y = __ldg(m + part), a = *total_lse, b = __ldg(more_lse + head * more_lse_stride + token);
  __syncthreads();  // every lane of the row has read the sum that one of them replaces
  if (!isfinite(a)) a = -INFINITY;
  if (!isfinite(b) || !inside) return;
  const float top = fmaxf(a, b), wa = __expf(a - top), wb = __expf(b - top), total = wa + wb;
  const float ka = wa / total, kb = wb / total;
  const auto merged = [&](uint32_t left, uint32_t right) {
    float2 p = unpack2(left, T());
    const float2 q = unpack2(right, T());
    if (wa == 0.f) p = make_float2(0.f, 0.f);  // an empty side may hold anything
    return pack2(p.x * ka + q.x * kb, p.y * ka + q.y * kb, T());
  };
  *o = make_uint4(merged(x.x, y.x), merged(x.y, y.y), merged(x.z, y.z), merged(x.w, y.w));
  if (part == 0) *total_lse = top + __logf(total);
}

}  // namespace

void token_positions(const Tensor& query_start_loc, const Tensor& seq_lens, const Tensor& positions) {
  check_tensor(query_start_loc, "query_start_loc", ScalarType::Int, {kAny});
  const int device = query_start_loc.get_device_index();
  check_tensor(seq_lens, "seq_lens", ScalarType::Int, {kAny}, device);
  check_tensor(positions, "positions", ScalarType::Long, {kAny}, device);
  for (const Tensor* t : {&query_start_loc, &seq_lens, &positions}) check_contiguous(*t, "token_positions argument");
  const int requests = static_cast<int>(std::min(query_start_loc.size(0) - 1, seq_lens.size(0)));
  const int rows = static_cast<int>(positions.size(0));
  if (requests <= 0 || rows == 0) return;
  const Launch on(positions);
  positions_kernel<<<(rows + 255) / 256, 256, 0, on.stream()>>>(
      data<const int>(query_start_loc), data<const int>(seq_lens), data<int64_t>(positions), requests, rows);
}

void merge_attention(const Tensor& out, const Tensor& lse, const Tensor& more_out, const Tensor& more_lse) {
  const ScalarType dtype = out.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "out must be bfloat16 or float16");
  check_tensor(out, "out", dtype, {kAny, kAny, kAny});
  const int device = out.get_device_index();
  const int64_t tokens = out.size(0), heads = out.size(1), dim = out.size(2);
  check_tensor(more_out, "more_out", dtype, {tokens, heads, dim}, device);
  check_tensor(lse, "lse", ScalarType::Float, {heads, tokens}, device);
  check_tensor(more_lse, "more_lse", ScalarType::Float, {heads, tokens}, device);
  STD_TORCH_CHECK(dim % 8 == 0 && dim <= 2048, "rows of ", dim, " elements; multiples of 8 up to 2048 can be merged");
  check_vectors(out, "out");
  check_vectors(more_out, "more_out");
  STD_TORCH_CHECK(tokens <= 1 || (lse.stride(1) == 1 && more_lse.stride(1) == 1), "lse must be dense over tokens");
  if (tokens == 0 || heads == 0) return;
  const Launch on(out);
  const int lanes = static_cast<int>(dim / 8), threads = lanes * std::max(1, 256 / lanes);  // whole rows in a block
  const dim3 grid(static_cast<unsigned>((tokens * heads * lanes + threads - 1) / threads));
  const auto go = [&](auto type) {
    using T = decltype(type);
    merge_kernel<T><<<grid, threads, 0, on.stream()>>>(
        data<T>(out), data<float>(lse), data<const T>(more_out), data<const float>(more_lse),
        static_cast<int>(tokens), static_cast<int>(heads), lanes, out.stride(0), out.stride(1),
        more_out.stride(0), more_out.stride(1), lse.stride(0), more_lse.stride(0));
  };
  if (dtype == ScalarType::BFloat16) {
    go(__nv_bfloat16());
  } else {
    go(__half());
  }
}

}  // namespace kqsvd
