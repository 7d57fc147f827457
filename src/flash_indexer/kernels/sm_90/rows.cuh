#pragma once
#include "../device/numbers.cuh"
#include "../device/score_tiles.cuh"
#define ROWS_THREADS 256
#define ROWS_WARPS (ROWS_THREADS / 32)
#define ROWS_KEYS (ROWS_THREADS * 16)
// e^x for x <= 0, to an ulp: x = n·ln(2) + r, |r| <= ln(2)/2; adding 1.5·2^23 leaves n in the low bits. NaN for NaN
static __device__ __forceinline__ float rows_exp(float x) {
  const float t = fmaf(x, LOG2E, 12582912.0f), n = t - 12582912.0f;
  const float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));
  float y = fmaf(r, 1.37805939e-3f, 8.37312452e-3f);
  y = fmaf(y, r, 4.16695364e-2f);
  y = fmaf(y, r, 1.66664720e-1f);
  y = fmaf(y, r, 4.99999851e-1f);
  y = fmaf(y, r, 1.0f);
  y = fmaf(y, r, 1.0f);
  return x < -87.0f ? 0.0f : y * __int_as_float((__float_as_int(t) << 23) + 0x3f800000);
}
// log(x) of a normal x > 0, to an ulp: x = 2^n·(1 + f), |f| <= 1/3. The special function unit errs by a few 1e-7 of the
// logarithm of a row's whole sum, and of log p̂ where p̂ is near 1
static __device__ __forceinline__ float rows_log(float x) {
  const int bits = __float_as_int(x), n = (bits - 0x3f2aaaab) >> 23;
  const float f = __int_as_float(bits - (n << 23)) - 1.0f, z = f * f;
  float y = -0.130310059f;
  y = fmaf(y, f, 0.140869141f);
  y = fmaf(y, f, -0.121483892f);
  y = fmaf(y, f, 0.139814854f);
  y = fmaf(y, f, -0.166846126f);
  y = fmaf(y, f, 0.200120345f);
  y = fmaf(y, f, -0.249996200f);
  y = fmaf(y, f, 0.333331972f);
  y = fmaf(y, f, -0.5f);
  return fmaf((float)n, LN2, fmaf(y, z, f));
}
// (a, b) of all threads combined, in every thread; MAX or sum
template <bool MAX>
static __device__ __forceinline__ float2 rows_reduce(float2 v) {
  __shared__ float2 part[2][ROWS_WARPS];
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    const float a = __shfl_xor_sync(0xffffffffu, v.x, d), b = __shfl_xor_sync(0xffffffffu, v.y, d);
    v = MAX ? make_float2(max_or_nan(v.x, a), max_or_nan(v.y, b)) : make_float2(v.x + a, v.y + b);
  }
  if ((threadIdx.x & 31) == 0) part[MAX][threadIdx.x >> 5] = v;
  __syncthreads();
  v = part[MAX][0];
#pragma unroll
  for (int w = 1; w < ROWS_WARPS; ++w) {
    const float2 u = part[MAX][w];
    v = MAX ? make_float2(max_or_nan(v.x, u.x), max_or_nan(v.y, u.y)) : make_float2(v.x + u.x, v.y + u.y);
  }
  return v;
}
// Where a row's scores and di lie in tiles; `load` and `store` take four columns from c on, of which one at least is in
// the row's width
struct TileRow : ScoreRow {
  using ScoreRow::ScoreRow;
  __device__ __forceinline__ float4 load(const float* x, int c) const {
    return __ldcs((const float4*)(x + begin + in_tiles(c)));
  }
  __device__ __forceinline__ void store(void* di, int c, const float* d) const {
    *(uint2*)((unsigned short*)di + begin + in_tiles(c)) = make_uint2(pack(d[0], d[1]), pack(d[2], d[3]));
  }
};
template <bool LOGITS, class Row>
static __device__ __forceinline__ void rows_row(
    const float* __restrict__ P, const float* __restrict__ X, const Row& row, const float* weight, void* DI, float* KL,
    float* ENT, int t) {
  const float inf = INFINITY;
  const int width = row.width, low = row.low, high = row.high;
  float p[16], x[16];
  float m = -inf, l = 0.0f, mp = LOGITS ? -inf : 0.0f, z = 0.0f;
  auto load = [&](int begin) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = begin + (i * ROWS_THREADS + (int)threadIdx.x) * 4;
      float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
      if (c < high && c + 4 > low) {
        a = row.load(P, c);
        b = row.load(X, c);
      }
      p[4 * i] = a.x, p[4 * i + 1] = a.y, p[4 * i + 2] = a.z, p[4 * i + 3] = a.w;
      x[4 * i] = b.x, x[4 * i + 1] = b.y, x[4 * i + 2] = b.z, x[4 * i + 3] = b.w;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < low || c + e >= high) p[4 * i + e] = LOGITS ? -inf : 0.0f, x[4 * i + e] = -inf;
    }
  };
  for (int begin = 0; begin < width; begin += ROWS_KEYS) {
    load(begin);
    float top = m, topp = mp, sum = 0.0f, sump = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      top = max_or_nan(top, x[i]);
      if (LOGITS) topp = max_or_nan(topp, p[i]);
    }
    if (top != -inf) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sum += rows_exp(x[i] - top);
      l = l * rows_exp(m - top) + sum;
      m = top;
    }
    if (LOGITS && topp != -inf) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sump += rows_exp(p[i] - topp);
      z = z * rows_exp(mp - topp) + sump;
      mp = topp;
    }
    if (!LOGITS) {
#pragma unroll
      for (int i = 0; i < 16; ++i) sump += p[i];
      z += sump;
    }
  }
  const float2 top = rows_reduce<true>(make_float2(m, mp));
  const bool seen = high > low;
  const float M = seen ? top.x : 0.0f, MP = seen ? top.y : 0.0f;
  const float2 total = rows_reduce<false>(make_float2(l * rows_exp(m - M), LOGITS ? z * rows_exp(mp - MP) : z));
  // a teacher whose every probability is 0, because of an lse that is not its own, has no distribution
  const float Z = total.y >= 1.17549435e-38f ? total.y : inf - inf, scale = __frcp_rn(Z);
  const float inverse = __frcp_rn(total.x), log_sum = rows_log(total.x);
  const float w = weight[t];
  float kl = 0.0f, ent = 0.0f;
  for (int begin = 0; begin < width; begin += ROWS_KEYS) {
    if (width > ROWS_KEYS) load(begin);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = begin + (i * ROWS_THREADS + (int)threadIdx.x) * 4;
      float d[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float score = x[4 * i + e] - M;
        const float share = LOGITS ? rows_exp(p[4 * i + e] - MP) : p[4 * i + e];
        const float q = fmaf(fmaf(-share * scale, Z, share), scale, share * scale);
        const float log_q = rows_log(q);
        const bool here = c + e >= low && c + e < high;
        const bool counts = here && !(q <= 1.2e-38f);  // NaN does
        kl += counts ? q * (log_q - (score - log_sum)) : 0.0f;
        ent -= counts ? q * log_q : 0.0f;
        d[e] = here ? (rows_exp(score) * inverse - q) * w : 0.0f;
      }
      if (c < width) row.store(DI, c, d);
    }
  }
  __syncthreads();
  const float2 result = rows_reduce<false>(make_float2(kl, ent));
  if (threadIdx.x == 0) {
    KL[t] = seen ? result.x : 0.0f;
    ENT[t] = seen ? result.y : 0.0f;
  }
}
template <bool LOGITS>
static __device__ __forceinline__ void rows_tile_row(
    const float* P, const float* X, const int* blocks, const int* key_start, const int* key_end, const float* weight,
    void* DI, float* KL, float* ENT, int t) {
  rows_row<LOGITS>(P, X, TileRow(blocks, key_start[t], key_end[t], t), weight, DI, KL, ENT, t);
}
