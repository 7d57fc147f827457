#pragma once
#include <tl_templates/cuda/common.h>
#include <tl_templates/cuda/intrin.h>
#include <tl_templates/cuda/instruction/wgmma.h>
#include "../device/accumulator.cuh"
#include "../device/additions.cuh"
#include "../device/cluster.cuh"
// One CTA of a pair: see sparse_gradients_mla.py for the picture.
namespace sparse {
constexpr int D = 576, V = 512, ROWS = 128, KEYS = 64;  // ROWS: heads, with padding
// shared memory of a CTA, in bytes from BASE on; "128" and "64": bytes of a row of a panel, swizzled
constexpr int BASE = 1024;         // where dynamic shared memory begins: descriptors are then constants (checked)
constexpr int Q = 0;               // queries, 256 columns: 4 panels [128 heads][64], 128
constexpr int G = 65536;           // d_out, the same
constexpr int K = 131072;          // keys, 256 columns: 4 panels [64 keys][64], 128
constexpr int Q_ROPE = 163840;     // queries, 32 rope columns [128][32], 64
constexpr int K_ROPE = 172032;     // keys, 32 rope columns [64][32], 64
constexpr int P = 176128;          // of each warpgroup: own P and dS [64 heads][32 keys], the other CTA's, the rest of the inbox
constexpr int P_SIZE = 24576, P_THERE = 8192, INBOX = 16384;
constexpr int BARRIERS = 225280;
constexpr int BYTES = BARRIERS + 64;
enum { K_FULL, K_EMPTY, Q_FULL, Q_EMPTY, INBOX_FULL, P_FULL = INBOX_FULL + 2, FREE };

struct Problem {
  const char *q, *k, *g;  // q [T, H, D], k [S, D], d_out [T, H, V] bfloat16
  const int *indices, *count;
  const float *lse, *delta;
  char* dq;
  float *dk, *p_sum;
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
      const unsigned a = pack(x[8 * m + 2 * e], x[8 * m + 2 * e + 1]), b = pack(x[8 * m + 4 + 2 * e], x[8 * m + 5 + 2 * e]);
      const unsigned s = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
      if (e ? is1 : is0)
        *(uint2*)((e ? second : first) + 32 * m + column) = odd ? make_uint2(s, b) : make_uint2(a, s);
    }
}
__device__ __forceinline__ int tiles_of(int count) { return max(1, (count + KEYS - 1) / KEYS); }
}  // namespace sparse

namespace sparse {
// Warps 8 to 11: keys of each tile, queries and d_out of each token. Row r of a tile holds slot r ^ 32·rank, so that the
// first 32 rows are the slots that this CTA finishes.
__device__ __forceinline__ void feed(const Problem& x, int sm, int rank) {
  const int warp = (threadIdx.x >> 5) & 3, lane = threadIdx.x & 31, bar = sm + BARRIERS;
  int tiles = 0, tokens = 0;
  for (int t = blockIdx.x / 2; t < x.T; t += gridDim.x / 2, ++tokens) {
    const int count = __ldg(x.count + t), n = tiles_of(count);
    const int* indices = x.indices + (int64_t)t * x.width;
    for (int i = 0; i < n; ++i, ++tiles) {
      const int slot = i * KEYS + ((warp * 16 + (lane & 15)) ^ (32 * rank));
      int key = slot < count ? __ldg(indices + slot) : -1;
      if ((unsigned)key >= (unsigned)x.S) key = -1;
      barrier_wait(bar + 8 * K_EMPTY, (tiles & 1) ^ 1);
      const char* from = x.k + 512 * rank + lane * 16;
      const int to = sm + K + (lane / 8) * 8192 + warp * 2048;
#pragma unroll 4
      for (int j = 0; j < 16; ++j) {
        const int k = __shfl_sync(0xffffffffu, key, j);
        copy16(to + j * 128 + (((lane & 7) ^ (j & 7)) << 4), from + (int64_t)max(k, 0) * (D * 2), k < 0 ? 0 : 16);
      }
      from = x.k + 1024 + 64 * rank + (lane & 3) * 16;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = j * 8 + lane / 4, k = __shfl_sync(0xffffffffu, key, row), r = warp * 16 + row;
        copy16(sm + K_ROPE + r * 64 + (((lane & 3) ^ ((r >> 1) & 3)) << 4), from + (int64_t)max(k, 0) * (D * 2),
               k < 0 ? 0 : 16);
      }
      if (i == 0) {
        barrier_wait(bar + 8 * Q_EMPTY, (tokens & 1) ^ 1);
        const char* q = x.q + (int64_t)t * x.H * (D * 2) + 512 * rank + lane * 16;
        const char* g = x.g + (int64_t)t * x.H * (V * 2) + 512 * rank + lane * 16;
#pragma unroll 4
        for (int j = 0; j < 32; ++j) {
          const int r = warp * 32 + j, to = sm + (lane / 8) * 16384 + r * 128 + (((lane & 7) ^ (r & 7)) << 4);
          const int head = min(r, x.H - 1), bytes = r < x.H ? 16 : 0;
          copy16(to + Q, q + head * (D * 2), bytes);
          copy16(to + G, g + head * (V * 2), bytes);
        }
        q = x.q + (int64_t)t * x.H * (D * 2) + 1024 + 64 * rank + (lane & 3) * 16;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = warp * 32 + j * 8 + lane / 4, head = min(r, x.H - 1);
          copy16(sm + Q_ROPE + r * 64 + (((lane & 3) ^ ((r >> 1) & 3)) << 4), q + head * (D * 2), r < x.H ? 16 : 0);
        }
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
      fence_shared();
      barrier_arrive(bar + 8 * K_FULL);
      if (i == 0) barrier_arrive(bar + 8 * Q_FULL);
    }
  }
}

// Warps 0 to 3 (W = 0) and 4 to 7: heads 64 W to 64 W + 63, and of dk a half of this CTA's columns.
template <int W>
struct Consumer {
  static constexpr int OWN = P + W * P_SIZE;
  static constexpr uint64_t q = tile(Q + W * 8192, 128, 16, 1024), q_rope = tile(Q_ROPE + W * 4096, 64, 16, 512);
  static constexpr uint64_t g = tile(G + W * 8192, 128, 16, 1024);
  static constexpr uint64_t k = tile(K, 128, 16, 1024), k_rope = tile(K_ROPE, 64, 16, 512);  // k^T as B
  static constexpr uint64_t k_b = tile(K, 128, 8192, 1024), k_rope_b = k_rope;               // k as B
  static constexpr uint64_t ds = tile(OWN + 4096, 64, 16, 512);       // as A; the other CTA's keys at + P_THERE
  static constexpr uint64_t p_t = tile(P, 64, P_THERE, 512);          // P^T as A, of 16 heads; dS^T at + 4096
  static constexpr uint64_t q_b = tile(Q + W * 32768, 128, 16, 1024), g_b = tile(G + W * 32768, 128, 16, 1024);
  static constexpr uint64_t q_rope_b = tile(Q_ROPE + W * 32, 64, 16, 512);

  const Problem& x;
  const int sm, rank, bar, tid, warp, lane, row;  // row: of the thread's accumulators, within the 64 heads

  __device__ __forceinline__ Consumer(const Problem& x, int sm, int rank)
      : x(x), sm(sm), rank(rank), bar(sm + BARRIERS), tid(threadIdx.x & 127),
        warp(__shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5) & 3, 0)), lane(threadIdx.x & 31),
        row(warp * 16 + (lane >> 2)) {}

  // S and dP over this CTA's columns; the half of the other CTA's keys is sent there. `between` is done while they run
  template <typename F>
  __device__ __forceinline__ void scores(float (&s)[16], float (&dp)[16], int number, F between) {
    float a[32], b[32];
    barrier_wait(bar + 8 * K_FULL, number & 1);
    begin_products();
#pragma unroll
    for (int j = 0; j < 16; ++j)
      product<false, false>(a, plus(q, (j / 4) * 16384 + (j % 4) * 32), plus(k, (j / 4) * 8192 + (j % 4) * 32), j > 0);
#pragma unroll
    for (int j = 0; j < 2; ++j) product<false, false>(a, plus(q_rope, j * 32), plus(k_rope, j * 32), true);
    commit_products();
    between();
    begin_products();
#pragma unroll
    for (int j = 0; j < 16; ++j)
      product<false, false>(b, plus(g, (j / 4) * 16384 + (j % 4) * 32), plus(k, (j / 4) * 8192 + (j % 4) * 32), j > 0);
    commit_products();
    wait_products<1>();
    barrier_wait(bar + 8 * FREE, (number & 1) ^ 1);
    const int there = of_rank(sm + OWN, rank ^ 1) + tid * 16, full = of_rank(bar + 8 * (INBOX_FULL + W), rank ^ 1);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      send(there + INBOX + j * 2048, a[16 + 4 * j], a[17 + 4 * j], a[18 + 4 * j], a[19 + 4 * j], full);
    wait_products<0>();
#pragma unroll
    for (int j = 0; j < 4; ++j) send(there + j * 2048, b[16 + 4 * j], b[17 + 4 * j], b[18 + 4 * j], b[19 + 4 * j], full);
#pragma unroll
    for (int j = 0; j < 16; ++j) s[j] = a[j], dp[j] = b[j];
  }

  // P and dS of 64 heads and this CTA's 32 keys, to shared memory here and there; the sums of P over the thread's heads
  __device__ __forceinline__ void softmax(
      float (&s)[16], float (&dp)[16], float (&sums)[8], int t, int first, int count, int number) {
    const float scale2 = x.scale * LOG2E;
    float lse2[2], delta[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int head = W * 64 + row + 8 * e;
      const bool is_head = head < x.H;
      lse2[e] = is_head ? __ldg(x.lse + (int64_t)t * x.H + head) * LOG2E : INFINITY;
      delta[e] = is_head ? __ldg(x.delta + (int64_t)t * x.H + head) : 0.f;
    }
    barrier_wait(bar + 8 * (INBOX_FULL + W), number & 1);
    const int in = sm + OWN + tid * 16;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float4 y = load_shared_float4(in + INBOX + g * 2048), z = load_shared_float4(in + g * 2048);
      const float s_there[4] = {y.x, y.y, y.z, y.w}, dp_there[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool is_key = first + 8 * g + 2 * (lane & 3) + e % 2 < count;
        const float p = is_key ? exp2f((s[4 * g + e] + s_there[e]) * scale2 - lse2[e / 2]) : 0.f;
        s[4 * g + e] = p;
        dp[4 * g + e] = p * (dp[4 * g + e] + dp_there[e] - delta[e / 2]) * x.scale;
      }
      sums[2 * g] = s[4 * g] + s[4 * g + 2];
      sums[2 * g + 1] = s[4 * g + 1] + s[4 * g + 3];
    }
    meet(1 + W, 128);  // all have read the inbox, which P and dS lie in
    const int to = sm + OWN + (warp * 16 + (lane & 15)) * 64, swizzle = (lane >> 1) & 3;
#pragma unroll
    for (int g = 0; g < 4; g += 2) {
      const int at = to + (((g + (lane >> 4)) ^ swizzle) << 4);
      unsigned v[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = pack(s[4 * g + 2 * i], s[4 * g + 2 * i + 1]);
        v[4 + i] = pack(dp[4 * g + 2 * i], dp[4 * g + 2 * i + 1]);
      }
      store_shared_matrices(at, v);
      store_shared_matrices(at + 4096, v + 4);
    }
    fence_shared();
    meet(1 + W, 128);
    if (tid == 0)
      send_bulk(of_rank(sm + OWN + P_THERE, rank ^ 1), sm + OWN, 8192, of_rank(bar + 8 * P_FULL, rank ^ 1));
  }

  // dq += dS k over half of the tile's keys: this CTA's or the other's
  __device__ __forceinline__ void query_gradients(float (&dq)[128], float (&dq_rope)[16], bool there) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      product<false, true>(dq, plus(ds, there * P_THERE + j * 32), plus(k_b, there * 4096 + j * 2048), true);
      product<false, true>(dq_rope, plus(ds, there * P_THERE + j * 32), plus(k_rope_b, there * 2048 + j * 1024), true);
    }
  }
  // dk [64 keys, 64 columns] over all heads, value columns 128 W + 64 part on; dv of the same columns in the same sum
  __device__ __forceinline__ void key_gradients(float (&d)[32], int part) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const uint64_t p = plus(p_t, (j / 4) * P_SIZE + (j % 4) * 1024);
      product<true, true>(d, plus(p, 4096), plus(q_b, part * 16384 + j * 2048), j > 0);
      product<true, true>(d, p, plus(g_b, part * 16384 + j * 2048), true);
    }
  }
  __device__ __forceinline__ void key_gradients_rope(float (&d)[8]) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      product<true, true>(d, plus(p_t, (j / 4) * P_SIZE + (j % 4) * 1024 + 4096), plus(q_rope_b, j * 1024), j > 0);
  }
  // the sums of P over 64 heads: seven exchanges, then an addition a lane
  __device__ __forceinline__ void add_head_sums(const float (&sums)[8], int t, int first) {
    const bool b4 = lane & 16, b3 = lane & 8, b2 = lane & 4;
    float u[4], v[2];
#pragma unroll
    for (int e = 0; e < 4; ++e)
      u[e] = (b4 ? sums[4 + e] : sums[e]) + __shfl_xor_sync(0xffffffffu, b4 ? sums[e] : sums[4 + e], 16);
#pragma unroll
    for (int e = 0; e < 2; ++e) v[e] = (b3 ? u[2 + e] : u[e]) + __shfl_xor_sync(0xffffffffu, b3 ? u[e] : u[2 + e], 8);
    const float f = (b2 ? v[1] : v[0]) + __shfl_xor_sync(0xffffffffu, b2 ? v[0] : v[1], 4);
    const int slot = first + 8 * ((lane >> 3) & 1) + 16 * (lane >> 4) + 2 * (lane & 3) + ((lane >> 2) & 1);
    if (slot < x.width) add_to(x.p_sum + (int64_t)t * x.width + slot, f);
  }
  // dk of 64 columns from `column` of the sums on. at[2e + o]: offset of the traded row 8e + o, or negative: no key
  __device__ __forceinline__ void add_keys(float (&d)[32], const int (&at)[4], int column) {
    trade_rows<64>(d);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at[i] >= 0) add_to(x.dk + at[i] + column + 32 * m, d + 16 * m + 4 * i);
  }
  __device__ __forceinline__ void add_keys_rope(float (&d)[8], const int (&at)[4], int column) {
    const bool odd = lane & 1;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float v[4] = {d[2 * e], d[2 * e + 1], d[4 + 2 * e], d[5 + 2 * e]};
      swap_pairs(v[0], v[2], odd, 1);
      swap_pairs(v[1], v[3], odd, 1);
      const int row = lane & 4 ? at[2 * e + 1] : at[2 * e];
      if (row >= 0) add_to(x.dk + row + column - 4 * (lane & 4), v);
    }
  }

  // One tile, whose S and dP over this CTA's columns are under way to the other; those of the next, where there is MORE
  template <bool MORE>
  __device__ __forceinline__ void step(
      float (&dq)[128], float (&dq_rope)[16], float (&s)[16], float (&dp)[16], int t, int i, int count, int number) {
    if (tid == 0) {
      barrier_expect(bar + 8 * (INBOX_FULL + W), 16384);
      if (W == 0) barrier_expect(bar + 8 * P_FULL, 16384);
    }
    float sums[8];
    const int first = i * KEYS + 32 * rank;
    softmax(s, dp, sums, t, first, count, number);
    begin_products();
    query_gradients(dq, dq_rope, false);
    commit_products();
    add_head_sums(sums, t, first);
    meet(3, 256);
    int at[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int slot = i * KEYS + ((warp * 16 + ((lane / 4) & ~1) + (e & 1) + 8 * (e / 2)) ^ (32 * rank));
      const int key = slot < count ? __ldg(x.indices + (int64_t)t * x.width + slot) : -1;
      at[e] = (unsigned)key < (unsigned)x.S ? key * D + traded_column() : -1;
    }
    barrier_wait(bar + 8 * P_FULL, number & 1);
    float a[32], b[32], r[8];
    begin_products();
    query_gradients(dq, dq_rope, true);
    key_gradients_rope(r);
    commit_products();
    key_gradients(a, 0);
    commit_products();
    wait_products<1>();
    if (lane == 0) barrier_arrive(bar + 8 * K_EMPTY);
    add_keys_rope(r, at, V + 32 * rank + 16 * W);
    begin_products();
    key_gradients(b, 1);
    commit_products();
    wait_products<1>();
    add_keys(a, at, 256 * rank + 128 * W);
    auto rest = [&] {
      wait_products<MORE ? 1 : 0>();
      if (lane == 0) {
        barrier_arrive_there(of_rank(bar + 8 * FREE, rank ^ 1));
        if (!MORE) barrier_arrive(bar + 8 * Q_EMPTY);
      }
      add_keys(b, at, 256 * rank + 128 * W + 64);
    };
    if constexpr (MORE)
      scores(s, dp, number + 1, rest);
    else
      rest();
  }

  __device__ __forceinline__ void run() {
    int number = 0, tokens = 0;
    float dq[128], dq_rope[16];
    for (int t = blockIdx.x / 2; t < x.T; t += gridDim.x / 2, ++tokens) {
      const int count = __ldg(x.count + t), n = tiles_of(count);
#pragma unroll
      for (int i = 0; i < 128; ++i) dq[i] = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) dq_rope[i] = 0;
      barrier_wait(bar + 8 * Q_FULL, tokens & 1);
      float s[16], dp[16];
      scores(s, dp, number, [] {});
      for (int i = 0; i < n - 1; ++i) step<true>(dq, dq_rope, s, dp, t, i, count, number++);
      step<false>(dq, dq_rope, s, dp, t, n - 1, count, number++);
      const int head = W * 64 + row;
      char* to = x.dq + ((int64_t)t * x.H + head) * (D * 2);
      store_rows(dq, to + 512 * rank, to + 16 * D + 512 * rank, head < x.H, head + 8 < x.H);
      store_rows(dq_rope, to + 1024 + 64 * rank, to + 16 * D + 1024 + 64 * rank, head < x.H, head + 8 < x.H);
    }
  }
};
}  // namespace sparse

// The whole kernel, for 384 threads of two CTAs; `sm` the address of BYTES of shared memory.
static __device__ __forceinline__ void sparse_gradients(
    int sm, const void* q, const void* k, const void* g, const int* indices, const int* count, const float* lse,
    const float* delta, void* dq, float* dk, float* p_sum, int T, int H, int S, int width, float scale) {
  using namespace sparse;
  const Problem x{(const char*)q, (const char*)k, (const char*)g, indices, count, lse, delta, (char*)dq, dk, p_sum,
                  T, H, S, width, scale};
  const int rank = cluster_rank(), warpgroup = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0), bar = sm + BARRIERS;
  if (threadIdx.x == 0) {
    if ((sm & 0xffffff) != BASE) __trap();
    barrier_init(bar + 8 * K_FULL, 128);
    barrier_init(bar + 8 * K_EMPTY, 8);
    barrier_init(bar + 8 * Q_FULL, 128);
    barrier_init(bar + 8 * Q_EMPTY, 8);
    barrier_init(bar + 8 * INBOX_FULL, 1);
    barrier_init(bar + 8 * (INBOX_FULL + 1), 1);
    barrier_init(bar + 8 * P_FULL, 1);
    barrier_init(bar + 8 * FREE, 8);
    barriers_ready();
  }
  cluster_sync();
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    feed(x, sm, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    if (warpgroup == 0)
      Consumer<0>(x, sm, rank).run();
    else
      Consumer<1>(x, sm, rank).run();
  }
  cluster_sync();
}
