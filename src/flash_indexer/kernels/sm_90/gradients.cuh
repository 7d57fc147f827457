#pragma once
// Accumulator of one thread: s[4g+2h+c] = row 16·warp + lane/4 + 8h, column 8g + 2·(lane%4) + c.
// P in registers as the A operand: p[2g+h] = columns 8g + 2·(lane%4) + {0, 1} of row 16·warp + lane/4 + 8h, bf16x2.
// Addresses of shared memory are passed as integers: a pointer argument would bring a proxy fence into the main loop.
// number of i with first + i * step < n; opaque, so that it is not hoisted above the role branch and spilled
static __device__ __forceinline__ int gd_count(int n, int first, int step) {
  asm volatile("" : "+r"(n));
  return n > first ? (int)((unsigned)(n - first + step - 1) / (unsigned)step) : 0;
}
// tiles of 128 rows of index_q from row first to last: none past the end n, at least one; no rows (an empty item): none
static __device__ __forceinline__ int gd_steps(int first, int last, int n) {
  return last <= first ? 0 : max((min(last, n) - first + 127) / 128, 1);
}
static __device__ __forceinline__ int gd_int(const int* p, int i) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ float gd_float(const float* p, int i) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ int gd_address(const void* p) { return (int)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ int gd_row() { return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2); }
static __device__ __forceinline__ unsigned gd_pack(float lo, float hi) {
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
  return v;
}
// 0xffff in each half where s > 0 (bfloat16 has the exponents of float32: the sign survives the rounding)
static __device__ __forceinline__ unsigned gd_mask(float lo, float hi) {
  unsigned m;
  asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(gd_pack(lo, hi)), "r"(0u));
  return m;
}
static __device__ __forceinline__ unsigned gd_di2(int address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
static __device__ __forceinline__ float gd_di(int address) {
  unsigned short v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return __uint_as_float((unsigned)v << 16);
}
// x = di * [s > 0]: rows (token, head), columns keys; di [128 / IP, 128]. A thread's rows share a token unless IP = 8
template <int IP>
static __device__ __forceinline__ void gd_query(const float* s, unsigned* x, int di) {
  const int d = di + gd_row() / IP * 256 + (threadIdx.x & 3) * 4;
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    const unsigned d0 = gd_di2(d + g * 16), d1 = IP == 8 ? gd_di2(d + 256 + g * 16) : d0;
    x[2 * g] = d0 & gd_mask(s[4 * g], s[4 * g + 1]);
    x[2 * g + 1] = d1 & gd_mask(s[4 * g + 2], s[4 * g + 3]);
  }
}
// x = di * w * [s > 0]: rows keys, columns (token, head); di [128 / IP, 128], w [128]
template <int IP>
static __device__ __forceinline__ void gd_key(const float* s, unsigned* x, int di, int w_) {
  const int d = di + gd_row() * 2, w = w_ + (threadIdx.x & 3) * 8;
#pragma unroll
  for (int t = 0; t < 128 / IP; ++t) {
    const float d0 = gd_di(d + t * 256), d1 = gd_di(d + t * 256 + 16);
#pragma unroll
    for (int g = t * (IP / 8); g < (t + 1) * (IP / 8); ++g) {
      float w0, w1;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(w0), "=f"(w1) : "r"(w + g * 32));
      x[2 * g] = gd_pack(w0 * d0, w1 * d0) & gd_mask(s[4 * g], s[4 * g + 1]);
      x[2 * g + 1] = gd_pack(w0 * d1, w1 * d1) & gd_mask(s[4 * g + 2], s[4 * g + 3]);
    }
  }
}
// P must be defined by a real instruction after the wait for the product that reads the old P, or ptxas serialises the
// products (C7513): ones is an opaque ~0
static __device__ __forceinline__ void gd_define(void* p, const unsigned* x, int ones) {
#pragma unroll
  for (int g = 0; g < 32; ++g) {
    unsigned r;
    asm volatile("and.b32 %0, %1, %2;" : "=r"(r) : "r"(x[g]), "r"((unsigned)ones));
    ((unsigned*)p)[g] = r;
  }
}
// weights of the thread's two rows of the tile that begins at `row`
static __device__ __forceinline__ void gd_weights(float* w, const float* W, int row, int n) {
  w[0] = gd_float(W, min(row + gd_row(), n - 1));
  w[1] = gd_float(W, min(row + gd_row() + 8, n - 1));
}
// DQ = w * O and DW, for heads j < I of tokens t < ntok
template <int E, int IP>
static __device__ __forceinline__ void gd_store_query(
    const float* o, const float* w, const float* dw, void* DQ, float* DW, int t0, int I, int ntok) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = gd_row() + 8 * h, t = t0 + r / IP, j = r % IP;
    if (t < ntok && j < I) {
      const long long row = (long long)t * I + j;
      unsigned* q = (unsigned*)DQ + row * (E / 2) + (threadIdx.x & 3);
      if ((threadIdx.x & 3) == 0) DW[row] = dw[h];
#pragma unroll
      for (int g = 0; g < E / 8; ++g) q[4 * g] = gd_pack(o[4 * g + 2 * h] * w[h], o[4 * g + 2 * h + 1] * w[h]);
    }
  }
}
// slot < 0: DK[kt * 128 + r] += O[r] for rows below S; otherwise PART[slot * 128 + r] = O[r]
template <int E>
static __device__ __forceinline__ void gd_store_key(const float* o, float* DK, float* PART, int kt, int slot, int S) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = gd_row() + 8 * h;
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
