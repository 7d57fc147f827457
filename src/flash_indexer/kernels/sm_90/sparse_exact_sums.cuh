#pragma once
#include "../device/exact_sums.cuh"
#define EXACT_THREADS 256
#define EXACT_TABLE_WARPS 32
#define EXACT_TABLE_KEYS 16384  // of a table in shared memory
static constexpr int SHARE_BITS = 17;  // a token's bound is counted in units of 2^-17 of the largest: 2^13 of them fit int32
// TERMS[s], SHARES[s] += number of tokens that select key s, and sum of their bounds in those units, each rounded up. A
// token whose bound is not finite counts as the largest: its keys' gradients are NaN whatever the grid is.
// `table`: address of two words for each key of a run
static __device__ __forceinline__ void exact_table(
    const int* IDX, const int* COUNT, const float* BOUND, const float* LARGEST, int* TERMS, int* SHARES, int S, int width,
    int T, int run, int part, int parts, int table) {
  const int first = run * EXACT_TABLE_KEYS, keys = min(S - first, EXACT_TABLE_KEYS), shares = table + keys * 4;
  const int lane = threadIdx.x & 31;
  const float per_unit = (float)(1 << SHARE_BITS) / LARGEST[0];
  for (int i = threadIdx.x; i < keys * 2; i += EXACT_TABLE_WARPS * 32) store_shared(table + i * 4, 0.f);
  __syncthreads();
  for (int t = part * EXACT_TABLE_WARPS + (threadIdx.x >> 5); t < T; t += parts * EXACT_TABLE_WARPS) {
    const int count = min(COUNT[t], width);
    const unsigned share = min((unsigned)(fminf(BOUND[t] * per_unit, (float)(1 << SHARE_BITS))) + 1u, 1u << SHARE_BITS);
#pragma unroll 8
    for (int k = lane; k < count; k += 32) {
      const int key = IDX[(long long)t * width + k] - first;
      if ((unsigned)key >= (unsigned)keys) continue;
      asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(table + key * 4) : "memory");
      asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(shares + key * 4), "r"(share) : "memory");
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < keys; i += EXACT_TABLE_WARPS * 32) {
    const int n = load_shared_int(table + i * 4);
    if (n == 0) continue;
    add_int(TERMS + first + i, n);
    add_int(SHARES + first + i, load_shared_int(shares + i * 4));
  }
}
// GRID[s]: the power of two with 2^HIGH_BITS units of the high sum in the mean bound of the key's terms, or a little less.
// Their sum stays below 2^30, as does that of 2^13 low terms
static __device__ __forceinline__ void exact_grid(
    const int* TERMS, const int* SHARES, const float* LARGEST, float* GRID, int S, int block) {
  const int s = block * EXACT_THREADS + threadIdx.x;
  if (s >= S) return;
  const float mean = (float)SHARES[s] / (float)max(TERMS[s], 1) * LARGEST[0] * two_to_the(-SHARE_BITS);
  const int unit = exponent_of(fminf(fmaxf(mean, 1.2e-38f), 3e38f)) + 1 - HIGH_BITS;  // exponent of a high unit
  GRID[s] = two_to_the(min(max(LOW_BITS - unit, -126), 126));
}
// DK[s] += the sums of both, in units of the grid; NaN where a term was none, or infinite
template <int D>
static __device__ __forceinline__ void exact_finish(
    const int* SUMS, const float* GRID, float* DK, int S, int block) {
  const long long i = (long long)block * EXACT_THREADS + threadIdx.x;  // of pairs
  const long long s = i / (D / 2), numbers = (long long)S * D;
  if (s >= S) return;
  const int2 low = low_sums(((const int2*)SUMS)[i]);
  const int2 high = ((const int2*)(SUMS + numbers))[i];
  const double unit = 1. / GRID[s];
  const bool bad = SUMS[2 * numbers + s];
  const float nan = __int_as_float(0x7fffffff);
  float2 d = ((float2*)DK)[i];
  d.x += bad ? nan : (float)((low.x + high.x * (double)HIGH_UNIT) * unit);
  d.y += bad ? nan : (float)((low.y + high.y * (double)HIGH_UNIT) * unit);
  ((float2*)DK)[i] = d;
}
