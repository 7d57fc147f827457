#pragma once
#include "sparse_gradients_rows.cuh"
// Gradients for up to 64 heads: see sparse_gradients_mla.py for the picture.
namespace sparse_half {
using namespace sparse;
// shared memory of a CTA, in bytes from BASE on; panels of 64 columns, 128 bytes a row, swizzled
constexpr int Q = 0;       // queries: 9 panels [64 heads][64]
constexpr int G = 73728;   // d_out: 8 panels
constexpr int K = 139264;  // keys: 9 panels [64 keys][64]
constexpr int P = 212992;  // P [64 heads][64 keys], then dS
constexpr int SUMS = 229376;  // sums of P over the heads of each warp [8][32 keys] float32
constexpr int BARRIERS = 230400;
constexpr int BYTES = BARRIERS + 128;
constexpr int PANEL = 8192;
enum {
  P_FULL = 0,  // P and dS are written
  P_FREE = 1,  // dk has been made of them
};

// Warps 0 to 3 (W = 0) and 4 to 7: S and dP of the tile's keys 32 W to 32 W + 31, dq of the columns from 256 W on
template <int W>
struct Attending {
  static constexpr uint64_t q = tile(Q, 128, 16, 1024), g = tile(G, 128, 16, 1024);
  static constexpr uint64_t k = tile(K + W * 4096, 128, 16, 1024);                                  // k^T as B
  static constexpr uint64_t k_b = tile(K + W * 4 * PANEL, 128, PANEL, 1024);                         // k as B
  static constexpr uint64_t k_rope_b = plus(tile(K + 8 * PANEL, 128, PANEL, 1024), W * 64);
  static constexpr uint64_t ds = tile(P + PANEL, 128, 16, 1024);  // as A

  const Problem& x;
  const int sm, bar, warp, lane;

  __device__ __forceinline__ Attending(const Problem& x, int sm)
      : x(x), sm(sm), bar(sm + BARRIERS), warp(__shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5) & 3, 0)),
        lane(threadIdx.x & 31) {}
  __device__ __forceinline__ int row() const { return warp * 16 + (lane >> 2); }
  __device__ __forceinline__ int first_row() const { return (W * 4 + warp) * 8; }  // of 8 that the warp copies
  __device__ __forceinline__ void meet_all() const { meet(3, 32 * WARPS); }

  // the key of the lane's row (of 8) of a tile
  __device__ __forceinline__ int key_of(int t, int tile, int count) const {
    const int slot = tile * KEYS + first_row() + (lane & 7);
    const int key = slot < count ? __ldg(x.indices + (int64_t)t * x.width + slot) : -1;
    return (unsigned)key < (unsigned)x.S ? key : -1;
  }
  // the first 512 columns of a row to panels from `to` on
  __device__ __forceinline__ void copy_values(int to, const char* from, int r, int bytes) const {
    to += lane / 8 * PANEL + r * 128 + (((lane & 7) ^ (r & 7)) << 4);
    copy16(to, from + lane * 16, bytes);
    copy16(to + 4 * PANEL, from + 512 + lane * 16, bytes);
  }
  __device__ __forceinline__ void copy_rope(int to, const char* from, int r, int bytes) const {
    copy16(to + 8 * PANEL + r * 128 + (((lane & 7) ^ (r & 7)) << 4), from + 1024 + (lane & 7) * 16, bytes);
  }
  __device__ __forceinline__ void gather(int key) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int n = __shfl_sync(0xffffffffu, key, j);
      copy_values(sm + K, x.k + (int64_t)max(n, 0) * (D * 2), first_row() + j, n < 0 ? 0 : 16);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = j * 4 + lane / 8, n = __shfl_sync(0xffffffffu, key, r);
      copy_rope(sm + K, x.k + (int64_t)max(n, 0) * (D * 2), first_row() + r, n < 0 ? 0 : 16);
    }
  }
  // q and d_out of a token, 8 heads a warp; zeros for heads that are none
  __device__ __forceinline__ void load_token(int t) const {
    const char* from = x.q + (int64_t)t * x.H * (D * 2);
    const char* from_g = x.g + (int64_t)t * x.H * (V * 2);
#pragma unroll 4
    for (int j = 0; j < 8; ++j) {
      const int r = first_row() + j, head = min(r, x.H - 1), bytes = r < x.H ? 16 : 0;
      copy_values(sm + Q, from + head * (D * 2), r, bytes);
      copy_values(sm + G, from_g + head * (V * 2), r, bytes);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = first_row() + j * 4 + lane / 8, head = min(r, x.H - 1);
      copy_rope(sm + Q, from + head * (D * 2), r, r < x.H ? 16 : 0);
    }
  }
  __device__ __forceinline__ void copies_here() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
    fence_shared();
    meet_all();
  }
  // to shared memory, [64 heads][64 keys], 32 of them
  __device__ __forceinline__ void store_half(const float (&s)[16], int to) const {
    to += (warp * 16 + (lane & 15)) * 128;
#pragma unroll
    for (int g = 0; g < 4; g += 2) {
      unsigned v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = pack(s[4 * g + 2 * i], s[4 * g + 2 * i + 1]);
      store_shared_matrices(to + (((W * 4 + g + (lane >> 4)) ^ (lane & 7)) << 4), v);
    }
  }
  // a b^T over the columns of `panels` panels
  static __device__ __forceinline__ void logits(float (&s)[16], uint64_t a, uint64_t b, int panels) {
    begin_products();
#pragma unroll
    for (int j = 0; j < panels * 4; ++j)
      product<false, false>(s, plus(a, j / 4 * PANEL + j % 4 * 32), plus(b, j / 4 * PANEL + j % 4 * 32), j > 0);
    commit_products();
  }
  __device__ __forceinline__ void query_gradients(float (&dq)[128], float (&dq_rope)[16]) const {
    begin_products();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      product<false, true>(dq, plus(ds, j * 32), plus(k_b, j * 2048), true);
      product<false, true>(dq_rope, plus(ds, j * 32), plus(k_rope_b, j * 2048), true);
    }
    commit_products();
  }
  // of the thread's two heads; those that are padding get no probability
  __device__ __forceinline__ void numbers_of_rows(float (&lse2)[2], float (&delta)[2], int t) const {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int head = row() + 8 * e;
      const bool is_head = head < x.H;
      lse2[e] = is_head ? __ldg(x.lse + (int64_t)t * x.H + head) * LOG2E : INFINITY;
      delta[e] = is_head ? __ldg(x.delta + (int64_t)t * x.H + head) : 0.f;
    }
  }
  // of 32 slots, over all heads, to memory
  __device__ __forceinline__ void write_sums(int t, int first) const {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < 4; ++w) sum += load_shared_float(sm + SUMS + (W * 4 + w) * 128 + lane * 4);
    if (first + lane < x.width) x.p_sum[(int64_t)t * x.width + first + lane] = sum;
  }
  // One tile of a token, whose keys are in shared memory; those of the next are gathered, where there is one
  __device__ __forceinline__ void step(
      float (&dq)[128], float (&dq_rope)[16], int t, int i, int n, int count, int number) const {
    float s[16], d[16], lse2[2], delta[2];
    const int first = i * KEYS + 32 * W;
    const int key = i + 1 < n ? key_of(t, i + 1, count) : -1;
    logits(s, q, k, 9);
    logits(d, g, k, 8);
    numbers_of_rows(lse2, delta, t);
    wait_products<1>();
    probabilities(s, lse2, x.scale, first, count);
    store_head_sums(s, sm + SUMS + (W * 4 + warp) * 128);
    wait_products<0>();
#pragma unroll
    for (int j = 0; j < 16; ++j) d[j] = s[j] * (d[j] - delta[j / 2 % 2]) * x.scale;
    barrier_wait(bar + 8 * P_FREE, (number & 1) ^ 1);
    store_half(s, sm + P);
    store_half(d, sm + P + PANEL);
    fence_shared();
    meet_all();
    if (lane == 0) barrier_arrive(bar + 8 * P_FULL);
    query_gradients(dq, dq_rope);
    wait_products<0>();
    meet_all();  // neither warpgroup reads the keys any more
    if (i + 1 < n) gather(key);
    if (warp == 3) write_sums(t, first);
    if (i + 1 < n) copies_here();
  }
  __device__ __forceinline__ void run() const {
    int number = 0;
    float dq[128], dq_rope[16];
    for (int t = blockIdx.x; t < x.T; t += gridDim.x) {
      const int count = __ldg(x.count + t), n = tiles_of(count);
#pragma unroll
      for (int i = 0; i < 128; ++i) dq[i] = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) dq_rope[i] = 0;
      gather(key_of(t, 0, count));
      barrier_wait(bar + 8 * P_FREE, (number & 1) ^ 1);  // dk no longer reads q and d_out of the token before
      load_token(t);
      copies_here();
      for (int i = 0; i < n; ++i) step(dq, dq_rope, t, i, n, count, number++);
      char* to = x.dq + ((int64_t)t * x.H + row()) * (D * 2);
      const bool is0 = row() < x.H, is1 = row() + 8 < x.H;
      store_rows(dq, to + 512 * W, to + 16 * D + 512 * W, is0, is1);
      store_rows(dq_rope, to + 1024 + 64 * W, to + 16 * D + 1024 + 64 * W, is0, is1);
    }
  }
};

// Warps 8 to 11: dk of all 576 columns, in panels of 64
template <int PANEL_NUMBER>
__device__ __forceinline__ void key_gradients(float (&d)[32]) {
  constexpr uint64_t p_t = tile(P, 128, 16, 1024);  // P^T as A; dS^T a panel on
  constexpr uint64_t q = tile(Q + PANEL_NUMBER * PANEL, 128, 16, 1024), g = tile(G + PANEL_NUMBER * PANEL, 128, 16, 1024);
  begin_products();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    product<true, true>(d, plus(p_t, PANEL + j * 2048), plus(q, j * 2048), j > 0);
    if (PANEL_NUMBER < 8) product<true, true>(d, plus(p_t, j * 2048), plus(g, j * 2048), true);
  }
  commit_products();
}
template <bool EXACT, int PANEL_NUMBER = 0>
__device__ __forceinline__ void add_panels(const Problem& x, const sparse::Rows& rows, int bar) {
  float d[32];
  key_gradients<PANEL_NUMBER>(d);
  wait_products<0>();
  if (PANEL_NUMBER == 8 && (threadIdx.x & 31) == 0) barrier_arrive(bar + 8 * P_FREE);
  add_keys<EXACT>(x, d, rows, 64 * PANEL_NUMBER);
  if constexpr (PANEL_NUMBER < 8) add_panels<EXACT, PANEL_NUMBER + 1>(x, rows, bar);
}
template <bool EXACT>
__device__ __forceinline__ void add_gradients(const Problem& x, int sm) {
  int number = 0;
  for (int t = blockIdx.x; t < x.T; t += gridDim.x) {
    const int count = __ldg(x.count + t), n = tiles_of(count);
    for (int i = 0; i < n; ++i, ++number) {
      sparse::Rows rows;
      rows_of_tile<EXACT>(rows, x, t, i, count, 0);
      barrier_wait(sm + BARRIERS + 8 * P_FULL, number & 1);
      add_panels<EXACT>(x, rows, sm + BARRIERS);
    }
  }
}
}  // namespace sparse_half

// The whole kernel, for 384 threads; `sm` the address of BYTES of shared memory.
template <bool EXACT>
static __device__ __forceinline__ void sparse_gradients_half(
    int sm, const void* q, const void* k, const void* g, const int* indices, const int* count, const float* lse,
    const float* delta, void* dq, float* dk, float* p_sum, const float* grid, int* sums, int T, int H, int S, int width,
    float scale) {
  using namespace sparse_half;
  const Problem x{(const char*)q, (const char*)k, (const char*)g, indices, count, lse, delta, (char*)dq, dk, p_sum,
                  grid, sums, sums + (int64_t)S * D, sums + (int64_t)S * D * 2, T, H, S, width, scale};
  const int warpgroup = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0);
  if (threadIdx.x == 0) {
    if (sm != BASE) __trap();
    barrier_init(sm + BARRIERS + 8 * P_FULL, WARPS);
    barrier_init(sm + BARRIERS + 8 * P_FREE, 4);
    barriers_ready();
  }
  __syncthreads();
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    add_gradients<EXACT>(x, sm);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    if (warpgroup == 0)
      Attending<0>(x, sm).run();
    else
      Attending<1>(x, sm).run();
  }
}
