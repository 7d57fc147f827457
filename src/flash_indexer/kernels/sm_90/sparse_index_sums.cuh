#pragma once
#include "../device/fixed_point.cuh"
#define INDEX_SUMS_THREADS 256
static __device__ __forceinline__ float absolute_or_nan(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }
// C[t] = max_e sum_j |W[t,j] IQ[t,j,e]|, so that |di| C[t] is as large as any term of d_index_k; MOST = the largest of all
template <int E>
static __device__ __forceinline__ void index_largest(
    const void* IQ, const float* W, const float* DI, const int* COUNT, float* C, float* MOST, int t, int I, int width) {
  __shared__ float part[INDEX_SUMS_THREADS * 2], top[INDEX_SUMS_THREADS / 32];
  constexpr int PAIRS = E / 2, GROUPS = INDEX_SUMS_THREADS / PAIRS;
  const int pair = threadIdx.x % PAIRS, group = threadIdx.x / PAIRS;
  float low = 0.f, high = 0.f;
  for (int j = group; j < I; j += GROUPS) {
    const unsigned q = __ldg((const unsigned*)IQ + ((long long)t * I + j) * PAIRS + pair);
    const float w = W[(long long)t * I + j];
    low += absolute_or_nan(w * low_half(q)), high += absolute_or_nan(w * high_half(q));
  }
  part[threadIdx.x * 2] = low, part[threadIdx.x * 2 + 1] = high;
  __syncthreads();
  float c = 0.f, d = 0.f;
  if (threadIdx.x < E)
    for (int g = 0; g < GROUPS; ++g) c += part[g * E + threadIdx.x];
  const int count = min(COUNT[t], width);
  for (int k = threadIdx.x; k < count; k += INDEX_SUMS_THREADS)
    d = fmaxf(d, absolute_or_nan(DI[(long long)t * width + k]));
  const float2 both = make_float2(c, d);
  float2 most = both;
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    most.x = max_or_nan(most.x, __shfl_xor_sync(0xffffffffu, most.x, m));
    most.y = fmaxf(most.y, __shfl_xor_sync(0xffffffffu, most.y, m));
  }
  __syncthreads();
  if ((threadIdx.x & 31) == 0) top[threadIdx.x / 32] = most.x, part[threadIdx.x / 32] = most.y;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < INDEX_SUMS_THREADS / 32; ++w) most.x = max_or_nan(most.x, top[w]), most.y = fmaxf(most.y, part[w]);
  C[t] = most.x;
  const unsigned term = __float_as_uint(most.x * most.y);
  if (term > 0u && term < 0x7f800000u)
    asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(MOST), "r"(term) : "memory");
}
// BOUND[s] += |DI[t,s]| C[t], rounded up, for each selected key
static __device__ __forceinline__ void index_bounds(
    const float* DI, const int* IDX, const int* COUNT, const float* C, const float* MOST, void* BOUND, int t,
    int S, int width) {
  const int count = min(COUNT[t], width);
  const float c = C[t], largest = *MOST;
  for (int k = threadIdx.x; k < count; k += INDEX_SUMS_THREADS) {
    const int key = IDX[(long long)t * width + k];
    if ((unsigned)key < (unsigned)S) add_bound((unsigned long long*)BOUND + key, absolute_or_nan(DI[(long long)t * width + k] * c), largest);
  }
}
// DK[s] += SUMS[s] / scale of s
template <int E>
static __device__ __forceinline__ void index_sums_finish(
    const int* SUMS, const void* BOUND, const float* MOST, float* DK, int S, int block) {
  const long long i = (long long)block * INDEX_SUMS_THREADS + threadIdx.x;  // of vectors of four
  const int s = (int)(i / (E / 4));
  if (s >= S) return;
  const float unit = 1.f / fixed_scale(((const unsigned long long*)BOUND)[s], *MOST);
  const int4 n = ((const int4*)SUMS)[i];
  float4 d = ((const float4*)DK)[i];
  d.x += (float)n.x * unit, d.y += (float)n.y * unit, d.z += (float)n.z * unit, d.w += (float)n.w * unit;
  ((float4*)DK)[i] = d;
}
