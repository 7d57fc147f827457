#pragma once
#include <tl_templates/cuda/common.h>
#include <tl_templates/cuda/intrin.h>
#include <tl_templates/cuda/instruction/wgmma.h>
// Products of one warpgroup on tiles in shared memory. A tile [ROWS, W] lies in panels of 64 columns (all of them where W
// is 32), rows of a panel one after the other, swizzled as the copy engine writes them. Addresses are in units of 16 bytes
// and pass through wg_uniform: the compiler then keeps descriptors in uniform registers, where adding to them is cheap.
static __device__ __forceinline__ int wg_uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
template <int W, int ROWS>
struct Tile {
  static constexpr int ROW = W < 64 ? W * 2 : 128;  // bytes of a row of a panel
  static constexpr int SIZE = ROWS * W * 2 >> 4;
  static constexpr int HALF = 64 * ROW >> 4;  // 64 rows on
  static __device__ __forceinline__ uint64_t descriptor(int low) {
    return (uint64_t)(ROW == 128 ? 0x40000040u : 0x80000020u) << 32 | (unsigned)low;  // swizzle; 8 rows on
  }
  static __device__ constexpr int along_row(int k) { return (k / (ROW / 32) * (ROWS * ROW) + k % (ROW / 32) * 32) >> 4; }
  static __device__ constexpr int along_column(int k) { return k * 16 * ROW >> 4; }
};
// d = A B^T: rows of A [ROWS, W] from a on, 64 of them, and B [N, W]; SIGN -1: the negative of it
template <int N, int W, int ROWS, int SIGN = 1>
static __device__ __forceinline__ void wg_product(float* d, int a, int b) {
  using namespace tl;
  warpgroup_fence_operand(d, N / 2);
  warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < W / 16; ++k)
    wgmma_ss<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, N, 16, false, false, SIGN, 1>(
        Tile<W, ROWS>::descriptor(a + Tile<W, ROWS>::along_row(k)), Tile<W, N>::descriptor(b + Tile<W, N>::along_row(k)),
        (uint32_t*)d, k > 0);
  warpgroup_commit_batch();
  warpgroup_fence_operand(d, N / 2);
}
// d = A B^T: A [64, W] in registers, and B [N, W]
template <int N, int W>
static __device__ __forceinline__ void wg_product_held(float* d, const unsigned* a, int b) {
  using namespace tl;
  warpgroup_fence_operand(d, N / 2);
  warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < W / 16; ++k)
    wgmma_rs<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, N, 16, false, false, 1, 1>(
        a + 4 * k, Tile<W, N>::descriptor(b + Tile<W, N>::along_row(k)), (uint32_t*)d, k > 0);
  warpgroup_commit_batch();
  warpgroup_fence_operand(d, N / 2);
}
// d = A B^T, or added to it, of e4m3 tiles [128, W], which lie as bfloat16 tiles of half as many columns do; W is 64 or 128.
// The caller fences d, and begins and commits the group
template <int W>
static __device__ __forceinline__ void wg_e4m3_products(float* d, int a, int b, bool add) {
  using namespace tl;
  using Narrow = Tile<W / 2, 128>;
#pragma unroll
  for (int k = 0; k < W / 32; ++k)
    wgmma_ss<DataType::kFloat8_e4m3, DataType::kFloat8_e4m3, DataType::kFloat32, 64, 128, 32, false, false, 1, 1>(
        Narrow::descriptor(a + Narrow::along_row(k)), Narrow::descriptor(b + Narrow::along_row(k)), (uint32_t*)d,
        add || k > 0);
}
// d += P B: P [64, N] in registers, B [N, V] from b on; of them SLICES slices of 16 columns and rows
template <int N, int V, int FIRST = 0, int SLICES = N / 16>
static __device__ __forceinline__ void wg_accumulate(float* d, unsigned* p, int b) {
  using namespace tl;
  warpgroup_fence_operand(p + 4 * FIRST, 4 * SLICES);
  warpgroup_fence_operand(d, V / 2);
  warpgroup_arrive();
#pragma unroll
  for (int k = FIRST; k < FIRST + SLICES; ++k)
    wgmma_rs<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, V, 16, false, true, 1, 1>(
        p + k * 4, Tile<V, N>::descriptor(b + Tile<V, N>::along_column(k) + (N * Tile<V, N>::ROW >> 4 << 16)),
        (uint32_t*)d, 1);
  warpgroup_commit_batch();
  warpgroup_fence_operand(d, V / 2);
  warpgroup_fence_operand(p + 4 * FIRST, 4 * SLICES);
}
