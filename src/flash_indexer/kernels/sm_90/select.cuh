#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
#include "../device/score_tiles.cuh"
// The K keys of largest score of a row, ascending. A thread looks at 16 ranks of a batch at a time.
#define SELECT_THREADS 512
#define SELECT_WARPS (SELECT_THREADS / 32)
#define SELECT_VECTORS 4                                       // of four ranks
#define SELECT_BATCH (SELECT_THREADS * SELECT_VECTORS * 4)     // ranks
#define SELECT_ROW 16384                                       // ranks that shared memory holds
#define SELECT_LIST (SELECT_ROW / 2)                           // or as many ranks with their columns
#define SELECT_SAMPLES 1024
static constexpr unsigned UNSEEN = 0u, NAN_RANK = 0xfffffffeu, FORCED = 0xffffffffu;
// Larger for a larger score, the same for -0.0 and +0.0 and for every NaN, which is above infinity; never UNSEEN or FORCED
static __device__ __forceinline__ unsigned rank_of(float x) {
  unsigned b = __float_as_uint(x);
  if (b == 0x80000000u) b = 0u;
  const unsigned r = (int)b < 0 ? ~b : b | 0x80000000u;
  return (b & 0x7fffffffu) > 0x7f800000u ? NAN_RANK : r;
}
static __device__ __forceinline__ float score_of(unsigned r) {
  return __uint_as_float((int)r < 0 ? r & 0x7fffffffu : ~r);
}
// one more in a counter of shared memory
static __device__ __forceinline__ void count_shared(int address) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(address) : "memory");
}
// What a CTA shares: numbers of ranks by their digit, sums of warps, what one thread found
struct SelectShared {
  int histogram[2048];
  int part[2][SELECT_WARPS];
  int found[3];
};
// Sum of x over the warps before this one, and over all of them. One barrier; `turn` alternates from call to call.
static __device__ __forceinline__ int2 sum_of_warps(SelectShared& s, int x, int turn) {
  const int warp = threadIdx.x >> 5;
  if ((threadIdx.x & 31) == 0) s.part[turn & 1][warp] = x;
  __syncthreads();
  const int lane = threadIdx.x & 31, y = lane < SELECT_WARPS ? s.part[turn & 1][lane] : 0;
  return make_int2(__reduce_add_sync(0xffffffffu, lane < warp ? y : 0), __reduce_add_sync(0xffffffffu, y));
}
static __device__ __forceinline__ void clear_digits(SelectShared& s) {
  __syncthreads();  // everyone has read what was found
  ((int4*)s.histogram)[threadIdx.x] = make_int4(0, 0, 0, 0);
  if (threadIdx.x < 3) s.found[threadIdx.x] = 0;
  __syncthreads();
}
// The largest digit d with at least `need` ranks of digit d and above: (d, ranks above d, ranks of d); zeros where there are
// not as many. A thread has four digits, in falling order.
static __device__ __forceinline__ int3 find_digit(SelectShared& s, int need, int turn) {
  const int top = 2047 - 4 * (int)threadIdx.x, lane = threadIdx.x & 31;
  __syncthreads();
  const int4 v = *(const int4*)(s.histogram + top - 3);
  const int own = v.x + v.y + v.z + v.w;
  int upto = own;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int y = __shfl_up_sync(0xffffffffu, upto, d);
    upto += lane >= d ? y : 0;
  }
  int above = sum_of_warps(s, __shfl_sync(0xffffffffu, upto, 31), turn).x + upto - own;
  if (above < need && above + own >= need) {
    int digit = top, size = v.w;
    if (above + size < need) above += size, size = v.z, --digit;
    if (above + size < need) above += size, size = v.y, --digit;
    if (above + size < need) above += size, size = v.x, --digit;
    s.found[0] = digit, s.found[1] = above, s.found[2] = size;
  }
  __syncthreads();
  return make_int3(s.found[0], s.found[1], s.found[2]);
}
// Ranks in order of their places, and where they lie: the row in global memory; once `kept`, shared memory, which holds
// either the row or a list of some of its ranks with their columns behind them
struct SelectSource {
  const float* scores;  // the row's, in tiles
  int low, high;        // columns that the query sees
  int forced_low, forced_high;  // those below and from here on are taken whatever their score
  int first;            // column of place 0
  int vectors;          // each warp's of a batch
  int batches;
  int room;  // address of SELECT_ROW words of shared memory
  bool kept, listed;

  __device__ __forceinline__ void spread(int tiles) {
    vectors = min((tiles + SELECT_WARPS - 1) / SELECT_WARPS, SELECT_VECTORS);
    batches = (tiles + SELECT_WARPS * SELECT_VECTORS - 1) / (SELECT_WARPS * SELECT_VECTORS);
  }
  // place of a thread's first rank of vector i in a batch: each warp has a run of neighbours
  __device__ __forceinline__ int place(int batch, int i) const {
    return batch * SELECT_BATCH + ((threadIdx.x >> 5) * vectors + i) * 128 + (threadIdx.x & 31) * 4;
  }
  __device__ __forceinline__ int column(int place) const {
    return listed ? load_shared_int(room + (SELECT_LIST + place) * 4) : first + place;
  }
  __device__ __forceinline__ unsigned rank(float score, int column) const {
    if (column < low || column >= high) return UNSEEN;
    return column < forced_low || column >= forced_high ? FORCED : rank_of(score);
  }
  __device__ __forceinline__ unsigned rank_at(int place) const {
    const int c = first + place;
    return c < low || c >= high ? UNSEEN : rank(scores[in_tiles(c)], c);
  }
  // r = ranks of a batch, of the row in global memory; whether a key that is seen has NaN
  __device__ __forceinline__ bool load_row(unsigned (&r)[SELECT_VECTORS * 4], int batch) const {
    bool has_nan = false;
#pragma unroll
    for (int i = 0; i < SELECT_VECTORS; ++i) {
      const int c = first + place(batch, i);
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      if (i < vectors && c < high && c + 4 > low) x = *(const float4*)(scores + in_tiles(c));
      const float v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        r[4 * i + e] = i < vectors ? rank(v[e], c + e) : UNSEEN;
        has_nan |= r[4 * i + e] != UNSEEN && isnan_bits(v[e]);
      }
    }
    return has_nan;
  }
  __device__ __forceinline__ void keep(const unsigned (&r)[SELECT_VECTORS * 4], int batch) const {
#pragma unroll
    for (int i = 0; i < SELECT_VECTORS; ++i)
      if (i < vectors)
        store_shared(room + place(batch, i) * 4, (int)r[4 * i], (int)r[4 * i + 1], (int)r[4 * i + 2], (int)r[4 * i + 3]);
  }
  // r = ranks of a batch
  __device__ __forceinline__ void load(unsigned (&r)[SELECT_VECTORS * 4], int batch) const {
    if (!kept) {
      load_row(r, batch);
      return;
    }
#pragma unroll
    for (int i = 0; i < SELECT_VECTORS; ++i) {
      int4 x = make_int4(0, 0, 0, 0);
      if (i < vectors) x = load_shared_int4(room + place(batch, i) * 4);
      r[4 * i] = x.x, r[4 * i + 1] = x.y, r[4 * i + 2] = x.z, r[4 * i + 3] = x.w;
    }
  }
};
// The threshold of a selection: ranks above `floor` are in, and those equal to it up to place `cut`
struct Threshold {
  unsigned floor;
  int cut;
  __device__ __forceinline__ bool takes(unsigned r, int place) const {
    return r > floor || (r == floor && place <= cut);
  }
};
// emit(n, rank, place) for the n-th rank that is taken, in order, from n = before on; their number. One barrier.
template <class Emit>
static __device__ __forceinline__ int emit_taken(
    SelectShared& s, const SelectSource& x, const unsigned (&r)[SELECT_VECTORS * 4], int batch, Threshold threshold,
    int before, Emit emit) {
  unsigned taken = 0;
#pragma unroll
  for (int j = 0; j < SELECT_VECTORS * 4; ++j)
    taken |= (unsigned)threshold.takes(r[j], x.place(batch, j / 4) + j % 4) << j;
  const int2 sum = sum_of_warps(s, __reduce_add_sync(0xffffffffu, __popc(taken)), batch);
  const unsigned below = (1u << (threadIdx.x & 31)) - 1u;
  int n = before + sum.x;
#pragma unroll
  for (int i = 0; i < SELECT_VECTORS; ++i) {
    if (i >= x.vectors) break;
    int at = n;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned votes = __ballot_sync(0xffffffffu, taken >> (4 * i + e) & 1);
      at += __popc(votes & below);
      n += __popc(votes);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (taken >> (4 * i + e) & 1) emit(at++, r[4 * i + e], x.place(batch, i) + e);
  }
  return sum.y;
}
// Place of the need-th rank equal to `floor`
static __device__ __forceinline__ int find_place(
    SelectShared& s, const SelectSource& x, unsigned floor, int need) {
  unsigned r[SELECT_VECTORS * 4];
  int before = 0;
  for (int batch = 0; batch < x.batches; ++batch) {
    x.load(r, batch);
    int own = 0;
#pragma unroll
    for (int j = 0; j < SELECT_VECTORS * 4; ++j) own += r[j] == floor;
    const int2 sum = sum_of_warps(s, __reduce_add_sync(0xffffffffu, own), batch);
    int n = before + sum.x;
#pragma unroll
    for (int i = 0; i < SELECT_VECTORS; ++i) {
      const unsigned below = (1u << (threadIdx.x & 31)) - 1u;
      int at = n;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const unsigned votes = __ballot_sync(0xffffffffu, r[4 * i + e] == floor);
        at += __popc(votes & below);
        n += __popc(votes);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (r[4 * i + e] == floor && ++at == need) s.found[0] = x.place(batch, i) + e;
    }
    before += sum.y;
  }
  __syncthreads();
  return s.found[0];
}
// The lowest first digit that need be counted: that of a rank which is below the threshold in all likelihood, by a sample
static __device__ __forceinline__ unsigned guess_digit(SelectShared& s, const SelectSource& x, int need) {
  const float expected = (float)need * SELECT_SAMPLES / (x.high - x.low);
  const int target = (int)(expected + 4.f * sqrtf(expected)) + 8;
  if (target >= SELECT_SAMPLES) return 0u;
  clear_digits(s);
#pragma unroll
  for (int j = threadIdx.x; j < SELECT_SAMPLES; j += SELECT_THREADS) {
    const int place = (int)((long long)j * (x.high - x.low) / SELECT_SAMPLES) + x.low - x.first;
    const unsigned r = x.kept ? load_shared_word(x.room + place * 4) : x.rank_at(place);
    count_shared(shared_address(s.histogram) + (r >> 21) * 4);
  }
  return find_digit(s, target, 0).x;
}
// What has the threshold's first digit or a larger one is moved to a list in shared memory, which then is the source
static __device__ __forceinline__ void move_to_list(SelectShared& s, SelectSource& x, unsigned floor) {
  unsigned r[SELECT_VECTORS * 4];
  int n = 0;
  for (int batch = 0; batch < x.batches; ++batch) {
    x.load_row(r, batch);
    n += emit_taken(s, x, r, batch, {floor, INT_MAX}, n, [&](int to, unsigned rank, int place) {
      store_shared(x.room + to * 4, __uint_as_float(rank));
      store_shared(x.room + (SELECT_LIST + to) * 4, __int_as_float(x.first + place));
    });
  }
  x.spread((n + 127) / 128);
  for (int to = n + threadIdx.x; to < x.batches * SELECT_WARPS * x.vectors * 128; to += SELECT_THREADS)
    store_shared(x.room + to * 4, __uint_as_float(UNSEEN));
  x.kept = x.listed = true;
  __syncthreads();
}
// The threshold of the `need` largest of more ranks than that
static __device__ __forceinline__ Threshold find_threshold(SelectShared& s, SelectSource& x, int need, bool& has_nan) {
  unsigned r[SELECT_VECTORS * 4];
  if (x.batches * SELECT_BATCH <= SELECT_ROW) {
    for (int batch = 0; batch < x.batches; ++batch) {
      has_nan |= x.load_row(r, batch);
      x.keep(r, batch);
    }
    x.kept = true;
    has_nan = __syncthreads_or(has_nan);
  }
  unsigned least = guess_digit(s, x, need), prefix = 0;
  const int wanted = need;
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
    clear_digits(s);
    for (int batch = 0; batch < x.batches; ++batch) {
      if (x.kept) x.load(r, batch); else has_nan |= x.load_row(r, batch);
#pragma unroll
      for (int j = 0; j < SELECT_VECTORS * 4; ++j)
        if (level == 0 ? r[j] >= max(least << 21, 1u) : r[j] >> (shift + bits) == prefix)
          count_shared(shared_address(s.histogram) + (r[j] >> shift & ((1 << bits) - 1)) * 4);
    }
    const int3 digit = find_digit(s, need, level + 1);
    if (digit.z == 0) {  // the guess was too high
      least = 0, level = -1;
      continue;
    }
    prefix = prefix << bits | digit.x;
    need -= digit.y;
    if (level == 0 && !x.kept) {
      has_nan = __syncthreads_or(has_nan);
      if (digit.z != need && wanted - need + digit.z <= SELECT_LIST) move_to_list(s, x, prefix << shift);
    }
    if (digit.z == need) return {prefix << shift, INT_MAX};
  }
  return {prefix, find_place(s, x, prefix, need)};
}
// Row t: keys, their number and their scores. width: slots of a row. first, last: keys that are taken in any case.
static __device__ __forceinline__ void select_row(
    const float* X, const int* blocks, const int* key_start, const int* key_end, int* IDX, int* COUNT, float* SC, int t,
    int width, int first, int last, int room) {
  __shared__ SelectShared s;
  const ScoreRow row(blocks, key_start[t], key_end[t], t);
  const int visible = max(row.high - row.low, 0);
  const long long slots = (long long)t * width;
  IDX += slots, SC += slots, X += row.begin;
  if (threadIdx.x == 0) COUNT[t] = min(visible, width);
  if (visible <= width) {
    bool has_nan = false;
    for (int c = threadIdx.x; c < visible; c += SELECT_THREADS) has_nan |= isnan_bits(X[in_tiles(row.low + c)]);
    has_nan = __syncthreads_or(has_nan);
    for (int c = threadIdx.x; c < width; c += SELECT_THREADS) {
      IDX[c] = c < visible ? row.first_key + row.low + c : -1;
      SC[c] = has_nan ? __int_as_float(0x7fffffff) : c < visible ? X[in_tiles(row.low + c)] : -INFINITY;
    }
    return;
  }
  SelectSource x;
  x.scores = X, x.low = row.low, x.high = row.high;
  x.forced_low = row.low + first, x.forced_high = row.high - last;
  x.first = row.low & ~127, x.room = room, x.kept = x.listed = false;
  x.spread((row.high - x.first + 127) / 128);
  bool has_nan = false;
  const Threshold threshold = find_threshold(s, x, width, has_nan);
  unsigned r[SELECT_VECTORS * 4];
  int n = 0;
  for (int batch = 0; batch < x.batches; ++batch) {
    x.load(r, batch);
    n += emit_taken(s, x, r, batch, threshold, n, [&](int to, unsigned rank, int place) {
      const int column = x.column(place);
      IDX[to] = row.first_key + column;
      SC[to] = has_nan ? __int_as_float(0x7fffffff) : rank == FORCED ? X[in_tiles(column)] : score_of(rank);
    });
  }
}
