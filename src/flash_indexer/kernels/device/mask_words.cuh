#pragma once
#include "numbers.cuh"
// Masks [logit > 0] of a score tile in bits. Row R = t * IP + j is head j of the tile's token t; its 128 keys are four words,
// q = 0 .. 3, of which word q holds those that lane q of a quad has in an accumulator: key 8g + 2q + c is bit
// 8 (2 (g % 2) + c) + 7 - g / 2. Then a shift by g / 2 brings keys 8g + 2q + c, g even and odd, c = 0 and 1, to the tops of
// the four bytes. The words of two rows lie beside one another, and 16 rows are 64 words, one piece of memory.
static __device__ __forceinline__ int mask_word(int R, int q) { return (R >> 1) * 8 + q * 2 + (R & 1); }
// bits of two keys in a word that is being made: c = 0 in the lower half, c = 1 in the upper half
static __device__ __forceinline__ unsigned mask_bits(int g) { return 0x10001u << (8 * (g & 1) + 7 - (g >> 1)); }
// what is made of all of them: the bytes in their places
static __device__ __forceinline__ unsigned mask_word_of(unsigned bits) { return __byte_perm(bits, 0u, 0x3120); }
