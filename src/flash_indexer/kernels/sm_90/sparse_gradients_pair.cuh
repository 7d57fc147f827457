#pragma once
#include "sparse_gradients_keys.cuh"
// Warps 0 to 7 of a CTA of a pair: see sparse_gradients_mla.py for the picture.
namespace sparse_pair {
// Warps 0 to 3 (W = 0) and 4 to 7: heads 64 W to 64 W + 63.
template <int W>
struct Attending : Warps {
  static constexpr int OWN = P + W * P_SIZE;
  static constexpr uint64_t q = tile(Q + W * 8192, 128, 16, 1024), q_rope = tile(Q_ROPE + W * 4096, 64, 16, 512);
  static constexpr uint64_t g = tile(G + W * 8192, 128, 16, 1024);
  static constexpr uint64_t k = tile(K, 128, 16, 1024), k_rope = tile(K_ROPE, 64, 16, 512);  // k^T as B
  static constexpr uint64_t k_b = tile(K, 128, 8192, 1024), k_rope_b = k_rope;               // k as B
  static constexpr uint64_t ds = tile(OWN + 4096, 64, 16, 512);  // as A; of the other CTA's keys at + P_THERE

  const int rank;

  __device__ __forceinline__ Attending(const Problem& x, int sm) : Warps(x, sm, sm + BARRIERS), rank(cluster_rank()) {}

  // the key of the lane's row of the next gather, 8 rows a warp. Row r of a tile holds slot r ^ 32·rank, so that the
  // first 32 rows are the slots that this CTA finishes
  __device__ __forceinline__ int next_key(int t, int tile, int count) const {
    return key_in(x, t, tile * KEYS + (((W * 4 + warp) * 8 + (lane & 7)) ^ (32 * rank)), count);
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
  // the half of this CTA's keys, moved out of the accumulator: the next product takes its registers, too few for two
  static __device__ __forceinline__ void keep_half(float (&half)[16], const float (&a)[32]) {
#pragma unroll
    for (int j = 0; j < 16; ++j) asm volatile("mov.b32 %0, %1;" : "=f"(half[j]) : "f"(a[j]));
  }
  // half of an accumulator, of the other CTA's keys, to that CTA's inbox
  __device__ __forceinline__ void send_half(const float (&a)[32], int full) const {
    const int to = of_rank(sm + INBOX + W * INBOX_SIZE, rank ^ 1) + tid * 16, there = of_rank(bar + 8 * full, rank ^ 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) send(to + j * 2048, a[16 + 4 * j], a[17 + 4 * j], a[18 + 4 * j], a[19 + 4 * j], there);
  }
  // returns a word that depends on all that was loaded
  __device__ __forceinline__ unsigned add_inbox(float (&a)[16]) const {
    const int in = sm + INBOX + W * INBOX_SIZE + tid * 16;
    unsigned loaded = 0;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float4 y = load_shared_float4(in + g * 2048);
      a[4 * g] += y.x, a[4 * g + 1] += y.y, a[4 * g + 2] += y.z, a[4 * g + 3] += y.w;
      loaded |= __float_as_uint(y.x);
    }
    return loaded;
  }
  // the other CTA may send dP. An arrival overtakes loads that wait behind additions to memory, and dP would then overwrite
  // what they are to load: hence its address depends on them, by a mask that is 0 for any width
  __device__ __forceinline__ void release_inbox(unsigned loaded) const {
    __syncwarp();
    const int there = of_rank(bar + 8 * (S_READ + W), rank ^ 1) + (int)(loaded & (unsigned)(x.width >> 31));
    if (lane == 0) barrier_arrive_there(there);
  }
  // S = q k^T, and dP = d_out k^T, over this CTA's columns
  static __device__ __forceinline__ void logits(float (&a)[32]) {
    begin_products();
#pragma unroll
    for (int j = 0; j < 16; ++j)
      product<false, false>(a, plus(q, (j / 4) * 16384 + (j % 4) * 32), plus(k, (j / 4) * 8192 + (j % 4) * 32), j > 0);
#pragma unroll
    for (int j = 0; j < 2; ++j) product<false, false>(a, plus(q_rope, j * 32), plus(k_rope, j * 32), true);
    commit_products();
  }
  static __device__ __forceinline__ void value_products(float (&a)[32]) {
    begin_products();
#pragma unroll
    for (int j = 0; j < 16; ++j)
      product<false, false>(a, plus(g, (j / 4) * 16384 + (j % 4) * 32), plus(k, (j / 4) * 8192 + (j % 4) * 32), j > 0);
    commit_products();
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
  // One tile of a token, whose keys are in shared memory; those of the next are gathered, where there is one
  __device__ __forceinline__ void step(
      float (&dq)[128], float (&dq_rope)[16], int t, int i, int n, int count, int number) const {
    if (tid == 0) {
      barrier_expect(bar + 8 * (S_FULL + W), INBOX_SIZE);
      barrier_expect(bar + 8 * (DP_FULL + W), INBOX_SIZE);
      if (W == 0) barrier_expect(bar + 8 * P_FULL, 16384);
    }
    float a[32], s[16], ds_[16], lse2[2], delta[2];
    const int first = i * KEYS + 32 * rank;
    const int key = i + 1 < n ? next_key(t, i + 1, count) : -1;
    logits(a);
    numbers_of_rows(lse2, delta, t, W * 64);
    wait_products<0>();
    send_half(a, S_FULL + W);
    keep_half(s, a);
    value_products(a);  // meanwhile P
    barrier_wait(bar + 8 * (S_FULL + W), number & 1);
    release_inbox(add_inbox(s));
    probabilities(s, lse2, x.scale, first, count);
    wait_products<0>();
    barrier_wait(bar + 8 * (S_READ + W), number & 1);
    send_half(a, DP_FULL + W);
    keep_half(ds_, a);
    store_head_sums(s, sm + SUMS + ((number & 1) * WARPS + W * 4 + warp) * 128);
    barrier_wait(bar + 8 * P_FREE, (number & 1) ^ 1);
    store_half<64>(s, sm + OWN, 0);
    barrier_wait(bar + 8 * (DP_FULL + W), number & 1);
    add_inbox(ds_);
#pragma unroll
    for (int j = 0; j < 16; ++j) ds_[j] = s[j] * (ds_[j] - delta[j / 2 % 2]) * x.scale;
    store_half<64>(ds_, sm + OWN + 4096, 0);
    fence_shared();
    meet(1 + W, 128);
    if (tid == 0)
      send_bulk(of_rank(sm + OWN + P_THERE, rank ^ 1), sm + OWN, 8192, of_rank(bar + 8 * P_FULL, rank ^ 1));
    if (lane == 0) barrier_arrive(bar + 8 * P_OWN);
    query_gradients(dq, dq_rope, 0);
    barrier_wait(bar + 8 * P_FULL, number & 1);
    query_gradients(dq, dq_rope, 1);
    wait_products<0>();
    meet_all();  // neither warpgroup reads the keys any more; the sums of both are in shared memory
    if (i + 1 < n) gather(key);
    if (W == 1 && warp == 3) write_sums<WARPS>(sm + SUMS + (number & 1) * WARPS * 128, t, first);
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
      gather(next_key(t, 0, count));
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

// What `sparse_gradients` takes of a form
struct Form {
  static constexpr int ATTENDING_REGISTERS = 216, ADDING_REGISTERS = 72;
  template <int W>
  static __device__ __forceinline__ void attend(const Problem& x, int sm) { Attending<W>(x, sm).run(); }
  template <bool EXACT>
  static __device__ __forceinline__ void add(const Problem& x, int sm) { add_gradients<EXACT>(x, sm, cluster_rank()); }
  static __device__ __forceinline__ void begin(int sm) {
    const int bar = sm + BARRIERS;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        barrier_init(bar + 8 * (S_FULL + w), 1);
        barrier_init(bar + 8 * (DP_FULL + w), 1);
        barrier_init(bar + 8 * (S_READ + w), 4);
      }
      barrier_init(bar + 8 * P_OWN, WARPS);
      barrier_init(bar + 8 * P_FULL, 1);
      barrier_init(bar + 8 * P_FREE, 8);
      barriers_ready();
    }
    cluster_sync();
  }
  static __device__ __forceinline__ void end() { cluster_sync(); }  // the other CTA may still send
};
}  // namespace sparse_pair
