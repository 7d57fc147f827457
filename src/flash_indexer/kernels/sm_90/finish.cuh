#pragma once
#include "../device/numbers.cuh"
static __device__ __forceinline__ unsigned scale_pair(unsigned v, float f) {
  return pack(low_half(v) * f, high_half(v) * f);
}
// words of 4 bytes, each two bfloat16 or one float32
template <int BF16>
static __device__ __forceinline__ void scale_all(void* x, long long rows, int columns, const float* factor) {
  const float f = *factor;
  if (f == 1.0f) return;
  const long long bytes = rows * columns * (BF16 ? 2 : 4), vectors = bytes >> 4;
  const long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
  auto word = [&](unsigned v) { return BF16 ? scale_pair(v, f) : __float_as_uint(__uint_as_float(v) * f); };
  for (long long i = first; i < vectors; i += step) {
    uint4 v = ((uint4*)x)[i];
    ((uint4*)x)[i] = make_uint4(word(v.x), word(v.y), word(v.z), word(v.w));
  }
  const long long whole = vectors * 4, words = bytes >> 2;
  if (first < words - whole) ((unsigned*)x)[whole + first] = word(((unsigned*)x)[whole + first]);
  if (BF16 && (bytes & 2) && first == 0) {
    unsigned short* last = (unsigned short*)x + (bytes >> 1) - 1;
    *last = (unsigned short)scale_pair(*last, f);
  }
}
// columns is a multiple of 32: whole vectors of 8
static __device__ __forceinline__ void finish_cast(const float* x, void* y, long long rows, int columns) {
  const long long vectors = rows * columns >> 3, step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += step) {
    const float4 a = ((const float4*)x)[2 * i], b = ((const float4*)x)[2 * i + 1];
    ((uint4*)y)[i] = make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
  }
}
static __device__ __forceinline__ void finish_loss(const float* weight, const float* kl, float* loss, int tokens) {
  __shared__ double part[8];
  if (blockIdx.x) return;
  double sum = 0.0;
#pragma unroll 16  // loads under way: their latency is what one CTA waits for
  for (int t = threadIdx.x; t < tokens; t += 256) sum += (double)weight[t] * (double)kl[t];
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < 8; ++w) sum += part[w];
    *loss = (float)sum;
  }
}
