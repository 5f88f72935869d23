// SPDX-License-Identifier: Apache-2.0
// Host side of store_latent: checks, launch shape, dispatch over dtype.
#include <algorithm>

#include "kqsvd/check.h"
#include "kqsvd/store_few.cuh"
#include "kqsvd/store_many.cuh"
#include "kqsvd/turn.h"
#include "ops.h"

namespace kqsvd {
namespace {

StoreSide side_of(const Tensor& x, const CodecTensors& c, const char* name, bool rotate, int dim, int device) {
  const int64_t heads = x.size(1), rank = c.latent_mean.size(3), period = c.latent_mean.size(2);
  STD_TORCH_CHECK(rank % kGroup == 0 && rank > 0 && rank <= kGroup * kMaxGroups, name, ": rank ", rank,
                  " must be a multiple of 16 up to 256");
  STD_TORCH_CHECK(period > 0 && (period & (period - 1)) == 0, name, ": mean period must be a power of two");
  const int64_t groups = rank / kGroup;
  check_tensor(c.encode, "encode", ScalarType::BFloat16, {heads, groups, kAny, 2, 32, 8}, device);
  check_tensor(c.weight, "weight", ScalarType::Float, {heads, rank, 2}, device);
  check_tensor(c.latent_mean, "latent_mean", ScalarType::Float, {heads, 2, period, rank}, device);
  check_tensor(c.class_vector, "class_vector", ScalarType::Float, {heads, period, dim}, device);
  check_tensor(c.class_offset, "class_offset", ScalarType::Float, {heads, period}, device);
  check_tensor(c.plan, "plan", ScalarType::Int, {kAny}, device);
  STD_TORCH_CHECK(is_plan_size(c.plan.size(0)), name, ": plan table of ", c.plan.size(0),
                  " integers: this extension belongs to another version of vllm_kqsvd");
  for (const Tensor* t : {&c.encode, &c.weight, &c.latent_mean, &c.class_vector, &c.class_offset, &c.plan}) {
    check_contiguous(*t, name);
  }
  StoreSide side{};
  side.x = x.data_ptr();
  side.token_stride = x.stride(0), side.head_stride = x.stride(1);
  side.encode = data<const uint4>(c.encode);
  const int64_t steps = c.encode.size(2);
  if (steps <= 8) {
    check_tensor(c.operand, "operand", ScalarType::BFloat16, {heads, 2, steps / 4, rank, 64}, device);
    check_contiguous(c.operand, name);
    side.operand = data<const uint4>(c.operand);
  }
  side.weight = data<const float>(c.weight);
  side.latent_mean = data<const float>(c.latent_mean);
  side.class_vector = data<const float>(c.class_vector);
  side.class_offset = data<const float>(c.class_offset);
  side.plan = data<const int>(c.plan);
  side.plan_ints = static_cast<int>(c.plan.size(0));
  side.groups = static_cast<int>(groups), side.period = static_cast<int>(period), side.rotate = rotate;
  return side;
}

int log2_of(int size) {
  int shift = 0;
  while ((1 << shift) < size) ++shift;
  return size > 0 && (1 << shift) == size ? shift : -1;
}

// Up to here a CTA per 16 tokens, beyond, CTAs that keep their tables. Launched after each other both kernels take about as
// long for 300 tokens; where other work empties the caches in between, as a model's weights do, 384 tokens of 8 heads take
// 12 us with the first and 20 with the second, 640 tokens 17 to 19 and 21 to 24 (H100).
constexpr int kFewTokens = 640;

template <typename T, int kSteps>
void launch_few(StoreParams& p, int heads, const Launch& on) {
  const int tiles = (p.num_tokens + kTile - 1) / kTile, groups = std::max(p.side[0].groups, p.side[1].groups);
  constexpr int kCrowded = kSteps <= 8 ? 2 : 1;  // more CTAs than multiprocessors: fewer registers make it one wave
  const bool crowded = 2 * tiles * heads > limits_of(on.device()).multiprocessors;
  launch_early(crowded ? store_few_kernel<T, kSteps, kCrowded> : store_few_kernel<T, kSteps, 1>, p,
               dim3(2 * tiles, heads), 32 * groups, sizeof(StoreFewShared<kSteps>), on);
}

template <typename T, int kSteps>
void launch_many(StoreParams& p, int heads, const Launch& on) {
  const DeviceLimits& device = limits_of(on.device());
  // One CTA per multiprocessor.
  const int tiles = (p.num_tokens + kTile - 1) / kTile, per_head = std::max(2, device.multiprocessors / heads);
  if constexpr (kSteps <= 8) {
    const int bytes = both_tables(p, kSteps, true).end;
    if (stores_both(p, kSteps) && bytes <= device.shared_per_block) {
      const dim3 grid(std::min((tiles + 3) / 4, std::max(1, device.multiprocessors / heads)), heads);
      return launch_early(store_both_kernel<T, kSteps>, p, grid, 32 * many_warps(kSteps), bytes, on);
    }
  }
  int bytes[2] = {};
  for (const bool in_shared : {false, true}) {
    for (const StoreSide& side : p.side) {
      const bool halves = side.rotate && !p.rope.interleaved;
      const StoreTables l =
          store_tables(p.dim, kSteps, side.groups, side.period, halves, in_shared, many_scratch_bytes(kSteps));
      bytes[in_shared] = std::max(bytes[in_shared], l.end);
    }
  }
  // Rotated keys take three products and a rotation where values take two.
  const int keys = p.side[0].rotate ? (per_head * 9 + 8) / 16 : per_head / 2;
  p.key_ctas = std::min(tiles, std::max(1, keys));
  const int value_ctas = std::min(tiles, std::max(1, per_head - keys));
  const dim3 grid(p.key_ctas + value_ctas, heads);
  if (bytes[1] <= device.shared_per_block) {
    launch_early(store_many_kernel<T, kSteps, true>, p, grid, 32 * many_warps(kSteps), bytes[1], on);
  } else {
    launch_early(store_many_kernel<T, kSteps, false>, p, grid, 32 * many_warps(kSteps), bytes[0], on);
  }
}

template <typename T, int kSteps>
void launch_steps(StoreParams& p, int heads, const Launch& on) {
  p.num_tokens <= kFewTokens ? launch_few<T, kSteps>(p, heads, on) : launch_many<T, kSteps>(p, heads, on);
}

template <typename T>
void launch_dtype(StoreParams& p, int heads, int steps, const Launch& on) {
  switch (steps) {
    case 4: return launch_steps<T, 4>(p, heads, on);
    case 8: return launch_steps<T, 8>(p, heads, on);
    default: return launch_steps<T, 16>(p, heads, on);
  }
}

}  // namespace

void store_latent(const Tensor& key, const Tensor& value, const Tensor& pages, std::optional<Tensor> window_pages,
                  const Tensor& slot_mapping, std::optional<Tensor> window_slot_mapping, const Tensor& positions,
                  const CodecTensors& k, const CodecTensors& v, const RopeTensors& rope, int64_t block_size,
                  int64_t tile_bytes) {
  check_tensor(key, "key", key.scalar_type(), {kAny, kAny, kAny});
  const int device = key.get_device_index();
  const int64_t heads = key.size(1), dim = key.size(2);
  const ScalarType dtype = key.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "key must be bfloat16 or float16, found ",
                  torch::headeronly::toString(dtype));
  STD_TORCH_CHECK(dim % 16 == 0 && dim >= 16 && dim <= 256, "head_dim ", dim, " must be a multiple of 16 up to 256");
  check_tensor(value, "value", dtype, {kAny, heads, dim}, device);
  check_vectors(key, "key");
  check_vectors(value, "value");
  STD_TORCH_CHECK(block_size > 0 && block_size % kTile == 0, "block size ", block_size, " must be a multiple of 16");
  const int64_t page_bytes = heads * (block_size / kTile) * tile_bytes;
  check_tensor(pages, "pages", ScalarType::Byte, {kAny, page_bytes}, device);
  STD_TORCH_CHECK(pages.stride(1) == 1 && pages.stride(0) % 16 == 0, "pages must be dense and aligned to 16 bytes");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(pages.data_ptr()) % 16 == 0, "pages must be aligned to 16 bytes");
  STD_TORCH_CHECK(pages.size(0) * block_size < (int64_t(1) << 31), "2^31 slots or more");
  check_tensor(slot_mapping, "slot_mapping", ScalarType::Long, {kAny}, device);
  check_tensor(positions, "positions", ScalarType::Long, {kAny}, device);
  check_contiguous(slot_mapping, "slot_mapping");
  check_contiguous(positions, "positions");
  STD_TORCH_CHECK(window_pages.has_value() == window_slot_mapping.has_value(),
                  "window_pages and window_slot_mapping go together");

  StoreParams p{};
  int64_t tokens = std::min({key.size(0), value.size(0), slot_mapping.size(0), positions.size(0)});
  if (window_pages.has_value()) {
    const Tensor& w = *window_pages;
    check_tensor(w, "window_pages", dtype, {kAny, heads, kAny, 2 * dim}, device);
    check_vectors(w, "window_pages");
    check_tensor(*window_slot_mapping, "window_slot_mapping", ScalarType::Long, {kAny}, device);
    check_contiguous(*window_slot_mapping, "window_slot_mapping");
    STD_TORCH_CHECK(window_slot_mapping->size(0) >= tokens, "window_slot_mapping is shorter than slot_mapping");
    STD_TORCH_CHECK(w.size(0) * w.size(2) < (int64_t(1) << 31), "2^31 window slots or more");
    p.window = w.data_ptr();
    for (int i = 0; i < 3; ++i) p.window_stride[i] = w.stride(i);
    p.window_block_size = static_cast<int>(w.size(2));
    p.window_slots = data<const int64_t>(*window_slot_mapping);
  }
  if (tokens == 0 || heads == 0) return;
  p.rope = turn_of(rope, device);
  p.side[0] = side_of(key, k, "k", p.rope.rotary_dim > 0, static_cast<int>(dim), device);
  p.side[1] = side_of(value, v, "v", false, static_cast<int>(dim), device);
  p.pages = data<uint8_t>(pages);
  p.page_stride = pages.stride(0);
  p.slots = data<const int64_t>(slot_mapping);
  p.positions = data<const int64_t>(positions);
  p.num_tokens = static_cast<int>(tokens), p.dim = static_cast<int>(dim);
  p.block_size = static_cast<int>(block_size), p.tiles_per_block = static_cast<int>(block_size / kTile);
  p.tile_bytes = static_cast<int>(tile_bytes);
  // The number of steps also tells whether registers hold a token's latents: more than 8 groups take the widest kernel.
  const int steps = std::max(p.side[0].groups, p.side[1].groups) > kWarpGroups ? 16 : store_steps(p.dim);
  STD_TORCH_CHECK(std::max(p.side[0].groups, p.side[1].groups) <= steps, "more latents than head_dim ", dim);
  for (const Tensor* image : {&k.encode, &v.encode}) {
    STD_TORCH_CHECK(image->size(2) == steps, "encode images have ", image->size(2), " steps, ", steps, " are needed");
  }
  p.block_shift = log2_of(p.block_size), p.window_shift = log2_of(p.window_block_size);
  const Launch on(key);
  if (dtype == ScalarType::BFloat16) {
    launch_dtype<__nv_bfloat16>(p, static_cast<int>(heads), steps, on);
  } else {
    launch_dtype<__half>(p, static_cast<int>(heads), steps, on);
  }
}

}  // namespace kqsvd
