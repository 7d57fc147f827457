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
constexpr int WARPS = 8;   // that attend

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
// the key in a slot of a token, negative where it holds none
__device__ __forceinline__ int key_in(const Problem& x, int t, int slot, int count) {
  const int key = slot < count ? __ldg(x.indices + (int64_t)t * x.width + slot) : -1;
  return (unsigned)key < (unsigned)x.S ? key : -1;
}
// Warps 0 to 3 or 4 to 7 of a CTA, of either form
struct Warps {
  const Problem& x;
  const int sm, bar, tid, warp, lane;

  __device__ __forceinline__ Warps(const Problem& x, int sm, int bar)
      : x(x), sm(sm), bar(bar), tid(threadIdx.x & 127),
        warp(__shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5) & 3, 0)), lane(threadIdx.x & 31) {}
  // the thread's first row of accumulators, within the 64 heads
  __device__ __forceinline__ int row() const { return warp * 16 + (lane >> 2); }
  __device__ __forceinline__ void meet_all() const { meet(3, 32 * WARPS); }
  // the copies of all these warps
  __device__ __forceinline__ void copies_here() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_shared();
    meet_all();
  }
  // of the thread's two heads, of 64 from `first` on; those that are padding get no probability
  __device__ __forceinline__ void numbers_of_rows(float (&lse2)[2], float (&delta)[2], int t, int first) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int head = first + row() + 8 * e;
      const bool is_head = head < x.H;
      lse2[e] = is_head ? __ldg(x.lse + (int64_t)t * x.H + head) * LOG2E : INFINITY;
      delta[e] = is_head ? __ldg(x.delta + (int64_t)t * x.H + head) : 0.f;
    }
  }
  // half of a tile's keys, of 64 heads, to a panel whose rows have ROW_BYTES, from its piece `first` of 8 keys on
  template <int ROW_BYTES>
  __device__ __forceinline__ void store_half(const float (&s)[16], int to, int first) const {
    to += (warp * 16 + (lane & 15)) * ROW_BYTES;
#pragma unroll
    for (int g = 0; g < 4; g += 2) {
      unsigned v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = pack(s[4 * g + 2 * i], s[4 * g + 2 * i + 1]);
      const int swizzle = ROW_BYTES == 128 ? lane & 7 : (lane >> 1) & 3;
      store_shared_matrices(to + (((first + g + (lane >> 4)) ^ swizzle) << 4), v);
    }
  }
  // p_sum of 32 slots from `first` on: sums over the heads of COUNT warps, in shared memory, are added in their order
  template <int COUNT>
  __device__ __forceinline__ void write_sums(int from, int t, int first) const {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < COUNT; ++w) sum += load_shared_float(from + w * 128 + lane * 4);
    if (first + lane < x.width) x.p_sum[(int64_t)t * x.width + first + lane] = sum;
  }
};
}  // namespace sparse
