#pragma once
#include "../device/items.cuh"
// Accumulator of one thread: s[4g+2h+c] = row 16·warp + lane/4 + 8h, column 8g + 2·(lane%4) + c. Addresses of shared
// memory are integers. Numbers of a tile's queries, [6, N]: lse, lsx (base 2; so large that the exponential is zero where
// there is no query), w · log2(e), w · coef, first visible key, end.
#define HG_LOG2E 1.4426950408889634f
#define HG_NOTHING 1e30f
static __device__ __forceinline__ int hg_count(int n, int first, int step) {
  asm volatile("" : "+r"(n));
  return n > first ? (int)((unsigned)(n - first + step - 1) / (unsigned)step) : 0;
}
static __device__ __forceinline__ int hg_int(const int* p, long long i) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ float hg_float(const float* p, long long i) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p + i));
  return v;
}
// keeps what is made of it from being hoisted out of a loop, to where registers run out
static __device__ __forceinline__ int hg_opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
static __device__ __forceinline__ int hg_address(const void* p) { return (int)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ int hg_field(int item, int field) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(item + field * 4));
  return v;
}
static __device__ __forceinline__ float4 hg_four(int address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address));
  return v;
}
static __device__ __forceinline__ int4 hg_limits(int address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
static __device__ __forceinline__ int hg_row(int h) {
  return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2) + 8 * h;
}
// R rows: HG heads of R / HG tokens
template <int HG, int R>
struct Rows {
  static constexpr int TOKENS = R / HG;
  static constexpr bool TOKEN_MAJOR = HG > TOKENS;
  static __device__ __forceinline__ int token(int r) { return TOKEN_MAJOR ? r / HG : r % TOKENS; }
  static __device__ __forceinline__ int head(int r) { return TOKEN_MAJOR ? r % HG : r / TOKENS; }
  static __device__ __forceinline__ bool padding(int r) { return r >= TOKENS * HG; }
};
// Items of `build_query`: t0, g, first key, tiles, right, left. Visited in the order 0 .. right - 1, left .. tiles - 1
// (masked), right .. left - 1.
static __device__ __forceinline__ int hq_masked(int item) {
  return hg_field(item, 4) + hg_field(item, 3) - hg_field(item, 5);
}
static __device__ __forceinline__ int hq_whole(int item) { return hg_field(item, 5) - hg_field(item, 4); }
template <int N>
static __device__ __forceinline__ int hq_key(int item, int i) {
  const int right = hg_field(item, 4), left = hg_field(item, 5), masked = hq_masked(item);
  return hg_field(item, 2) - N * (i < right ? i : i < masked ? i - right + left : i - masked + right);
}
// Items of `build_key`, read where they are needed: key tile, first row tile, end, first whole one, end of those, slot. Visited
// for each key head: those before and behind the whole ones (masked), then the whole ones.
static __device__ __forceinline__ int hk_field(const int* items, int at, int field) { return hg_int(items, at + field); }
static __device__ __forceinline__ int hk_rows(const int* items, int at) {
  return hk_field(items, at, 2) - hk_field(items, at, 1);
}
static __device__ __forceinline__ int hk_whole(const int* items, int at) {
  return hk_field(items, at, 4) - hk_field(items, at, 3);
}
static __device__ __forceinline__ int hk_masked(const int* items, int at) {
  return hk_rows(items, at) - hk_whole(items, at);
}
static __device__ __forceinline__ int hk_tile(const int* items, int at, int i) {
  const int first = hk_field(items, at, 1), whole = hk_field(items, at, 3), end = hk_field(items, at, 4);
  const int masked = hk_masked(items, at);
  return i < whole - first ? first + i : i < masked ? i - (whole - first) + end : i - masked + whole;
}
// the first tile of an item counts as masked, whatever it is
static __device__ __forceinline__ int hk_masked_left(const int* items, int at, int g) {
  const int n = hk_masked(items, at);
  return g == 0 && n > 0 ? n - 1 : n;
}
static __device__ __forceinline__ int hk_whole_left(const int* items, int at, int g) {
  const int n = hk_whole(items, at);
  return g == 0 && hk_masked(items, at) == 0 ? n - 1 : n;
}
// numbers of the thread's two queries: lse, lsx, w, coef, and their intervals; padding and tokens t >= n have none
template <int HG>
static __device__ __forceinline__ void hq_numbers(
    float* x, int* limits, int item, const float* LSE, const float* LSX, const float* W, const float* COEF,
    const int* KS, const int* KE, int n, int H) {
  const int t0 = hg_field(item, 0), g = hg_field(item, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = hg_row(h), t = t0 + Rows<HG, 128>::token(r);
    const bool none = Rows<HG, 128>::padding(r) || t >= n;
    const long long at = (long long)t * H + g * HG + Rows<HG, 128>::head(r);
    const int first = none ? 0 : hg_int(KS, t), end = none ? 0 : hg_int(KE, t);
    const bool seen = end > first + 1;  // with one key both distributions are 1: no gradient
    x[h] = seen ? hg_float(LSE, at) * HG_LOG2E : HG_NOTHING;
    x[2 + h] = seen ? hg_float(LSX, at) * HG_LOG2E : HG_NOTHING;
    x[4 + h] = none ? 0.f : hg_float(W, at) * HG_LOG2E;
    limits[2 * h] = first;
    limits[2 * h + 1] = end;
  }
}
template <int HG>
static __device__ __forceinline__ void hq_limits(int* limits, int item, const int* KS, const int* KE, int n) {
  const int t0 = hg_field(item, 0);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = hg_row(h), t = t0 + Rows<HG, 128>::token(r);
    const bool none = Rows<HG, 128>::padding(r) || t >= n;
    limits[2 * h] = none ? 0 : hg_int(KS, t);
    limits[2 * h + 1] = none ? 0 : hg_int(KE, t);
  }
}
// s = g
template <int N>
static __device__ __forceinline__ void hq_apply(float* s, const float* z, const float* x, float scale) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int h = i / 2 % 2;
    const float e = exp2f(fmaf(z[i], x[4 + h], -x[2 + h])) - exp2f(fmaf(s[i], scale, -x[h]));
    s[i] = z[i] > 0.f ? e : 0.f;
  }
}
template <int N>
static __device__ __forceinline__ void hq_mask(float* s, const int* limits, int item, int i) {
  const int key = hq_key<N>(item, i) + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int low = limits[2 * h] - key;
    const unsigned size = limits[2 * h + 1] - limits[2 * h];
#pragma unroll
    for (int g = 0; g < N / 8; ++g)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        s[4 * g + 2 * h + c] = (unsigned)(8 * g + c - low) < size ? s[4 * g + 2 * h + c] : 0.f;
  }
}
// 64 threads gather the numbers of a row tile: HG heads of key head g, tokens from t0
template <int HG, int N>
static __device__ __forceinline__ void hk_gather(
    int numbers, int t0, int g, const float* LSE, const float* LSX, const float* W, const float* COEF, const int* KS,
    const int* KE, int n, int H) {
  float lse[N / 64], lsx[N / 64], w[N / 64], coef[N / 64];
  int first[N / 64], end[N / 64];
#pragma unroll
  for (int i = 0; i < N / 64; ++i) {
    const int r = i * 64 + threadIdx.x % 64, t = t0 + Rows<HG, N>::token(r);
    lse[i] = lsx[i] = w[i] = coef[i] = 0.f;
    first[i] = end[i] = 0;
    if (!Rows<HG, N>::padding(r) && t < n) {
      const long long at = (long long)t * H + g * HG + Rows<HG, N>::head(r);
      lse[i] = hg_float(LSE, at), lsx[i] = hg_float(LSX, at), w[i] = hg_float(W, at);
      coef[i] = hg_float(COEF, t), first[i] = hg_int(KS, t), end[i] = hg_int(KE, t);
    }
  }
#pragma unroll
  for (int i = 0; i < N / 64; ++i) {
    const int r = i * 64 + threadIdx.x % 64;
    const bool seen = end[i] > first[i] + 1;  // with one key both distributions are 1
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(numbers + r * 16),
                 "f"(seen ? lse[i] * HG_LOG2E : HG_NOTHING), "f"(seen ? lsx[i] * HG_LOG2E : HG_NOTHING),
                 "f"(w[i] * HG_LOG2E), "f"(w[i] * coef[i])
                 : "memory");
    asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(numbers + N * 16 + r * 8), "r"(first[i]), "r"(end[i]) : "memory");
  }
}
// s = g · w · coef: rows keys, columns queries
template <int N>
static __device__ __forceinline__ void hk_apply(float* s, const float* z, int numbers, float scale) {
  const int at = numbers + (threadIdx.x & 3) * 32;
#pragma unroll
  for (int g = 0; g < N / 8; ++g)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float4 x = hg_four(at + g * 128 + c * 16);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 4 * g + 2 * h + c;
        const float e = (exp2f(fmaf(z[i], x.z, -x.y)) - exp2f(fmaf(s[i], scale, -x.x))) * x.w;
        s[i] = z[i] > 0.f ? e : 0.f;
      }
    }
}
template <int N>
static __device__ __forceinline__ void hk_mask(float* s, int numbers, const int* items, int at_item) {
  const int at = numbers + N * 16 + (threadIdx.x & 3) * 16, key = hk_field(items, at_item, 0) * 128 + hg_row(0);
#pragma unroll
  for (int g = 0; g < N / 8; ++g) {
    const int4 x = hg_limits(at + g * 64);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int low = i % 2 ? x.z : x.x, high = i % 2 ? x.w : x.y, here = key + (i / 2) * 8;
      s[4 * g + i] = here >= low && here < high ? s[4 * g + i] : 0.f;
    }
  }
}
// a real, ordered instruction after the wait for the product that reads the old P, or ptxas serialises (C7513)
template <int N>
static __device__ __forceinline__ void hg_pack(void* p, const float* s) {
#pragma unroll
  for (int g = 0; g < N / 4; ++g) {
    unsigned v;
    asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(s[2 * g + 1]), "f"(s[2 * g]));
    ((unsigned*)p)[g] = v;
  }
}
// DQ = w · coef · O and DW = coef · dw
template <int HG, int E>
static __device__ __forceinline__ void hq_store(
    const float* o, const float* dw, const float* x, int item, const float* COEF, void* DQ, float* DW, int n, int H) {
  const int t0 = hg_field(item, 0), key_head = hg_field(item, 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = hg_row(h), t = t0 + Rows<HG, 128>::token(r);
    if (!Rows<HG, 128>::padding(r) && t < n) {
      const long long at = (long long)t * H + key_head * HG + Rows<HG, 128>::head(r);
      const float coef = hg_float(COEF, t), w = x[4 + h] * (coef / HG_LOG2E);
      unsigned* q = (unsigned*)DQ + at * (E / 2) + (threadIdx.x & 3);
      if ((threadIdx.x & 3) == 0) DW[at] = dw[h] * coef;
#pragma unroll
      for (int i = 0; i < E / 8; ++i) {
        unsigned v;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(o[4 * i + 2 * h + 1] * w), "f"(o[4 * i + 2 * h] * w));
        q[4 * i] = v;
      }
    }
  }
}
// slot < 0: DK[kt * 128 + r] += O[r] for rows below S; otherwise PART[slot * 128 + r] = O[r]
template <int E>
static __device__ __forceinline__ void hk_store(const float* o, const int* items, int at, float* DK, float* PART, int S) {
  const int kt = hk_field(items, at, 0), slot = hk_field(items, at, 5);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = hg_row(h);
    if (slot >= 0) {
      float2* p = (float2*)(PART + ((long long)slot * 128 + r) * E) + (threadIdx.x & 3);
#pragma unroll
      for (int g = 0; g < E / 8; ++g) p[4 * g] = make_float2(o[4 * g + 2 * h], o[4 * g + 2 * h + 1]);
    } else if (kt * 128 + r < S) {
      float2* p = (float2*)(DK + ((long long)kt * 128 + r) * E) + (threadIdx.x & 3);
#pragma unroll
      for (int g = 0; g < E / 8; ++g) {
        const float2 old = p[4 * g];
        p[4 * g] = make_float2(old.x + o[4 * g + 2 * h], old.y + o[4 * g + 2 * h + 1]);
      }
    }
  }
}
