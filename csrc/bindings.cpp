// SPDX-License-Identifier: Apache-2.0
// Registers torch.ops.kqsvd.* against PyTorch's stable ABI. The library has no Python symbol: it is loaded with
// torch.ops.load_library, so one file serves every Python version and every PyTorch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace {

using kqsvd::CodecTensors;
using kqsvd::DecoderTensors;
using kqsvd::RopeTensors;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void store_latent(const Tensor key, const Tensor value, Tensor pages, OptionalTensor window_pages,
                  const Tensor slot_mapping, OptionalTensor window_slot_mapping, const Tensor positions,
                  const Tensor k_encode, const Tensor k_operand, const Tensor k_weight, const Tensor k_latent_mean,
                  const Tensor k_class_vector, const Tensor k_class_offset, const Tensor k_plan, const Tensor v_encode,
                  const Tensor v_operand, const Tensor v_weight, const Tensor v_latent_mean,
                  const Tensor v_class_vector, const Tensor v_class_offset, const Tensor v_plan,
                  const Tensor rope_table, int64_t rope_block, bool rope_interleaved, int64_t block_size,
                  int64_t tile_bytes) {
  kqsvd::store_latent(key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions,
                      CodecTensors{k_encode, k_operand, k_weight, k_latent_mean, k_class_vector,
                                   k_class_offset, k_plan},
                      CodecTensors{v_encode, v_operand, v_weight, v_latent_mean, v_class_vector,
                                   v_class_offset, v_plan},
                      RopeTensors{rope_table, rope_block, rope_interleaved}, block_size, tile_bytes);
}

void dequantize(const Tensor pages, const Tensor block_table, OptionalTensor window_pages,
                OptionalTensor window_block_table, const Tensor ranges, int64_t num_tiles, Tensor key, Tensor value,
                const Tensor k_decode, const Tensor k_decode_unit, const Tensor k_mean, const Tensor k_plan,
                int64_t k_first_byte, int64_t k_num_bytes, const Tensor v_decode, const Tensor v_decode_unit,
                const Tensor v_mean, const Tensor v_plan, int64_t v_first_byte, int64_t v_num_bytes,
                const Tensor rope_table, int64_t rope_block, bool rope_interleaved, int64_t block_size,
                int64_t tile_bytes) {
  kqsvd::dequantize(pages, block_table, window_pages, window_block_table, ranges, num_tiles, key, value,
                    DecoderTensors{k_decode, k_decode_unit, k_mean, k_plan, k_first_byte, k_num_bytes},
                    DecoderTensors{v_decode, v_decode_unit, v_mean, v_plan, v_first_byte, v_num_bytes},
                    RopeTensors{rope_table, rope_block, rope_interleaved}, block_size, tile_bytes);
}

void token_positions(const Tensor query_start_loc, const Tensor seq_lens, Tensor positions) {
  kqsvd::token_positions(query_start_loc, seq_lens, positions);
}

void merge_attention(Tensor out, Tensor lse, const Tensor more_out, const Tensor more_lse) {
  kqsvd::merge_attention(out, lse, more_out, more_lse);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(kqsvd, m) {
  m.def(
      "store_latent(Tensor key, Tensor value, Tensor(a!) pages, Tensor(b!)? window_pages, Tensor slot_mapping, "
      "Tensor? window_slot_mapping, Tensor positions, Tensor k_encode, Tensor k_operand, Tensor k_weight, "
      "Tensor k_latent_mean, Tensor k_class_vector, Tensor k_class_offset, Tensor k_plan, Tensor v_encode, "
      "Tensor v_operand, Tensor v_weight, Tensor v_latent_mean, Tensor v_class_vector, Tensor v_class_offset, "
      "Tensor v_plan, Tensor rope_table, "
      "int rope_block, bool rope_interleaved, int block_size, int tile_bytes) -> ()");
  m.def(
      "dequantize(Tensor pages, Tensor block_table, Tensor? window_pages, Tensor? window_block_table, Tensor ranges, "
      "int num_tiles, Tensor(a!) key, Tensor(b!) value, Tensor k_decode, Tensor k_decode_unit, Tensor k_mean, "
      "Tensor k_plan, int k_first_byte, int k_num_bytes, Tensor v_decode, Tensor v_decode_unit, Tensor v_mean, "
      "Tensor v_plan, int v_first_byte, int v_num_bytes, Tensor rope_table, int rope_block, bool rope_interleaved, "
      "int block_size, int tile_bytes) -> ()");
  m.def("token_positions(Tensor query_start_loc, Tensor seq_lens, Tensor(a!) positions) -> ()");
  m.def("merge_attention(Tensor(a!) out, Tensor(b!) lse, Tensor more_out, Tensor more_lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kqsvd, CUDA, m) {
  m.impl("store_latent", TORCH_BOX(&store_latent));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("token_positions", TORCH_BOX(&token_positions));
  m.impl("merge_attention", TORCH_BOX(&merge_attention));
}
