#pragma once
static constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
// 2^x by the special function unit, denormal results are zero
static __device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// whether x is NaN, by its bits: fast arithmetic may take comparisons with NaN as it likes
static __device__ __forceinline__ bool isnan_bits(float x) { return (__float_as_uint(x) & 0x7fffffffu) > 0x7f800000u; }
// max(x, y), NaN where one is: fmaxf would hide it
static __device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
// max_or_nan(x, 0), with the zero in the instruction rather than in a register
static __device__ __forceinline__ float relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
// two bfloat16 in a word, the first in the lower half
static __device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
static __device__ __forceinline__ float low_half(unsigned v) { return __uint_as_float(v << 16); }
static __device__ __forceinline__ float high_half(unsigned v) { return __uint_as_float(v & 0xffff0000u); }
// 0xffff in each half where s > 0 (bfloat16 has the exponents of float32: the sign survives the rounding)
static __device__ __forceinline__ unsigned mask_positive(float lo, float hi) {
  unsigned m;
  asm("set.gt.u32.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(pack(lo, hi)), "r"(0u));
  return m;
}
// 0xffff in each half where s has a minus sign
static __device__ __forceinline__ unsigned mask_signs(float lo, float hi) {
  unsigned m;
  asm("prmt.b32 %0, %1, %2, 0xffbb;" : "=r"(m) : "r"(__float_as_uint(lo)), "r"(__float_as_uint(hi)));
  return m;
}
// 0xffff in the lower half where byte n of x has its top bit, in the upper half for byte n + 2; n is a constant
static __device__ __forceinline__ unsigned spread_signs(unsigned x, int n) {
  unsigned m;
  asm("prmt.b32 %0, %1, %1, %2;" : "=r"(m) : "r"(x), "r"(n ? 0xbb99 : 0xaa88));
  return m;
}
