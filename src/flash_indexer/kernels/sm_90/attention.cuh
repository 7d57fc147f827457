#pragma once
#include "../device/wgmma.cuh"
#include "../device/items.cuh"
// Accumulator of one thread: s[4g+2h+c] = row 16·warp + lane/4 + 8h, column 8g + 2·(lane%4) + c. Arrays of two are one
// number for each of the thread's two rows h. An item in shared memory: t0, g, first key, tiles, right, left, seen (see build).
#define AT_UNSEEN -1e30f
#define AT_UNSET 1e30f
static __device__ __forceinline__ int at_count(int n, int first, int step) {
  asm volatile("" : "+r"(n));
  return n > first ? (int)((unsigned)(n - first + step - 1) / (unsigned)step) : 0;
}
static __device__ __forceinline__ int at_int(const int* p, long long i) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ float at_float(const float* p, long long i) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ int at_address(const void* p) { return (int)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ int at_field(int item, int field) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(item + field * 4));
  return v;
}
// tiles of the item are visited in the order 0 .. right - 1, left .. tiles - 1 (these are masked), right .. left - 1
static __device__ __forceinline__ int at_masked(int item) {
  return at_field(item, 4) - 1 + at_field(item, 3) - at_field(item, 5);
}
static __device__ __forceinline__ int at_whole(int item) { return at_field(item, 5) - at_field(item, 4); }
static __device__ __forceinline__ int at_tile(int item, int i) {
  const int right = at_field(item, 4);
  return i < right ? i : i - right + at_field(item, 5);
}
template <int BN>
static __device__ __forceinline__ int at_key(int item, int i) {
  const int masked = at_masked(item) + 1;
  return at_field(item, 2) - BN * (i < masked ? at_tile(item, i) : i - masked + at_field(item, 4));
}
static __device__ __forceinline__ int4 at_numbers(int address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
static __device__ __forceinline__ int at_row(int h) {
  return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2) + 8 * h;
}
template <int HG>
struct Rows {
  static constexpr int TOKENS = 128 / HG;
  static constexpr bool TOKEN_MAJOR = HG > TOKENS;
  static __device__ __forceinline__ int token(int r) { return TOKEN_MAJOR ? r / HG : r % TOKENS; }
  static __device__ __forceinline__ int head(int r) { return TOKEN_MAJOR ? r % HG : r / TOKENS; }
  static __device__ __forceinline__ bool padding(int r) { return r >= TOKENS * HG; }
};
// max(x, 0), NaN where x is: fmaxf would hide it
static __device__ __forceinline__ float at_relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
// over the four lanes that share a row
static __device__ __forceinline__ float at_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
static __device__ __forceinline__ float at_quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
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
// 64 threads gather the numbers of an item's rows, [128, 4]: interval and w · log2(e); padding and tokens t >= n see nothing
template <int HG, int E>
static __device__ __forceinline__ void at_gather(
    int numbers, const int* items, int at, const int* KS, const int* KE, const float* W, int n, int H) {
  const int t0 = at_int(items, (long long)at * 8), g = at_int(items, (long long)at * 8 + 1);
  int first[2], end[2];
  float w[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = i * 64 + threadIdx.x % 64, t = t0 + Rows<HG>::token(r);
    first[i] = end[i] = 0;
    w[i] = 0.f;
    if (!Rows<HG>::padding(r) && t < n) {
      first[i] = at_int(KS, t), end[i] = at_int(KE, t);
      if (E) w[i] = at_float(W, (long long)t * H + g * HG + Rows<HG>::head(r)) * 1.4426950408889634f;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(numbers + (i * 64 + (int)threadIdx.x % 64) * 16),
                 "r"(first[i]), "r"(end[i]), "r"(__float_as_int(w[i])), "r"(0)
                 : "memory");
}
// intervals of the thread's rows, first and end of row 0, of row 1
static __device__ __forceinline__ void at_limits(int* limits, int numbers) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int4 v = at_numbers(numbers + at_row(h) * 16);
    limits[2 * h] = v.x;
    limits[2 * h + 1] = v.y;
  }
}
static __device__ __forceinline__ void at_weights(float* w, int numbers) {
#pragma unroll
  for (int h = 0; h < 2; ++h) w[h] = __int_as_float(at_numbers(numbers + at_row(h) * 16).z);
}
// the i-th masked tile of the item: s = UNSEEN outside of the rows' limits; rows that see their first key get their shift
template <int BN>
static __device__ __forceinline__ void at_mask(float* s, float* m, const int* limits, int item, int i, float scale) {
  const int first = at_field(item, 2) - at_tile(item, i) * BN + (threadIdx.x & 3) * 2;
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
    most = at_quad_max(most);
    if (m[h] == AT_UNSET && most > 0.5f * AT_UNSEEN) m[h] = most * scale;
  }
}
// x = w · max(x, 0), then as at_mask
template <int BN>
static __device__ __forceinline__ void at_mask_index(
    float* x, float* n, const float* w, const int* limits, int item, int i) {
#pragma unroll
  for (int j = 0; j < BN / 2; ++j) x[j] = at_relu(x[j]) * w[j / 2 % 2];
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
    const float fresh = fmaxf(at_quad_max(most) * scale, m[h]), delta = m[h] - fresh;
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
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(backup + (int)threadIdx.x * 16), "f"(l[0] + l[1]),
               "f"(l[2] + l[3]), "f"(E ? c[0] + c[1] : 0.f), "f"(E ? c[2] + c[3] : 0.f)
               : "memory");
  if (ENTROPY)
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(backup + 4096 + (int)threadIdx.x * 8),
                 "f"(d[0] + d[1]), "f"(d[2] + d[3])
                 : "memory");
#pragma unroll
  for (int i = 0; i < BN / 2; ++i) {
    const int h = i / 2 % 2, j = 2 * h;
    const float a = fmaf(s[i], scale, -m[h]), e = exp2f(a);
    l[ENTROPY ? j : i % 4] += e;
    s[i] = e;
    if (ENTROPY) d[j] = fmaf(e, a, d[j]);
    if (E) {
      x[i] = READY ? x[i] - n[h] : fmaf(at_relu(x[i]), w[h], -n[h]);
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
  const int t0 = at_field(item, 0), g = at_field(item, 1), key = at_key<BN>(item, at_masked(item) + 1 + i);
  const int lane = threadIdx.x & 31, stride = H / HG * D;
  const unsigned* q[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = min(at_row(h), Rows<HG>::TOKENS * HG - 1), t = min(t0 + Rows<HG>::token(r), n - 1);
    q[h] = (const unsigned*)Q + ((long long)t * H + g * HG + Rows<HG>::head(r)) * (D / 2) + (lane & 3);
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
#pragma unroll
  for (int i = 0; i < V / 2; ++i) o[i] *= by[i / 2 % 2];
}
// a tile's softmax once more, with m raised to the rows' maxima, and by as much as makes the old l at most one
template <int BN, int D, int V, int HG, int E, int ENTROPY>
static __device__ __forceinline__ void at_redo(
    float* s, const float* x, float* o, float* m, float* l, float* c, float* d, float* alpha, int backup, float scale,
    int item, int i, const void* Q, const void* K, int n, int H) {
  const int4 old = at_numbers(backup + (int)threadIdx.x * 16);
  l[0] = __int_as_float(old.x), l[2] = __int_as_float(old.y), l[1] = l[3] = 0.f;
  if (E) c[0] = __int_as_float(old.z), c[2] = __int_as_float(old.w), c[1] = c[3] = 0.f;
  if (ENTROPY) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(d[0]), "=f"(d[2])
                 : "r"(backup + 4096 + (int)threadIdx.x * 8)
                 : "memory");
    d[1] = d[3] = 0.f;
  }
  at_again<BN, D, HG>(s, item, i, Q, K, n, H);
  at_raise<BN, E, ENTROPY>(s, m, l, c, d, alpha, scale);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float more = log2f(fmaxf(at_quad_max(l[2 * h]), 1.f)), shrink = exp2f(-more);
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
    most = at_quad_max(most);
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
// a real, ordered instruction after the wait for the product that reads the old P, or ptxas serialises (C7513)
template <int BN>
static __device__ __forceinline__ void at_pack(unsigned* p, const float* s) {
#pragma unroll
  for (int g = 0; g < BN / 4; ++g) {
    unsigned v;
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(s[2 * g + 1]), "f"(s[2 * g]));
    p[g] = v;
  }
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
  const int t0 = at_field(item, 0), g = at_field(item, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = at_row(h), t = t0 + Rows<HG>::token(r);
    const bool write = (threadIdx.x & 3) == 0 && !Rows<HG>::padding(r) && t < tokens;
    const long long at = (long long)t * H + g * HG + Rows<HG>::head(r);
    const float total = at_quad_sum(l[2 * h] + l[2 * h + 1]), log_l = log2f(total), ln2 = 0.6931471805599453f;
    const bool seen = m[h] != AT_UNSET || isnan(total);
    inverse[h] = seen ? 1.f / total : 0.f;
    const int4 v = at_numbers(item + 32 + r * 16);
    const int visible = v.y - v.x;
    if (write) LSE[at] = seen ? (m[h] + log_l) * ln2 : -INFINITY;
    if (E) {
      const float log_y = log2f(at_quad_sum(y[2 * h] + y[2 * h + 1])), cross = at_quad_sum(c[2 * h] + c[2 * h + 1]);
      if (write) LSX[at] = seen ? (n[h] + log_y) * ln2 : -INFINITY;
      const float found = cross * inverse[h] - log_l + log_y;
      if (write) KL[at] = at_several(visible, found) ? found * ln2 : 0.f;
    }
    if (ENTROPY) {  // log2(l) - d / l, less a power of two near l in both, which would cancel
      const float power = rintf(log_l), rest = log2f(total * exp2f(-power));
      const float own = at_quad_sum(fmaf(-power, l[2 * h], d[2 * h]) + fmaf(-power, l[2 * h + 1], d[2 * h + 1]));
      const float found = rest - own * inverse[h];
      if (write) ENT[at] = at_several(visible, found) && !(found < 0.f) ? found * ln2 : 0.f;
    }
  }
}
// o in bfloat16 into the row tile at `rows` of shared memory, swizzled
template <int V>
static __device__ __forceinline__ void at_stage(const float* o, int rows) {
  const int lane = threadIdx.x & 31, r = (threadIdx.x >> 5) * 16 + (lane & 15);
#pragma unroll
  for (int g = 0; g < V / 8; g += 2) {
    unsigned v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v[i]) : "f"(o[4 * g + 2 * i + 1]), "f"(o[4 * g + 2 * i]));
    const int address = rows + g / 8 * 16384 + r * 128 + (((g % 8 + (lane >> 4)) ^ (r & 7)) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
  }
}
template <int HG, int V>
static __device__ __forceinline__ void at_store(const float* o, int item, void* OUT, int tokens, int H) {
  const int t0 = at_field(item, 0), g = at_field(item, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = at_row(h), t = t0 + Rows<HG>::token(r);
    if (!Rows<HG>::padding(r) && t < tokens) {
      unsigned* p = (unsigned*)OUT + ((long long)t * H + g * HG + Rows<HG>::head(r)) * (V / 2) + (threadIdx.x & 3);
#pragma unroll
      for (int i = 0; i < V / 8; ++i) {
        unsigned v;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(o[4 * i + 2 * h + 1]), "f"(o[4 * i + 2 * h]));
        p[4 * i] = v;
      }
    }
  }
}
