// SPDX-License-Identifier: Apache-2.0
// What a decode launch needs, as plain pointers and strides. Shared by the kernels, their host launchers and the bindings.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kqsvd::decode {

// One request of a step as the schedule kernel sees it. Positions are token positions in the sequence.
struct alignas(16) Request {
  int unit_begin, unit_end;  // its range of work units in every virtual head; kChangeUnits of nothing follow
  int first, last;           // latent positions [first, last); first is aligned to a grain
  int p0;                    // position of its first query row
  int row;                   // its first row in query and out
  int num_rows;              // query rows
  int length;                // sequence length, new tokens included; exact positions are [last, length)
};

struct ScheduleParams {
  const int* seq_lens;         // [num_requests]
  const int* query_start_loc;  // [num_requests + 1]
  // [table_rows]; rows from num_requests on are empty: unit_begin is the total, `first` 1 if the step's pages are settled.
  Request* requests;
  int num_requests;
  int table_rows;  // all are written, so that a graph captured for more requests finds the surplus empty
  int window;          // positions kept exactly; 0: none
  int sliding_window;  // visible positions; 0: all
  int grain;           // tokens of one warp's smallest piece of work; four make a unit
  // Null: the step's pages count as unsettled. Otherwise [num_requests][...] pages of block_size positions.
  const int* block_table;
  int64_t block_table_stride;
  int block_size;
};

struct DecodeParams {
  const void* query;  // [tokens, num_heads, head_dim], 16-bit
  int64_t query_token_stride, query_head_stride;
  void* out;
  int64_t out_token_stride, out_head_stride;
  const uint8_t* pages;
  int64_t page_stride;  // bytes from block to block, a multiple of 32
  const int* block_table;
  int64_t block_table_stride;
  int block_size;
  const void* window_pages;  // [block, kv_head, token, 2 * head_dim]; strides in elements
  int64_t window_block_stride, window_head_stride, window_token_stride;
  const int* window_table;
  int64_t window_table_stride;
  int window_block_size;
  int prefetch_window;  // whether all windows of the step stay in L2 until they are read
  const Request* requests;
  int num_requests;

  // Constants of the layer, built by vllm_kqsvd/ops/cuda_decode.py.
  const uint8_t* key_image;   // [kv_head][rows * head_dim] fp16, swizzled: absorb matrix, then 16 mean rows
  const uint4* mean_tile;     // [kv_head][rope_block / 16][32]: A fragments of the mean basis in log2 units
  const uint4* sink_rows;     // [kv_head][head_dim / 16][32]: B fragments of sink minus mean
  const uint32_t* rope_table;  // [rows][head_dim / 2] (cos, sin) fp16 of the block starts
  int rope_table_moves;       // 0: every block uses row 0 (no RoPE frame)
  const int* key_exponent;    // [kv_head]: float exponent bits added when a K scale byte is read
  const uint4* value_basis;   // [kv_head][head_dim / 16][v groups][32]: A fragments of decode_V transposed
  const float* value_mean;    // [kv_head][2][head_dim]: mean, sink minus mean
  const float* value_factor;  // [kv_head]: what value_basis was divided by
  int rotary_dim, rotary_interleaved;

  float scale_log2;      // softmax scale * log2(e), for the exact window
  float soft_cap_log2;   // soft cap * log2(e); 0: none
  int sliding_window;    // 0: none
  int is_bf16;           // dtype of query, out and window pages
  int num_kv_heads, heads_per_kv, column_groups;

  // Workspace, shared by all layers.
  float* partials;         // split results, `partial_floats` each
  float* whole_partials;   // [request][virtual head]: results of requests that are not split
  int num_ctas, max_phases;
  int late_ctas, late_units;  // the last CTAs, and how much less they get
  int most_ctas, big_heads;   // of a virtual head, and how many have so many; the others have one less
  int finish_parts;        // warpgroups of a finishing block: 1 or kFewParts
  int join_from;           // pieces of a request from which on CTAs join theirs
  int finish_blocks;       // of a virtual head where each warp finishes requests of its own; 0: one block a request
};

constexpr int kFewParts = 4;

// What it takes a warpgroup to go from one request to the next, in units: ranges are cut as if requests lay so far apart.
constexpr int kChangeUnits = 1;

// Values of join_from, with one warpgroup in a finishing block and with kFewParts. On an H100 at 2.56 bits joining takes
// 2 x 32k (22 pieces) from 29.4 us to 26.8 and 4 x 8k (11) from 18.7 to 19.4; kFewParts warpgroups ask for 48 at once.
constexpr int kJoinFrom = 16, kJoinFromFew = 48;

// How many CTAs read latents, and how many warpgroups a finishing block has. A multiprocessor with a finishing block takes
// no latent CTA: as long as finishing blocks are few, some multiprocessors are left to them, so that they begin early and
// the next layer's CTAs are not kept waiting. More of them crowd, four on a multiprocessor, where the next layer's last
// CTAs will be: those begin when the others read already. Where one block per request would not fit the GPU at once, blocks
// stay and a warp takes a request after another.
struct Grid {
  int num_ctas, finish_parts, late_ctas, finish_blocks;
};
inline Grid grid_of(int multiprocessors, int virtual_heads, int num_requests) {
  const int64_t blocks = int64_t{virtual_heads} * num_requests, crowded = (blocks + 3) / 4;
  const bool few = blocks * 11 <= multiprocessors;
  const int64_t reserved = few ? blocks : blocks * 16 <= multiprocessors * 4 ? crowded : 0;
  int ctas = static_cast<int>(multiprocessors - reserved);
  if (reserved > 0) ctas -= ctas % virtual_heads;  // ranges of equal length
  const bool late = reserved == 0 && crowded * 4 <= ctas;  // with more, nearly all begin late
  const int stay = std::max(4 * multiprocessors / virtual_heads, 1);
  const int finish_blocks = crowded > multiprocessors ? std::min(stay, (num_requests + 3) / 4) : 0;
  return {ctas, few ? kFewParts : 1, late ? static_cast<int>(crowded) : 0, finish_blocks};
}

// Bytes of latents that a CTA reads while a late one gets ready: about 10 us of an H100's bandwidth.
constexpr int kLateBytes = 210 << 10;

}  // namespace kqsvd::decode
