#pragma once
#include "sparse_gradients_rows.cuh"
// The form for up to 64 heads: see sparse_gradients_mla.py for the picture.
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
  P_FULL = 0,     // P and dS are written
  P_FREE = 1,     // dk has been made of them
  GATHERING = 2,  // copies of the next tile's keys have been issued
};

// Warps 0 to 3 (W = 0) and 4 to 7: S and dP of the tile's keys 32 W to 32 W + 31, dq of the columns from 256 W on
template <int W>
struct Attending : Warps {
  static constexpr uint64_t q = tile(Q, 128, 16, 1024), g = tile(G, 128, 16, 1024);
  static constexpr uint64_t k = tile(K + W * 4096, 128, 16, 1024);                                  // k^T as B
  static constexpr uint64_t k_b = tile(K + W * 4 * PANEL, 128, PANEL, 1024);                         // k as B
  static constexpr uint64_t k_rope_b = plus(tile(K + 8 * PANEL, 128, PANEL, 1024), W * 64);
  static constexpr uint64_t ds = tile(P + PANEL, 128, 16, 1024);  // as A

  __device__ __forceinline__ Attending(const Problem& x, int sm) : Warps(x, sm, sm + BARRIERS) {}
  __device__ __forceinline__ int first_row() const { return (W * 4 + warp) * 8; }  // of 8 that the warp copies

  // the key of the lane's row of the next gather, 8 rows a warp
  __device__ __forceinline__ int next_key(int t, int tile, int count) const {
    return key_in(x, t, tile * KEYS + first_row() + (lane & 7), count);
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
  // s = a b^T over the columns of panels FIRST to END - 1
  template <int FIRST, int END>
  static __device__ __forceinline__ void logits(float (&s)[16], uint64_t a, uint64_t b) {
    begin_products();
#pragma unroll
    for (int j = 4 * FIRST; j < 4 * END; ++j) {
      const int at = j / 4 * PANEL + j % 4 * 32;
      product<false, false>(s, plus(a, at), plus(b, at), j > 4 * FIRST);
    }
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
  // One tile of a token, whose keys are in shared memory; those of the next are gathered, where there is one
  __device__ __forceinline__ void step(
      float (&dq)[128], float (&dq_rope)[16], int t, int i, int n, int count, int number) const {
    float s[16], d[16], lse2[2], delta[2];
    const int first = i * KEYS + 32 * W;
    const int key = i + 1 < n ? next_key(t, i + 1, count) : -1;
    logits<0, 4>(s, q, k);
    logits<4, 9>(d, q, k);  // a sum of its own: tensor cores cut off bits of all that they add to
    numbers_of_rows(lse2, delta, t, 0);
    wait_products<0>();
#pragma unroll
    for (int j = 0; j < 16; ++j) s[j] += d[j];
    logits<0, 8>(d, g, k);  // meanwhile P
    probabilities(s, lse2, x.scale, first, count);
    store_head_sums(s, sm + SUMS + (W * 4 + warp) * 128);
    wait_products<0>();
#pragma unroll
    for (int j = 0; j < 16; ++j) d[j] = s[j] * (d[j] - delta[j / 2 % 2]) * x.scale;
    barrier_wait(bar + 8 * P_FREE, (number & 1) ^ 1);
    store_half<128>(s, sm + P, 4 * W);
    store_half<128>(d, sm + P + PANEL, 4 * W);
    fence_shared();
    meet_all();
    if (lane == 0) barrier_arrive(bar + 8 * P_FULL);
    query_gradients(dq, dq_rope);
    wait_products<0>();
    meet_all();  // neither warpgroup reads the keys any more
    if (i + 1 < n) gather(key);
    if (lane == 0) barrier_arrive(bar + 8 * GATHERING);
    if (warp == 3) write_sums<4>(sm + SUMS + W * 512, t, first);
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
      gather(next_key(t, 0, count));
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

// Warps 8 to 11: dk of all 576 columns, in panels of 64; d_out has none of the last
template <bool VALUES>
__device__ __forceinline__ void key_gradients(float (&d)[32], int panel) {
  constexpr uint64_t p_t = tile(P, 128, 16, 1024);  // P^T as A; dS^T a panel on
  const uint64_t q = plus(tile(Q, 128, 16, 1024), panel * PANEL), g = plus(tile(G, 128, 16, 1024), panel * PANEL);
  begin_products();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    product<true, true>(d, plus(p_t, PANEL + j * 2048), plus(q, j * 2048), j > 0);
    if (VALUES) product<true, true>(d, plus(p_t, j * 2048), plus(g, j * 2048), true);
  }
  commit_products();
  wait_products<0>();
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
      float d[32];
      key_gradients<false>(d, V / 64);
      add_keys<EXACT>(x, d, rows, V);
      barrier_wait(sm + BARRIERS + 8 * GATHERING, number & 1);  // loads wait behind additions: those of keys go first
#pragma unroll 1  // instructions would not fit their cache
      for (int panel = 0; panel < V / 64; ++panel) {
        key_gradients<true>(d, panel);
        if (panel == V / 64 - 1 && (threadIdx.x & 31) == 0) barrier_arrive(sm + BARRIERS + 8 * P_FREE);
        add_keys<EXACT>(x, d, rows, 64 * panel);
      }
    }
  }
}

// What `sparse_gradients` takes of a form
struct Form {
  static constexpr int ATTENDING_REGISTERS = 216, ADDING_REGISTERS = 72;
  template <int W>
  static __device__ __forceinline__ void attend(const Problem& x, int sm) { Attending<W>(x, sm).run(); }
  template <bool EXACT>
  static __device__ __forceinline__ void add(const Problem& x, int sm) { add_gradients<EXACT>(x, sm); }
  static __device__ __forceinline__ void begin(int sm) {
    if (threadIdx.x == 0) {
      barrier_init(sm + BARRIERS + 8 * P_FULL, WARPS);
      barrier_init(sm + BARRIERS + 8 * P_FREE, 4);
      barrier_init(sm + BARRIERS + 8 * GATHERING, WARPS);
      barriers_ready();
    }
    __syncthreads();
  }
  static __device__ __forceinline__ void end() {}
};
}  // namespace sparse_half
