#pragma once
#include "../device/memory.cuh"
// Tiles of 64 selected keys, gathered into panels of 64 columns (128 bytes a row, swizzled as wgmma reads them) by four
// warps. Lane l of warp w copies 16 bytes of the rows 16w + 4j + l / 8, j = 0 .. 3, in each panel.
static constexpr int GATHERED_ROW = 576 * 2;  // bytes
// the key of the lane's slot (16w + l % 16 of a tile); -1 where there is none
static __device__ __forceinline__ void gather_key(int* key, const int* IDX, int token, int width, int first, int count) {
  const int slot = first + ((threadIdx.x >> 5) & 3) * 16 + (threadIdx.x & 15);
  key[0] = slot < count ? load_int(IDX, (long long)token * width + slot) : -1;
}
// addresses of the lane's four pieces of the first panel, and their bytes: 0 for a slot without a key of 0 .. S - 1
static __device__ __forceinline__ void gather_rows(int64_t* w, int* size, int key, const void* K, int S) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int k = __shfl_sync(0xffffffffu, key, 4 * j + (lane >> 3));
    const bool is_key = (unsigned)k < (unsigned)S;
    size[j] = is_key ? 16 : 0;
    w[j] = (int64_t)K + (int64_t)(is_key ? k : 0) * GATHERED_ROW + (lane & 7) * 16;
  }
}
// panel C of the tile, to `to`
template <int C>
static __device__ __forceinline__ void gather_panel(int to, const int64_t* w, const int* size) {
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + (lane >> 3);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     to + (row + 4 * j) * 128 + (((lane & 7) ^ ((row + 4 * j) & 7)) << 4)),
                 "l"(w[j] + C * 128), "r"(size[j])
                 : "memory");
}
