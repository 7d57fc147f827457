#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
// A row of D numbers lies in LANES lanes, 8 * VECTORS of them each: vector v of lane l begins at column 8 * (v * LANES + l).
// So vector v of all lanes is block v of the rotation: 8 * LANES is the largest power of two in D, at most 256
template <int D>
struct RowLanes {
  static constexpr int ALL = D / 8;
  static constexpr int LANES = ALL % 32 == 0 ? 32 : ALL % 16 == 0 ? 16 : ALL % 8 == 0 ? 8 : 4;
  static constexpr int VECTORS = ALL / LANES;
  static constexpr int ROWS = 256 / LANES;  // of a block of 256 threads
  static __device__ __forceinline__ int row() { return blockIdx.x * ROWS + threadIdx.x / LANES; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % LANES; }
  static __device__ __forceinline__ long long at(int row, int v) {
    return (long long)row * D + 8 * (v * LANES + lane());
  }
};
// x = H x / sqrt(columns) of a block of columns, sums of pairs at distance 1, 2, 4, ...: one vector a lane
template <int D>
static __device__ __forceinline__ void rotate_row(float* x) {
  constexpr int COLUMNS = 8 * RowLanes<D>::LANES;
  static_assert(COLUMNS == (D & -D) || (COLUMNS == 256 && D % 256 == 0), "lanes hold a block of the rotation");
#pragma unroll
  for (int step = 1; step < 8; step *= 2)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (!(j & step)) {
        const float left = x[j], right = x[j + step];
        x[j] = left + right;
        x[j + step] = left - right;
      }
#pragma unroll
  for (int step = 1; step < RowLanes<D>::LANES; step *= 2) {
    const bool upper = RowLanes<D>::lane() & step;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float other = __shfl_xor_sync(0xffffffffu, x[j], step);
      x[j] = upper ? other - x[j] : x[j] + other;
    }
  }
  constexpr float root = COLUMNS == 32    ? 0.17677669529663687f
                         : COLUMNS == 64  ? 0.125f
                         : COLUMNS == 128 ? 0.08838834764831845f
                                          : 0.0625f;
#pragma unroll
  for (int j = 0; j < 8; ++j) x[j] *= root;
}
static __device__ __forceinline__ void load_bfloat16(const void* p, float* x) {
  const uint4 raw = *(const uint4*)p;
  const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) x[2 * j] = low_half(words[j]), x[2 * j + 1] = high_half(words[j]);
}
// 2^ceil(log2(largest / 448)), at least 2^-100: 448 has the mantissa 1.75 and the exponent 8
static __device__ __forceinline__ float power_of_two(float largest) {
  const int bits = __float_as_int(largest), exponent = (bits >> 23) - 8 + ((bits & 0x7fffff) > 0x600000);
  return (bits >> 23) == 255 ? __int_as_float(0x7fc00000) : __int_as_float(max(exponent, 27) << 23);
}
static __device__ __forceinline__ unsigned short to_e4m3(float low, float high) {
  unsigned short v;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(v) : "f"(high), "f"(low));
  return v;
}
// V = row of X in e4m3, whose scale is returned; rows from `rows` on are not written
template <int D, int ROTATION>
static __device__ __forceinline__ float quantize_row(const void* X, void* V, int row, int rows) {
  using Lanes = RowLanes<D>;
  const bool inside = row < rows;
  float x[Lanes::VECTORS][8], largest = 0.0f;
#pragma unroll
  for (int v = 0; v < Lanes::VECTORS; ++v) {
    load_bfloat16((const unsigned short*)X + Lanes::at(inside ? row : rows - 1, v), x[v]);
    if constexpr (ROTATION) rotate_row<D>(x[v]);
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = max_or_nan(largest, fabsf(x[v][j]));
  }
#pragma unroll
  for (int step = 1; step < Lanes::LANES; step *= 2)
    largest = max_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  const float scale = power_of_two(largest);
  const float inverse = isnan(scale) ? scale : __int_as_float((254 << 23) - __float_as_int(scale));
#pragma unroll
  for (int v = 0; v < Lanes::VECTORS; ++v) {
    unsigned short e[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) e[j] = to_e4m3(x[v][2 * j] * inverse, x[v][2 * j + 1] * inverse);
    const long long at = Lanes::at(row, v);
    if (inside) *(uint2*)((unsigned char*)V + at) = make_uint2(e[0] | e[1] << 16, e[2] | e[3] << 16);
  }
  return scale;
}
// V, SC = rows of X (with ROTATION of its rotation) in e4m3 and their scales. Row r is token r / heads of head r % heads,
// and its scale goes to SC[head * stride + token]; heads = 1 keeps the rows' order
template <int D, int ROTATION>
static __device__ __forceinline__ void quantize(const void* X, void* V, float* SC, int rows, int heads, int stride) {
  const int row = RowLanes<D>::row();
  const float scale = quantize_row<D, ROTATION>(X, V, row, rows);
  if (RowLanes<D>::lane() == 0 && row < rows) SC[(long long)(row % heads) * stride + row / heads] = scale;
}
// The indexer's rows: blocks of queries, WS = half of their weights times their scales; then blocks of keys, with their
// scales, 0 past the last key of a tile
template <int D, int ROTATION>
static __device__ __forceinline__ void quantize_index(
    const void* Q, void* QV, const float* W, float* WS, const void* K, void* KV, float* KS, int rows, int keys) {
  using Lanes = RowLanes<D>;
  const int blocks = (rows + Lanes::ROWS - 1) / Lanes::ROWS;
  if ((int)blockIdx.x < blocks) {
    const int row = Lanes::row();
    const float scale = quantize_row<D, ROTATION>(Q, QV, row, rows);
    if (Lanes::lane() == 0 && row < rows) WS[row] = W[row] * scale * 0.5f;
  } else {
    const int key = Lanes::row() - blocks * Lanes::ROWS;
    const float scale = quantize_row<D, ROTATION>(K, KV, key, keys);
    if (Lanes::lane() == 0 && key < (keys + 127) / 128 * 128) KS[key] = key < keys ? scale : 0.0f;
  }
}
static constexpr int SMALLEST_SCALE = 27 << 23;  // 2^-100, by its bits
static __device__ __forceinline__ uint2 eight_to_e4m3(const float* x, float inverse) {
  unsigned short e[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) e[j] = to_e4m3(x[2 * j] * inverse, x[2 * j + 1] * inverse);
  return make_uint2(e[0] | e[1] << 16, e[2] | e[3] << 16);
}
// four numbers of a word times 2^-shift, 0 <= shift <= 4, rounded to nearest
static __device__ __forceinline__ unsigned shift_e4m3(unsigned v, int shift) {
  const unsigned half = (15 - shift) << 10, factor = half | half << 16;  // 2^-shift, twice, in float16
  unsigned low, high;
  unsigned short e0, e1;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(low) : "h"((unsigned short)v));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(high) : "h"((unsigned short)(v >> 16)));
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(low) : "r"(factor));
  asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(high) : "r"(factor));
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(e0) : "r"(low));
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(e1) : "r"(high));
  return e0 | e1 << 16;
}
// 128 keys of a head by a block: V, SC = those of X [S * G, D], bfloat16 (with ROTATION of its rotation), or with NARROW
// e4m3 with the scales SX, taken as it is. Where the scales of all rows with a number in them lie within 2^SHARED and
// differ by powers of two, all rows are brought to the largest, which is written with a minus sign for all 128. Block b:
// tile b / G of head b % G; its scales begin at SC[head * stride + 128 * tile]
static constexpr int SHARED = 4;
template <int D, int NARROW, int ROTATION>
static __device__ __forceinline__ void quantize_keys(
    const void* X, const float* SX, void* V, float* SC, int S, int G, int stride) {
  using Lanes = RowLanes<D>;
  constexpr int PASSES = 128 / Lanes::ROWS;
  __shared__ int largest_scales[8];
  uint2 e[PASSES][Lanes::VECTORS];
  int bits[PASSES];  // of the row's scale; 0 where the row needs none: zeros and NaN
  float scales[PASSES];
  const int head = blockIdx.x % G, tile = blockIdx.x / G, first = tile * 128 + threadIdx.x / Lanes::LANES;
  int common = SMALLEST_SCALE;
#pragma unroll
  for (int n = 0; n < PASSES; ++n) {
    const int key = first + n * Lanes::ROWS;
    const long long row = (long long)min(key, S - 1) * G + head;
    const long long at = row * D + 8 * Lanes::lane();
    if constexpr (NARROW) {
      // a scale's sign goes to the numbers, for here it says something else, and so does a zero
      const float scale = SX[row];
      const unsigned flip = scale < 0.0f ? 0x80808080u : 0u, keep = scale == 0.0f ? 0u : ~0u;
      scales[n] = fabsf(scale);
#pragma unroll
      for (int v = 0; v < Lanes::VECTORS; ++v) {
        const uint2 raw = *(const uint2*)((const unsigned char*)X + at + 8 * v * Lanes::LANES);
        e[n][v] = make_uint2((raw.x ^ flip) & keep, (raw.y ^ flip) & keep);
      }
    } else {
      float x[Lanes::VECTORS][8], largest = 0.0f;
#pragma unroll
      for (int v = 0; v < Lanes::VECTORS; ++v) {
        load_bfloat16((const unsigned short*)X + at + 8 * v * Lanes::LANES, x[v]);
        if constexpr (ROTATION) rotate_row<D>(x[v]);
#pragma unroll
        for (int j = 0; j < 8; ++j) largest = max_or_nan(largest, fabsf(x[v][j]));
      }
#pragma unroll
      for (int step = 1; step < Lanes::LANES; step *= 2)
        largest = max_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      scales[n] = power_of_two(largest);
      const float inverse =
          isnan(scales[n]) ? scales[n] : __int_as_float((254 << 23) - __float_as_int(scales[n]));
#pragma unroll
      for (int v = 0; v < Lanes::VECTORS; ++v) e[n][v] = eight_to_e4m3(x[v], inverse);
    }
    unsigned any = 0;
#pragma unroll
    for (int v = 0; v < Lanes::VECTORS; ++v) any |= (e[n][v].x | e[n][v].y) & 0x7f7f7f7fu;
#pragma unroll
    for (int step = 1; step < Lanes::LANES; step *= 2) any |= __shfl_xor_sync(0xffffffffu, any, step);
    const bool needs = key < S && any && !isnan(scales[n]);
    bits[n] = needs ? __float_as_int(scales[n]) : 0;
    common = max(common, bits[n]);
  }
  common = __reduce_max_sync(0xffffffffu, common);
  if (threadIdx.x % 32 == 0) largest_scales[threadIdx.x / 32] = common;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < 8; ++n) common = max(common, largest_scales[n]);
  bool alike = true;
#pragma unroll
  for (int n = 0; n < PASSES; ++n) {
    const int below = common - bits[n];
    alike = alike && (bits[n] == 0 || (bits[n] >= SMALLEST_SCALE && (below & 0x7fffff) == 0 && below >> 23 <= SHARED));
  }
  const bool shared = __syncthreads_and(alike);
#pragma unroll
  for (int n = 0; n < PASSES; ++n) {
    const int key = first + n * Lanes::ROWS, shift = shared && bits[n] ? (common - bits[n]) >> 23 : 0;
    const bool inside = key < S, nan = isnan(scales[n]);
    if (Lanes::lane() == 0)
      SC[(long long)head * stride + key] = shared ? -__int_as_float(common) : inside && !nan ? scales[n] : 0.0f;
    const long long at = ((long long)key * G + head) * D + 8 * Lanes::lane();
#pragma unroll
    for (int v = 0; v < Lanes::VECTORS; ++v) {
      uint2 out = make_uint2(shift_e4m3(e[n][v].x, shift), shift_e4m3(e[n][v].y, shift));
      if (nan) out = make_uint2(0x7f7f7f7fu, 0x7f7f7f7fu);
      if (inside) *(uint2*)((unsigned char*)V + at + 8 * v * Lanes::LANES) = out;
    }
  }
}
