#pragma once
#include "../device/accumulator.cuh"
// Numbers f of the thread's two rows: 0, 1 reference m (log2 units); 2, 3 this thread's part of the row sums; 4, 5
// factors of O.
// opaque zero, in indices of shared memory: keeps 80 wgmma descriptors from being hoisted out of the loop, and spilled
static __device__ __forceinline__ int mla_zero() {
  int v;
  asm volatile("mov.u32 %0, 0;" : "=r"(v));
  return v;
}
// b: lo, hi of row 0, lo, hi of row 1
static __device__ __forceinline__ void mla_bounds(int* b, const int* KS, const int* KE, int row0, int H, int nt) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = min((row0 + warpgroup_row() + 8 * h) / H, nt - 1);
    b[2 * h] = load_int(KS, t);
    b[2 * h + 1] = load_int(KE, t);
  }
}
static __device__ __forceinline__ void mla_start(float* f) {
  f[0] = f[1] = -1.0e30f;
  f[2] = f[3] = 0.f;
  f[4] = f[5] = 1.f;
}
// adopt the reference of the other warpgroup's tile
static __device__ __forceinline__ void mla_adopt(float* O, float* f, int m) {
  const float a = load_shared_float(m + warpgroup_row() * 4), b = load_shared_float(m + warpgroup_row() * 4 + 32);
  if (__any_sync(0xffffffffu, a != f[0] || b != f[1])) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");  // S; ptxas would put it here itself (C7517)
    const float x = exp2_approximate(f[0] - a), y = exp2_approximate(f[1] - b);
    f[0] = a;
    f[1] = b;
    f[2] *= x;
    f[3] *= y;
    scale_rows<256>(O, x, y);
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
        if (k < b[2 * h] || k >= b[2 * h + 1]) s[4 * g + 2 * h + j] = -INFINITY;
      }
    }
  }
}
// x = P in bfloat16, also stored at p (swizzled [64, 64] tile); m the address of the 64 references. 1 if O is to be
// scaled
static __device__ __forceinline__ int mla_softmax(const float* s, unsigned* x, float* f, float cs, int m, int p) {
  float a = fmaxf(s[0], s[1]), b = fmaxf(s[2], s[3]);
#pragma unroll
  for (int g = 1; g < 8; ++g) {
    a = fmaxf(a, fmaxf(s[4 * g], s[4 * g + 1]));
    b = fmaxf(b, fmaxf(s[4 * g + 2], s[4 * g + 3]));
  }
  const int grow = __any_sync(0xffffffffu, a * cs > f[0] + 8.f || b * cs > f[1] + 8.f);
  if (grow) {
    a = fmaxf(quad_max(a) * cs, f[0]);
    b = fmaxf(quad_max(b) * cs, f[1]);
    f[4] = exp2_approximate(f[0] - a);
    f[5] = exp2_approximate(f[1] - b);
    f[0] = a;
    f[1] = b;
    f[2] *= f[4];
    f[3] *= f[5];
  }
  if ((threadIdx.x & 3) == 0) {
    store_shared(m + warpgroup_row() * 4, f[0]);
    store_shared(m + warpgroup_row() * 4 + 32, f[1]);
  }
  const int lane = threadIdx.x & 31;
  const int row = p + (((threadIdx.x >> 5) & 3) * 16 + ((lane >> 3) & 1) * 8 + (lane & 7)) * 128;
  float l0 = 0.f, l1 = 0.f;
#pragma unroll
  for (int g = 0; g < 8; g += 2) {
#pragma unroll
    for (int i = g; i < g + 2; ++i) {
      const float e0 = exp2_approximate(s[4 * i] * cs - f[0]), e1 = exp2_approximate(s[4 * i + 1] * cs - f[0]);
      const float e2 = exp2_approximate(s[4 * i + 2] * cs - f[1]), e3 = exp2_approximate(s[4 * i + 3] * cs - f[1]);
      l0 += e0 + e1;
      l1 += e2 + e3;
      x[2 * i] = pack(e0, e1);
      x[2 * i + 1] = pack(e2, e3);
    }
    store_shared_matrices(matrix_address(row, lane, g), x + 2 * g);
  }
  f[2] += l0;
  f[3] += l1;
  fence_shared();
  __syncwarp();
  return grow;
}
// this warpgroup's part of the row sums, for the other
static __device__ __forceinline__ void mla_sums(float* f, int l) {
  f[2] = quad_sum(f[2]);
  f[3] = quad_sum(f[3]);
  if ((threadIdx.x & 3) == 0) {
    store_shared(l + warpgroup_row() * 4, f[2]);
    store_shared(l + warpgroup_row() * 4 + 32, f[3]);
  }
}
// l: the other warpgroup's part of the row sums. Out[row, 256 * wg ..] = O / sum; LSE (by warpgroup 0)
static __device__ __forceinline__ void mla_store(
    const float* O, float* f, int l, void* Out, float* LSE, int row0, int n, int wg) {
  const int lane = threadIdx.x & 31, q = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = row0 + warpgroup_row() + 8 * h;
    const float sum = f[2 + h] + load_shared_float(l + warpgroup_row() * 4 + 32 * h);
    const float inv = sum == 0.f ? 0.f : 1.f / sum;
    if (wg == 0 && q == 0 && row < n)
      LSE[row] = sum == 0.f ? -INFINITY : (f[h] + log2f(sum)) * LN2;
    uint4* out = (uint4*)Out + (long long)row * 64 + wg * 32 + q;
#pragma unroll
    for (int k = 0; k < 8; ++k) {  // 32 columns: transpose 4 x 4 words in the quad, 16 bytes a lane
      unsigned v[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) v[g] = pack(O[16 * k + 4 * g + 2 * h] * inv, O[16 * k + 4 * g + 2 * h + 1] * inv);
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
