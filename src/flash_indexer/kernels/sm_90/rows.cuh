#pragma once
#include "../device/cluster.cuh"
#include "../device/numbers.cuh"
#include "../device/score_tiles.cuh"
#define ROWS_THREADS 256  // that share a row
#define ROWS_KEYS 4096     // of a piece
// e^x for x <= 0, to an ulp: x = n·ln(2) + r, |r| <= ln(2)/2; adding 1.5·2^23 leaves n in the low bits. n = -127, from
// -88 down to -infinity, gives 0. NaN for NaN
static __device__ __forceinline__ float rows_exp(float x) {
  x = max_or_nan(x, -88.0f);
  const float t = fmaf(x, LOG2E, 12582912.0f), n = t - 12582912.0f;
  const float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));
  float y = fmaf(r, 1.37805939e-3f, 8.37312452e-3f);
  y = fmaf(y, r, 4.16695364e-2f);
  y = fmaf(y, r, 1.66664720e-1f);
  y = fmaf(y, r, 4.99999851e-1f);
  y = fmaf(y, r, 1.0f);
  y = fmaf(y, r, 1.0f);
  return y * __int_as_float((__float_as_int(t) << 23) + 0x3f800000);
}
// log(x) of a normal x > 0, to an ulp: x = 2^n·(1 + f), |f| <= 1/3. The special function unit errs by a few 1e-7 of the
// logarithm of a row's whole sum, and of log p̂ where p̂ is near 1
static __device__ __forceinline__ float rows_log(float x) {
  const int bits = __float_as_int(x), n = (bits - 0x3f2aaaab) >> 23;
  const float f = __int_as_float(bits - (n << 23)) - 1.0f, z = f * f;
  float y = -0.130310059f;
  y = fmaf(y, f, 0.140869141f);
  y = fmaf(y, f, -0.121483892f);
  y = fmaf(y, f, 0.139814854f);
  y = fmaf(y, f, -0.166846126f);
  y = fmaf(y, f, 0.200120345f);
  y = fmaf(y, f, -0.249996200f);
  y = fmaf(y, f, 0.333331972f);
  y = fmaf(y, f, -0.5f);
  return fmaf((float)n, LN2, fmaf(y, z, f));
}
// the largest x of the warp, NaN where one is (max_or_nan has made it canonical): integers are ordered as their floats are
static __device__ __forceinline__ float rows_max(float x) {
  const int bits = __float_as_int(x);
  const int top = __reduce_max_sync(0xffffffffu, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(top ^ (top >> 31 & 0x7fffffff));
}
// the sum of a in lanes 0 to 15, that of b in lanes 16 to 31
static __device__ __forceinline__ float rows_sums(float a, float b) {
  const bool upper = threadIdx.x & 16;
  float v = (upper ? b : a) + __shfl_xor_sync(0xffffffffu, upper ? a : b, 16);
#pragma unroll
  for (int d = 8; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  return v;
}
static __device__ __forceinline__ float rows_finite(float top) { return top == -INFINITY ? 0.0f : top; }
// KL, entropy and di of a row; `row` says where its scores and di lie: open and close stand around the loads of a piece of
// ROWS_KEYS columns, p and x load four columns from c on, of which one at least is seen, store takes four of the width.
// Where a piece STAYS until it is closed, its scores are read again, and their exponentials kept in registers instead.
// A warp has every WARPS-th run of 128 columns, and leaves out those of which the query sees none
template <bool LOGITS, class Row>
static __device__ __forceinline__ void rows_row(Row& row, float w, void* DI, float* KL, float* ENT, int t) {
  constexpr int WARPS = Row::THREADS / 32, RUNS = ROWS_KEYS / (Row::THREADS * 4), KEYS = 4 * RUNS;  // keys of a thread
  __shared__ float4 warps[WARPS];    // largest x, sum of its exponentials, sum of p or of its exponentials, largest p
  __shared__ float2 results[WARPS];  // KL, entropy
  const float inf = INFINITY;
  const int width = row.width, low = row.low, high = row.high, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const bool one_piece = width <= ROWS_KEYS, kept = Row::STAYS && one_piece, loads_again = Row::STAYS || !one_piece;
  float p[KEYS], x[KEYS];
  float m = -inf, l = 0.0f, mp = -inf, z = 0.0f;
  auto tile = [&](int begin, int i) { return begin + (i * WARPS + warp) * 128; };
  auto is_seen = [&](int first) { return first < high && first + 128 > low; };
  auto is_whole = [&](int first) { return first >= low && first + 128 <= high; };
  auto load = [&](int first, float* p, float* x) {
    const int c = first + lane * 4;
    const bool whole = is_whole(first);
    float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
    if (whole || (c < high && c + 4 > low)) {
      a = row.p(c);
      b = row.x(c);
    }
    p[0] = a.x, p[1] = a.y, p[2] = a.z, p[3] = a.w;
    x[0] = b.x, x[1] = b.y, x[2] = b.z, x[3] = b.w;
    if (!whole)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < low || c + e >= high) p[e] = LOGITS ? -inf : 0.0f, x[e] = -inf;
  };
  // m = max(x), l = sum(exp(x - m)), z = sum(p), of logits as l
  for (int begin = 0; begin < width; begin += ROWS_KEYS) {
    float top = m, topp = mp, sum = 0.0f, sump = 0.0f;
    row.open();
#pragma unroll
    for (int i = 0; i < RUNS; ++i)
      if (is_seen(tile(begin, i))) load(tile(begin, i), p + 4 * i, x + 4 * i);
    if (!kept) row.close();
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      if (!is_seen(tile(begin, i / 4))) continue;
      top = max_or_nan(top, x[i]);
      if (LOGITS) topp = max_or_nan(topp, p[i]);
    }
    const float safe = rows_finite(top), safep = rows_finite(topp);
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      if (!is_seen(tile(begin, i / 4))) continue;
      const float y = rows_exp(x[i] - safe);
      if (Row::STAYS) x[i] = y;
      sum += y;
      sump += LOGITS ? rows_exp(p[i] - safep) : p[i];
    }
    if (begin > 0) {
      sum = fmaf(l, rows_exp(m - safe), sum);
      sump += LOGITS ? z * rows_exp(mp - safep) : z;
    }
    l = sum, z = sump, m = top, mp = topp;
  }
  {
    const float top = rows_max(m), topp = LOGITS ? rows_max(mp) : 0.0f;
    l *= rows_exp(m - rows_finite(top));
    if (LOGITS) z *= rows_exp(mp - rows_finite(topp));
    const float sum = rows_sums(l, z);
    if ((lane & 15) == 0) ((float2*)&warps[warp])[lane >> 4] = lane ? make_float2(sum, topp) : make_float2(top, sum);
  }
  row.meet();
  float M, MP = 0.0f, Z, scale, inverse, log_sum;
  {
    const float4 part = warps[lane % WARPS];
    M = rows_finite(rows_max(part.x));
    float v = part.y * rows_exp(part.x - M), u = part.z;
    if (LOGITS) MP = rows_finite(rows_max(part.w)), u *= rows_exp(part.w - MP);
    v = lane & WARPS ? u : v;  // sums of exp(x) in lanes 0 to 7, of p in lanes 8 to 15
#pragma unroll
    for (int d = WARPS / 2; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    // a teacher whose every probability is 0, because of an lse that is not its own, has no distribution
    if ((lane & WARPS) && !(v >= 1.17549435e-38f)) v = inf - inf;
    const float r = __frcp_rn(v);
    Z = __shfl_sync(0xffffffffu, v, WARPS);
    scale = __shfl_sync(0xffffffffu, r, WARPS);
    inverse = __shfl_sync(0xffffffffu, r, 0);
    log_sum = __shfl_sync(0xffffffffu, rows_log(v), 0);
  }
  if (kept) inverse *= rows_exp(m - M);
  float kl = 0.0f, ent = 0.0f;
  for (int begin = 0; begin < width; begin += ROWS_KEYS) {
    if (!one_piece) row.open();
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
      const int first = tile(begin, i), c = first + lane * 4;
      if (first >= width) break;
      float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (is_seen(first)) {
        float share[4], score[4], y[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) share[e] = p[4 * i + e], score[e] = x[4 * i + e];
        if (loads_again) load(first, share, score);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          score[e] -= M;
          y[e] = x[4 * i + e];
        }
        if (!kept)
#pragma unroll
          for (int e = 0; e < 4; ++e) y[e] = rows_exp(score[e]);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float s = LOGITS ? rows_exp(share[e] - MP) : share[e];
          const float q = fmaf(fmaf(-s * scale, Z, s), scale, s * scale);
          const float log_q = rows_log(q);
          if (!(q <= 1.2e-38f)) {  // NaN isn't
            kl = fmaf(q, log_q - (score[e] - log_sum), kl);
            ent = fmaf(-q, log_q, ent);
          }
          d[e] = fmaf(y[e], inverse, -q) * w;
        }
        if (!is_whole(first))
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (c + e < low || c + e >= high) d[e] = 0.0f;
      }
      if (c < width) row.store(DI, c, d);
    }
    if (loads_again) row.close();
  }
  const float sum = rows_sums(kl, ent);
  if ((lane & 15) == 0) ((float*)&results[warp])[lane >> 4] = sum;
  row.meet();
  if (threadIdx.x >= 32) return;
  const float2 part = results[lane % WARPS];
  float v = lane & WARPS ? part.y : part.x;
#pragma unroll
  for (int d = WARPS / 2; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
  if (lane == 0) KL[t] = high > low ? v : 0.0f;
  if (lane == WARPS) ENT[t] = high > low ? v : 0.0f;
}
// A row whose scores lie in tiles, copied piece by piece to a ring of stages in shared memory, and its di in tiles
template <int STAGES>
struct TileRow : ScoreRow {
  static constexpr bool STAYS = true;
  static constexpr int THREADS = ROWS_THREADS;
  int stage, parity;
  int ring, full, empty;  // addresses in shared memory
  __device__ __forceinline__ void open() const { barrier_wait(full + 8 * stage, parity); }
  __device__ __forceinline__ void close() {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * stage);
    next();
  }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void meet() const { ::meet(1, ROWS_THREADS); }
  __device__ __forceinline__ float4 p(int c) const {
    return load_shared_float4(ring + stage * (8 * ROWS_KEYS) + c % ROWS_KEYS * 4);
  }
  __device__ __forceinline__ float4 x(int c) const {
    return load_shared_float4(ring + stage * (8 * ROWS_KEYS) + (4 * ROWS_KEYS + c % ROWS_KEYS * 4));
  }
  __device__ __forceinline__ void store(void* di, int c, const float* d) const {
    *(uint2*)((unsigned short*)di + begin + in_tiles(c)) = make_uint2(pack(d[0], d[1]), pack(d[2], d[3]));
  }
};
// the tiles of `row` among columns from `piece` on that the query sees, to the stage
template <class Row>
static __device__ __forceinline__ void rows_copy(const Row& row, const float* P, const float* X, int piece) {
  const int first = max(row.low, piece) >> 7, end = (min(row.high, piece + ROWS_KEYS) + 127) >> 7;
  const int lane = threadIdx.x & 31, full = row.full + 8 * row.stage, to = row.ring + row.stage * (8 * ROWS_KEYS);
  barrier_wait(row.empty + 8 * row.stage, row.parity ^ 1);
  if (lane == 0) barrier_expect(full, max(end - first, 0) * 1024);
  __syncwarp();
  const int tile = first + lane;
  if (tile < end) {
    const long long from = row.begin + in_tiles(tile << 7);
    const int place = to + ((tile << 7) - piece) * 4;
    copy_bulk(place, P + from, 512, full);
    copy_bulk(place + 4 * ROWS_KEYS, X + from, 512, full);
  }
}
// rows first, first + step, ... below end; the last warp copies, the others compute
template <bool LOGITS, int STAGES>
static __device__ __forceinline__ void rows_tile_rows(
    const float* P, const float* X, const int* blocks, const int* key_start, const int* key_end, const float* weight,
    void* DI, float* KL, float* ENT, int first, int end, int step, int ring, int barriers) {
  if (threadIdx.x < STAGES) {
    barrier_init(barriers + 8 * threadIdx.x, 1);
    barrier_init(barriers + 8 * (STAGES + threadIdx.x), ROWS_THREADS / 32);
    barriers_ready();
  }
  __syncthreads();
  TileRow<STAGES> row;
  row.stage = row.parity = 0;
  row.ring = ring, row.full = barriers, row.empty = barriers + 8 * STAGES;
  for (int t = first; t < end; t += step) {
    (ScoreRow&)row = ScoreRow(
        *(const int4*)(blocks + 4 * (t >> 7)), load_int(key_start, t), load_int(key_end, t), t);
    const float w = load_float(weight, t);
    if (t + step < end) {
      prefetch(key_start + t + step), prefetch(key_end + t + step), prefetch(weight + t + step);
      prefetch(blocks + 4 * (t + step >> 7));
    }
    if (threadIdx.x < ROWS_THREADS) {
      rows_row<LOGITS>(row, w, DI, KL, ENT, t);
    } else {
      for (int pass = 0; pass < (row.width > ROWS_KEYS ? 2 : 1); ++pass)
        for (int piece = 0; piece < row.width; piece += ROWS_KEYS) {
          rows_copy(row, P, X, piece);
          row.next();
        }
    }
  }
}
