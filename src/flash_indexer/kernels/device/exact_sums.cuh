#pragma once
#include "memory.cuh"
#include "numbers.cuh"
// Sums of float32 terms that come in any order, the same bits every time: of integers, two for each number. A row has a
// power of two, its grid, by which its terms are multiplied; a term below 2^17 is rounded and added to the low sum,
// a larger one leaves a multiple of 2^18 for the high sum first. What is lost of a term is half a unit of the grid at most.
// The widths below are for at most 2^13 terms a row: 2^13 · 2^17 and 2^13 · 2^16 are below 2^31.
static constexpr int LOW_BITS = 18, HIGH_BITS = 16;
static constexpr float MOST_HIGH = 1073741824.f;
static constexpr float ROUNDING = 12582912.f;  // 1.5 · 2^23: adding it rounds to whole numbers below 2^22
static constexpr int ROUNDING_BITS = 0x4b400000;
static __device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }
// largest power of two not above x, as an exponent; x positive and normal
static __device__ __forceinline__ int exponent_of(float x) { return (int)(__float_as_uint(x) >> 23 & 255) - 127; }
// |x| < limit, by their bits: not where x is NaN
static __device__ __forceinline__ bool is_below(float x, float limit) {
  return (__float_as_uint(x) & 0x7fffffffu) < __float_as_uint(limit);
}
static __device__ __forceinline__ int rounded(float x) { return __float_as_int(x + ROUNDING) - ROUNDING_BITS; }
static __device__ __forceinline__ void add_int(int* p, int x) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
// two neighbouring sums by one addition: the carry out of the first is taken back when they are read
static __device__ __forceinline__ void add_pair(int* p, int x, int y) {
  const unsigned long long v = (unsigned long long)(unsigned)(y + (x >> 31)) << 32 | (unsigned)x;
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
// what lies in the high word's sum of two that `add_pair` made
static __device__ __forceinline__ int second_of_pair(int2 v) { return v.y - (v.x >> 31); }
