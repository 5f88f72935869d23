// SPDX-License-Identifier: Apache-2.0
// The host entry points behind torch.ops.kqsvd (schemas in bindings.cpp). Stable ABI only: no ATen, no c10.
//
// A further source file may register operators of its own with STABLE_TORCH_LIBRARY_FRAGMENT(kqsvd, m).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace kqsvd {

using torch::stable::Tensor;

// Constants with which one side is coded (vllm_kqsvd/ops/cuda_tables.py says what each holds).
struct CodecTensors {
  const Tensor &encode, &operand, &weight, &latent_mean, &class_vector, &class_offset, &plan;
};

// Constants with which one side is decoded.
struct DecoderTensors {
  const Tensor &decode, &decode_unit, &mean, &plan;
  int64_t first_byte, num_bytes;
};

// Tables that turn keys by block starts; block 0: keys are coded as they arrive.
struct RopeTensors {
  const Tensor& table;
  int64_t block;
  bool interleaved;
};

void store_latent(const Tensor& key, const Tensor& value, const Tensor& pages, std::optional<Tensor> window_pages,
                  const Tensor& slot_mapping, std::optional<Tensor> window_slot_mapping, const Tensor& positions,
                  const CodecTensors& k, const CodecTensors& v, const RopeTensors& rope, int64_t block_size,
                  int64_t tile_bytes);

// Rows of position ranges; `ranges` [5, S + 1] int32: first, row_start, tile_start, exact_from, request.
void dequantize(const Tensor& pages, const Tensor& block_table, std::optional<Tensor> window_pages,
                std::optional<Tensor> window_block_table, const Tensor& ranges, int64_t num_tiles, const Tensor& key,
                const Tensor& value, const DecoderTensors& k, const DecoderTensors& v, const RopeTensors& rope,
                int64_t block_size, int64_t tile_bytes);

// positions [N] of the rows of every request: seq_lens[i] - q_len + (row - query_start_loc[i]).
void token_positions(const Tensor& query_start_loc, const Tensor& seq_lens, const Tensor& positions);

// Merges attention over more keys into (out, lse) in place: out [N, Hq, d], lse [Hq, N] float32.
void merge_attention(const Tensor& out, const Tensor& lse, const Tensor& more_out, const Tensor& more_lse);

}  // namespace kqsvd
