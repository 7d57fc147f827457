#pragma once
#include "memory.cuh"
#include "numbers.cuh"
// Sums of float32 terms that come in any order, the same bits every time: of integers, which have an exponent of their own
// for each row. Its bound is a sum as well: of |terms| in units of the largest one's 2^-40, rounded up.
static constexpr int BOUND_BITS = 40;               // 2^17 terms, and 6 bits to spare below the flag
static constexpr unsigned long long NO_NUMBER = 1ull << 63;  // a term is NaN or infinite
static __device__ __forceinline__ void add_bound(unsigned long long* bound, float term, float largest) {
  const bool wrong = (__float_as_uint(term) & 0x7f800000u) == 0x7f800000u;
  if (wrong)
    asm volatile("red.relaxed.gpu.global.or.b64 [%0], %1;" ::"l"(bound), "l"(NO_NUMBER) : "memory");
  else if (term > 0.f)
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(bound),
                 "l"((unsigned long long)(fminf(__fdividef(term, largest), 1.f) * (float)(1ull << BOUND_BITS)) + 1ull)
                 : "memory");
}
// Power of two by which a row's terms are multiplied, so that its sum stays below 2^30; NaN where it is no number
static __device__ __forceinline__ float fixed_scale(unsigned long long bound, float largest) {
  if (bound >> 63) return __int_as_float(0x7fffffff);
  const float most = __ull2float_ru(bound) * (largest * exp2f(-BOUND_BITS));  // 2^-126 at least counts
  const int exponent = (int)(__float_as_uint(fmaxf(most, 1.2e-38f)) >> 23) - 127 + 1;  // most < 2^exponent
  return __int_as_float((min(30 - exponent, 126) + 127) << 23);
}
// so many bytes of int32 in shared memory, added to those in global memory
static __device__ __forceinline__ void add_bulk(int* to, int from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
static __device__ __forceinline__ void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// the additions of this thread have read what they add
static __device__ __forceinline__ void wait_bulk_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
static __device__ __forceinline__ void wait_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
