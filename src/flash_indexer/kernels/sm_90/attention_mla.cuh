#pragma once
// Accumulator of one thread of a 64-row tile: s[4g+2h+c] = row 16*warp + lane/4 + 8h, column 8g + 2*(lane%4) + c.
// f: 0, 1 reference m of the two rows (log2 units); 2, 3 this thread's part of the row sums; 4, 5 factors of O.
static __device__ __forceinline__ int mla_count(int n, int first, int step) {
  asm volatile("" : "+r"(n));
  return n > first ? (int)((unsigned)(n - first + step - 1) / (unsigned)step) : 0;
}
static __device__ __forceinline__ int mla_int(const int* p, int i) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p + i));
  return v;
}
// opaque zero, in indices of shared memory: keeps 80 wgmma descriptors from being hoisted out of the loop, and spilled
static __device__ __forceinline__ int mla_zero() {
  int v;
  asm volatile("mov.u32 %0, 0;" : "=r"(v));
  return v;
}
static __device__ __forceinline__ int mla_address(const void* p) { return (int)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ int mla_row() { return ((threadIdx.x >> 5) & 3) * 16 + ((threadIdx.x & 31) >> 2); }
static __device__ __forceinline__ float mla_lds(int a) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a) : "memory");
  return v;
}
static __device__ __forceinline__ void mla_sts(int a, float v) {
  asm volatile("st.shared.f32 [%0], %1;" :: "r"(a), "f"(v) : "memory");
}
static __device__ __forceinline__ float mla_exp2(float x) {
  float v;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
  return v;
}
static __device__ __forceinline__ unsigned mla_pack(float lo, float hi) {
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
  return v;
}
// b: lo, hi of row 0, lo, hi of row 1
static __device__ __forceinline__ void mla_bounds(int* b, const int* KS, const int* KE, int row0, int H, int nt) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = min((row0 + mla_row() + 8 * h) / H, nt - 1);
    b[2 * h] = mla_int(KS, t);
    b[2 * h + 1] = mla_int(KE, t);
  }
}
static __device__ __forceinline__ void mla_start(float* f) {
  f[0] = f[1] = -1.0e30f;
  f[2] = f[3] = 0.f;
  f[4] = f[5] = 1.f;
}
static __device__ __forceinline__ void mla_scale(float* O, float a, float b) {
#pragma unroll
  for (int g = 0; g < 32; ++g) {
    O[4 * g] *= a;
    O[4 * g + 1] *= a;
    O[4 * g + 2] *= b;
    O[4 * g + 3] *= b;
  }
}
// adopt the reference of the other warpgroup's tile
static __device__ __forceinline__ void mla_adopt(float* O, float* f, int m) {
  const float a = mla_lds(m + mla_row() * 4), b = mla_lds(m + mla_row() * 4 + 32);
  if (__any_sync(0xffffffffu, a != f[0] || b != f[1])) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");  // S; ptxas would put it here itself (C7517)
    const float x = mla_exp2(f[0] - a), y = mla_exp2(f[1] - b);
    f[0] = a;
    f[1] = b;
    f[2] *= x;
    f[3] *= y;
    mla_scale(O, x, y);
  }
}
static __device__ __forceinline__ void mla_mask(float* s, const int* b, int k0) {
  const int c = k0 + (threadIdx.x & 3) * 2;
#pragma unroll
  for (int g = 0; g < 8; ++g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int k = c + 8 * g + j;
        if (k < b[2 * h] || k >= b[2 * h + 1]) s[4 * g + 2 * h + j] = -__int_as_float(0x7f800000);
      }
    }
  }
}
// x = P in bfloat16, also stored at p (swizzled [64, 64] tile); m the address of the 64 references. 1 if O is to be scaled
static __device__ __forceinline__ int mla_softmax(const float* s, unsigned* x, float* f, float cs, int m, int p) {
  float a = fmaxf(s[0], s[1]), b = fmaxf(s[2], s[3]);
#pragma unroll
  for (int g = 1; g < 8; ++g) {
    a = fmaxf(a, fmaxf(s[4 * g], s[4 * g + 1]));
    b = fmaxf(b, fmaxf(s[4 * g + 2], s[4 * g + 3]));
  }
  const int grow = __any_sync(0xffffffffu, a * cs > f[0] + 8.f || b * cs > f[1] + 8.f);
  if (grow) {
    a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
    b = fmaxf(b, __shfl_xor_sync(0xffffffffu, b, 1));
    a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2));
    b = fmaxf(b, __shfl_xor_sync(0xffffffffu, b, 2));
    a = fmaxf(a * cs, f[0]);
    b = fmaxf(b * cs, f[1]);
    f[4] = mla_exp2(f[0] - a);
    f[5] = mla_exp2(f[1] - b);
    f[0] = a;
    f[1] = b;
    f[2] *= f[4];
    f[3] *= f[5];
  }
  if ((threadIdx.x & 3) == 0) {
    mla_sts(m + mla_row() * 4, f[0]);
    mla_sts(m + mla_row() * 4 + 32, f[1]);
  }
  const int lane = threadIdx.x & 31;
  const int q = p + (((threadIdx.x >> 5) & 3) * 16 + ((lane >> 3) & 1) * 8 + (lane & 7)) * 128;
  float l0 = 0.f, l1 = 0.f;
#pragma unroll
  for (int g = 0; g < 8; g += 2) {
#pragma unroll
    for (int i = g; i < g + 2; ++i) {
      const float e0 = mla_exp2(s[4 * i] * cs - f[0]), e1 = mla_exp2(s[4 * i + 1] * cs - f[0]);
      const float e2 = mla_exp2(s[4 * i + 2] * cs - f[1]), e3 = mla_exp2(s[4 * i + 3] * cs - f[1]);
      l0 += e0 + e1;
      l1 += e2 + e3;
      x[2 * i] = mla_pack(e0, e1);
      x[2 * i + 1] = mla_pack(e2, e3);
    }
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::
      "r"(q + (((g + (lane >> 4)) ^ (lane & 7)) << 4)), "r"(x[2 * g]), "r"(x[2 * g + 1]), "r"(x[2 * g + 2]),
      "r"(x[2 * g + 3]) : "memory");
  }
  f[2] += l0;
  f[3] += l1;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  return grow;
}
// P must be defined by real instructions after the wait for the products before (C7513): ones is an opaque ~0
static __device__ __forceinline__ void mla_define(void* p, const unsigned* x, int ones) {
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    unsigned r;
    asm volatile("and.b32 %0, %1, %2;" : "=r"(r) : "r"(x[g]), "r"((unsigned)ones));
    ((unsigned*)p)[g] = r;
  }
}
// this warpgroup's part of the row sums, for the other
static __device__ __forceinline__ void mla_sums(float* f, int l) {
  f[2] += __shfl_xor_sync(0xffffffffu, f[2], 1);
  f[3] += __shfl_xor_sync(0xffffffffu, f[3], 1);
  f[2] += __shfl_xor_sync(0xffffffffu, f[2], 2);
  f[3] += __shfl_xor_sync(0xffffffffu, f[3], 2);
  if ((threadIdx.x & 3) == 0) {
    mla_sts(l + mla_row() * 4, f[2]);
    mla_sts(l + mla_row() * 4 + 32, f[3]);
  }
}
// l: the other warpgroup's part of the row sums. Out[row, 256 * wg ..] = O / sum; LSE (by warpgroup 0)
static __device__ __forceinline__ void mla_store(
    const float* O, float* f, int l, void* Out, float* LSE, int row0, int n, int wg) {
  const int lane = threadIdx.x & 31, q = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + mla_row() + 8 * h;
    const float sum = f[2 + h] + mla_lds(l + mla_row() * 4 + 32 * h);
    const float inv = sum == 0.f ? 0.f : 1.f / sum;
    if (wg == 0 && q == 0 && row < n)
      LSE[row] = sum == 0.f ? -__int_as_float(0x7f800000) : (f[h] + log2f(sum)) * 0.6931471805599453f;
    uint4* out = (uint4*)Out + (long long)row * 64 + wg * 32 + q;
#pragma unroll
    for (int k = 0; k < 8; ++k) {  // 32 columns: transpose 4 x 4 words in the quad, 16 bytes a lane
      unsigned v[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) v[g] = mla_pack(O[16 * k + 4 * g + 2 * h] * inv, O[16 * k + 4 * g + 2 * h + 1] * inv);
      const bool o = q & 1, t = q & 2;
      const unsigned a = __shfl_xor_sync(0xffffffffu, o ? v[0] : v[1], 1);
      const unsigned b = __shfl_xor_sync(0xffffffffu, o ? v[2] : v[3], 1);
      const unsigned p0 = o ? a : v[0], p1 = o ? v[1] : a;  // lane pair's words of group o
      const unsigned p2 = o ? b : v[2], p3 = o ? v[3] : b;  // and of group 2 + o
      const unsigned c = __shfl_xor_sync(0xffffffffu, t ? p0 : p2, 2);
      const unsigned d = __shfl_xor_sync(0xffffffffu, t ? p1 : p3, 2);
      const uint4 w = t ? make_uint4(c, d, p2, p3) : make_uint4(p0, p1, c, d);
      if (row < n) out[4 * k] = w;
    }
  }
}
