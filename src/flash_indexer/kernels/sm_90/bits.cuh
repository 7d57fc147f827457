#pragma once
#include "../device/memory.cuh"
// Bits of a selection, set in shared memory and read there along both axes: see bits.py.
static constexpr int BT_SEGMENT = 512;            // words of a row in shared memory at a time: 16,384 keys
static constexpr int BT_STRIDE = BT_SEGMENT + 1;   // of a row, so that 32 rows lie in 32 banks
// bits[t, s] = 1, of keys in any order; of four ascending ones mostly one word is written
static __device__ __forceinline__ void bt_set(unsigned* row, int s, int w0, int n, int S, int& word, unsigned& bits) {
  const int w = (unsigned)s < (unsigned)S ? (s >> 5) - w0 : -1;
  if (w != word) {
    if ((unsigned)word < (unsigned)n) atomicOr(row + word, bits);
    word = w, bits = 0;
  }
  bits |= 1u << (s & 31);
}
// Bits of 32 queries, from t0 on; `sm` points to 32 rows of BT_STRIDE words and 32 words more. 512 threads.
static __device__ __forceinline__ void bt_bits(
    unsigned* sm, const int* IDX, const int* COUNT, const float* SCORES, const int* ODD, int* BITS, int* TURNED,
    int* FLAGS, float* BAD, int T, int K, int S, int rows, int words, int block) {
  const int t0 = block * 32, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  unsigned* odd_rows = sm + 32 * BT_STRIDE;
  if (warp == 0) odd_rows[lane] = 0;
  for (int w0 = 0; w0 < words; w0 += BT_SEGMENT) {
    const int n = min(BT_SEGMENT, words - w0);
    for (int i = threadIdx.x; i < 32 * BT_STRIDE; i += 512) sm[i] = 0;
    __syncthreads();
    for (int r = warp; r < 32; r += 16) {
      const int t = t0 + r, count = t < T ? min(COUNT[t], K) : 0;
      const int* keys = IDX + (int64_t)t * K;
      unsigned* row = sm + r * BT_STRIDE;
      const bool whole = ((long long)keys & 15) == 0;
#pragma unroll 2
      for (int i = lane * 4; i < count; i += 128) {
        int4 s;
        if (whole && i + 4 <= K) s = __ldg((const int4*)(keys + i));
        else s = make_int4(keys[i], i + 1 < count ? keys[i + 1] : -1, i + 2 < count ? keys[i + 2] : -1, -1);
        if (!(whole && i + 4 <= K) && i + 3 < count) s.w = keys[i + 3];
        int word = -1;
        unsigned bits = 0;
        bt_set(row, s.x, w0, n, S, word, bits);
        bt_set(row, i + 1 < count ? s.y : -1, w0, n, S, word, bits);
        bt_set(row, i + 2 < count ? s.z : -1, w0, n, S, word, bits);
        bt_set(row, i + 3 < count ? s.w : -1, w0, n, S, word, bits);
        if ((unsigned)word < (unsigned)n) atomicOr(row + word, bits);
      }
    }
    __syncthreads();
    // lane: a query; a warp takes the two words of 64 keys
    for (int p = warp * 2; p < n; p += 32) {
      bool some = false, odd = false;
#pragma unroll 1
      for (int j = 0; j < 2; ++j) {
        const unsigned x = sm[lane * BT_STRIDE + p + j];
        BITS[(int64_t)(w0 + p + j) * rows + t0 + lane] = x;
        some |= x != 0;
        odd |= (x & (unsigned)ODD[w0 + p + j]) != 0;
        unsigned turned = 0;
#pragma unroll 8
        for (int key = 0; key < 32; ++key) {
          const unsigned column = __ballot_sync(0xffffffffu, x >> key & 1);
          turned = lane == key ? column : turned;
        }
        TURNED[(int64_t)block * words * 32 + (w0 + p + j) * 32 + lane] = turned;
      }
      if (odd) atomicOr(odd_rows + lane, 1u);
      some = __any_sync(0xffffffffu, some);
      if (lane == 0) FLAGS[(int64_t)block * (words / 2) + (w0 + p) / 2] = some;
    }
    __syncthreads();
  }
  const int t = t0 + lane;
  if (warp == 0 && t < T)
    BAD[t] = odd_rows[lane] || isnan(SCORES[(int64_t)t * K]) ? __int_as_float(0x7fffffff) : 0.f;
}
