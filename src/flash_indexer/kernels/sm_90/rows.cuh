#pragma once
#include "../device/cluster.cuh"
#include "../device/numbers.cuh"
#include "../device/score_tiles.cuh"
#define ROWS_THREADS 256
#define ROWS_WARPS (ROWS_THREADS / 32)
#define ROWS_KEYS (ROWS_THREADS * 16)
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
// (a, b) of all threads combined, in every thread; MAX or sum. `part` is not used again before all threads have met anew
template <bool MAX, class Row>
static __device__ __forceinline__ float2 rows_reduce(const Row& row, float2 v, float2* part) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    const float a = __shfl_xor_sync(0xffffffffu, v.x, d), b = __shfl_xor_sync(0xffffffffu, v.y, d);
    v = MAX ? make_float2(max_or_nan(v.x, a), max_or_nan(v.y, b)) : make_float2(v.x + a, v.y + b);
  }
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  row.meet();
  v = part[0];
#pragma unroll
  for (int w = 1; w < ROWS_WARPS; ++w) {
    const float2 u = part[w];
    v = MAX ? make_float2(max_or_nan(v.x, u.x), max_or_nan(v.y, u.y)) : make_float2(v.x + u.x, v.y + u.y);
  }
  return v;
}
// KL, entropy and di of a row; `row` says where its scores and di lie: open and close stand around the loads of a piece of
// ROWS_KEYS columns, p and x load four columns from c on, of which one at least is seen, store takes four of the width
template <bool LOGITS, class Row>
static __device__ __forceinline__ void rows_row(Row& row, float w, void* DI, float* KL, float* ENT) {
  __shared__ float2 part[3][ROWS_WARPS];
  const float inf = INFINITY;
  const int width = row.width, low = row.low, high = row.high;
  float p[16], x[16];
  float m = -inf, l = 0.0f, mp = LOGITS ? -inf : 0.0f, z = 0.0f;
  auto load = [&](int begin) {
    row.open();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (begin + i * (ROWS_KEYS / 4) >= width) break;
      const int c = begin + (i * ROWS_THREADS + (int)threadIdx.x) * 4;
      float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a;
      if (c < high && c + 4 > low) {
        a = row.p(c);
        b = row.x(c);
      }
      p[4 * i] = a.x, p[4 * i + 1] = a.y, p[4 * i + 2] = a.z, p[4 * i + 3] = a.w;
      x[4 * i] = b.x, x[4 * i + 1] = b.y, x[4 * i + 2] = b.z, x[4 * i + 3] = b.w;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < low || c + e >= high) p[4 * i + e] = LOGITS ? -inf : 0.0f, x[4 * i + e] = -inf;
    }
    row.close();
  };
  for (int begin = 0; begin < width; begin += ROWS_KEYS) {
    load(begin);
    float top = m, topp = mp, sum = 0.0f, sump = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (begin + i / 4 * (ROWS_KEYS / 4) >= width) break;
      top = max_or_nan(top, x[i]);
      if (LOGITS) topp = max_or_nan(topp, p[i]);
    }
    if (top != -inf) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (begin + i / 4 * (ROWS_KEYS / 4) >= width) break;
        sum += rows_exp(x[i] - top);
      }
      l = l * rows_exp(m - top) + sum;
      m = top;
    }
    if (LOGITS && topp != -inf) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (begin + i / 4 * (ROWS_KEYS / 4) >= width) break;
        sump += rows_exp(p[i] - topp);
      }
      z = z * rows_exp(mp - topp) + sump;
      mp = topp;
    }
    if (!LOGITS) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (begin + i / 4 * (ROWS_KEYS / 4) >= width) break;
        sump += p[i];
      }
      z += sump;
    }
  }
  const float2 top = rows_reduce<true>(row, make_float2(m, mp), part[0]);
  const bool seen = high > low;
  const float M = seen ? top.x : 0.0f, MP = seen ? top.y : 0.0f;
  const float2 total =
      rows_reduce<false>(row, make_float2(l * rows_exp(m - M), LOGITS ? z * rows_exp(mp - MP) : z), part[1]);
  // a teacher whose every probability is 0, because of an lse that is not its own, has no distribution
  const float Z = total.y >= 1.17549435e-38f ? total.y : inf - inf, scale = __frcp_rn(Z);
  const float inverse = __frcp_rn(total.x), log_sum = rows_log(total.x);
  float kl = 0.0f, ent = 0.0f;
  for (int begin = 0; begin < width; begin += ROWS_KEYS) {
    if (width > ROWS_KEYS) load(begin);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (begin + i * (ROWS_KEYS / 4) >= width) break;
      const int c = begin + (i * ROWS_THREADS + (int)threadIdx.x) * 4;
      float d[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float score = x[4 * i + e] - M;
        const float share = LOGITS ? rows_exp(p[4 * i + e] - MP) : p[4 * i + e];
        const float q = fmaf(fmaf(-share * scale, Z, share), scale, share * scale);
        const float log_q = rows_log(q);
        const bool here = c + e >= low && c + e < high;
        const bool counts = here && !(q <= 1.2e-38f);  // NaN does
        kl += counts ? q * (log_q - (score - log_sum)) : 0.0f;
        ent -= counts ? q * log_q : 0.0f;
        d[e] = here ? (rows_exp(score) * inverse - q) * w : 0.0f;
      }
      if (c < width) row.store(DI, c, d);
    }
  }
  const float2 result = rows_reduce<false>(row, make_float2(kl, ent), part[2]);
  if (threadIdx.x == 0) {
    *KL = seen ? result.x : 0.0f;
    *ENT = seen ? result.y : 0.0f;
  }
}
// A row whose scores lie in tiles, copied piece by piece to a ring of stages in shared memory, and its di in tiles
template <int STAGES>
struct TileRow : ScoreRow {
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
    barrier_init(barriers + 8 * (STAGES + threadIdx.x), ROWS_WARPS);
    barriers_ready();
  }
  __syncthreads();
  TileRow<STAGES> row;
  row.stage = row.parity = 0;
  row.ring = ring, row.full = barriers, row.empty = barriers + 8 * STAGES;
  if (first >= end) return;
  int start = load_int(key_start, first), stop = load_int(key_end, first);
  int4 block = *(const int4*)(blocks + 4 * (first >> 7));
  float w = load_float(weight, first);
  for (int t = first; t < end; t += step) {
    (ScoreRow&)row = ScoreRow(block, start, stop, t);
    const float here = w;
    if (t + step < end) {
      start = load_int(key_start, t + step), stop = load_int(key_end, t + step);
      block = *(const int4*)(blocks + 4 * (t + step >> 7));
      w = load_float(weight, t + step);
    }
    if (threadIdx.x < ROWS_THREADS) {
      rows_row<LOGITS>(row, here, DI, KL + t, ENT + t);
    } else {
      for (int pass = 0; pass < (row.width > ROWS_KEYS ? 2 : 1); ++pass)
        for (int piece = 0; piece < row.width; piece += ROWS_KEYS) {
          rows_copy(row, P, X, piece);
          row.next();
        }
    }
  }
}
