#pragma once
#include "../device/cluster.cuh"
#include "gradients.cuh"
#include "rows_warp.cuh"
// Places in shared memory. A stage: the tile of index_k, the mask words of PARTS times 128 rows (token, head), and of their
// tokens the teacher's scores, the index scores, and di, which the warps of rows write. Barriers of each stage: it is
// full; di is there; it has been read. Behind them those of index_q's rows: they are there; they have been read
template <int E, int IP, int PARTS_, int STAGES, int X_STAGES>
struct KlRing {
  static constexpr int PARTS = PARTS_, TOKENS = PARTS * 128 / IP, ROW = 512, SCORES_BYTES = TOKENS * 2 * ROW + TOKENS * 256;
  int y, masks, scores, x, barriers;  // addresses of the first ones
  int stage, parity, x_stage, x_parity;
  __device__ __forceinline__ KlRing(int y_, int masks_, int scores_, int x_, int barriers_)
      : y(opaque(y_)), masks(opaque(masks_)), scores(opaque(scores_)), x(opaque(x_)), barriers(opaque(barriers_)) {
    stage = parity = x_stage = x_parity = 0;
  }
  __device__ __forceinline__ int full() const { return barriers + 8 * stage; }
  __device__ __forceinline__ int ready() const { return barriers + 8 * (STAGES + stage); }
  __device__ __forceinline__ int empty() const { return barriers + 8 * (2 * STAGES + stage); }
  __device__ __forceinline__ int x_full() const { return barriers + 8 * (3 * STAGES + x_stage); }
  __device__ __forceinline__ int x_empty() const { return barriers + 8 * (3 * STAGES + X_STAGES + x_stage); }
  __device__ __forceinline__ int teacher() const { return scores + stage * SCORES_BYTES; }
  __device__ __forceinline__ int index() const { return teacher() + TOKENS * ROW; }
  __device__ __forceinline__ int di() const { return teacher() + TOKENS * 2 * ROW; }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void next_x() {
    if (++x_stage == X_STAGES) x_stage = 0, x_parity ^= 1;
  }
};
// Where word (q, g) of a token's di lies in a stage: of keys 8g + 2q and 8g + 2q + 1, as lane q of a quad has them. Four g are
// 16 bytes, and neither the quad that loads them nor the warp that stores a row meets a bank twice
static __device__ __forceinline__ int kg_di_word(int q, int g) {
  return (q ^ q >> 1) * 16 + ((g >> 2 ^ q >> 1) << 2) + (g & 3);
}
// p = di & mask of keys 16 FIRST .. 16 (FIRST + 4) - 1: rows (token, head), columns keys. bits: words of the thread's two rows
template <int IP, int FIRST>
static __device__ __forceinline__ void kg_form(unsigned* p, const unsigned* bits, int di) {
  const int q = threadIdx.x & 3, d = di + thread_row() / IP * 256;
#pragma unroll
  for (int g = 2 * FIRST; g < 2 * FIRST + 8; g += 4) {
    const int4 four = load_shared_int4(d + 4 * kg_di_word(q, g));
    const int4 other = IP == 8 ? load_shared_int4(d + 256 + 4 * kg_di_word(q, g)) : four;
    const int first[4] = {four.x, four.y, four.z, four.w}, second[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[2 * (g + i)] = define_word(first[i], spread_pair(bits[0] << (g + i >> 1), i & 1));
      p[2 * (g + i) + 1] = define_word(second[i], spread_pair(bits[1] << (g + i >> 1), i & 1));
    }
  }
}
// products of `COUNT` key tiles, each in two groups for each part, of which at most two are under way; none at the end.
// Every lane hands a stage back for itself, and says of its di that it is there, as in `gradients_masked.cuh`
template <int E, int IP, int COUNT, class Ring>
static __device__ __forceinline__ void kg_group(Ring& ring, float (*o)[E / 2], unsigned* p) {
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    const int before = ring.empty();
    if (u > 0) ring.next();
    barrier_wait(ring.full(), ring.parity);
    const int y = wg_uniform(ring.y + ring.stage * (256 * E) >> 4);
#pragma unroll
    for (int part = 0; part < Ring::PARTS; ++part) {
      const int mask = ring.masks + (ring.stage * Ring::PARTS + part) * 2048, di = ring.di() + part * (128 / IP * 256);
      const unsigned bits[2] = {
          load_shared_word(mask + 4 * mask_word(thread_row(), threadIdx.x & 3)),
          load_shared_word(mask + 4 * mask_word(thread_row(1), threadIdx.x & 3)),
      };
      if (part == 0) barrier_wait(ring.ready(), ring.parity);
      const bool first = u + part == 0;
      if (!first) tl::wait_wgmma<1>();
      kg_form<IP, 0>(p, bits, di);
      wg_accumulate<128, E, 0, 4>(o[part], p, y);
      if (!first) tl::wait_wgmma<1>();
      if (u > 0 && part == 0) barrier_arrive(before);
      kg_form<IP, 4>(p, bits, di);
      wg_accumulate<128, E, 4, 4>(o[part], p, y);
    }
  }
  tl::wait_wgmma<0>();
#pragma unroll
  for (int part = 0; part < Ring::PARTS; ++part) tl::warpgroup_fence_operand(o[part], E / 2);
  barrier_arrive(ring.empty());
  ring.next();
}
// d_index_q, d_index_w and w·index_q of the items, by the warps that multiply
template <int E, int IP, class Ring>
static __device__ __forceinline__ void kg_multiply(
    Ring ring, const float* W, const int* ITEMS, void* DQ, float* DW, void* WQ, int I, int q_base, int ntok, int nitems,
    int grid, int base, int nq) {
  constexpr int PARTS = Ring::PARTS, COUNT = 2 / PARTS;
  float o[PARTS][E / 2], w[PARTS][2], dw[2];
  unsigned p[32];
  const int items = count_items(nitems, blockIdx.x, grid);
  int4 coming = *(const int4*)(ITEMS + 4 * blockIdx.x);
  for (int it = 0; it < items; ++it) {
    const int4 item = coming;
    coming = *(const int4*)(ITEMS + 4 * min(blockIdx.x + (it + 1) * grid, nitems - 1));
    const int row = (item.x - q_base) * IP;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      gd_weights(w[part], W, row + part * 128, nq);
#pragma unroll
      for (int i = 0; i < E / 2; ++i) o[part][i] = 0.0f;
    }
    for (int i = 0; i < item.z / COUNT; ++i) kg_group<E, IP, COUNT>(ring, o, p);
    if (COUNT > 1 && item.z & 1) kg_group<E, IP, 1>(ring, o, p);
    barrier_wait(ring.x_full(), ring.x_parity);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int t = item.x + part * (128 / IP);
      const int x = ring.x + (ring.x_stage * PARTS + part) * (256 * E) + (threadIdx.x >> 7) * (128 * (E < 64 ? E : 64));
      if (t >= ntok) break;
      gd_row_products<E>(o[part], dw, x);
      gd_store_scaled<E>(w[part], x, WQ, (t - base) * IP, row + part * 128, nq);
      gd_store_query<E, IP, 0>(o[part], w[part], dw, DQ, DW, t, I, ntok);
    }
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(ring.x_empty());
    ring.next_x();
  }
}
// What the warps of rows read: the interval and weight of each token, and the sums of its score tiles
struct KlRows {
  const float *TOPS, *TSUM;
  const int *BLOCKS, *KS, *KE;
  const float* WT;
  int ntok;
};
// a token of an item, and in each lane the sums of one of its tiles
struct KlToken {
  int low, high;  // keys that it sees
  float weight;
  RowSums<false> sums;
  // tiles lane, lane + 32, ...: from the i-th on
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
    const bool real = t < rows.ntok;
    low = real ? rows.KS[t] : 0, high = real ? rows.KE[t] : 0, weight = real ? rows.WT[t] : 0.0f;
    sums = tile(rows, item, t, threadIdx.x & 31);
  }
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
// di of the key tile that begins at `key` for the warp's tokens: to the stage and to DI; KL and entropy are added to
template <int TOKENS, int COUNT, bool WHOLE, class Ring>
static __device__ __forceinline__ void kg_row_tile(
    const Ring& ring, const KlToken* tokens, const RowTotals<false>* totals, float* kl, float* ent, KlLane lane, int key,
    unsigned short* DI) {
  constexpr int STEP = TOKENS / COUNT;
  float4 p[COUNT], x[COUNT];
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const int from = lane.scores + n * STEP * Ring::ROW;
    p[n] = load_shared_float4(ring.teacher() + from), x[n] = load_shared_float4(ring.index() + from);
  }
#pragma unroll
  for (int n = 0; n < COUNT; ++n) {
    const float score[4] = {x[n].x, x[n].y, x[n].z, x[n].w}, share[4] = {p[n].x, p[n].y, p[n].z, p[n].w};
    float d[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int s = key + (threadIdx.x & 31) * 4 + c;
      const bool seen = WHOLE || (s >= tokens[n].low && s < tokens[n].high);
      d[c] = totals[n].pair(seen ? share[c] : 0.0f, seen ? score[c] : -INFINITY, tokens[n].weight, kl[n], ent[n]);
      if (!seen) d[c] = 0.0f;
    }
    const unsigned low = pack(d[0], d[1]), high = pack(d[2], d[3]);
    store_shared_int(ring.di() + lane.di[0] + n * STEP * 256, low);
    store_shared_int(ring.di() + lane.di[1] + n * STEP * 256, high);
    *(uint2*)(DI + n * STEP * 128) = make_uint2(low, high);
  }
}
// KL, entropy and di of the items' tokens. Of WARPS warps each takes tokens at, at + WARPS, ... of an item; where there are more
// warps than tokens, SHARE of them take a token's key tiles in turns
template <int IP, int WARPS, class Ring>
static __device__ __forceinline__ void kg_rows(
    Ring ring, KlRows rows, const int* ITEMS, void* DI_, float* KL, float* ENT, int nitems, int grid, int warp) {
  constexpr int TOKENS = Ring::TOKENS, SHARE = WARPS > TOKENS ? WARPS / TOKENS : 1, COUNT = TOKENS * SHARE / WARPS;
  static_assert(COUNT * WARPS == TOKENS * SHARE, "every warp has as much to do");
  __shared__ float2 part[2][SHARE][TOKENS];
  const int at = warp % TOKENS, share = warp / TOKENS;
  const int lane = threadIdx.x & 31, items = count_items(nitems, blockIdx.x, grid);
  unsigned short* DI = (unsigned short*)DI_;
  const KlLane where(at, Ring::ROW);
  int4 item, coming = *(const int4*)(ITEMS + 4 * blockIdx.x);
  KlToken tokens[COUNT], later[COUNT];
#pragma unroll
  for (int n = 0; n < COUNT; ++n) later[n].load(rows, coming, coming.x + at + n * WARPS);
  for (int it = 0; it < items; ++it) {
    item = coming;
    coming = *(const int4*)(ITEMS + 4 * min(blockIdx.x + (it + 1) * grid, nitems - 1));
    const int t = item.x + at, place = (item.x & 127) + at;
    RowTotals<false> totals[COUNT];
    float kl[COUNT], ent[COUNT];
    int low = 0, high = 0x7fffffff;  // keys that every token sees
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      tokens[n] = later[n];
      for (int i = 32 + lane; i < item.z; i += 32)
        tokens[n].sums.merge(KlToken::tile(rows, item, t + n * WARPS, i));
      tokens[n].sums.combine();
      totals[n] = RowTotals<false>(tokens[n].sums);
      kl[n] = ent[n] = 0.0f;
      low = max(low, tokens[n].low), high = min(high, tokens[n].high);
    }
    unsigned short* di = DI + ((long long)(item.w + item.y) * 128 + place) * 128 + lane * 4;
    for (int i = 0, key = item.y * 128; i < item.z; ++i, key += 128, di += 16384) {
      barrier_wait(ring.full(), ring.parity);
      if (SHARE == 1 || i % SHARE == share) {
        if (key >= low && key + 128 <= high)
          kg_row_tile<TOKENS, COUNT, true>(ring, tokens, totals, kl, ent, where, key, di);
        else
          kg_row_tile<TOKENS, COUNT, false>(ring, tokens, totals, kl, ent, where, key, di);
        barrier_arrive(ring.ready());
      }
      ring.next();
      if (i == 0)
#pragma unroll
        for (int n = 0; n < COUNT; ++n) later[n].load(rows, coming, coming.x + at + n * WARPS);
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
