// SPDX-License-Identifier: Apache-2.0
// Dequantize: latent pages -> keys (after RoPE) and values of position ranges of many requests, row after row, for
// attention of a prefill chunk over cached context. Positions of the exact window are copied from its pages.
//
// One CTA owns one side of one head and walks over runs of kRun page tiles: codes become exact fp16 (code minus zero
// point), one tensor-core product with the decode matrix, then scale, mean and rotation in float32.
#pragma once

#include "plan_table.cuh"
#include "primitives.cuh"

namespace kqsvd {

constexpr int kRun = 4;                   // page tiles at a time
constexpr int kRunTokens = kRun * kTile;  // 64 rows
constexpr int kDequantizeThreads = 256;

struct DequantizeSide {
  const uint4* decode;        // [H][d / 16][groups][32 lanes]: fp16 B fragments of two n-tiles, over decode_unit
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
  int num_requests, num_tiles, dim, chunk_lanes_log2, block_size, tiles_per_block, tile_bytes, window_block_size;
};

struct TileJob {
  int64_t page;  // byte offset of the tile of this head, -1: nothing to decode
  int position, row, rows, exact, request;
};

struct DequantizeShared {
  TileJob job[kRun];
  float scale[kRunTokens];
  int sink[kRunTokens];
  int source_count[kMaxGroups];
  int2 source[kMaxGroups][8];  // (offset in the side's bytes, bits | half << 4 | position << 8 | shift << 16)
  alignas(16) int plan[kPlanInts];
};

inline size_t dequantize_shared_bytes(int dim, int groups, int num_bytes, bool decode_shared) {
  const size_t decode = decode_shared ? size_t(groups) * (dim / 16) * 512 : 0;
  return decode + size_t(kRunTokens) * (padded_row(groups * kGroup) + 4 * (dim + 4)) + kRun * size_t(num_bytes + 16) +
         sizeof(DequantizeShared);
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

// The four codes of (token r, group, t): channels 2t, 2t + 8, 2t + 1, 2t + 9 in bytes 0..3.
__device__ __forceinline__ uint32_t unpack_codes(const char* bytes, const int2* source, int count, bool is_value, int r,
                                                 int t) {
  uint32_t word = 0;
  for (int i = 0; i < count; ++i) {
    const int2 entry = source[i];
    const int bits = entry.y & 15, position = (entry.y >> 8) & 255, shift = entry.y >> 16;
    const bool half = entry.y & 16;
    const uint32_t mask = (1u << bits) - 1u;
    const char* a = bytes + entry.x + column_offset(is_value, half, r, 2 * t);
    const char* b = bytes + entry.x + column_offset(is_value, half, r, 2 * t + 1);
    uint32_t field;
    if (half) {
      const uint32_t x = (uint32_t(uint8_t(*a)) | uint32_t(uint8_t(*b)) << 16) >> (2 * position * bits);
      field = (x & mask * 0x00010001u) | ((x >> bits) & mask * 0x00010001u) << 8;
    } else {
      const uint32_t x = *reinterpret_cast<const uint16_t*>(a) | uint32_t(*reinterpret_cast<const uint16_t*>(b)) << 16;
      field = (x >> (position * bits)) & mask * 0x01010101u;
    }
    word |= field << shift;
  }
  return word;
}

// Grid (CTAs of keys + as many of values, heads); block kDequantizeThreads. GPW n16 column groups per warp.
template <typename T, int GPW, bool kDecodeShared>
__global__ void __launch_bounds__(kDequantizeThreads, 2) dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  extern __shared__ __align__(16) char memory[];
  const bool is_value = blockIdx.x & 1;
  const DequantizeSide& side = p.side[is_value];
  const int groups = side.groups, rank = groups * kGroup, columns = p.dim / 16, head = blockIdx.y;
  const int row_bytes = padded_row(rank), x_stride = p.dim + 4;
  char* matrix = memory;
  char* latents = memory + (kDecodeShared ? groups * columns * 512 : 0);
  float* x = reinterpret_cast<float*>(latents + kRunTokens * row_bytes);
  char* bytes = reinterpret_cast<char*>(x + kRunTokens * x_stride);
  const int tile_side = side.num_bytes + 16;  // planes, then the scale bytes
  DequantizeShared& s = *reinterpret_cast<DequantizeShared*>(bytes + kRun * tile_side);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  constexpr int kWarps = kDequantizeThreads / 32;

  const uint4* decode = side.decode + int64_t(head) * groups * columns * 32;
  if constexpr (kDecodeShared) {
    for (int i = tid; i < groups * columns * 32; i += kDequantizeThreads) copy_async_16(matrix + 16 * i, decode + i);
    decode = reinterpret_cast<const uint4*>(matrix);
  }
  for (int i = tid; i < side.plan_ints; i += kDequantizeThreads) s.plan[i] = side.plan[i];
  const PlanView plan{s.plan};
  const float unit = side.decode_unit[head];
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
    s.source_count[tid] = count;
  }

  const int runs = (p.num_tiles + kRun - 1) / kRun;
  for (int run = blockIdx.x >> 1; run < runs; run += gridDim.x >> 1) {
    if (tid < kRun) s.job[tid] = find_tile(p, run * kRun + tid, head);
    __syncthreads();
    bool any = false;
    for (int j = 0; j < kRun; ++j) {
      const int64_t page = s.job[j].page;
      if (page < 0) continue;
      any = true;
      const uint8_t* tile = p.pages + page;
      for (int i = tid; i < tile_side / 16; i += kDequantizeThreads) {
        const int at = 16 * i < side.num_bytes ? side.first_byte + 16 * i : plan.scale_offset();
        copy_async_16(bytes + j * tile_side + 16 * i, tile + at);
      }
    }
    copy_async_wait();
    __syncthreads();

    if (any) {
      for (int i = tid; i < kRunTokens * groups * 4; i += kDequantizeThreads) {
        const int t = i & 3, r = (i >> 2) % kRunTokens, group = (i >> 2) / kRunTokens;
        const uint32_t word = unpack_codes(bytes + (r / kTile) * tile_side, s.source[group], s.source_count[group],
                                           is_value, r % kTile, t);
        // fp16 0x6000 + 2c is 512 + c; the zero point, a half integer, is exact there too.
        const __half2 zero = __float2half2_rn(512.f + static_cast<float>(1 << (plan.width(group) - 1)) - 0.5f);
        const uint32_t even = (word & 0x00ff00ffu) << 1 | 0x60006000u, odd = (word >> 7 & 0x01fe01feu) | 0x60006000u;
        __half2* out = reinterpret_cast<__half2*>(latents + r * row_bytes + 2 * (group * kGroup + 2 * t));
        out[0] = __hsub2(*reinterpret_cast<const __half2*>(&even), zero);
        out[4] = __hsub2(*reinterpret_cast<const __half2*>(&odd), zero);
      }
      if (tid < kRunTokens) {
        const uint32_t byte = uint8_t(bytes[(tid / kTile) * tile_side + side.num_bytes + tid % kTile]);
        s.scale[tid] = decode_scale(byte) * unit;
        s.sink[tid] = byte >> 7;
      }
      __syncthreads();

      float acc[kRun][GPW][2][4] = {};
      for (int k = 0; k < groups; ++k) {
        uint32_t a[kRun][4];
#pragma unroll
        for (int m = 0; m < kRun; ++m) load_fragment_a(a[m], latents + m * 16 * row_bytes + 32 * k, row_bytes, lane);
#pragma unroll
        for (int i = 0; i < GPW; ++i) {
          const int column = warp + i * kWarps;
          if (column < columns) {
            const uint4 b = decode[(column * groups + k) * 32 + lane];
#pragma unroll
            for (int m = 0; m < kRun; ++m) {
              mma_fp16(acc[m][i][0], a[m], b.x, b.y);
              mma_fp16(acc[m][i][1], a[m], b.z, b.w);
            }
          }
        }
      }
      const int g = lane >> 2, t = lane & 3;
#pragma unroll
      for (int m = 0; m < kRun; ++m) {
#pragma unroll
        for (int y = 0; y < 2; ++y) {
          const int r = m * 16 + g + 8 * y;
          const float scale = s.scale[r];
#pragma unroll
          for (int i = 0; i < GPW; ++i) {
            const int column = warp + i * kWarps;
            if (column < columns) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                *reinterpret_cast<float2*>(x + r * x_stride + 16 * column + 8 * n + 2 * t) =
                    make_float2(acc[m][i][n][2 * y] * scale, acc[m][i][n][2 * y + 1] * scale);
              }
            }
          }
        }
      }
    }
    __syncthreads();

    const int index = lane & ((1 << p.chunk_lanes_log2) - 1), rows = 32 >> p.chunk_lanes_log2;
    RopeTurn rope = p.rope;
    if (!side.rotate) rope.rotary_dim = 0;
    const Chunk chunk = chunk_of(index, rope);
    for (int r = warp * rows + (lane >> p.chunk_lanes_log2); r < kRunTokens; r += kWarps * rows) {
      const TileJob& job = s.job[r / kTile];
      const int in_tile = r % kTile, position = job.position + in_tile;
      if (index >= p.dim / 8 || in_tile >= job.rows) continue;
      T* out = static_cast<T*>(side.out) + int64_t(job.row + in_tile) * side.row_stride + head * side.head_stride;
      uint2 a, b;
      if (job.exact) {
        const int block = p.window_block_table[job.request * p.window_table_stride + position / p.window_block_size];
        const T* from = static_cast<const T*>(p.window) + int64_t(block) * p.window_stride[0] +
                        head * p.window_stride[1] + (position % p.window_block_size) * p.window_stride[2] +
                        (is_value ? p.dim : 0);
        a = *reinterpret_cast<const uint2*>(from + chunk.a);
        b = *reinterpret_cast<const uint2*>(from + chunk.b);
      } else {
        const int offset = position & (side.period - 1);
        const float* mean = side.mean + ((int64_t(head) * 2 + s.sink[r]) * side.period + offset) * p.dim;
        const float4 ma = __ldg(reinterpret_cast<const float4*>(mean + chunk.a));
        const float4 mb = __ldg(reinterpret_cast<const float4*>(mean + chunk.b));
        const float4 xa = *reinterpret_cast<const float4*>(x + r * x_stride + chunk.a);
        const float4 xb = *reinterpret_cast<const float4*>(x + r * x_stride + chunk.b);
        float v[8] = {xa.x + ma.x, xa.y + ma.y, xa.z + ma.z, xa.w + ma.w,
                      xb.x + mb.x, xb.y + mb.y, xb.z + mb.z, xb.w + mb.w};
        if (chunk.turned) turn_chunk(v, index, position >> rope.block_shift, rope, 1.f);
        a = make_uint2(pack2(v[0], v[1], T()), pack2(v[2], v[3], T()));
        b = make_uint2(pack2(v[4], v[5], T()), pack2(v[6], v[7], T()));
      }
      *reinterpret_cast<uint2*>(out + chunk.a) = a;
      *reinterpret_cast<uint2*>(out + chunk.b) = b;
    }
    __syncthreads();
  }
}

}  // namespace kqsvd
