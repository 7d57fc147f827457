#pragma once
#include <tl_templates/cuda/common.h>
#include <tl_templates/cuda/intrin.h>
#include <tl_templates/cuda/instruction/wgmma.h>
#include "../device/accumulator.cuh"
#include "../device/cluster.cuh"
// What the warps of both forms of `sparse_gradients_mla` share: the problem, products of tiles, probabilities.
namespace sparse {
constexpr int D = 576, V = 512, KEYS = 64;
constexpr int BASE = 1024;  // where dynamic shared memory begins: descriptors are then constants (checked)
constexpr int WARPS = 8;  // that attend

struct Problem {
  const char *q, *k, *g;  // q [T, H, D], k [S, D], d_out [T, H, V] bfloat16
  const int *indices, *count;
  const float *lse, *delta;
  char* dq;
  float *dk, *p_sum;
  const float* grid;      // of the exact sums: a power of two for each key
  int *low, *high, *bad;  // [S, D], [S, D], [S]
  int T, H, S, width;
  float scale;
};

// descriptor of a tile at a constant place; bytes between panels (or 8 rows along the other axis) and between 8 rows
__device__ __forceinline__ constexpr uint64_t tile(int at, int row_bytes, int panels, int rows8) {
  return (uint64_t)((row_bytes == 128 ? 1u : 2u) << 30 | (unsigned)(rows8 >> 4)) << 32 | (unsigned)(panels >> 4) << 16 |
         (unsigned)((BASE + at) >> 4);
}
__device__ __forceinline__ constexpr uint64_t plus(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }
// d [64, N] += a b; A_T, B_T: whether the reduced dimension runs along the rows of shared memory
template <bool A_T, bool B_T, int R>
__device__ __forceinline__ void product(float (&d)[R], uint64_t a, uint64_t b, bool add) {
  using namespace tl;
  wgmma_ss<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, R * 2, 16, A_T, B_T, 1, 1>(
      a, b, (uint32_t*)d, add);
}
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void copy16(int to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// two rows of dq: neighbouring lanes trade so that each stores 8 bytes; nothing where a row is no head
template <int R>
__device__ __forceinline__ void store_rows(const float (&x)[R], char* first, char* second, bool is0, bool is1) {
  const bool odd = threadIdx.x & 1;
  const int column = 16 * (threadIdx.x & 1) + 4 * (threadIdx.x & 2);  // bytes
#pragma unroll
  for (int m = 0; m < R / 8; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float* v = x + 8 * m + 2 * e;
      const unsigned a = pack(v[0], v[1]), b = pack(v[4], v[5]);
      const unsigned s = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
      if (e ? is1 : is0)
        *(uint2*)((e ? second : first) + 32 * m + column) = odd ? make_uint2(s, b) : make_uint2(a, s);
    }
}
// P of a thread's logits of 32 slots from `first` on, of which `count` are keys
__device__ __forceinline__ void probabilities(
    float (&s)[16], const float (&lse2)[2], float scale, int first, int count) {
  const float scale2 = scale * LOG2E;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const bool is_key = first + 8 * (j / 4) + 2 * (threadIdx.x & 3) + j % 2 < count;
    s[j] = is_key ? exp2_approximate(s[j] * scale2 - lse2[j / 2 % 2]) : 0.f;
  }
}
// sums of P over the 16 heads of the warp, of 32 slots, to shared memory
__device__ __forceinline__ void store_head_sums(const float (&s)[16], int to) {
  const int lane = threadIdx.x & 31;
  const bool b4 = lane & 16, b3 = lane & 8, b2 = lane & 4;
  float sums[8], u[4], v[2];
#pragma unroll
  for (int g = 0; g < 4; ++g) sums[2 * g] = s[4 * g] + s[4 * g + 2], sums[2 * g + 1] = s[4 * g + 1] + s[4 * g + 3];
#pragma unroll
  for (int e = 0; e < 4; ++e)
    u[e] = (b4 ? sums[4 + e] : sums[e]) + __shfl_xor_sync(0xffffffffu, b4 ? sums[e] : sums[4 + e], 16);
#pragma unroll
  for (int e = 0; e < 2; ++e) v[e] = (b3 ? u[2 + e] : u[e]) + __shfl_xor_sync(0xffffffffu, b3 ? u[e] : u[2 + e], 8);
  const float f = (b2 ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, b2 ? v[0] : v[1], 4);
  const int key = 8 * ((lane >> 3) & 1) + 16 * (lane >> 4) + 2 * (lane & 3) + ((lane >> 2) & 1);
  store_shared(to + key * 4, f);
}
__device__ __forceinline__ int tiles_of(int count) { return max(1, (count + KEYS - 1) / KEYS); }
}  // namespace sparse
