#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
// What the kernels of the bit form read besides q, k and v: see bits_tables.py.
static constexpr int BT_SEGMENT = 512;             // words of a row in shared memory at a time: 16,384 keys
static constexpr int BT_STRIDE = BT_SEGMENT + 1;   // of a row, so that 32 rows lie in 32 banks
// Bits of 32 queries, from t0 on; `sm` points to 32 rows of BT_STRIDE words. 256 threads.
static __device__ __forceinline__ void bt_bits(
    unsigned* sm, const int* IDX, const int* COUNT, const float* SCORES, int* BITS, int* TURNED, int* FLAGS, float* BAD,
    int T, int K, int S, int rows, int words, int block) {
  const int t0 = block * 32, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int w0 = 0; w0 < words; w0 += BT_SEGMENT) {
    const int n = min(BT_SEGMENT, words - w0);
    for (int i = threadIdx.x; i < 32 * BT_STRIDE; i += 256) sm[i] = 0;
    __syncthreads();
    // bits[t, s] = 1
    for (int r = warp; r < 32; r += 8) {
      const int t = t0 + r, count = t < T ? min(COUNT[t], K) : 0;
      bool nan = false;
      for (int i = lane; i < count; i += 32) {
        const int s = IDX[(int64_t)t * K + i], w = (s >> 5) - w0;
        if ((unsigned)s < (unsigned)S && (unsigned)w < (unsigned)n) atomicOr(sm + r * BT_STRIDE + w, 1u << (s & 31));
        if (w0 == 0) nan |= isnan(SCORES[(int64_t)t * K + i]);
      }
      nan = __any_sync(0xffffffffu, nan);
      if (w0 == 0 && lane == 0 && t < T) BAD[t] = nan ? __int_as_float(0x7fffffff) : 0.f;
    }
    __syncthreads();
    // lane: a query; a warp takes the two words of 64 keys
    for (int p = warp * 2; p < n; p += 16) {
      bool some = false;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const unsigned x = sm[lane * BT_STRIDE + p + j];
        BITS[(int64_t)(w0 + p + j) * rows + t0 + lane] = x;
        some |= x != 0;
        unsigned turned = 0;
#pragma unroll
        for (int key = 0; key < 32; ++key) {
          const unsigned column = __ballot_sync(0xffffffffu, x >> key & 1);
          turned = lane == key ? column : turned;
        }
        TURNED[(int64_t)block * words * 32 + (w0 + p + j) * 32 + lane] = turned;
      }
      some = __any_sync(0xffffffffu, some);
      if (lane == 0) FLAGS[(int64_t)block * (words / 2) + (w0 + p) / 2] = some;
    }
    __syncthreads();
  }
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
// P_SUM[t, slot] = the score of the slot's key, in the tile of 128 queries and keys that PLACE[t / 128, key / 128] names
static __device__ __forceinline__ void bt_slots(
    const float* SCORES, const int* PLACE, const int* IDX, const int* COUNT, float* P_SUM, int T, int K, int S, int tiles,
    int64_t first) {
  const int64_t n = first + threadIdx.x;
  if (n >= (int64_t)T * K) return;
  const int t = (int)(n / K), slot = (int)(n % K);
  float p = 0.f;
  if (slot < COUNT[t]) {
    const int s = IDX[n];
    if ((unsigned)s < (unsigned)S)
      p = SCORES[((int64_t)PLACE[(int64_t)(t / 128) * tiles + s / 128] * 128 + t % 128) * 128 + s % 128];
  }
  P_SUM[n] = p;
}
