#pragma once
#include "numbers.cuh"
// Masks [logit > 0] of a score tile in bits. Row R = t * IP + j is head j of the tile's token t; its 128 keys are 16 bits in
// each of eight words, which it shares with the row beside it: an even row has their lower halves, the odd one after it the
// upper halves. Word (q, c), q = 0 .. 3 and c = 0, 1, has keys 8g + 2q + c, those that lane q of a quad has in an accumulator,
// as bits 8 (g % 2) + 7 - g / 2. Then a shift by g / 2 brings the keys of g even and odd of both rows to the tops of the four
// bytes. The eight words of two rows are 32 bytes in one piece, and 16 rows are 64 words.
static __device__ __forceinline__ int mask_word(int R, int q, int c) { return (R >> 1) * 8 + q * 2 + c; }
// bits of two keys of a row that are being collected: c = 0 in the lower half, c = 1 in the upper half
static __device__ __forceinline__ unsigned mask_bits(int g) { return 0x10001u << (8 * (g & 1) + 7 - (g >> 1)); }
// half n of a and of b in one word, those of a below; n is a constant. Of what two rows have collected it makes word c = n, of
// the words c = 0 and 1 what row n had collected
static __device__ __forceinline__ unsigned mask_halves(unsigned a, unsigned b, int n) {
  return __byte_perm(a, b, n ? 0x7632 : 0x5410);
}
