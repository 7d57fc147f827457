#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
// What the kernels of the bit form read besides q, k and v: see bits_tables.py.
// whether one of eight bfloat16 is NaN or infinite: all bits of an exponent are set
static __device__ __forceinline__ bool bt_odd(uint4 x) {
  const unsigned w[4] = {x.x, x.y, x.z, x.w};
  bool odd = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) odd |= (w[i] & 0x7f80u) == 0x7f80u || (w[i] & 0x7f800000u) == 0x7f800000u;
  return odd;
}
// A key's rows [G, W] = those of X, [G, stride] of which `columns` count; the rest is zero. A warp. Returns whether one
// of the numbers of the lane is not finite.
template <int W>
static __device__ __forceinline__ bool bt_fill(void* TO, const unsigned short* X, int64_t s, int G, int stride, int columns) {
  bool odd = false;
  for (int i = threadIdx.x & 31; i < G * (W / 8); i += 32) {
    const int g = i / (W / 8), column = i % (W / 8) * 8;
    const unsigned short* from = X + (s * G + g) * stride + column;
    uint4 x;
    if (column + 8 <= columns && ((long long)from & 15) == 0) {
      x = __ldg((const uint4*)from);
    } else {
      unsigned w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned low = column + 2 * j < columns ? from[2 * j] : 0;
        w[j] = low | (column + 2 * j + 1 < columns ? (unsigned)from[2 * j + 1] << 16 : 0);
      }
      x = make_uint4(w[0], w[1], w[2], w[3]);
    }
    odd |= bt_odd(x);
    ((uint4*)TO)[s * G * (W / 8) + i] = x;
  }
  return odd;
}
// 32 keys, a warp each: k and v as wide as the kernels' tiles, zero where one of a key's numbers is not finite; ODD has
// a bit for such a key
template <int W>
static __device__ __forceinline__ void bt_keys(
    unsigned* sm, const void* K, const void* V, void* K_TO, void* V_TO, int* ODD, int S, int G, int k_stride,
    int k_columns, int v_stride, int v_columns, int block) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int64_t s = (int64_t)block * 32 + warp;
  bool odd = false;
  if (s < S) {
    odd = bt_fill<W>(K_TO, (const unsigned short*)K, s, G, k_stride, k_columns);
    odd |= bt_fill<W>(V_TO, (const unsigned short*)V, s, G, v_stride, v_columns);
    odd = __any_sync(0xffffffffu, odd);
    if (odd)
      for (int i = lane; i < G * (W / 8); i += 32)
        ((uint4*)K_TO)[s * G * (W / 8) + i] = ((uint4*)V_TO)[s * G * (W / 8) + i] = make_uint4(0, 0, 0, 0);
  }
  if (lane == 0) sm[warp] = odd;
  __syncthreads();
  const unsigned word = __ballot_sync(0xffffffffu, sm[lane] != 0);
  if (threadIdx.x == 0) ODD[block] = word;
}
// The tiles b of tile a that hold a bit: LIST[a, 0] their number, then they themselves. One warp; tile (a, b) has the
// flags (a · na + i) · step_a + (b · nb + j) · step_b, i < na, j < nb; those beyond end_a, end_b are none.
static __device__ __forceinline__ void bt_list(
    const int* FLAGS, int* LIST, int tiles, int na, int step_a, int end_a, int nb, int step_b, int end_b, int a) {
  const int lane = threadIdx.x & 31;
  int* list = LIST + (int64_t)a * (tiles + 1);
  int found = 0;
  for (int b0 = 0; b0 < tiles; b0 += 32) {
    const int b = b0 + lane;
    bool some = false;
    if (b < tiles)
      for (int i = a * na; i < min((a + 1) * na, end_a); ++i)
        for (int j = b * nb; j < min((b + 1) * nb, end_b); ++j)
          some |= FLAGS[(int64_t)i * step_a + (int64_t)j * step_b] != 0;
    const unsigned mask = __ballot_sync(0xffffffffu, some);
    if (some) list[1 + found + __popc(mask & ((1u << lane) - 1))] = b;
    found += __popc(mask);
  }
  if (lane == 0) list[0] = found;
}
// NUMBERS[h, t] = lse[t, h] · log2(e), OUT[t, h] · G[t, h]; zeros for T <= t < rows. D / 8 lanes a row.
template <int D>
static __device__ __forceinline__ void bt_numbers(
    const void* OUT, const void* G, const float* LSE, float* NUMBERS, int T, int H, int rows, int block) {
  constexpr int LANES = D / 8;
  const int64_t n = (int64_t)block * (256 / LANES) + threadIdx.x / LANES;
  const int t = (int)(n / H), h = (int)(n % H), part = threadIdx.x % LANES;
  float sum = 0.f;
  if (t < T) {
    const uint4 a = __ldg((const uint4*)OUT + n * LANES + part), b = __ldg((const uint4*)G + n * LANES + part);
    const unsigned x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += low_half(x[i]) * low_half(y[i]) + high_half(x[i]) * high_half(y[i]);
  }
#pragma unroll
  for (int m = LANES / 2; m; m >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, m);
  if (part == 0 && t < rows)
    ((float2*)NUMBERS)[(int64_t)h * rows + t] = t < T ? make_float2(__ldg(LSE + n) * LOG2E, sum) : make_float2(0.f, 0.f);
}
// P_SUM[t, slot] = the score of the slot's key, in the tile of 128 queries and keys that PLACE[t / 128, key / 128] names.
// 256 threads take 1,024 slots of a query.
static __device__ __forceinline__ void bt_slots(
    const float* SCORES, const int* PLACE, const int* IDX, const int* COUNT, float* P_SUM, int K, int S, int tiles, int t,
    int part) {
  const int count = COUNT[t], *place = PLACE + (int64_t)(t / 128) * tiles;
  const int64_t row = (int64_t)t * K;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int slot = part * 1024 + j * 256 + threadIdx.x;
    if (slot >= K) return;
    const int s = slot < count ? IDX[row + slot] : -1;
    float p = 0.f;
    if ((unsigned)s < (unsigned)S) p = SCORES[((int64_t)place[s / 128] * 128 + t % 128) * 128 + s % 128];
    P_SUM[row + slot] = p;
  }
}
