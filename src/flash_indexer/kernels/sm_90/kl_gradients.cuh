#pragma once
#include "../device/cluster.cuh"
#include "gradients.cuh"
#include "rows_warp.cuh"
// Places in shared memory, in two rings. Of the first a stage is the tile of index_k, the mask words of PARTS times 128 rows
// (token, head), and di of their tokens, which the warps of rows write; barriers of each stage: it is full; di is there; it
// has been read. Of the second a stage is the teacher's scores and the index scores of the tokens: it is full; it has been
// read, which the warps of rows say as soon as they have the scores in registers. Then index_q's rows: they are there; read
template <int E, int IP, int PARTS_, int STAGES, int SCORE_STAGES>
struct KlRing {
  static constexpr int PARTS = PARTS_, TOKENS = PARTS * 128 / IP, ROW = 512;
  int y, masks, di_rows, scores, x, barriers;  // addresses of the first ones
  int stage, parity, score_stage, score_parity, x_parity;
  __device__ __forceinline__ KlRing(int y_, int masks_, int di_, int scores_, int x_, int barriers_)
      : y(opaque(y_)), masks(opaque(masks_)), di_rows(opaque(di_)), scores(opaque(scores_)), x(opaque(x_)),
        barriers(opaque(barriers_)) {
    stage = parity = score_stage = score_parity = x_parity = 0;
  }
  __device__ __forceinline__ int full() const { return barriers + 8 * stage; }
  __device__ __forceinline__ int ready() const { return barriers + 8 * (STAGES + stage); }
  __device__ __forceinline__ int empty() const { return barriers + 8 * (2 * STAGES + stage); }
  __device__ __forceinline__ int scores_full() const { return barriers + 8 * (3 * STAGES + score_stage); }
  __device__ __forceinline__ int scores_empty() const { return barriers + 8 * (3 * STAGES + SCORE_STAGES + score_stage); }
  __device__ __forceinline__ int x_full() const { return barriers + 8 * (3 * STAGES + 2 * SCORE_STAGES); }
  __device__ __forceinline__ int x_empty() const { return x_full() + 8; }
  __device__ __forceinline__ int di() const { return di_rows + stage * (TOKENS * 256); }
  __device__ __forceinline__ int teacher() const { return scores + score_stage * (TOKENS * 2 * ROW); }
  __device__ __forceinline__ int index() const { return teacher() + TOKENS * ROW; }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void next_scores() {
    if (++score_stage == SCORE_STAGES) score_stage = 0, score_parity ^= 1;
  }
};
// Where word (q, g) of a token's di lies in a stage: of keys 8g + 2q and 8g + 2q + 1, as lane q of a quad has them. Four g are
// 16 bytes, and neither the quad that loads them nor the warp that stores a row meets a bank twice
static __device__ __forceinline__ int kg_di_word(int q, int g) {
  return (q ^ q >> 1) * 16 + ((g >> 2 ^ q >> 1) << 2) + (g & 3);
}
// Where a thread that multiplies finds, in 128 rows of a stage, the mask words of its first row (the second row's are 128
// bytes on) and its di from keys 0 and 32 on (those from 64 and 96 on are 32 bytes on)
template <int IP>
struct KlThread {
  int mask, di[2];
  __device__ __forceinline__ KlThread() {
    const int q = threadIdx.x & 3;
    mask = opaque(4 * mask_word(thread_row(), q, 0));
#pragma unroll
    for (int c = 0; c < 2; ++c) di[c] = opaque(thread_row() / IP * 256 + 4 * kg_di_word(q, 4 * c));
  }
};
// p = di & mask of keys 64 HALF .. 64 HALF + 63: rows (token, head), columns keys. bits: those of the thread's two rows,
// keys 8g + 2q in the lower half, 8g + 2q + 1 in the upper half
template <int IP, int HALF>
static __device__ __forceinline__ void kg_form(unsigned* p, const unsigned* bits, int di, const KlThread<IP>& thread) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int from = di + thread.di[c] + 32 * HALF;
    const int4 four = load_shared_int4(from), other = IP == 8 ? load_shared_int4(from + 256) : four;
    const int first[4] = {four.x, four.y, four.z, four.w}, second[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int g = 8 * HALF + 4 * c + i;
      p[2 * g] = define_word(first[i], spread_signs(bits[0] << (g >> 1), i & 1));
      p[2 * g + 1] = define_word(second[i], spread_signs(bits[1] << (g >> 1), i & 1));
    }
  }
}
// products of an item's key tiles, each in two groups for each part, of which at most two are under way, also from one tile
// to the next. Every lane hands a stage back for itself, and says of its di that it is there, as in `gradients_masked.cuh`
template <int E, int IP, class Ring>
static __device__ __forceinline__ void kg_products(
    Ring& ring, float (*o)[E / 2], unsigned* p, const KlThread<IP>& thread, int count) {
  int before = 0;
#pragma unroll 1
  for (int u = 0; u < count; ++u) {
    barrier_wait(ring.full(), ring.parity);
    const int y = wg_uniform(ring.y + ring.stage * (256 * E) >> 4);
#pragma unroll
    for (int part = 0; part < Ring::PARTS; ++part) {
      const int mask = ring.masks + (ring.stage * Ring::PARTS + part) * 2048 + thread.mask;
      unsigned bits[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int2 words = load_shared_int2(mask + h * 128);
        bits[h] = __byte_perm(words.x, words.y, threadIdx.x & 4 ? 0x7632 : 0x5410);
      }
      if (part == 0) barrier_wait(ring.ready(), ring.parity);
      const int di = ring.di() + part * (128 / IP * 256);
      tl::wait_wgmma<1>();
      kg_form<IP, 0>(p, bits, di, thread);
      wg_accumulate<128, E, 0, 4>(o[part], p, y);
      tl::wait_wgmma<1>();
      if (u > 0 && part == 0) barrier_arrive(before);
      kg_form<IP, 1>(p, bits, di, thread);
      wg_accumulate<128, E, 4, 4>(o[part], p, y);
    }
    before = ring.empty();
    ring.next();
  }
  tl::wait_wgmma<0>();
#pragma unroll
  for (int part = 0; part < Ring::PARTS; ++part) tl::warpgroup_fence_operand(o[part], E / 2);
  if (count > 0) barrier_arrive(before);
}
// d_index_q, d_index_w and w·index_q of the items, by the warps that multiply
template <int E, int IP, class Ring>
static __device__ __forceinline__ void kg_multiply(
    Ring ring, const float* W, const int* ITEMS, void* DQ, float* DW, void* WQ, int I, int q_base, int ntok, int nitems,
    int grid, int base, int nq) {
  constexpr int PARTS = Ring::PARTS;
  float o[PARTS][E / 2], w[PARTS][2], dw[2];
  unsigned p[32];
  const KlThread<IP> thread;
  const int items = count_items(nitems, blockIdx.x, grid);
  int4 item = *(const int4*)(ITEMS + 4 * blockIdx.x);
  for (int it = 0; it < items; ++it) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int i = 0; i < E / 2; ++i) o[part][i] = 0.0f;
    kg_products<E, IP>(ring, o, p, thread, item.z);
    const int first = item.x, row = (first - q_base) * IP;
    item = *(const int4*)(ITEMS + 4 * min(blockIdx.x + (it + 1) * grid, nitems - 1));
#pragma unroll
    for (int part = 0; part < PARTS; ++part) gd_weights(w[part], W, row + part * 128, nq);
    barrier_wait(ring.x_full(), ring.x_parity);
    ring.x_parity ^= 1;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int t = first + part * (128 / IP);
      const int x = ring.x + part * (256 * E) + (threadIdx.x >> 7) * (128 * (E < 64 ? E : 64));
      if (t >= ntok) break;
      gd_row_products<E>(o[part], dw, x);
      gd_store_scaled<E>(w[part], x, WQ, (t - base) * IP, row + part * 128, nq);
      gd_store_query<E, IP>(o[part], w[part], dw, DQ, DW, t, I, ntok);
    }
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(ring.x_empty());
  }
}
// What the warps of rows read: the interval and weight of each token, and the sums of its score tiles
struct KlRows {
  const float *TOPS, *TSUM;
  const int *BLOCKS, *KS, *KE;
  const float* WT;
  int ntok;
};
// Of a warp's tokens t, t + STEP, ...: lane n has the interval and the weight of token n % COUNT, lane i the sums of tile i
template <int COUNT, int STEP>
struct KlTokens {
  int low, high;  // keys that it sees
  float weight;
  RowSums<false> sums[COUNT];
  __device__ __forceinline__ static RowSums<false> tile(const KlRows& rows, int4 item, int t, int i) {
    RowSums<false> sums = {-INFINITY, 0.0f, 0.0f, 0.0f};
    if (i < item.z) {
      const long long r = (long long)(item.w + item.y + i) * 128 + (t & 127);
      const float2 top = *(const float2*)(rows.TOPS + 2 * r);
      sums.m = top.x, sums.l = top.y, sums.z = rows.TSUM[r];
    }
    return sums;
  }
  __device__ __forceinline__ void load(const KlRows& rows, int4 item, int t) {
    const int lane = threadIdx.x & 31, own = t + lane % COUNT * STEP;
    const bool real = own < rows.ntok;
    low = real ? rows.KS[own] : 0, high = real ? rows.KE[own] : 0, weight = real ? rows.WT[own] : 0.0f;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) sums[n] = tile(rows, item, t + n * STEP, lane);
  }
};
// What the warp needs of a token in every tile, in shared memory: in registers, those of four tokens would be too many
struct KlTotals {
  float m, z, scale, log_sum, weight;
  int low, high, unused;
  __device__ __forceinline__ bool sees(int key) const { return key >= low && key < high; }
};
// where a lane's four keys of the warp's first token are: its scores in a stage, the two words of di there
struct KlLane {
  int scores, di[2];
  __device__ __forceinline__ KlLane(int at, int row) {
    const int lane = threadIdx.x & 31;
    scores = opaque(at * row + lane * 16);
#pragma unroll
    for (int c = 0; c < 2; ++c) di[c] = opaque(at * 256 + 4 * kg_di_word(2 * (lane & 1) + c, lane >> 1));
  }
};
// di of the key tile that begins at `key` for the warp's tokens: to the stage, once that is free, and to DI; KL and entropy
// are added to. The scores' stage is handed back
template <int TOKENS, int COUNT, bool WHOLE, class Ring>
static __device__ __forceinline__ void kg_row_tile(
    const Ring& ring, const KlTotals* tokens, float* kl, float* ent, KlLane lane, int key, unsigned short* DI) {
  constexpr int STEP = TOKENS / COUNT, HELD = COUNT < 2 ? COUNT : 2;
  uint2 words[COUNT];
#pragma unroll
  for (int first = 0; first < COUNT; first += HELD) {
    float4 p[HELD], x[HELD];
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
      const int from = lane.scores + (first + n) * STEP * Ring::ROW;
      p[n] = load_shared_float4(ring.teacher() + from), x[n] = load_shared_float4(ring.index() + from);
    }
    if (first + HELD == COUNT) {
      fence_shared();  // the copy engine may write there as soon as all have arrived: not before these loads are done
      barrier_arrive(ring.scores_empty());
    }
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
      const float score[4] = {x[n].x, x[n].y, x[n].z, x[n].w}, share[4] = {p[n].x, p[n].y, p[n].z, p[n].w};
      const KlTotals token = tokens[first + n];
      const RowTotals<false> totals(token.m, token.z, token.scale, token.log_sum);
      float d[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool seen = WHOLE || token.sees(key + (threadIdx.x & 31) * 4 + c);
        d[c] = totals.pair(seen ? share[c] : 0.0f, seen ? score[c] : -INFINITY, token.weight, kl[first + n], ent[first + n]);
        if (!seen) d[c] = 0.0f;
      }
      words[first + n] = make_uint2(pack(d[0], d[1]), pack(d[2], d[3]));
    }
  }
  barrier_wait(ring.empty(), ring.parity ^ 1);
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    store_shared_int(ring.di() + lane.di[0] + n * STEP * 256, words[n].x);
    store_shared_int(ring.di() + lane.di[1] + n * STEP * 256, words[n].y);
  }
  barrier_arrive(ring.ready());
#pragma unroll
  for (int n = 0; n < COUNT; ++n) *(uint2*)(DI + n * STEP * 128) = words[n];
}
// KL, entropy and di of the items' tokens. Of WARPS warps each takes tokens at, at + WARPS, ... of an item; where there are more
// warps than tokens, SHARE of them take a token's key tiles in turns
template <int IP, int WARPS, class Ring>
static __device__ __forceinline__ void kg_rows(
    Ring ring, KlRows rows, const int* ITEMS, void* DI_, float* KL, float* ENT, int nitems, int grid, int warp) {
  constexpr int TOKENS = Ring::TOKENS, SHARE = WARPS > TOKENS ? WARPS / TOKENS : 1, COUNT = TOKENS * SHARE / WARPS;
  static_assert(COUNT * WARPS == TOKENS * SHARE, "every warp has as much to do");
  __shared__ float2 part[2][SHARE][TOKENS];
  __shared__ __align__(16) KlTotals all[WARPS][COUNT];
  KlTotals* const tokens = all[warp];
  const int at = warp % TOKENS, share = warp / TOKENS;
  const int lane = threadIdx.x & 31, items = count_items(nitems, blockIdx.x, grid);
  unsigned short* DI = (unsigned short*)DI_;
  const KlLane where(at, Ring::ROW);
  int4 item, coming = *(const int4*)(ITEMS + 4 * blockIdx.x);
  KlTokens<COUNT, WARPS> later;
  later.load(rows, coming, coming.x + at);
  for (int it = 0; it < items; ++it) {
    item = coming;
    coming = *(const int4*)(ITEMS + 4 * min(blockIdx.x + (it + 1) * grid, nitems - 1));
    const int t = item.x + at, place = (item.x & 127) + at;
    // keys that every token sees
    const int low = __reduce_max_sync(0xffffffffu, later.low), high = __reduce_min_sync(0xffffffffu, later.high);
    float kl[COUNT], ent[COUNT];
    __syncwarp();
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      RowSums<false> sums = later.sums[n];
      for (int i = 32 + lane; i < item.z; i += 32)
        sums.merge(KlTokens<COUNT, WARPS>::tile(rows, item, t + n * WARPS, i));
      sums.combine();
      const RowTotals<false> of(sums);
      if (lane == n)
        tokens[n] = {of.m, of.z, of.scale, of.log_sum, later.weight, later.low, later.high, 0};
      kl[n] = ent[n] = 0.0f;
    }
    __syncwarp();
    unsigned short* di = DI + ((long long)(item.w + item.y) * 128 + place) * 128 + lane * 4;
    for (int i = 0, key = item.y * 128; i < item.z; ++i, key += 128, di += 16384) {
      barrier_wait(ring.scores_full(), ring.score_parity);
      if (SHARE == 1 || i % SHARE == share) {
        if (key >= low && key + 128 <= high)
          kg_row_tile<TOKENS, COUNT, true>(ring, tokens, kl, ent, where, key, di);
        else
          kg_row_tile<TOKENS, COUNT, false>(ring, tokens, kl, ent, where, key, di);
      } else {
        barrier_arrive(ring.scores_empty());
      }
      ring.next(), ring.next_scores();
      if (i == 0) later.load(rows, coming, coming.x + at);
    }
    // zeros in the tiles of the tokens' block that the item doesn't visit
    const int4 block = *(const int4*)(rows.BLOCKS + 4 * (item.x >> 7));
    for (int key = block.y + share; key < block.z; key += SHARE)
      if (key < item.y || key >= item.y + item.z)
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
          *(uint2*)(DI + ((long long)(block.x + key) * 128 + place + n * WARPS) * 128 + lane * 4) = make_uint2(0, 0);
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      float2 result = rows_warp_sum(kl[n], ent[n]);
      if (SHARE > 1) {  // the other parity's numbers may still be read
        if (lane == 0) part[it & 1][share][at] = result;
        meet(1 + at, 32 * SHARE);
        if (share > 0) continue;
        result = part[it & 1][0][at];
        for (int s = 1; s < SHARE; ++s) result.x += part[it & 1][s][at].x, result.y += part[it & 1][s][at].y;
      }
      const bool sees = tokens[n].high > tokens[n].low;
      if (lane == 0 && t + n * WARPS < rows.ntok) {
        KL[t + n * WARPS] = sees ? result.x : 0.0f;
        ENT[t + n * WARPS] = sees ? result.y : 0.0f;
      }
    }
  }
}
