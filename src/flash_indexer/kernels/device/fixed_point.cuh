#pragma once
#include "memory.cuh"
#include "numbers.cuh"
// Sums of float32 terms that come in any order, the same bits every time: of integers, which have an exponent of their own
// for each row. A row's bound, which no sum of its terms exceeds, has two parts that do not depend on an order either: its
// largest term, and the sum of its terms in units of 2^-bits of that, each rounded up.
static __device__ __forceinline__ unsigned bound_term(float term, float largest, int bits) {
  const float share = fminf(__fdiv_rn(term, largest), 1.f);
  return term > 0.f ? (unsigned)(share * (float)(1u << bits)) + 1u : 0u;
}
// Power of two by which a row's terms are multiplied, so that its sum stays below 2^30; NaN where a term is NaN or infinite
static __device__ __forceinline__ float fixed_scale(unsigned sum, float largest, int bits) {
  if (__float_as_uint(largest) >= 0x7f800000u) return __int_as_float(0x7fffffff);
  const float most = (float)(sum + (sum >> 16) + 1u) * (1.f / (float)(1u << bits)) * largest;
  const int exponent = (int)(__float_as_uint(fmaxf(most, 1.2e-38f)) >> 23) - 127 + 1;  // most < 2^exponent
  return __int_as_float((min(30 - exponent, 126) + 127) << 23);
}
// so many bytes of int32 in shared memory, added to those in global memory
static __device__ __forceinline__ void add_bulk(int* to, int from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
