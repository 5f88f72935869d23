// SPDX-License-Identifier: Apache-2.0
// Dequantize: latent pages -> keys (after RoPE) and values of position ranges of many requests, row after row, for
// attention of a prefill chunk over cached context. Positions of the exact window are copied from its pages.
//
// Persistent CTAs of one side and head keep the decode matrix and the means in shared memory. Every warp takes a page
// tile of 16 tokens at a time on its own, the next one under way: codes become exact fp16 (code minus zero point) in
// operand registers, a tensor-core product, then scale, mean and rotation in float32. The matrix's columns are ordered
// so that a lane's results are whole chunks (primitives.cuh): rotated pairs meet in one lane.
#pragma once

#include "plan_table.cuh"
#include "primitives.cuh"

namespace kqsvd {

constexpr int kDequantizeThreads = 256;
constexpr int kDequantizeWarps = kDequantizeThreads / 32;

struct DequantizeSide {
  const uint4* decode;        // [H][ceil(d / 32)][groups][2][32 lanes]: fp16 B fragments of two n-tiles, over the unit
  const float* decode_unit;   // [H] power of two
  const float* mean;          // [H][2 (ordinary, sink)][period][d]
  const int* plan;
  int plan_ints, groups, period;
  bool rotate;
  int first_byte, num_bytes;  // the side's planes inside a tile
  void* out;                  // [rows, H, d]
  int64_t row_stride, head_stride;
};

// Request i covers positions first[i] + (0 .. row_start[i + 1] - row_start[i] - 1) in rows row_start[i]... and tiles
// tile_start[i]... of the run; first[i] is a multiple of 16. Positions >= exact_from[i] come from the window.
struct DequantizeParams {
  DequantizeSide side[2];
  RopeTurn rope;
  const uint8_t* pages;
  int64_t page_stride;
  const void* window;
  int64_t window_stride[3];
  const int *first, *row_start, *tile_start, *exact_from;
  const int *request, *block_table, *window_block_table;  // request[i]: row of the block tables
  int64_t table_stride, window_table_stride;
  int num_requests, num_tiles, dim, block_size, tiles_per_block, tile_bytes, window_block_size;
};

struct TileJob {
  int64_t page;  // byte offset of the tile of this head, -1: nothing to decode
  int position, row, rows, exact, request;
};

// Planes of a group: offset in the side's bytes, and bits | half << 4 | position << 8 | shift << 16.
struct DequantizeSources {
  int count[kMaxGroups];
  int2 source[kMaxGroups][8];
  alignas(16) int plan[kPlanInts];
};

// Offsets in dynamic shared memory. Rows of means are padded so that the tokens of a warp hit different banks.
// `halves`: chunks have their two parts half a row apart, so that neighbours lie 16 bytes apart, not 32.
struct DequantizeLayout {
  int mean_stride, decode, mean, sources, fragments, stage, stage_bytes, bytes;
};

__host__ __device__ inline DequantizeLayout dequantize_layout(int dim, int groups, int period, int num_bytes,
                                                              bool halves, bool tables_shared) {
  DequantizeLayout l{};
  l.mean_stride = tables_shared ? (dim + 31) / 32 * 32 + (halves ? 16 : 4) : dim;
  l.stage_bytes = num_bytes + 16;  // planes, then the scale bytes
  int at = 0;
  l.decode = at, at += tables_shared ? (dim + 31) / 32 * groups * 1024 : 0;
  l.mean = at, at += tables_shared ? period * l.mean_stride * 4 : 0;
  l.sources = at, at += static_cast<int>(sizeof(DequantizeSources) + 15) / 16 * 16;
  l.fragments = at, at += kDequantizeWarps * groups * 512;
  l.stage = at, at += 2 * kDequantizeWarps * l.stage_bytes;
  l.bytes = at;
  return l;
}

__device__ __forceinline__ TileJob find_tile(const DequantizeParams& p, int tile, int head) {
  TileJob job{-1, 0, 0, 0, 0, 0};
  if (tile >= p.num_tiles) return job;
  int low = 0, high = p.num_requests;  // the last request with tile_start <= tile
  while (high - low > 1) {
    const int middle = (low + high) >> 1;
    (p.tile_start[middle] <= tile ? low : high) = middle;
  }
  const int at = kTile * (tile - p.tile_start[low]);
  job.position = p.first[low] + at;
  job.row = p.row_start[low] + at;
  job.rows = min(kTile, p.row_start[low + 1] - job.row);
  job.exact = p.window != nullptr && job.position >= p.exact_from[low];
  job.request = p.request[low];
  if (!job.exact && job.rows > 0) {
    const int block = p.block_table[job.request * p.table_stride + job.position / p.block_size];
    const int in_block = job.position % p.block_size / kTile;
    job.page = block * p.page_stride + int64_t(head * p.tiles_per_block + in_block) * p.tile_bytes;
  }
  return job;
}

// Columns 2t and 2t + 1 of token r in a full plane: low and high half of the result.
__device__ __forceinline__ uint32_t plane_columns(const char* plane, bool is_value, int r, int t) {
  if (is_value) {
    const uint2 pair = *reinterpret_cast<const uint2*>(plane + 32 * (r >> 1) + 8 * t);
    return __byte_perm(pair.x, pair.y, r & 1 ? 0x7632 : 0x5410);
  }
  return *reinterpret_cast<const uint32_t*>(plane + 16 * r + 4 * t);
}

// The four codes of tokens g and g + 8 in a group: channels 2t, 2t + 8, 2t + 1, 2t + 9 in bytes 0..3.
__device__ __forceinline__ void unpack_codes(uint32_t (&words)[2], const char* bytes, const int2* source, int count,
                                             bool is_value, int g, int t) {
  words[0] = words[1] = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int2 entry = source[i];
    const int bits = entry.y & 15, position = (entry.y >> 8) & 255, shift = entry.y >> 16;
    const char* plane = bytes + entry.x;
    const uint32_t x = plane_columns(plane, is_value, g, t);
    if (entry.y & 16) {  // half plane: a byte of either token in every 16 bits, columns 2t + 8 behind 2t
      const uint32_t mask = 0x00010001u * ((1u << bits) - 1u);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const uint32_t low = x >> (8 * y + 2 * position * bits);
        words[y] |= ((low & mask) | ((low >> bits) & mask) << 8) << shift;
      }
    } else {
      const uint32_t mask = 0x01010101u * ((1u << bits) - 1u);
      words[0] |= (x >> (position * bits) & mask) << shift;
      words[1] |= (plane_columns(plane, is_value, g + 8, t) >> (position * bits) & mask) << shift;
    }
  }
}

__device__ __forceinline__ void copy_exact_rows(const DequantizeParams& p, const DequantizeSide& side,
                                                const TileJob& job, bool is_value, int head, int lane) {
  const char* window = static_cast<const char*>(p.window);
  const int vectors = p.dim / 8;  // rows are 16-bit
  for (int i = lane; i < kTile * vectors; i += 32) {
    const int r = i / vectors, c = i - r * vectors, position = job.position + r;
    if (r >= job.rows) break;
    const int block = p.window_block_table[job.request * p.window_table_stride + position / p.window_block_size];
    const int64_t from = int64_t(block) * p.window_stride[0] + head * p.window_stride[1] +
                         (position % p.window_block_size) * p.window_stride[2] + (is_value ? p.dim : 0);
    const int64_t to = int64_t(job.row + r) * side.row_stride + head * side.head_stride;
    *reinterpret_cast<uint4*>(static_cast<char*>(side.out) + 2 * to + 16 * c) =
        *reinterpret_cast<const uint4*>(window + 2 * from + 16 * c);
  }
}

// Grid (CTAs of keys + as many of values, heads); block kDequantizeThreads. kGroups: most groups of 16 channels.
template <typename T, int kGroups, bool kShared>
__global__ void __launch_bounds__(kDequantizeThreads, 2) dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  extern __shared__ __align__(16) char memory[];
  const bool is_value = blockIdx.x & 1;
  const DequantizeSide& side = p.side[is_value];
  const int groups = side.groups, head = blockIdx.y, period = side.period, spans = (p.dim + 31) / 32;
  const int tid = threadIdx.x, lane = tid & 31, warp = uniform_warp_index(), g = lane >> 2, t = lane & 3;
  const bool halves = side.rotate && !p.rope.interleaved;
  const DequantizeLayout l = dequantize_layout(p.dim, groups, period, side.num_bytes, halves, kShared);
  DequantizeSources& s = *reinterpret_cast<DequantizeSources*>(memory + l.sources);
  char* stage = memory + l.stage + warp * 2 * l.stage_bytes;

  const uint4* decode = side.decode + int64_t(head) * spans * groups * 64;
  const float* global_means = side.mean + int64_t(head) * 2 * period * p.dim;
  const float* means = global_means;
  if constexpr (kShared) {
    for (int i = tid; i < spans * groups * 64; i += kDequantizeThreads) {
      copy_async_16(memory + l.decode + 16 * i, decode + i);
    }
    for (int i = tid; i < period * p.dim / 4; i += kDequantizeThreads) {
      const int row = 4 * i / p.dim, c = 4 * i - row * p.dim;
      copy_async_16(memory + l.mean + 4 * (row * l.mean_stride + c), means + 4 * i);
    }
    decode = reinterpret_cast<const uint4*>(memory + l.decode);
    means = reinterpret_cast<const float*>(memory + l.mean);
  }
  for (int i = tid; i < side.plan_ints; i += kDequantizeThreads) s.plan[i] = side.plan[i];
  const PlanView plan{s.plan};
  const float unit = side.decode_unit[head];
  copy_async_wait();
  __syncthreads();
  if (tid < groups) {
    int count = 0;
    for (int i = 0; i < plan.planes(); ++i) {
      const PlaneView plane = plan.plane(i);
      for (int n = 0; n < plane.count(); ++n) {
        if (plane.group(n) == tid) {
          s.source[tid][count++] = make_int2(plane.offset() - side.first_byte,
                                             plane.bits() | plane.half() << 4 | n << 8 | plane.shift(n) << 16);
        }
      }
    }
    s.count[tid] = count;
  }
  __syncthreads();

  RopeTurn rope = p.rope;
  if (!side.rotate) rope.rotary_dim = 0;
  const int ctas = gridDim.x >> 1, stride = ctas * kDequantizeWarps;
  const auto fetch = [&](int tile, int buffer) {  // the tile's place, its bytes on their way
    const TileJob job = find_tile(p, tile, head);
    if (job.page >= 0) {
      for (int i = lane; i < l.stage_bytes / 16; i += 32) {
        const int at = 16 * i < side.num_bytes ? side.first_byte + 16 * i : plan.scale_offset();
        copy_async_16(stage + buffer * l.stage_bytes + 16 * i, p.pages + job.page + at);
      }
    }
    copy_async_commit();
    return job;
  };

  int tile = (blockIdx.x >> 1) + warp * ctas, buffer = 0;
  TileJob next = fetch(tile, 0);
  for (; tile < p.num_tiles; tile += stride, buffer ^= 1) {
    const TileJob job = next;
    next = fetch(tile + stride, buffer ^ 1);
    copy_async_wait_but_one();
    __syncwarp();
    if (job.exact) copy_exact_rows(p, side, job, is_value, head, lane);
    if (job.page < 0) continue;

    const char* bytes = stage + buffer * l.stage_bytes;
    uint4* fragments = reinterpret_cast<uint4*>(memory + l.fragments) + warp * groups * 32 + lane;
#pragma unroll 1
    for (int k = 0; k < groups; ++k) {
      const int count = s.count[k];
      // fp16 0x6000 + 2c is 512 + c; the zero point, a half integer, is exact there too.
      const __half2 zero = __float2half2_rn(512.f + static_cast<float>(1 << (plan.width(k) - 1)) - 0.5f);
      uint32_t words[2];
      unpack_codes(words, bytes, s.source[k], count, is_value, g, t);
      uint32_t quad[4];
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        const uint32_t even = (words[y] & 0x00ff00ffu) << 1 | 0x60006000u;
        const uint32_t odd = (words[y] >> 7 & 0x01fe01feu) | 0x60006000u;
        const __half2 a = __hsub2(*reinterpret_cast<const __half2*>(&even), zero);
        const __half2 b = __hsub2(*reinterpret_cast<const __half2*>(&odd), zero);
        quad[y] = *reinterpret_cast<const uint32_t*>(&a);
        quad[2 + y] = *reinterpret_cast<const uint32_t*>(&b);
      }
      fragments[32 * k] = make_uint4(quad[0], quad[1], quad[2], quad[3]);
    }
    uint32_t operand[kGroups][4];  // every lane reads what it wrote itself: plans are walked, registers are not
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (k < groups) {
        const uint4 v = fragments[32 * k];
        operand[k][0] = v.x, operand[k][1] = v.y, operand[k][2] = v.z, operand[k][3] = v.w;
      }
    }
    float scale[2];
    int block[2];
    const float* mean[2];
    T* const out = static_cast<T*>(side.out) + int64_t(job.row + g) * side.row_stride + head * side.head_stride;
#pragma unroll
    for (int y = 0; y < 2; ++y) {
      const int r = g + 8 * y, position = job.position + r, offset = position & (period - 1);
      const uint32_t byte = static_cast<uint8_t>(bytes[side.num_bytes + r]);
      scale[y] = decode_scale(byte) * unit;
      mean[y] = byte & 128u ? global_means + (period + offset) * p.dim : means + offset * l.mean_stride;
      block[y] = position >> rope.block_shift;
    }
    __syncwarp();  // the buffer may be filled again

#pragma unroll 1
    for (int j = 0; j < spans; ++j) {
      const int index = 4 * j + t;
      const Chunk chunk = chunk_of(index, rope);
      float acc[4][4] = {};
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (k < groups) {
          const uint4* at = decode + (j * groups + k) * 64 + lane;
          const uint4 b = at[0], c = at[32];
          mma_fp16(acc[0], operand[k], b.x, b.y);
          mma_fp16(acc[1], operand[k], b.z, b.w);
          mma_fp16(acc[2], operand[k], c.x, c.y);
          mma_fp16(acc[3], operand[k], c.z, c.w);
        }
      }
      if (8 * index < p.dim) {
        float4 turn[2] = {};
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          if (g + 8 * y < job.rows) {
            const float4 ma = *reinterpret_cast<const float4*>(mean[y] + chunk.a);
            const float4 mb = *reinterpret_cast<const float4*>(mean[y] + chunk.b);
            const float m[8] = {ma.x, ma.y, ma.z, ma.w, mb.x, mb.y, mb.z, mb.w};
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] = acc[i >> 1][2 * y + (i & 1)] * scale[y] + m[i];
            if (chunk.turned) {
              if (y == 0 || block[0] != block[1]) load_turn(turn, turn_rows(block[y], t, rope), 8 * j);
              apply_turn(v, turn, rope.interleaved, 1.f);
            }
            T* const row = out + 8 * y * side.row_stride;
            *reinterpret_cast<uint2*>(row + chunk.a) = make_uint2(pack2(v[0], v[1], T()), pack2(v[2], v[3], T()));
            *reinterpret_cast<uint2*>(row + chunk.b) = make_uint2(pack2(v[4], v[5], T()), pack2(v[6], v[7], T()));
          }
        }
      }
      __syncwarp();  // lanes part over turned and missing rows; products need them together
    }
  }
}

}  // namespace kqsvd
