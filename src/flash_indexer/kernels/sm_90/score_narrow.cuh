#pragma once
#include "../device/cluster.cuh"
#include "../device/mask_words.cuh"
#include "rows.cuh"
#include "score.cuh"
// rows of 32 bytes, of 32 columns in e4m3: one step of a product
template <int ROWS>
struct Tile<16, ROWS> {
  static __device__ __forceinline__ uint64_t descriptor(int low) { return (uint64_t)0xc0000010u << 32 | (unsigned)low; }
  static __device__ constexpr int along_row(int k) { return 0; }
};
// s = Q K^T of a head, SIGN -1: the negative of it; addresses as in Tile, uniform
template <int D, int SIGN>
static __device__ __forceinline__ void nr_product(float* s, int q, int k) {
  wg_product<128, D, 64, SIGN>(s, q, k);
}
// a += l (s + |s|), twice the weighted ReLU; l = the row scalars of the thread's two rows
static __device__ __forceinline__ void nr_add_twice(const float* s, float* a, const float* l) {
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = fmaf(s[i] + fabsf(s[i]), (i & 2) ? l[1] : l[0], a[i]);
}
// row of Q of the thread's first row, for the warpgroup's tokens from `token` on, at most `last`
static __device__ __forceinline__ int nr_row(int token, int last) { return min(token + warpgroup_row(), last); }
// the thread's first row of OUT: its tokens are the first or the last 64 of their block
static __device__ __forceinline__ int nr_out(int tile, int token) {
  return tile * 128 + (token & 64) + warpgroup_row();
}
// sc_add of exponentials; s is used up. The first part is a loop that ends at once, for no barrier is at -1, which the compiler
// doesn't know: without it all multiplications come first and the special function unit waits for them
static __device__ __forceinline__ void nr_add_exponentials(float* s, float* a, const float* l, float c, int barrier) {
  constexpr int N = 16;
  const Normalizer upper(l[0]), lower(l[1]);
  do {
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = fmaf(s[i], c, (i & 2) ? lower.n : upper.n);
  } while (barrier == -1);
#pragma unroll
  for (int i = N; i < 64 + 2 * N; ++i) {
    const int x = i - N, y = i - 2 * N;
    if (i < 64) s[i] = fmaf(s[i], c, (i & 2) ? lower.n : upper.n);
    if (x < 64) s[x] = exp2_approximate(s[x]);
    if (y >= 0) a[y] = fmaf(s[y], (y & 2) ? lower.f : upper.f, a[y]);
  }
}
// a += l relu(-s), and in `bits` the masks [s < 0] of the thread's two rows (`device/mask_words.cuh`). |s| - s is twice the
// ReLU: an instruction at twice the rate of a maximum
static __device__ __forceinline__ void nr_add_masks(const float* s, float* a, const float* l, unsigned* bits) {
  const float factor[2] = {0.5f * l[0], 0.5f * l[1]};
  bits[0] = bits[1] = 0u;
#pragma unroll
  for (int g = 0; g < 16; ++g)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * g + 2 * h, j = i + 1;
      bits[h] |= mask_signs(s[i], s[j]) & mask_bits(g);
      a[i] = fmaf(fabsf(s[i]) - s[i], factor[h], a[i]);
      a[j] = fmaf(fabsf(s[j]) - s[j], factor[h], a[j]);
    }
}
// where in memory the thread's words of its first row's first two heads lie; those of the next two are 32 bytes on
static __device__ __forceinline__ long long nr_masks(const void* MASKS, int tile, int token, int IP) {
  const int word = mask_word(nr_out(0, token) * IP, threadIdx.x & 3, 0);
  return __cvta_generic_to_global((const unsigned*)MASKS + (long long)tile * (512 * IP) + word);
}
// masks of two heads, the first one's number even, of the thread's rows
static __device__ __forceinline__ void nr_store_masks(
    const unsigned* first, const unsigned* second, long long masks, int IP) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(masks + (long long)(128 * IP) * h),
                 "r"(mask_halves(first[h], second[h], 0)), "r"(mask_halves(first[h], second[h], 1))
                 : "memory");
}
// the warp's copies to memory, which its first lane has asked for, have read what they copy. made: a number that work of the
// meantime ends with, never -1 as an integer, which the compiler doesn't know: it would wait before that work
static __device__ __forceinline__ void nr_stored(float made) {
  if (__float_as_int(made) != -1) wait_bulk_read();
  __syncwarp();
}
// OUT of the thread's row `row` + 8 H by way of shared memory, BYTES for each warp from `at` on: copies of whole runs, which no
// warp waits for; where the warp's 16 rows of 512 bytes are two runs, the second waits for the first to be read. Groups of 8
// columns change places by row, so that rows are written to different banks
template <int BYTES, int H>
static __device__ __forceinline__ void nr_store(const float* a, float* out, int row, int at, float made) {
  constexpr int PARTS = 8192 / BYTES;
  static_assert(PARTS == 1 || PARTS == 2);
  const int lane = threadIdx.x & 31, r = lane >> 2, region = at + ((threadIdx.x >> 5) & 3) * BYTES;
  const int line = region + (PARTS == 1 ? 4096 * H : 0) + 512 * r + 8 * (lane & 3);
  if (H == 1 && PARTS == 2) nr_stored(made);
#pragma unroll
  for (int g = 0; g < 16; g += 4) {
    float x[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) x[j][c] = a[4 * (g + j) + 2 * H + c];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float y[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] = r & 1 ? x[j ^ 1][c] : x[j][c];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j][c] = r & 2 ? y[j ^ 2] : y[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) store_shared(line + 32 * g + 32 * (j ^ (r & 3)), x[j][0], x[j][1]);
  }
  if (H == 0 && PARTS == 1) return;
  fence_shared();
  __syncwarp();
  if (lane == 0) {
    store_bulk(out + (row - r + (PARTS == 2 ? 8 * H : 0)) * 128LL, region, BYTES);
    commit_bulk();
  }
}
// the keys that the thread's two rows see; `token` is the warpgroup's first
static __device__ __forceinline__ void nr_limits(int* limits, const int* KS, const int* KE, int token, int last) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = nr_row(token + 8 * h, last);
    limits[2 * h] = load_int(KS, t), limits[2 * h + 1] = load_int(KE, t);
  }
}
// LEFT of the thread's row `row` + 8 H over the keys that its token sees: the sum (MODE 0), or maximum and sum of exponentials
// (MODE 1); `key` is the tile's first. The row's part of the accumulator is cleared for the next tile. Returns the sum
template <int MODE, int H>
static __device__ __forceinline__ float nr_leave(float* a, float* LEFT, const int* limits, int row, int key) {
  if (limits[2 * H] > key || limits[2 * H + 1] < key + 128) mask_row<128, H>(a, limits, key, MODE == 0 ? 0.0f : -INFINITY);
  float top = -INFINITY, sums[2] = {0.0f, 0.0f};
  if (MODE == 1) {
#pragma unroll
    for (int g = 0; g < 16; ++g) top = max_or_nan(top, max_or_nan(a[4 * g + 2 * H], a[4 * g + 2 * H + 1]));
    top = quad_max_or_nan(top);
  }
  const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int g = 0; g < 16; ++g)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float x = a[4 * g + 2 * H + c];
      sums[c] += MODE == 0 ? x : exp2_approximate((x - base) * LOG2E);
    }
  const float sum = quad_sum(sums[0] + sums[1]);
  if ((threadIdx.x & 3) == 0) {
    if (MODE == 0) LEFT[row + 8 * H] = sum;
    if (MODE == 1) *(float2*)(LEFT + 2LL * (row + 8 * H)) = make_float2(top, sum);
  }
#pragma unroll
  for (int g = 0; g < 16; ++g) a[4 * g + 2 * H] = a[4 * g + 2 * H + 1] = 0.0f;
  return sum;
}
