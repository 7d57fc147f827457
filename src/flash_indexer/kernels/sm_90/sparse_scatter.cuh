#pragma once
#include "../device/numbers.cuh"
#define SCATTER_THREADS 256
#define SCATTER_KEYS 8192  // of a row at a time
// Row t of di at its keys, zeros between: bfloat16 tiles of 128 tokens by 128 keys, `tiles` of each block of 128 tokens
static __device__ __forceinline__ void scatter_row(
    const float* DI, const int* IDX, const int* COUNT, void* OUT, int t, int width, int tiles) {
  __shared__ __align__(16) unsigned short row[SCATTER_KEYS];
  const int count = min(COUNT[t], width), keys = tiles * 128;
  const long long slots = (long long)t * width;
  unsigned short* out = (unsigned short*)OUT + ((long long)(t >> 7) * tiles * 128 + (t & 127)) * 128;
  for (int first = 0; first < keys; first += SCATTER_KEYS) {
    const int here = min(keys - first, SCATTER_KEYS);
    for (int i = threadIdx.x; i < here / 8; i += SCATTER_THREADS) ((uint4*)row)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int k = threadIdx.x; k < count; k += SCATTER_THREADS) {
      const int key = IDX[slots + k] - first;
      if ((unsigned)key < (unsigned)here) row[key] = (unsigned short)pack(DI[slots + k], 0.f);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < here / 8; i += SCATTER_THREADS) {
      const int key = first + 8 * i;
      *(uint4*)(out + (long long)(key >> 7) * 16384 + (key & 127)) = ((const uint4*)row)[i];
    }
    __syncthreads();
  }
}
