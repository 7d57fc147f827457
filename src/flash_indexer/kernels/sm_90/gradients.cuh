#pragma once
#include "../device/accumulator.cuh"
#include "../device/mask_words.cuh"
#include "../device/partial_sums.cuh"
#include "../device/wgmma.cuh"
// tiles of 128 rows of index_q from row first to last: none past the end n, at least one; no rows (an empty item): none
static __device__ __forceinline__ int gd_steps(int first, int last, int n) {
  return last <= first ? 0 : max((min(last, n) - first + 127) / 128, 1);
}
// s = -X Y^T, of X in shared memory or its negative in registers; o += P Y. Addresses as in Tile
template <int E>
static __device__ __forceinline__ void gd_product(float* s, int x, int y) {
  wg_product<128, E, 128, -1>(s, wg_uniform(x), wg_uniform(y));
}
template <int E>
static __device__ __forceinline__ void gd_held_product(float* s, const unsigned* x, int y) {
  wg_product_held<128, E>(s, x, wg_uniform(y));
}
template <int E>
static __device__ __forceinline__ void gd_accumulate(float* o, unsigned* p, int y) {
  wg_accumulate<128, E>(o, p, wg_uniform(y));
}
// p = di * [s < 0]: rows (token, head), columns keys; di [128 / IP, 128]. A thread's rows share a token unless IP = 8
template <int IP>
static __device__ __forceinline__ void gd_query(const float* s, unsigned* p, int di) {
  const int d = di + thread_row() / IP * 256 + (threadIdx.x & 3) * 4;
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    const unsigned d0 = load_shared_word(d + g * 16), d1 = IP == 8 ? load_shared_word(d + 256 + g * 16) : d0;
    p[2 * g] = define_word(d0, mask_signs(s[4 * g], s[4 * g + 1]));
    p[2 * g + 1] = define_word(d1, mask_signs(s[4 * g + 2], s[4 * g + 3]));
  }
}
// the same, and the masks in bits, as `device/mask_words.cuh` says: threads of neighbouring rows, lanes l and l ^ 4, make a word of
// both rows each. MASKS holds the first 32 tiles of 128 rows of a block, MORE the others
template <int IP>
static __device__ __forceinline__ void gd_query_masks(
    const float* s, unsigned* p, int di, void* MASKS, void* MORE, int tile, int place) {
  const int d = di + thread_row() / IP * 256 + (threadIdx.x & 3) * 4;
  unsigned bits[2] = {0u, 0u};
#pragma unroll
  for (int g = 0; g < 16; ++g) {
    const unsigned d0 = load_shared_word(d + g * 16), d1 = IP == 8 ? load_shared_word(d + 256 + g * 16) : d0;
    const unsigned m0 = mask_signs(s[4 * g], s[4 * g + 1]), m1 = mask_signs(s[4 * g + 2], s[4 * g + 3]);
    const unsigned bit = mask_bits(g);
    p[2 * g] = define_word(d0, m0);
    p[2 * g + 1] = define_word(d1, m1);
    bits[0] |= m0 & bit;
    bits[1] |= m1 & bit;
  }
  constexpr int HELD = IP < 32 ? IP : 32;
  unsigned* to = (unsigned*)(place < 32 ? MASKS : MORE) + ((long long)tile * HELD + place % 32) * 512;
  const int odd = threadIdx.x >> 2 & 1, halves = odd ? 0x3276 : 0x5410;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    to[mask_word(thread_row(h), threadIdx.x & 3, odd)] =
        __byte_perm(bits[h], __shfl_xor_sync(0xffffffffu, bits[h], 4), halves);
}
// p = di * w * [s < 0]: rows keys, columns (token, head); di [128 / IP, 128], w [128]
template <int IP>
static __device__ __forceinline__ void gd_key(const float* s, unsigned* p, int di, int w_) {
  const int d = di + thread_row() * 2, w = w_ + (threadIdx.x & 3) * 8;
#pragma unroll
  for (int t = 0; t < 128 / IP; ++t) {
    const float d0 = load_shared_bfloat16(d + t * 256), d1 = load_shared_bfloat16(d + t * 256 + 16);
#pragma unroll
    for (int g = t * (IP / 8); g < (t + 1) * (IP / 8); ++g) {
      const float2 two = load_shared_float2(w + g * 32);
      p[2 * g] = define_word(pack(two.x * d0, two.y * d0), mask_signs(s[4 * g], s[4 * g + 1]));
      p[2 * g + 1] = define_word(pack(two.x * d1, two.y * d1), mask_signs(s[4 * g + 2], s[4 * g + 3]));
    }
  }
}
// address of 16 bytes of row r of the warpgroup's rows of X, which begin at x: columns 8g .. 8g + 7, swizzled
template <int E>
static __device__ __forceinline__ int gd_x_address(int x, int r, int g) {
  const int swizzle = E < 64 ? r / 2 % 4 : r % 8;
  return x + r * (E < 64 ? 2 * E : 128) + g / 8 * 16384 + ((g % 8 ^ swizzle) << 4);
}
// the negative of the warpgroup's rows of X as the A operand of products
template <int E>
static __device__ __forceinline__ void gd_hold(unsigned* held, int x) {
#pragma unroll
  for (int g = 0; g < E / 8; ++g)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      held[2 * g + h] =
          load_shared_word(gd_x_address<E>(x, warpgroup_row() + 8 * h, g) + (threadIdx.x & 3) * 4) ^ 0x80008000u;
}
// dw of the thread's two rows = their o · x
template <int E>
static __device__ __forceinline__ void gd_row_products(const float* o, float* dw, int x) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < E / 8; ++g) {
      const unsigned v = load_shared_word(gd_x_address<E>(x, warpgroup_row() + 8 * h, g) + (threadIdx.x & 3) * 4);
      sum = fmaf(o[4 * g + 2 * h], low_half(v), fmaf(o[4 * g + 2 * h + 1], high_half(v), sum));
    }
    dw[h] = quad_sum(sum);
  }
}
// WQ = w * X in bfloat16, as its tile lies in shared memory, from row `to_row` on; X begins at `row`, and rows past the
// end n are zero
template <int E>
static __device__ __forceinline__ void gd_store_scaled(const float* w, int x, void* WQ, int to_row, int row, int n) {
  char* to = (char*)WQ + (long long)(to_row >> 7) * (256 * E) + (threadIdx.x >> 7) * (128 * (E < 64 ? E : 64));
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float factor = row + thread_row(h) < n ? w[h] : 0.0f;
#pragma unroll
    for (int g = 0; g < E / 8; ++g) {
      const int at = gd_x_address<E>(0, warpgroup_row() + 8 * h, g) + (threadIdx.x & 3) * 4;
      const unsigned v = load_shared_word(x + at);
      *(unsigned*)(to + at) = pack(low_half(v) * factor, high_half(v) * factor);
    }
  }
}
// weights of the thread's two rows of the tile that begins at `row`
static __device__ __forceinline__ void gd_weights(float* w, const float* W, int row, int n) {
  w[0] = load_float(W, min(row + thread_row(), n - 1));
  w[1] = load_float(W, min(row + thread_row(1), n - 1));
}
// DQ = w * O and DW, for heads j < I of tokens t < ntok
template <int E, int IP>
static __device__ __forceinline__ void gd_store_query(
    const float* o, const float* w, const float* dw, void* DQ, float* DW, int t0, int I, int ntok) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + r / IP, j = r % IP;
    if (t < ntok && j < I) {
      const long long row = (long long)t * I + j;
      unsigned* q = (unsigned*)DQ + row * (E / 2) + (threadIdx.x & 3);
      if ((threadIdx.x & 3) == 0) DW[row] = dw[h];
#pragma unroll
      for (int g = 0; g < E / 8; ++g) q[4 * g] = pack(o[4 * g + 2 * h] * w[h], o[4 * g + 2 * h + 1] * w[h]);
    }
  }
}
