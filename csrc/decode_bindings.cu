// SPDX-License-Identifier: Apache-2.0
// torch.ops.kqsvd.decode*: tensors in, kernel parameters out. vllm_kqsvd/ops/cuda_decode.py is the only caller and
// has checked the constants when it built them; what can change from step to step is checked here.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "kqsvd/check.h"
#include "kqsvd/decode_launch.h"

namespace {

using kqsvd::check_tensor;
using kqsvd::data;
using kqsvd::kAny;
using kqsvd::Launch;
using kqsvd::ScalarType;
using torch::stable::Tensor;
using namespace kqsvd::decode;

const Instance& instance_of(int64_t key) {
  const Instance* instance = find_instance(static_cast<uint64_t>(key));
  STD_TORCH_CHECK(instance, "this decode kernel is not in the extension; rebuild it from the same sources");
  return *instance;
}

// Which compiled kernel stands behind a key: 0 nothing, else floats of a partial result * 4 + warpgroups per CTA.
int64_t decode_instance(int64_t key) {
  const Instance* i = find_instance(static_cast<uint64_t>(key));
  return i ? int64_t{i->record_floats} * 4 + i->parts : 0;
}

void decode_schedule(const Tensor seq_lens, const Tensor query_start_loc, Tensor requests, int64_t key,
                     int64_t num_requests, int64_t window, int64_t sliding_window,
                     std::optional<Tensor> block_table, int64_t block_size) {
  check_tensor(seq_lens, "seq_lens", ScalarType::Int, {kAny});
  check_tensor(query_start_loc, "query_start_loc", ScalarType::Int, {kAny}, seq_lens.get_device_index());
  check_tensor(requests, "requests", ScalarType::Int, {kAny, 8}, seq_lens.get_device_index());
  STD_TORCH_CHECK(seq_lens.size(0) >= num_requests && query_start_loc.size(0) > num_requests &&
                      requests.size(0) > num_requests,
                  "a schedule of ", num_requests, " requests does not fit its tensors");
  const Launch on(seq_lens);
  ScheduleParams p{};
  p.seq_lens = data<const int>(seq_lens);
  p.query_start_loc = data<const int>(query_start_loc);
  p.requests = reinterpret_cast<Request*>(data<int>(requests));
  p.num_requests = static_cast<int>(num_requests);
  p.table_rows = static_cast<int>(requests.size(0));
  p.window = static_cast<int>(window);
  p.sliding_window = static_cast<int>(sliding_window);
  p.grain = instance_of(key).grain;
  if (block_table.has_value()) {
    check_tensor(*block_table, "block_table", ScalarType::Int, {kAny, kAny}, seq_lens.get_device_index());
    STD_TORCH_CHECK(block_table->size(0) >= num_requests && block_table->stride(1) == 1, "block_table is too small");
    p.block_table = data<const int>(*block_table);
    p.block_table_stride = block_table->stride(0);
    p.block_size = static_cast<int>(block_size);
  }
  kqsvd::check_cuda(launch_schedule(p, on.stream()), "decode schedule");
}

void decode(const Tensor query, Tensor out, const Tensor pages, const Tensor block_table,
            std::optional<Tensor> window_pages, std::optional<Tensor> window_table, const Tensor requests,
            const Tensor key_image, const Tensor mean_tile, const Tensor sink_rows, const Tensor rope_table,
            const Tensor key_exponent, const Tensor value_basis, const Tensor value_mean, const Tensor value_factor,
            Tensor partials, Tensor whole_partials, int64_t key, int64_t num_requests,
            int64_t block_size, int64_t columns, int64_t rope_block, int64_t rotary_dim, bool rotary_interleaved,
            int64_t sliding_window, double scale, double soft_cap) {
  const Instance& instance = instance_of(key);
  const int device = query.get_device_index();
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "query must be bfloat16 or float16");
  check_tensor(query, "query", dtype, {kAny, kAny, kAny});
  check_tensor(out, "out", dtype, {kAny, query.size(1), query.size(2)}, device);
  check_tensor(pages, "pages", ScalarType::Byte, {kAny, kAny}, device);
  check_tensor(block_table, "block_table", ScalarType::Int, {kAny, kAny}, device);
  kqsvd::check_vectors(query, "query");
  STD_TORCH_CHECK(out.stride(2) == 1, "out must be dense in its last dimension");
  STD_TORCH_CHECK(pages.stride(1) == 1 && pages.stride(0) % 32 == 0, "pages must lie multiples of 32 bytes apart");
  STD_TORCH_CHECK(block_table.size(0) >= num_requests && block_table.stride(1) == 1, "block_table is too small");
  const Launch on(query);

  DecodeParams p{};
  p.query = query.data_ptr();
  p.query_token_stride = query.stride(0), p.query_head_stride = query.stride(1);
  p.out = out.data_ptr();
  p.out_token_stride = out.stride(0), p.out_head_stride = out.stride(1);
  p.pages = data<const uint8_t>(pages);
  p.page_stride = pages.stride(0);
  p.block_table = data<const int>(block_table);
  p.block_table_stride = block_table.stride(0);
  p.block_size = static_cast<int>(block_size);
  p.num_kv_heads = static_cast<int>(key_exponent.size(0));
  p.window_block_size = 1;
  if (window_pages.has_value()) {
    const Tensor& w = *window_pages;
    check_tensor(w, "window_pages", dtype, {kAny, p.num_kv_heads, kAny, 2 * query.size(2)}, device);
    kqsvd::check_vectors(w, "window_pages");
    STD_TORCH_CHECK(window_table.has_value(), "window_pages without window_table");
    STD_TORCH_CHECK(w.size(2) % 16 == 0, "window blocks must hold a multiple of 16 positions");
    STD_TORCH_CHECK(w.stride(0) < (int64_t{1} << 31), "window blocks must lie less than 4 GiB apart");
    check_tensor(*window_table, "window_table", ScalarType::Int, {kAny, kAny}, device);
    STD_TORCH_CHECK(window_table->size(0) >= num_requests && window_table->stride(1) == 1, "window_table is too small");
    p.window_pages = w.data_ptr();
    p.window_block_stride = w.stride(0), p.window_head_stride = w.stride(1), p.window_token_stride = w.stride(2);
    p.window_block_size = static_cast<int>(w.size(2));
    p.window_table = data<const int>(*window_table);
    p.window_table_stride = window_table->stride(0);
    // About 80 positions of K and V. On an H100 (50 MB of L2) few of them gain 2 to 4 %, 80 MB lose 8 %.
    p.prefetch_window = num_requests * p.num_kv_heads * 80 * 4 * query.size(2) <= (int64_t{8} << 20);
  }
  p.requests = reinterpret_cast<const Request*>(data<const int>(requests));
  p.num_requests = static_cast<int>(num_requests);
  p.key_image = data<const uint8_t>(key_image);
  p.mean_tile = reinterpret_cast<const uint4*>(data<const int>(mean_tile));
  p.sink_rows = reinterpret_cast<const uint4*>(data<const int>(sink_rows));
  p.rope_table = reinterpret_cast<const uint32_t*>(data<const int>(rope_table));
  p.rope_table_moves = rope_block > 0;
  p.key_exponent = data<const int>(key_exponent);
  p.value_basis = reinterpret_cast<const uint4*>(data<const int>(value_basis));
  p.value_mean = data<const float>(value_mean);
  p.value_factor = data<const float>(value_factor);
  p.rotary_dim = static_cast<int>(rotary_dim), p.rotary_interleaved = rotary_interleaved;
  const double log2e = 1.4426950408889634;
  p.scale_log2 = static_cast<float>(scale * log2e);
  p.soft_cap_log2 = static_cast<float>(soft_cap * log2e);
  p.sliding_window = static_cast<int>(sliding_window);
  p.is_bf16 = dtype == ScalarType::BFloat16;
  p.heads_per_kv = static_cast<int>(query.size(1)) / p.num_kv_heads;
  p.column_groups = static_cast<int>(columns);
  p.partials = data<float>(partials);
  p.whole_partials = data<float>(whole_partials);
  const int64_t virtual_heads = int64_t{p.num_kv_heads} * p.column_groups;
  const Grid grid = grid_of(kqsvd::limits_of(device).multiprocessors, static_cast<int>(virtual_heads), p.num_requests);
  p.num_ctas = grid.num_ctas, p.finish_parts = grid.finish_parts;
  p.join_from = p.finish_parts == 1 ? kJoinFrom : kJoinFromFew;
  // A warp that finishes a request alone writes vectors of 16 bytes.
  const bool vectors =
      reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.out_token_stride % 8 == 0 && p.out_head_stride % 8 == 0;
  p.finish_blocks = vectors ? grid.finish_blocks : 0;
  p.most_ctas = static_cast<int>((p.num_ctas + virtual_heads - 1) / virtual_heads);
  p.big_heads = static_cast<int>(p.num_ctas - (p.most_ctas - 1) * virtual_heads);
  p.late_ctas = grid.late_ctas, p.late_units = kLateBytes / instance.unit_bytes;
  p.max_phases = static_cast<int>((virtual_heads + p.num_ctas - 1) / p.num_ctas) + 1;
  STD_TORCH_CHECK(partials.numel() >= int64_t{p.num_ctas} * instance.parts * p.max_phases * 2 * instance.record_floats &&
                      whole_partials.numel() >= num_requests * virtual_heads * instance.record_floats,
                  "the decode workspace is too small for this step");
  kqsvd::check_cuda(instance.launch(p, on.stream()), "decode launch");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kqsvd, m) {
  m.def("decode_instance(int key) -> int");
  m.def(
      "decode_schedule(Tensor seq_lens, Tensor query_start_loc, Tensor(a!) requests, int key, int num_requests, "
      "int window, int sliding_window, Tensor? block_table, int block_size) -> ()");
  m.def(
      "decode(Tensor query, Tensor(a!) out, Tensor pages, Tensor block_table, Tensor? window_pages, "
      "Tensor? window_table, Tensor requests, Tensor key_image, Tensor mean_tile, Tensor sink_rows, Tensor rope_table, "
      "Tensor key_exponent, Tensor value_basis, Tensor value_mean, Tensor value_factor, Tensor(b!) partials, "
      "Tensor(c!) whole_partials, int key, int num_requests, int block_size, int columns, "
      "int rope_block, int rotary_dim, bool rotary_interleaved, int sliding_window, float scale, "
      "float soft_cap) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kqsvd, CompositeExplicitAutograd, m) { m.impl("decode_instance", TORCH_BOX(&decode_instance)); }

STABLE_TORCH_LIBRARY_IMPL(kqsvd, CUDA, m) {
  m.impl("decode_schedule", TORCH_BOX(&decode_schedule));
  m.impl("decode", TORCH_BOX(&decode));
}
