#pragma once
#include "../device/wgmma.cuh"
#include "attention_softmax.cuh"
// What a row tile brings and leaves: products, the numbers of its rows, sums and outputs of the whole item.
// S = q k^T and X = index_q index_k^T: addresses of the first row tile and of the first key tile
template <int D, int E, int BN, int QS>
static __device__ __forceinline__ void at_logits(
    float* s, float* x, int q, int k, int index_q, int index_k, int row_tile, int key_tile) {
  const int half = wg_uniform(threadIdx.x >> 7), rows = wg_uniform(row_tile % QS), keys = wg_uniform(key_tile & 1);
  using A = Tile<D, 128>;
  wg_product<BN, D, 128>(s, (q >> 4) + rows * A::SIZE + half * A::HALF, (k >> 4) + keys * Tile<D, BN>::SIZE);
  if constexpr (E > 0) {
    using C = Tile<E, 128>;
    wg_product<BN, E, 128>(
        x, (index_q >> 4) + rows * C::SIZE + half * C::HALF, (index_k >> 4) + keys * Tile<E, BN>::SIZE);
  }
}
// O += P v
template <int BN, int V>
static __device__ __forceinline__ void at_values(float* o, unsigned* p, int v, int key_tile) {
  wg_accumulate<BN, V>(o, p, (v >> 4) + wg_uniform(key_tile & 1) * Tile<V, BN>::SIZE);
}
// 64 threads gather the numbers of an item's rows, [128, 4]: interval and w · log2(e); padding and tokens t >= n see
// nothing
template <int HG, int E>
static __device__ __forceinline__ void at_gather(
    int numbers, const int* items, int at, const int* KS, const int* KE, const float* W, int n, int H) {
  const int t0 = load_int(items, (long long)at * ITEM + row_item::TOKEN);
  const int g = load_int(items, (long long)at * ITEM + row_item::KEY_HEAD);
  int first[2], end[2];
  float w[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = i * 64 + threadIdx.x % 64, t = t0 + Rows<HG, 128>::token(r);
    first[i] = end[i] = 0;
    w[i] = 0.f;
    if (!Rows<HG, 128>::padding(r) && t < n) {
      first[i] = load_int(KS, t), end[i] = load_int(KE, t);
      if (E) w[i] = load_float(W, (long long)t * H + g * HG + Rows<HG, 128>::head(r)) * LOG2E;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    store_shared(numbers + (i * 64 + (int)threadIdx.x % 64) * ROW_BYTES, first[i], end[i], __float_as_int(w[i]), 0);
}
// with one key both distributions are 1, and what was found for it is rounding alone, or NaN
static __device__ __forceinline__ bool at_several(int visible, float found) {
  return visible > 1 || (visible == 1 && isnan(found));
}
// lse, lsx and kl where E, and the entropy where asked for, of the thread's rows; inverse = 1 / l, 0 for a row that saw
// nothing
template <int HG, int E, int ENTROPY>
static __device__ __forceinline__ void at_finish(
    float* inverse, int item, const float* m, const float* n, const float* l, const float* y, const float* c,
    const float* d, float* LSE, float* LSX, float* KL, float* ENT, int tokens, int H) {
  const int t0 = item_field(item, row_item::TOKEN), g = item_field(item, row_item::KEY_HEAD);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + Rows<HG, 128>::token(r);
    const bool write = (threadIdx.x & 3) == 0 && !Rows<HG, 128>::padding(r) && t < tokens;
    const long long at = (long long)t * H + g * HG + Rows<HG, 128>::head(r);
    const float total = quad_sum(l[2 * h] + l[2 * h + 1]), log_l = log2f(total), ln2 = LN2;
    const bool seen = m[h] != AT_UNSET || isnan(total);
    inverse[h] = seen ? 1.f / total : 0.f;
    const int4 v = load_shared_int4(item + ITEM_BYTES + r * ROW_BYTES);
    const int visible = v.y - v.x;
    if (write) LSE[at] = seen ? (m[h] + log_l) * ln2 : -INFINITY;
    if (E) {
      const float log_y = log2f(quad_sum(y[2 * h] + y[2 * h + 1])), cross = quad_sum(c[2 * h] + c[2 * h + 1]);
      if (write) LSX[at] = seen ? (n[h] + log_y) * ln2 : -INFINITY;
      const float found = cross * inverse[h] - log_l + log_y;
      if (write) KL[at] = at_several(visible, found) ? found * ln2 : 0.f;
    }
    if (ENTROPY) {  // log2(l) - d / l, less a power of two near l in both, which would cancel
      const float power = rintf(log_l), rest = log2f(total * exp2f(-power));
      const float own = quad_sum(fmaf(-power, l[2 * h], d[2 * h]) + fmaf(-power, l[2 * h + 1], d[2 * h + 1]));
      const float found = rest - own * inverse[h];
      if (write) ENT[at] = at_several(visible, found) && !(found < 0.f) ? found * ln2 : 0.f;
    }
  }
}
// o in bfloat16 into the row tile at `rows` of shared memory, swizzled
template <int V>
static __device__ __forceinline__ void at_stage(const float* o, int rows) {
  const int r = (threadIdx.x >> 5) * 16 + (threadIdx.x & 15), row = rows + r * 128;
#pragma unroll
  for (int g = 0; g < V / 8; g += 2) {
    unsigned v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = pack(o[4 * g + 2 * i], o[4 * g + 2 * i + 1]);
    store_shared_matrices(matrix_address(row, r, g), v);
  }
}
template <int HG, int V>
static __device__ __forceinline__ void at_store(const float* o, int item, void* OUT, int tokens, int H) {
  const int t0 = item_field(item, row_item::TOKEN), g = item_field(item, row_item::KEY_HEAD);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + Rows<HG, 128>::token(r);
    if (!Rows<HG, 128>::padding(r) && t < tokens) {
      unsigned* p = (unsigned*)OUT + ((long long)t * H + g * HG + Rows<HG, 128>::head(r)) * (V / 2) + (threadIdx.x & 3);
#pragma unroll
      for (int i = 0; i < V / 8; ++i) p[4 * i] = pack(o[4 * i + 2 * h], o[4 * i + 2 * h + 1]);
    }
  }
}
