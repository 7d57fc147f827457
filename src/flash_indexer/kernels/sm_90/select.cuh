#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
#include "../device/score_tiles.cuh"
// The K keys of largest score of a row, ascending. A thread holds 16 ranks.
#define SELECT_THREADS 1024
#define SELECT_WARPS (SELECT_THREADS / 32)
#define SELECT_VECTORS 4  // of four ranks, of a thread
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
// Sum of x over the warps before this one. One barrier; `turn` alternates where no other barrier is between two calls.
static __device__ __forceinline__ int sum_before(SelectShared& s, int x, int turn) {
  const int warp = threadIdx.x >> 5;
  if ((threadIdx.x & 31) == 0) s.part[turn & 1][warp] = x;
  __syncthreads();
  const int lane = threadIdx.x & 31, y = s.part[turn & 1][lane];  // as many warps as lanes
  return __reduce_add_sync(0xffffffffu, lane < warp ? y : 0);
}
// The largest digit d with at least `need` ranks of digit d and above: (d, ranks above d, ranks of d). The numbers are read
// by threads in the order of falling digits.
static __device__ __forceinline__ int3 find_digit(SelectShared& s, int need, int turn) {
  const int top = 2047 - 2 * (int)threadIdx.x, lane = threadIdx.x & 31;
  const int2 v = *(const int2*)(s.histogram + top - 1);
  const int own = v.x + v.y;
  int upto = own;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const int y = __shfl_up_sync(0xffffffffu, upto, d);
    upto += lane >= d ? y : 0;
  }
  int above = sum_before(s, __shfl_sync(0xffffffffu, upto, 31), turn) + upto - own;
  if (above < need && above + own >= need) {
    const bool second = above + v.y < need;
    s.found[0] = top - second, s.found[1] = above + (second ? v.y : 0), s.found[2] = second ? v.x : v.y;
  }
  __syncthreads();
  return make_int3(s.found[0], s.found[1], s.found[2]);
}
// The ranks of a row in order of their places
struct SelectRow {
  const float* scores;          // in tiles
  int low, high;                // columns that the query sees
  int forced_low, forced_high;  // those below and from here on are taken whatever their score
  int first;                    // column of place 0
  int vectors;                  // of a thread, SELECT_VECTORS at most

  // place of a thread's first rank of vector i: each warp has a run of neighbours
  __device__ __forceinline__ int place(int i) const {
    return ((threadIdx.x >> 5) * vectors + i) * 128 + (threadIdx.x & 31) * 4;
  }
  // r = the thread's ranks; whether a key that is seen has NaN
  __device__ __forceinline__ bool load(unsigned (&r)[SELECT_VECTORS * 4]) const {
    bool has_nan = false;
#pragma unroll
    for (int i = 0; i < SELECT_VECTORS; ++i) {
      const int c = first + place(i);
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
      if (i < vectors && c < high && c + 4 > low) x = *(const float4*)(scores + in_tiles(c));
      const float v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool seen = i < vectors && c + e >= low && c + e < high;
        const unsigned rank = rank_of(v[e]);
        has_nan |= seen && rank == NAN_RANK;
        r[4 * i + e] = !seen ? UNSEEN : c + e < forced_low || c + e >= forced_high ? FORCED : rank;
      }
    }
    return has_nan;
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
// emit(n, rank, place) for the n-th rank that is taken, in order. One barrier.
template <class Emit>
static __device__ __forceinline__ void emit_taken(
    SelectShared& s, const SelectRow& x, const unsigned (&r)[SELECT_VECTORS * 4], Threshold threshold, Emit emit) {
  unsigned taken = 0;
#pragma unroll
  for (int j = 0; j < SELECT_VECTORS * 4; ++j)
    taken |= (unsigned)threshold.takes(r[j], x.place(j / 4) + j % 4) << j;
  const unsigned below = (1u << (threadIdx.x & 31)) - 1u;
  int n = sum_before(s, __reduce_add_sync(0xffffffffu, __popc(taken)), 0);
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
      if (taken >> (4 * i + e) & 1) emit(at++, r[4 * i + e], x.place(i) + e);
  }
}
// Place of the need-th rank equal to `floor`
static __device__ __forceinline__ int find_place(
    SelectShared& s, const SelectRow& x, const unsigned (&r)[SELECT_VECTORS * 4], unsigned floor, int need) {
  int own = 0;
#pragma unroll
  for (int j = 0; j < SELECT_VECTORS * 4; ++j) own += r[j] == floor;
  int n = sum_before(s, __reduce_add_sync(0xffffffffu, own), 0);
  const unsigned below = (1u << (threadIdx.x & 31)) - 1u;
#pragma unroll
  for (int i = 0; i < SELECT_VECTORS; ++i) {
    int at = n;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const unsigned votes = __ballot_sync(0xffffffffu, r[4 * i + e] == floor);
      at += __popc(votes & below);
      n += __popc(votes);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (r[4 * i + e] == floor && ++at == need) s.found[0] = x.place(i) + e;
  }
  __syncthreads();
  return s.found[0];
}
// The threshold of the `need` largest of more ranks than that; has_nan becomes the CTA's
static __device__ __forceinline__ Threshold find_threshold(
    SelectShared& s, const SelectRow& x, const unsigned (&r)[SELECT_VECTORS * 4], int need, bool& has_nan) {
  unsigned prefix = 0;
#pragma unroll
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
    ((int2*)s.histogram)[threadIdx.x] = make_int2(0, 0);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < SELECT_VECTORS * 4; ++j)
      if (level == 0 ? r[j] != UNSEEN : r[j] >> (shift + bits) == prefix)
        count_shared(shared_address(s.histogram) + (r[j] >> shift & ((1 << bits) - 1)) * 4);
    if (level == 0) has_nan = __syncthreads_or(has_nan); else __syncthreads();
    const int3 digit = find_digit(s, need, level);
    prefix = prefix << bits | digit.x;
    need -= digit.y;
    if (digit.z == need) return {prefix << shift, INT_MAX};
  }
  return {prefix, find_place(s, x, r, prefix, need)};
}
// Row t: keys, their number and their scores. width: slots of a row. first, last: keys that are taken in any case.
static __device__ __forceinline__ void select_row(
    const float* X, const int* blocks, const int* key_start, const int* key_end, int* IDX, int* COUNT, float* SC, int t,
    int width, int first, int last) {
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
  SelectRow x;
  x.scores = X, x.low = row.low, x.high = row.high;
  x.forced_low = row.low + first, x.forced_high = row.high - last;
  x.first = row.low & ~127;
  x.vectors = min(((row.high - x.first + 127) / 128 + SELECT_WARPS - 1) / SELECT_WARPS, SELECT_VECTORS);
  unsigned r[SELECT_VECTORS * 4];
  bool has_nan = x.load(r);
  const Threshold threshold = find_threshold(s, x, r, width, has_nan);
  emit_taken(s, x, r, threshold, [&](int to, unsigned rank, int place) {
    const int column = x.first + place;
    IDX[to] = row.first_key + column;
    SC[to] = has_nan ? __int_as_float(0x7fffffff) : rank == FORCED ? X[in_tiles(column)] : score_of(rank);
  });
}
