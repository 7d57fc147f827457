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
constexpr int P = 176128;          // of each warpgroup: own P and dS [64 heads][32 keys], then the other CTA's, 64
constexpr int P_SIZE = 16384, P_THERE = 8192;
constexpr int INBOX = 208896;      // of each warpgroup: S, then dP that the other CTA sends, 16 numbers a thread
constexpr int INBOX_SIZE = 8192;
constexpr int SUMS = 225280;       // of even and odd tiles: sums of P over the heads of each warp [8][32 keys] float32
constexpr int BARRIERS = 227328;
constexpr int BYTES = BARRIERS + 128;
enum { S_FULL, DP_FULL = S_FULL + 2, S_READ = DP_FULL + 2, P_OWN = S_READ + 2, P_FULL, P_FREE, COUNT };
constexpr int WARPS = 8;  // that attend

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
// the tile that a token takes as its i-th: CTAs that work side by side begin at different keys
__device__ __forceinline__ int tile_at(int i, int t, int n) {
#ifdef ROTATE
  const int j = i + (int)((unsigned)t * 2654435761u >> 16) % n;
  return j < n ? j : j - n;
#else
  return i;
#endif
}
// offsets in dk of the four traded rows of the warp, or negative where a slot holds no key: at[2e + o] of row 8e + o
__device__ __forceinline__ void row_offsets(int (&at)[4], const Problem& x, int t, int tile, int count, int rank) {
  const int lane = threadIdx.x & 31, row = ((threadIdx.x >> 5) & 3) * 16 + ((lane / 4) & ~1);
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int slot = tile * KEYS + ((row + (e & 1) + 8 * (e / 2)) ^ (32 * rank));
    const int key = slot < count ? __ldg(x.indices + (int64_t)t * x.width + slot) : -1;
    at[e] = (unsigned)key < (unsigned)x.S ? key * D + traded_column() : -1;
  }
}
// P^T as A of products, of 16 heads; dS^T at + 4096
constexpr uint64_t p_t = tile(P, 64, P_THERE, 512);
__device__ __forceinline__ constexpr uint64_t heads_16(int j) {
  return plus(p_t, (j / 4) * P_SIZE + (j % 4) * 1024);
}
// dk [64 keys, 64 columns] over all heads, of columns 64·part on; dv of the same columns in the same sum
__device__ __forceinline__ void key_gradients(float (&d)[32], uint64_t q, uint64_t g) {
  begin_products();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    product<true, true>(d, plus(heads_16(j), 4096), plus(q, j * 2048), j > 0);
    product<true, true>(d, heads_16(j), plus(g, j * 2048), true);
  }
  commit_products();
}
// the same of the 32 rope columns
__device__ __forceinline__ void key_gradients(float (&d)[16], uint64_t q) {
  begin_products();
#pragma unroll
  for (int j = 0; j < 8; ++j) product<true, true>(d, plus(heads_16(j), 4096), plus(q, j * 1024), j > 0);
  commit_products();
}
template <int R>
__device__ __forceinline__ void add_keys(const Problem& x, float (&d)[R], const int (&at)[4], int column) {
  trade_rows<2 * R>(d);
#pragma unroll
  for (int m = 0; m < R / 16; ++m)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at[i] >= 0) add_to(x.dk + at[i] + column + 32 * m, d + 16 * m + 4 * i);
}
// this warpgroup no longer reads P and dS of the tile, of either CTA's keys
__device__ __forceinline__ void release_p(int bar, int rank) {
  if ((threadIdx.x & 31) == 0) {
    barrier_arrive(bar + 8 * P_FREE);
    barrier_arrive_there(of_rank(bar + 8 * P_FREE, rank ^ 1));
  }
}

// Warps 8 to 11: dk of the first PARTS x 64 of this CTA's value columns.
constexpr int PARTS = 3;
__device__ __forceinline__ void add_gradients(const Problem& x, int sm, int rank) {
  const int bar = sm + BARRIERS;
  int number = 0;
  for (int t = blockIdx.x / 2; t < x.T; t += gridDim.x / 2) {
    const int count = __ldg(x.count + t), n = tiles_of(count);
    for (int i = 0; i < n; ++i, ++number) {
      int at[4];
      row_offsets(at, x, t, tile_at(i, t, n), count, rank);
      barrier_wait(bar + 8 * P_OWN, number & 1);
      barrier_wait(bar + 8 * P_FULL, number & 1);
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        float d[32];
        key_gradients(d, tile(Q + part * 16384, 128, 16, 1024), tile(G + part * 16384, 128, 16, 1024));
        wait_products<0>();
        if (part == PARTS - 1) release_p(bar, rank);
        add_keys(x, d, at, 256 * rank + 64 * part);
      }
    }
  }
}

// Warps 0 to 3 (W = 0) and 4 to 7: heads 64 W to 64 W + 63.
template <int W>
struct Attending {
  static constexpr int OWN = P + W * P_SIZE;
  static constexpr uint64_t q = tile(Q + W * 8192, 128, 16, 1024), q_rope = tile(Q_ROPE + W * 4096, 64, 16, 512);
  static constexpr uint64_t g = tile(G + W * 8192, 128, 16, 1024);
  static constexpr uint64_t k = tile(K, 128, 16, 1024), k_rope = tile(K_ROPE, 64, 16, 512);  // k^T as B
  static constexpr uint64_t k_b = tile(K, 128, 8192, 1024), k_rope_b = k_rope;               // k as B
  static constexpr uint64_t ds = tile(OWN + 4096, 64, 16, 512);  // as A; of the other CTA's keys at + P_THERE

  const Problem& x;
  const int sm, rank, bar, tid, warp, lane;

  __device__ __forceinline__ Attending(const Problem& x, int sm, int rank)
      : x(x), sm(sm), rank(rank), bar(sm + BARRIERS), tid(threadIdx.x & 127),
        warp(__shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5) & 3, 0)), lane(threadIdx.x & 31) {}

  // the thread's first row of accumulators, within the 64 heads
  __device__ __forceinline__ int row() const { return warp * 16 + (lane >> 2); }
  __device__ __forceinline__ void meet_all() const { meet(3, 32 * WARPS); }

  // the key of the lane's row of the next gather, 8 rows a warp. Row r of a tile holds slot r ^ 32·rank, so that the
  // first 32 rows are the slots that this CTA finishes
  __device__ __forceinline__ int next_key(int t, int tile, int count) const {
    const int slot = tile * KEYS + (((W * 4 + warp) * 8 + (lane & 7)) ^ (32 * rank));
    const int key = slot < count ? __ldg(x.indices + (int64_t)t * x.width + slot) : -1;
    return (unsigned)key < (unsigned)x.S ? key : -1;
  }
  __device__ __forceinline__ void gather(int key) const {
    const int first = (W * 4 + warp) * 8;
    const char* from = x.k + 512 * rank + lane * 16;
    const int to = sm + K + (lane / 8) * 8192 + first * 128;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int k = __shfl_sync(0xffffffffu, key, j);
      copy16(to + j * 128 + (((lane & 7) ^ j) << 4), from + (int64_t)max(k, 0) * (D * 2), k < 0 ? 0 : 16);
    }
    const int r = first + lane / 4, k = __shfl_sync(0xffffffffu, key, lane / 4);
    copy16(sm + K_ROPE + r * 64 + (((lane & 3) ^ ((r >> 1) & 3)) << 4),
           x.k + 1024 + 64 * rank + (lane & 3) * 16 + (int64_t)max(k, 0) * (D * 2), k < 0 ? 0 : 16);
  }
  // q and d_out of a token, 16 heads a warp
  __device__ __forceinline__ void load_token(int t) const {
    const char* from = x.q + (int64_t)t * x.H * (D * 2) + 512 * rank + lane * 16;
    const char* from_g = x.g + (int64_t)t * x.H * (V * 2) + 512 * rank + lane * 16;
#pragma unroll 4
    for (int j = 0; j < 16; ++j) {
      const int r = (W * 4 + warp) * 16 + j, to = sm + (lane / 8) * 16384 + r * 128 + (((lane & 7) ^ (r & 7)) << 4);
      const int head = min(r, x.H - 1), bytes = r < x.H ? 16 : 0;
      copy16(to + Q, from + head * (D * 2), bytes);
      copy16(to + G, from_g + head * (V * 2), bytes);
    }
    from = x.q + (int64_t)t * x.H * (D * 2) + 1024 + 64 * rank + (lane & 3) * 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = (W * 4 + warp) * 16 + j * 8 + lane / 4, head = min(r, x.H - 1);
      copy16(sm + Q_ROPE + r * 64 + (((lane & 3) ^ ((r >> 1) & 3)) << 4), from + head * (D * 2), r < x.H ? 16 : 0);
    }
  }
  __device__ __forceinline__ void copies_here() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_shared();
    meet_all();
  }
  // half of an accumulator, of the other CTA's keys, to that CTA's inbox
  __device__ __forceinline__ void send_half(const float (&a)[32], int full) const {
    const int to = of_rank(sm + INBOX + W * INBOX_SIZE, rank ^ 1) + tid * 16, there = of_rank(bar + 8 * full, rank ^ 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) send(to + j * 2048, a[16 + 4 * j], a[17 + 4 * j], a[18 + 4 * j], a[19 + 4 * j], there);
  }
  __device__ __forceinline__ void add_inbox(float (&a)[16]) const {
    const int in = sm + INBOX + W * INBOX_SIZE + tid * 16;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float4 y = load_shared_float4(in + g * 2048);
      a[4 * g] += y.x, a[4 * g + 1] += y.y, a[4 * g + 2] += y.z, a[4 * g + 3] += y.w;
    }
  }
  // to shared memory, [64 heads][32 keys]
  __device__ __forceinline__ void store_half(const float (&s)[16], int to) const {
    to += (warp * 16 + (lane & 15)) * 64;
#pragma unroll
    for (int g = 0; g < 4; g += 2) {
      unsigned v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = pack(s[4 * g + 2 * i], s[4 * g + 2 * i + 1]);
      store_shared_matrices(to + (((g + (lane >> 4)) ^ ((lane >> 1) & 3)) << 4), v);
    }
  }
  // dq += dS k over half of the tile's keys: this CTA's or the other's
  __device__ __forceinline__ void query_gradients(float (&dq)[128], float (&dq_rope)[16], int there) const {
    begin_products();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      product<false, true>(dq, plus(ds, there * P_THERE + j * 32), plus(k_b, there * 4096 + j * 2048), true);
      product<false, true>(dq_rope, plus(ds, there * P_THERE + j * 32), plus(k_rope_b, there * 2048 + j * 1024), true);
    }
    commit_products();
  }
  // the sums of P over the 16 heads of the warp, to shared memory
  __device__ __forceinline__ void store_sums(const float (&s)[16], int number) const {
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
    store_shared(sm + SUMS + ((number & 1) * WARPS + W * 4 + warp) * 128 + key * 4, f);
  }
  // of all heads, to memory: 32 slots, in the order of the warps
  __device__ __forceinline__ void write_sums(int t, int first, int number) const {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
      sum += load_shared_float(sm + SUMS + ((number & 1) * WARPS + w) * 128 + lane * 4);
    if (first + lane < x.width) x.p_sum[(int64_t)t * x.width + first + lane] = sum;
  }

  // One tile of a token, whose keys are in shared memory; those of the next are gathered, where there is one
  __device__ __forceinline__ void step(
      float (&dq)[128], float (&dq_rope)[16], int t, int i, int n, int count, int number) const {
    if (tid == 0) {
      barrier_expect(bar + 8 * (S_FULL + W), INBOX_SIZE);
      barrier_expect(bar + 8 * (DP_FULL + W), INBOX_SIZE);
      if (W == 0) barrier_expect(bar + 8 * P_FULL, 16384);
    }
    float a[32], s[16], ds_[16], lse2[2], delta[2];
    const int first = tile_at(i, t, n) * KEYS + 32 * rank;
    {
      begin_products();
#pragma unroll
      for (int j = 0; j < 16; ++j)
        product<false, false>(a, plus(q, (j / 4) * 16384 + (j % 4) * 32), plus(k, (j / 4) * 8192 + (j % 4) * 32), j > 0);
#pragma unroll
      for (int j = 0; j < 2; ++j) product<false, false>(a, plus(q_rope, j * 32), plus(k_rope, j * 32), true);
      commit_products();
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int head = W * 64 + row() + 8 * e;
        const bool is_head = head < x.H;
        lse2[e] = is_head ? __ldg(x.lse + (int64_t)t * x.H + head) * LOG2E : INFINITY;
        delta[e] = is_head ? __ldg(x.delta + (int64_t)t * x.H + head) : 0.f;
      }
      wait_products<0>();
      send_half(a, S_FULL + W);
#pragma unroll
      for (int j = 0; j < 16; ++j) asm volatile("mov.b32 %0, %1;" : "=f"(s[j]) : "f"(a[j]));
    }
    {
      begin_products();
#pragma unroll
      for (int j = 0; j < 16; ++j)
        product<false, false>(a, plus(g, (j / 4) * 16384 + (j % 4) * 32), plus(k, (j / 4) * 8192 + (j % 4) * 32), j > 0);
      commit_products();
      barrier_wait(bar + 8 * (S_FULL + W), number & 1);
      add_inbox(s);
      __syncwarp();
      if (lane == 0) barrier_arrive_there(of_rank(bar + 8 * (S_READ + W), rank ^ 1));
      const float scale2 = x.scale * LOG2E;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const bool is_key = first + 8 * (j / 4) + 2 * (lane & 3) + j % 2 < count;
        s[j] = is_key ? exp2_approximate(s[j] * scale2 - lse2[j / 2 % 2]) : 0.f;
      }
      store_sums(s, number);
      wait_products<0>();
      barrier_wait(bar + 8 * (S_READ + W), number & 1);
      send_half(a, DP_FULL + W);
#pragma unroll
      for (int j = 0; j < 16; ++j) asm volatile("mov.b32 %0, %1;" : "=f"(ds_[j]) : "f"(a[j]));
    }
    barrier_wait(bar + 8 * (DP_FULL + W), number & 1);
    add_inbox(ds_);
#pragma unroll
    for (int j = 0; j < 16; ++j) ds_[j] = s[j] * (ds_[j] - delta[j / 2 % 2]) * x.scale;
    barrier_wait(bar + 8 * P_FREE, (number & 1) ^ 1);
    store_half(s, sm + OWN);
    store_half(ds_, sm + OWN + 4096);
    fence_shared();
    meet(1 + W, 128);
    if (tid == 0)
      send_bulk(of_rank(sm + OWN + P_THERE, rank ^ 1), sm + OWN, 8192, of_rank(bar + 8 * P_FULL, rank ^ 1));
    if (lane == 0) barrier_arrive(bar + 8 * P_OWN);
    query_gradients(dq, dq_rope, 0);
    const int key = i + 1 < n ? next_key(t, tile_at(i + 1, t, n), count) : -1;
    int at[4];
    row_offsets(at, x, t, tile_at(i, t, n), count, rank);
    barrier_wait(bar + 8 * P_FULL, number & 1);
    query_gradients(dq, dq_rope, 1);
    wait_products<0>();
    meet_all();  // neither warpgroup reads the keys any more; the sums of both are in shared memory
    if (i + 1 < n) gather(key);
    if (W == 1 && warp == 3) write_sums(t, first, number);
    barrier_wait(bar + 8 * P_OWN, number & 1);
    if constexpr (W == 0) {
      key_gradients(a, tile(Q + PARTS * 16384, 128, 16, 1024), tile(G + PARTS * 16384, 128, 16, 1024));
      wait_products<0>();
      release_p(bar, rank);
      add_keys(x, a, at, 256 * rank + 64 * PARTS);
    } else {
      float d[16];
      key_gradients(d, tile(Q_ROPE, 64, 16, 512));
      wait_products<0>();
      release_p(bar, rank);
      add_keys(x, d, at, V + 32 * rank);
    }
    if (i + 1 < n) copies_here();
  }

  __device__ __forceinline__ void run() const {
    int number = 0;
    float dq[128], dq_rope[16];
    for (int t = blockIdx.x / 2; t < x.T; t += gridDim.x / 2) {
      const int count = __ldg(x.count + t), n = tiles_of(count);
#pragma unroll
      for (int i = 0; i < 128; ++i) dq[i] = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) dq_rope[i] = 0;
      gather(next_key(t, tile_at(0, t, n), count));
      barrier_wait(bar + 8 * P_FREE, (number & 1) ^ 1);  // all are done with q and d_out of the token before
      load_token(t);
      copies_here();
      for (int i = 0; i < n; ++i) step(dq, dq_rope, t, i, n, count, number++);
      const int head = W * 64 + row();
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
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      barrier_init(bar + 8 * (S_FULL + w), 1);
      barrier_init(bar + 8 * (DP_FULL + w), 1);
      barrier_init(bar + 8 * (S_READ + w), 4);
    }
    barrier_init(bar + 8 * P_OWN, WARPS);
    barrier_init(bar + 8 * P_FULL, 1);
    barrier_init(bar + 8 * P_FREE, 24);
    barriers_ready();
  }
  cluster_sync();
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    add_gradients(x, sm, rank);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    if (warpgroup == 0)
      Attending<0>(x, sm, rank).run();
    else
      Attending<1>(x, sm, rank).run();
  }
  cluster_sync();
}
