#pragma once
#include "../device/accumulator.cuh"
// Bits of a tile [128, N] in shared memory, N / 32 runs of 128 words: word j of row r has columns 32j .. 32j + 31.
// words[h * N / 32 + j]: of the thread's two rows, shifted to its first column: those of s[4g+2h+c] are at 8g % 32 + c.
template <int N>
static __device__ __forceinline__ void load_words(unsigned* words, int address) {
  const int shift = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < N / 32; ++j)
      words[h * (N / 32) + j] = load_shared_word(address + j * 512 + thread_row(h) * 4) >> shift;
}
// of s[i]
template <int N>
static __device__ __forceinline__ bool is_selected(const unsigned* words, int i) {
  const int g = i / 4, h = i / 2 % 2;
  return words[h * (N / 32) + g / 4] & 1u << (g % 4 * 8 + i % 2);
}
