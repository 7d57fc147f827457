#pragma once
#include "../device/wgmma.cuh"
#include "head_gradients.cuh"
// Tiles in shared memory as in wgmma.cuh; all have 128 rows or keys. P [128 rows, 128 keys], bfloat16, is read as it lies
// for O += P index_k, and its panel w transposed for the 64 keys of warpgroup w.
// S = q k^T and Z = index_q index_k^T of a warpgroup's 64 rows
template <int D, int E>
static __device__ __forceinline__ void ho_logits(
    float* s, float* z, int q, int index_q, int k, int index_k, int row_tile, int key_tile) {
  const int half = wg_uniform(threadIdx.x >> 7), rows = wg_uniform(row_tile & 1), keys = wg_uniform(key_tile & 1);
  using A = Tile<D, 128>;
  using B = Tile<E, 128>;
  wg_product<128, D, 128>(s, (q >> 4) + half * A::HALF, (k >> 4) + keys * A::SIZE);
  wg_product<128, E, 128>(z, (index_q >> 4) + rows * B::SIZE + half * B::HALF, (index_k >> 4) + keys * B::SIZE);
}
// o += P index_k, for a warpgroup's 64 rows and the 128 keys of a tile; the old o is not read where fresh
template <int E>
static __device__ __forceinline__ void ho_rows(float* o, int p, int index_k, int key_tile, int fresh) {
  using namespace tl;
  using B = Tile<E, 128>;
  using A = Tile<128, 128>;
  const int half = wg_uniform(threadIdx.x >> 7), keys = wg_uniform(key_tile & 1);
  const int a = (p >> 4) + keys * A::SIZE + half * A::HALF;
  const int b = (index_k >> 4) + keys * B::SIZE + (128 * B::ROW >> 4 << 16);
  warpgroup_fence_operand(o, E / 2);
  warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 8; ++k)
    wgmma_ss<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, E, 16, false, true, 1, 1>(
        A::descriptor(a + A::along_row(k)), B::descriptor(b + B::along_column(k)), (uint32_t*)o, k > 0 || !fresh);
  warpgroup_commit_batch();
  warpgroup_fence_operand(o, E / 2);
}
// y = P^T index_q, for a warpgroup's 64 keys and the 128 rows of a tile
template <int E>
static __device__ __forceinline__ void ho_keys(float* y, int p, int index_q, int row_tile, int key_tile) {
  using namespace tl;
  using B = Tile<E, 128>;
  using A = Tile<64, 128>;
  const int half = wg_uniform(threadIdx.x >> 7), rows = wg_uniform(row_tile & 1), keys = wg_uniform(key_tile & 1);
  const int a = (p >> 4) + (keys * 2 + half) * A::SIZE, b = (index_q >> 4) + rows * B::SIZE + (128 * B::ROW >> 4 << 16);
  warpgroup_fence_operand(y, E / 2);
  warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 8; ++k)
    wgmma_ss<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, E, 16, true, true, 1, 1>(
        A::descriptor(a + A::along_column(k)), B::descriptor(b + B::along_column(k)), (uint32_t*)y, k > 0);
  warpgroup_commit_batch();
  warpgroup_fence_operand(y, E / 2);
}
// numbers of the thread's two rows: lse and lsx less log2 |w · coef|, w (all base 2), and the sign of w · coef in both
// halves. For
// d_index_weights a |w| below LEAST counts as that; padding, tokens t >= n and tokens of one key have p = 0
#define HO_LEAST 8.6736174e-19f
template <int HG>
static __device__ __forceinline__ void ho_numbers(
    float* x, unsigned* sign, int item, const float* LSE, const float* LSX, const float* W, const float* COEF,
    const int* KS, const int* KE, int n, int H) {
  const int t0 = item_field(item, row_item::TOKEN), g = item_field(item, row_item::KEY_HEAD);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + Rows<HG, 128>::token(r);
    const bool none = Rows<HG, 128>::padding(r) || t >= n;
    const long long at = (long long)t * H + g * HG + Rows<HG, 128>::head(r);
    const float w = none ? 0.f : load_float(W, at), coef = none ? 0.f : load_float(COEF, t);
    const float factor = fmaxf(fabsf(w), HO_LEAST) * fabsf(coef);
    const bool some = !none && !(factor <= 0.f) && load_int(KE, t) > load_int(KS, t) + 1;
    x[h] = some ? load_float(LSE, at) * LOG2E - log2f(factor) : HG_NOTHING;
    x[2 + h] = some ? load_float(LSX, at) * LOG2E - log2f(factor) : HG_NOTHING;
    x[4 + h] = w * LOG2E;
    sign[h] = (w < 0.f) != (coef < 0.f) ? 0x80008000u : 0u;
  }
}
// z = -1 where a key of the item's i-th tile is not seen, so that no gradient passes
static __device__ __forceinline__ void ho_mask(float* z, const int* limits, int item, int i) {
  mask_keys<128>(z, limits, first_key<128>(item, i), -1.f);
}
// p = g · w · coef in bfloat16: |w · coef| comes with the exponents, its sign and [z > 0] with bits
static __device__ __forceinline__ void ho_apply(
    unsigned* p, const float* s, const float* z, const float* x, const unsigned* sign, float scale) {
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const int h = i / 2 % 2;
    float e[2];
#pragma unroll
    for (int c = 0; c < 2; ++c)
      e[c] = exp2f(fmaf(z[i + c], x[4 + h], -x[2 + h])) - exp2f(fmaf(s[i + c], scale, -x[h]));
    const unsigned v = pack(e[0], e[1]);
    unsigned positive;
    asm("{ .reg .b32 y; cvt.rn.bf16x2.f32 y, %1, %2; set.gt.u32.bf16x2 %0, y, %3; }"
        : "=r"(positive)
        : "f"(z[i + 1]), "f"(z[i]), "r"(0u));
    p[i / 2] = (v & positive) ^ sign[h];
  }
}
// p to this warp's rows of P
static __device__ __forceinline__ void ho_put(const unsigned* v, int p, int key_tile) {
  const int r = (threadIdx.x >> 5) * 16 + (threadIdx.x & 15), row = p + (key_tile & 1) * 32768 + r * 128;
#pragma unroll
  for (int g = 0; g < 16; g += 2) store_shared_matrices(matrix_address(row, r, g), v + 2 * g);
  fence_shared();
}
// SUM[key + r, 16j + 4q + 2a + c] += y of row r and column 16j + 8a + 2q + c, for keys 0 .. S - 1 of the item's i-th
// tile
template <int E>
static __device__ __forceinline__ void ho_add(const float* y, int item, int i, float* SUM, int S) {
  const int first = first_key<128>(item, i) + thread_row();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first + 8 * h;
    float* p = SUM + (long long)key * E + (threadIdx.x & 3) * 4;
    if (key >= 0 && key < S)
#pragma unroll
      for (int j = 0; j < E / 16; ++j)
        asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p + 16 * j), "f"(y[8 * j + 2 * h]),
                     "f"(y[8 * j + 2 * h + 1]), "f"(y[8 * j + 4 + 2 * h]), "f"(y[8 * j + 5 + 2 * h])
                     : "memory");
  }
}
// DQ = O, zero where w is; DW = O·index_q / w
template <int HG, int E>
static __device__ __forceinline__ void ho_store(
    const float* o, int item, const float* W, const void* IQ, void* DQ, float* DW, int n, int H) {
  const int t0 = item_field(item, row_item::TOKEN), g = item_field(item, row_item::KEY_HEAD);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + Rows<HG, 128>::token(r);
    const bool there = !Rows<HG, 128>::padding(r) && t < n;
    const long long at = (long long)t * H + g * HG + Rows<HG, 128>::head(r);
    const float w = there ? load_float(W, at) : 0.f;
    float sum = 0.f;
    if (there) {
      unsigned* to = (unsigned*)DQ + at * (E / 2) + (threadIdx.x & 3);
      const unsigned* q = (const unsigned*)IQ + at * (E / 2) + (threadIdx.x & 3);
#pragma unroll
      for (int i = 0; i < E / 8; ++i) {
        const float a = o[4 * i + 2 * h], b = o[4 * i + 2 * h + 1];
        const unsigned pair = q[4 * i], both = pack(a, b);
        sum = fmaf(a, low_half(pair), sum);
        sum = fmaf(b, high_half(pair), sum);
        to[4 * i] = w == 0.f ? 0u : both;
      }
    }
    sum = quad_sum(sum);
    if (there && (threadIdx.x & 3) == 0) DW[at] = sum / copysignf(fmaxf(fabsf(w), HO_LEAST), w < 0.f ? -1.f : 1.f);
  }
}
