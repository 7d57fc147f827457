#pragma once
#include "../device/fixed_point.cuh"
#define INDEX_SUMS_THREADS 256
#define INDEX_TABLE_WARPS 32
#define INDEX_TABLE_KEYS 16384  // of a table in shared memory
static __device__ __forceinline__ float absolute_or_nan(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }
// C[t] = max_e sum_j |W[t,j] IQ[t,j,e]|, so that |di| C[t] is as large as any term of d_index_k
template <int E>
static __device__ __forceinline__ void index_largest(const void* IQ, const float* W, float* C, int t, int I) {
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
  float c = 0.f;
  if (threadIdx.x < E)
    for (int g = 0; g < GROUPS; ++g) c += part[g * E + threadIdx.x];
#pragma unroll
  for (int m = 16; m; m >>= 1) c = max_or_nan(c, __shfl_xor_sync(0xffffffffu, c, m));
  if ((threadIdx.x & 31) == 0) top[threadIdx.x / 32] = c;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < INDEX_SUMS_THREADS / 32; ++w) c = max_or_nan(c, top[w]);
  C[t] = c;
}
// what a row has for one of its keys
template <class Use>
static __device__ __forceinline__ void each_term(
    const float* DI, const int* IDX, const int* COUNT, const float* C, int first, int keys, int width, int T, int part,
    int parts, Use use) {
  const int lane = threadIdx.x & 31;
  for (int t = part * INDEX_TABLE_WARPS + (threadIdx.x >> 5); t < T; t += parts * INDEX_TABLE_WARPS) {
    const int count = min(COUNT[t], width);
    const long long slots = (long long)t * width;
    const float c = C[t];
#pragma unroll 8
    for (int k = lane; k < count; k += 32) {
      const int key = IDX[slots + k] - first;
      if ((unsigned)key < (unsigned)keys) use(key, absolute_or_nan(DI[slots + k] * c));
    }
  }
}
// MOST[s] = max |DI[t,s]| C[t] of the tokens that select s (bits: a NaN is the largest). SUM: then BOUND[s] += these terms.
// `table`: address of a word for each key of a run, and of another one where they are summed
template <bool SUM>
static __device__ __forceinline__ void index_table(
    const float* DI, const int* IDX, const int* COUNT, const float* C, float* MOST, int* BOUND, int S, int width, int T,
    int bits, int run, int part, int parts, int table) {
  const int first = run * INDEX_TABLE_KEYS, keys = min(S - first, INDEX_TABLE_KEYS), largest = table + keys * 4;
  for (int i = threadIdx.x; i < keys; i += INDEX_TABLE_WARPS * 32) {
    store_shared(table + i * 4, 0.f);
    if (SUM) store_shared(largest + i * 4, MOST[first + i]);
  }
  __syncthreads();
  each_term(DI, IDX, COUNT, C, first, keys, width, T, part, parts, [&](int key, float term) {
    if (SUM)
      asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(table + key * 4),
                   "r"(bound_term(term, load_shared_float(largest + key * 4), bits))
                   : "memory");
    else
      asm volatile("red.shared.max.u32 [%0], %1;" ::"r"(table + key * 4), "r"(__float_as_uint(term)) : "memory");
  });
  __syncthreads();
  for (int i = threadIdx.x; i < keys; i += INDEX_TABLE_WARPS * 32) {
    const unsigned v = load_shared_word(table + i * 4);
    if (v == 0u) continue;
    if (SUM)
      asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(BOUND + first + i), "r"(v) : "memory");
    else
      asm volatile("red.relaxed.gpu.global.max.u32 [%0], %1;" ::"l"(MOST + first + i), "r"(v) : "memory");
  }
}
// DK[s] += SUMS[s] / scale of s
template <int E>
static __device__ __forceinline__ void index_sums_finish(
    const int* SUMS, const int* BOUND, const float* MOST, float* DK, int S, int bits, int block) {
  const long long i = (long long)block * INDEX_SUMS_THREADS + threadIdx.x;  // of vectors of four
  const int s = (int)(i / (E / 4));
  if (s >= S) return;
  const float unit = 1.f / fixed_scale(BOUND[s], MOST[s], bits);
  const int4 n = ((const int4*)SUMS)[i];
  float4 d = ((const float4*)DK)[i];
  d.x += (float)n.x * unit, d.y += (float)n.y * unit, d.z += (float)n.z * unit, d.w += (float)n.w * unit;
  ((float4*)DK)[i] = d;
}
