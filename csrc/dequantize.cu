// SPDX-License-Identifier: Apache-2.0
// Host side of dequantize: checks, launch shape, dispatch over dtype and head width.
#include <algorithm>

#include "kqsvd/check.h"
#include "kqsvd/dequantize.cuh"
#include "kqsvd/turn.h"
#include "ops.h"

namespace kqsvd {
namespace {

DequantizeSide side_of(const Tensor& out, const DecoderTensors& c, const char* name, bool rotate, int64_t tile_bytes,
                       int device) {
  const int64_t heads = out.size(1), dim = out.size(2), period = c.mean.size(2), groups = c.decode.size(2);
  STD_TORCH_CHECK(groups > 0 && groups <= kMaxGroups, name, ": ", groups, " groups, at most 16 are supported");
  STD_TORCH_CHECK(period > 0 && (period & (period - 1)) == 0, name, ": mean period must be a power of two");
  check_tensor(c.decode, "decode", ScalarType::Half, {heads, (dim + 31) / 32, groups, 2, 32, 8}, device);
  check_tensor(c.decode_unit, "decode_unit", ScalarType::Float, {heads}, device);
  check_tensor(c.mean, "mean", ScalarType::Float, {heads, 2, period, dim}, device);
  check_tensor(c.plan, "plan", ScalarType::Int, {kAny}, device);
  STD_TORCH_CHECK(is_plan_size(c.plan.size(0)), name, ": plan table of ", c.plan.size(0),
                  " integers: this extension belongs to another version of vllm_kqsvd");
  for (const Tensor* t : {&c.decode, &c.decode_unit, &c.mean, &c.plan}) check_contiguous(*t, name);
  STD_TORCH_CHECK(c.first_byte % 16 == 0 && c.num_bytes % 16 == 0 && c.first_byte >= 0 && c.num_bytes > 0 &&
                      c.first_byte + c.num_bytes <= tile_bytes,
                  name, ": planes outside the tile");
  DequantizeSide side{};
  side.decode = data<const uint4>(c.decode);
  side.decode_unit = data<const float>(c.decode_unit);
  side.mean = data<const float>(c.mean);
  side.plan = data<const int>(c.plan);
  side.plan_ints = static_cast<int>(c.plan.size(0));
  side.groups = static_cast<int>(groups), side.period = static_cast<int>(period), side.rotate = rotate;
  side.first_byte = static_cast<int>(c.first_byte), side.num_bytes = static_cast<int>(c.num_bytes);
  side.out = out.data_ptr();
  side.row_stride = out.stride(0), side.head_stride = out.stride(1);
  return side;
}

template <typename T, int kGroups>
void launch_dequantize(const DequantizeParams& p, int heads, const Launch& on) {
  const DeviceLimits& device = limits_of(on.device());
  int bytes[2] = {};
  for (const bool in_shared : {false, true}) {
    for (const DequantizeSide& side : p.side) {
      const bool halves = side.rotate && !p.rope.interleaved;
      const DequantizeLayout l =
          dequantize_layout(p.dim, side.groups, side.period, side.num_bytes, halves, in_shared);
      bytes[in_shared] = std::max(bytes[in_shared], l.bytes);
    }
  }
  const bool fits = bytes[1] <= device.shared_per_block;
  const int resident = std::clamp(device.shared_per_multiprocessor / (bytes[fits] + 1024), 1, 2);
  const int most = (p.num_tiles + kDequantizeWarps - 1) / kDequantizeWarps;
  const int per_side = std::max(1, device.multiprocessors * resident / (2 * heads));
  const dim3 grid(2 * std::min(most, per_side), heads);
  if (fits) {
    launch(dequantize_kernel<T, kGroups, true>, p, grid, kDequantizeThreads, bytes[1], on.stream());
  } else {
    launch(dequantize_kernel<T, kGroups, false>, p, grid, kDequantizeThreads, bytes[0], on.stream());
  }
}

template <typename T>
void launch_width(const DequantizeParams& p, int heads, const Launch& on) {
  if (std::max(p.side[0].groups, p.side[1].groups) <= 8) {
    launch_dequantize<T, 8>(p, heads, on);
  } else {
    launch_dequantize<T, 16>(p, heads, on);
  }
}

}  // namespace

void dequantize(const Tensor& pages, const Tensor& block_table, std::optional<Tensor> window_pages,
                std::optional<Tensor> window_block_table, const Tensor& ranges, int64_t num_tiles, const Tensor& key,
                const Tensor& value, const DecoderTensors& k, const DecoderTensors& v, const RopeTensors& rope,
                int64_t block_size, int64_t tile_bytes) {
  check_tensor(key, "key", key.scalar_type(), {kAny, kAny, kAny});
  const ScalarType dtype = key.scalar_type();
  const int device = key.get_device_index();
  const int64_t heads = key.size(1), dim = key.size(2);
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "key must be bfloat16 or float16, found ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(dim % 16 == 0 && dim >= 16 && dim <= 256, "head_dim ", dim, " must be a multiple of 16 up to 256");
  check_tensor(value, "value", dtype, {key.size(0), heads, dim}, device);
  check_vectors(key, "key");
  check_vectors(value, "value");
  STD_TORCH_CHECK(block_size > 0 && block_size % kTile == 0, "block size ", block_size, " must be a multiple of 16");
  check_tensor(pages, "pages", ScalarType::Byte, {kAny, heads * (block_size / kTile) * tile_bytes}, device);
  STD_TORCH_CHECK(pages.stride(1) == 1 && pages.stride(0) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(pages.data_ptr()) % 16 == 0,
                  "pages must be dense and aligned to 16 bytes");
  check_tensor(block_table, "block_table", ScalarType::Int, {kAny, kAny}, device);
  STD_TORCH_CHECK(block_table.stride(1) == 1, "block_table must be dense in its last dimension");
  check_tensor(ranges, "ranges", ScalarType::Int, {5, kAny}, device);
  STD_TORCH_CHECK(ranges.stride(1) == 1, "ranges must be dense in its last dimension");
  const int64_t requests = ranges.size(1) - 1;
  if (num_tiles <= 0 || requests <= 0 || heads == 0) return;
  STD_TORCH_CHECK(num_tiles <= key.size(0) / kTile + requests, "ranges hold more tiles than the workspace");

  DequantizeParams p{};
  if (window_pages.has_value()) {
    STD_TORCH_CHECK(window_block_table.has_value(), "window_pages and window_block_table go together");
    const Tensor &w = *window_pages, &table = *window_block_table;
    check_tensor(w, "window_pages", dtype, {kAny, heads, kAny, 2 * dim}, device);
    check_vectors(w, "window_pages");
    check_tensor(table, "window_block_table", ScalarType::Int, {kAny, kAny}, device);
    STD_TORCH_CHECK(table.stride(1) == 1, "window_block_table must be dense in its last dimension");
    p.window = w.data_ptr();
    for (int i = 0; i < 3; ++i) p.window_stride[i] = w.stride(i);
    p.window_block_size = static_cast<int>(w.size(2));
    p.window_block_table = data<const int>(table);
    p.window_table_stride = table.stride(0);
  }
  p.rope = turn_of(rope, device);
  p.side[0] = side_of(key, k, "k", p.rope.rotary_dim > 0, tile_bytes, device);
  p.side[1] = side_of(value, v, "v", false, tile_bytes, device);
  p.pages = data<const uint8_t>(pages);
  p.page_stride = pages.stride(0);
  const int* rows = data<const int>(ranges);
  p.first = rows, p.row_start = rows + ranges.stride(0), p.tile_start = rows + 2 * ranges.stride(0);
  p.exact_from = rows + 3 * ranges.stride(0), p.request = rows + 4 * ranges.stride(0);
  p.block_table = data<const int>(block_table);
  p.table_stride = block_table.stride(0);
  p.num_requests = static_cast<int>(requests), p.num_tiles = static_cast<int>(num_tiles);
  p.dim = static_cast<int>(dim);
  p.block_size = static_cast<int>(block_size), p.tiles_per_block = static_cast<int>(block_size / kTile);
  p.tile_bytes = static_cast<int>(tile_bytes);
  const Launch on(key);
  if (dtype == ScalarType::BFloat16) {
    launch_width<__nv_bfloat16>(p, static_cast<int>(heads), on);
  } else {
    launch_width<__half>(p, static_cast<int>(heads), on);
  }
}

}  // namespace kqsvd
