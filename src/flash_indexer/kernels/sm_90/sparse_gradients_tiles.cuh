#pragma once
#include <tl_templates/cuda/common.h>
#include <tl_templates/cuda/intrin.h>
#include <tl_templates/cuda/instruction/wgmma.h>
#include "../device/accumulator.cuh"
#include "../device/cluster.cuh"
// What the warps of `sparse_gradients_mla` share: shared memory of a CTA, the problem, products of tiles.
namespace sparse {
constexpr int D = 576, V = 512, KEYS = 64;
// shared memory of a CTA, in bytes from BASE on; "128" and "64": bytes of a row of a panel, swizzled
constexpr int BASE = 1024;         // where dynamic shared memory begins: descriptors are then constants (checked)
constexpr int Q = 0;            // queries, 256 columns: 4 panels [128 heads][64], 128
constexpr int G = 65536;        // d_out, the same
constexpr int K = 131072;       // keys, 256 columns: 4 panels [64 keys][64], 128
constexpr int Q_ROPE = 163840;  // queries, 32 rope columns [128][32], 64
constexpr int K_ROPE = 172032;  // keys, 32 rope columns [64][32], 64
constexpr int P = 176128;       // of each warpgroup: own P and dS [64 heads][32 keys], then the other CTA's, 64
constexpr int P_SIZE = 16384, P_THERE = 8192;
constexpr int INBOX = 208896;  // of each warpgroup: S, then dP that the other CTA sends, 16 numbers a thread
constexpr int INBOX_SIZE = 8192;
constexpr int SUMS = 225280;  // of even and odd tiles: sums of P over the heads of each warp [8][32 keys] float32
constexpr int BARRIERS = 227328;
constexpr int BYTES = BARRIERS + 128;
constexpr int WARPS = 8;  // that attend
// barriers; those of both warpgroups that attend come in pairs
enum {
  S_FULL = 0,   // S of the other CTA is in the inbox
  DP_FULL = 2,  // dP is
  S_READ = 4,   // the other CTA has read S: its inbox may hold dP
  P_OWN = 6,    // P and dS of this CTA's keys are written
  P_FULL = 7,   // of the other's keys
  P_FREE = 8,   // both CTAs have made dk of them: they may be overwritten
};

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
__device__ __forceinline__ int tiles_of(int count) { return max(1, (count + KEYS - 1) / KEYS); }
}  // namespace sparse
