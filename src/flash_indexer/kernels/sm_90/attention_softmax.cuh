#pragma once
#include "../device/accumulator.cuh"
#include "../device/items.cuh"
#include "../device/rows.cuh"
// The softmaxes of a tile, and what they sum up. Arrays of two have one number for each of the thread's two rows h, arrays
// of four two for each, over even and odd columns. Behind an item in shared memory (field, as items.cuh has it) lie the
// numbers of its 128 rows, ROW_BYTES each: interval and w · log2(e).
#define AT_UNSEEN -1e30f
#define AT_UNSET 1e30f
enum { ROW_BYTES = 16 };
// where a thread keeps its sums l and c of two rows, and d, from before a tile
static __device__ __forceinline__ int backup_lc(int backup) { return backup + (int)threadIdx.x * 16; }
static __device__ __forceinline__ int backup_d(int backup) { return backup + 256 * 16 + (int)threadIdx.x * 8; }
// intervals of the thread's rows, first and end of row 0, of row 1
static __device__ __forceinline__ void at_limits(int* limits, int numbers) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int4 v = load_shared_int4(numbers + thread_row(h) * ROW_BYTES);
    limits[2 * h] = v.x;
    limits[2 * h + 1] = v.y;
  }
}
static __device__ __forceinline__ void at_weights(float* w, int numbers) {
#pragma unroll
  for (int h = 0; h < 2; ++h) w[h] = __int_as_float(load_shared_int4(numbers + thread_row(h) * ROW_BYTES).z);
}
// the i-th masked tile of the item: s = UNSEEN outside of the rows' limits; rows that see their first key get their
// shift
template <int BN>
static __device__ __forceinline__ void at_mask(float* s, float* m, const int* limits, int item, int i, float scale) {
  const int first = first_masked_key<BN>(item, i) + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int low = limits[2 * h] - first;
    const unsigned size = limits[2 * h + 1] - limits[2 * h];
    float most = AT_UNSEEN;
#pragma unroll
    for (int g = 0; g < BN / 8; ++g)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[4 * g + 2 * h + c];
        x = (unsigned)(8 * g + c - low) < size ? x : AT_UNSEEN;
        most = fmaxf(most, x);
      }
    most = quad_max(most);
    if (m[h] == AT_UNSET && most > 0.5f * AT_UNSEEN) m[h] = most * scale;
  }
}
// x = w · max(x, 0), then as at_mask
template <int BN>
static __device__ __forceinline__ void at_mask_index(
    float* x, float* n, const float* w, const int* limits, int item, int i) {
#pragma unroll
  for (int j = 0; j < BN / 2; ++j) x[j] = relu(x[j]) * w[j / 2 % 2];
  at_mask<BN>(x, n, limits, item, i, 1.f);
}
// m = max(m, rowmax(s)), with what was summed under the old shift; o is rescaled by alpha when its product is done
template <int BN, int E, int ENTROPY>
static __device__ __forceinline__ void at_raise(
    const float* s, float* m, float* l, float* c, float* d, float* alpha, float scale) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
    for (int g = 1; g < BN / 8; ++g) most = fmaxf(fmaxf(most, s[4 * g + 2 * h]), s[4 * g + 2 * h + 1]);
    const float fresh = fmaxf(quad_max(most) * scale, m[h]), delta = m[h] - fresh;
    alpha[h] = exp2f(delta);
#pragma unroll
    for (int i = 2 * h; i < 2 * h + 2; ++i) {
      if (E) c[i] = (c[i] + delta * l[i]) * alpha[h];
      if (ENTROPY) d[i] = (d[i] + delta * l[i]) * alpha[h];
      l[i] *= alpha[h];
    }
    m[h] = fresh;
  }
}
// s = e = exp2(a - m), x = x - n; adds to the sums l of e, c of e (a - m - x) and d of e (a - m), whose old values go to
// `backup`; y is this tile's sum of exp2(x). READY: x is weighted already. c, d and y take the first of a row's two places
// alone, and so does l beside an entropy: with fewer registers in use the compiler's order of instructions is faster
template <int BN, int E, int ENTROPY, bool READY>
static __device__ __forceinline__ void at_softmax(
    float* s, float* x, const float* m, const float* n, const float* w, float* l, float* y, float* c, float* d,
    int backup, float scale) {
  store_shared(backup_lc(backup), l[0] + l[1], l[2] + l[3], E ? c[0] + c[1] : 0.f, E ? c[2] + c[3] : 0.f);
  if (ENTROPY) store_shared(backup_d(backup), d[0] + d[1], d[2] + d[3]);
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) {
    const int h = i / 2 % 2, j = 2 * h;
    const float a = fmaf(s[i], scale, -m[h]), e = exp2f(a);
    l[ENTROPY ? j : i % 4] += e;
    s[i] = e;
    if (ENTROPY) d[j] = fmaf(e, a, d[j]);
    if (E) {
      x[i] = READY ? x[i] - n[h] : fmaf(relu(x[i]), w[h], -n[h]);
      c[j] = fmaf(e, a - x[i], c[j]);
      y[j] = i == j ? exp2f(x[i]) : y[j] + exp2f(x[i]);
    }
  }
  if (E) y[1] = y[3] = 0.f;
#pragma unroll
  for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(l[j]));  // here, between the exponentials, not after a branch
}
// s = q k^T once more, of the thread's warp alone, from global memory: i-th tile that is not masked
template <int BN, int D, int HG>
static __device__ __forceinline__ void at_again(float* s, int item, int i, const void* Q, const void* K, int n, int H) {
  const int t0 = item_field(item, row_item::TOKEN), g = item_field(item, row_item::KEY_HEAD);
  const int key = first_key_late<BN>(item, masked_tiles_left(item) + 1 + i);
  const int lane = threadIdx.x & 31, stride = H / HG * D;
  const unsigned* q[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = min(thread_row(h), Rows<HG, 128>::TOKENS * HG - 1), t = min(t0 + Rows<HG, 128>::token(r), n - 1);
    q[h] = (const unsigned*)Q + ((long long)t * H + g * HG + Rows<HG, 128>::head(r)) * (D / 2) + (lane & 3);
  }
  const unsigned* k = (const unsigned*)K + ((long long)(key + lane / 4) * stride + g * D) / 2 + (lane & 3);
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) s[i] = 0.f;
#pragma unroll 1
  for (int d = 0; d < D / 2; d += 8) {
    const unsigned a0 = q[0][d], a1 = q[1][d], a2 = q[0][d + 4], a3 = q[1][d + 4];
#pragma unroll
    for (int i = 0; i < BN / 8; ++i) {
      const unsigned* b = k + (long long)i * 4 * stride + d;
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(s[4 * i]), "+f"(s[4 * i + 1]), "+f"(s[4 * i + 2]), "+f"(s[4 * i + 3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[4]));
    }
  }
}
// whether sums are too large to go on with their shifts: 1 l, 2 y
template <int E>
static __device__ __forceinline__ int at_over(const float* l, const float* y) {
  float a = l[0], b = E ? y[0] : 0.f;
#pragma unroll
  for (int j = 1; j < 4; ++j) {
    a = fmaxf(a, l[j]);
    if (E) b = fmaxf(b, y[j]);
  }
  int over = __any_sync(0xffffffffu, fmaxf(a, b) > 1e18f);
  if (over) over = __any_sync(0xffffffffu, a > 1e18f) + 2 * __any_sync(0xffffffffu, b > 1e18f);
  return over;
}
static __device__ __forceinline__ void at_total(float* total, const float* sum) {
#pragma unroll
  for (int j = 0; j < 4; ++j) total[j] += sum[j];
}
template <int V>
static __device__ __forceinline__ void at_scale(float* o, const float* by) {
  scale_rows<V>(o, by[0], by[1]);
}
// a tile's softmax once more, with m raised to the rows' maxima, and by as much as makes the old l at most one
template <int BN, int D, int V, int HG, int E, int ENTROPY>
static __device__ __forceinline__ void at_redo(
    float* s, const float* x, float* o, float* m, float* l, float* c, float* d, float* alpha, int backup, float scale,
    int item, int i, const void* Q, const void* K, int n, int H) {
  const float4 old = load_shared_float4(backup_lc(backup));
  l[0] = old.x, l[2] = old.y, l[1] = l[3] = 0.f;
  if (E) c[0] = old.z, c[2] = old.w, c[1] = c[3] = 0.f;
  if (ENTROPY) {
    const float2 sums = load_shared_float2(backup_d(backup));
    d[0] = sums.x, d[2] = sums.y, d[1] = d[3] = 0.f;
  }
  at_again<BN, D, HG>(s, item, i, Q, K, n, H);
  at_raise<BN, E, ENTROPY>(s, m, l, c, d, alpha, scale);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float more = log2f(fmaxf(quad_max(l[2 * h]), 1.f)), shrink = exp2f(-more);
    if (E) c[2 * h] = (c[2 * h] - more * l[2 * h]) * shrink;
    if (ENTROPY) d[2 * h] = (d[2 * h] - more * l[2 * h]) * shrink;
    l[2 * h] *= shrink;
    alpha[h] *= shrink;
    m[h] += more;
  }
  at_scale<V>(o, alpha);
#pragma unroll
  for (int z = 0; z < BN / 2; ++z) {
    const float a = fmaf(s[z], scale, -m[z / 2 % 2]);
    s[z] = exp2f(a);
    l[z % 4] += s[z];
    if (E) c[z % 4] = fmaf(s[z], a - x[z], c[z % 4]);
    if (ENTROPY) d[z % 4] = fmaf(s[z], a, d[z % 4]);
  }
}
// n raised by what the tile's x exceed it
template <int BN>
static __device__ __forceinline__ void at_raise_index(
    float* x, float* n, const float* l, float* y, float* c, float* y_tile) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float most = 0.f;
#pragma unroll
    for (int g = 0; g < BN / 8; ++g) most = fmaxf(fmaxf(most, x[4 * g + 2 * h]), x[4 * g + 2 * h + 1]);
    most = quad_max(most);
    n[h] += most;
    const float shrink = exp2f(-most);
#pragma unroll
    for (int j = 2 * h; j < 2 * h + 2; ++j) {
      y[j] *= shrink;
      c[j] += most * l[j];
      y_tile[j] = 0.f;
    }
#pragma unroll
    for (int g = 0; g < BN / 8; ++g)
#pragma unroll
      for (int z = 0; z < 2; ++z) y_tile[2 * h + z] += exp2f(x[4 * g + 2 * h + z] - most);
  }
}
