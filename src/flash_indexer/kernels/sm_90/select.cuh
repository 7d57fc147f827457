#pragma once
#include "../device/memory.cuh"
#include "../device/numbers.cuh"
#include "../device/score_tiles.cuh"
// The K keys of largest score of a row, ascending, by one CTA.
namespace selection {
constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int VECTORS = 2;                          // of four ranks, of a thread in a segment
constexpr int SEGMENT = THREADS * VECTORS * 4;      // places
constexpr int ROW = 16384, LIST = ROW / 2;          // most places of a row that is held; entries of a list
constexpr int ORDERED = 4096;                       // most slots of a list, or put in order before they are written
constexpr int SAMPLED = 16, SAMPLED_LONG = 64;      // one in so many ranks says where the K largest begin
static_assert(LIST % SEGMENT == 0, "a list ends with a segment");
constexpr unsigned UNSEEN = 0u, LOWEST = 1u, NAN_RANK = 0xfffffffeu, FORCED = 0xffffffffu;
// What a CTA shares. Of a long row the first half of `ranks` is a list's and the second has their places
struct Shared {
  unsigned ranks[ROW];
  int histogram[2048];  // zeros between two uses; at last the places of ranks in order, 16 bits each
  int part[2][WARPS];
  int found[3];
};
// Larger for a larger score, the same for -0.0 and +0.0 and for every NaN, which is above infinity; never UNSEEN or FORCED
static __device__ __forceinline__ unsigned rank_of(float x) {
  const unsigned b = __float_as_uint(x), r = b ^ ((unsigned)((int)b >> 31) | 0x80000000u);
  return (b & 0x7fffffffu) > 0x7f800000u ? NAN_RANK : r + (r == 0x7fffffffu);
}
static __device__ __forceinline__ float score_of(unsigned r) {
  return __uint_as_float((int)r < 0 ? r & 0x7fffffffu : ~r);
}
// A segment of places: each warp has a run of neighbours, so that `place` ascends with warp, vector, lane
struct Segment {
  int begin, vectors;
  __device__ __forceinline__ Segment(int begin, int size)
      : begin(begin), vectors(min((size - begin + WARPS * 128 - 1) / (WARPS * 128), VECTORS)) {}
  __device__ __forceinline__ int place(int i) const {
    return begin + ((threadIdx.x >> 5) * vectors + i) * 128 + (threadIdx.x & 31) * 4;
  }
};
// The ranks of a row, from its scores: place p is column first + p
struct Row {
  const float* scores;          // in tiles
  int low, high;                // columns that the query sees
  int forced_low, forced_high;  // those below and from here on are taken whatever their score
  int first, size;
  bool has_nan;  // among what this thread has loaded
  __device__ __forceinline__ unsigned rank(int c, float x) {
    if (c < low || c >= high) return UNSEEN;
    const unsigned r = rank_of(x);
    has_nan |= r == NAN_RANK;
    return c < forced_low || c >= forced_high ? FORCED : r;
  }
  // a whole warp together, which as a rule has nothing to look up but scores
  __device__ __forceinline__ void load(int place, unsigned* r) {
    const int c = first + place;
    const float4* from = (const float4*)(scores + in_tiles(c));
    if (__all_sync(0xffffffffu, c >= forced_low && c + 4 <= forced_high)) {
      const float4 x = *from;
      r[0] = rank_of(x.x), r[1] = rank_of(x.y), r[2] = rank_of(x.z), r[3] = rank_of(x.w);
      has_nan |= max(max(r[0], r[1]), max(r[2], r[3])) == NAN_RANK;
      return;
    }
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (c < high && c + 4 > low) x = *from;
    r[0] = rank(c, x.x), r[1] = rank(c + 1, x.y), r[2] = rank(c + 2, x.z), r[3] = rank(c + 3, x.w);
  }
};
// Ranks in shared memory, UNSEEN behind the last one to the end of its segment
struct Held {
  const unsigned* ranks;
  int size;
  __device__ __forceinline__ void load(int place, unsigned* r) const {
    const uint4 v = *(const uint4*)(ranks + place);
    r[0] = v.x, r[1] = v.y, r[2] = v.z, r[3] = v.w;
  }
};
// Ranks above `floor` are in, and those equal to it up to place `cut`: a floor of FORCED has none behind its cut
struct Threshold {
  unsigned floor;
  int cut;
  __device__ __forceinline__ bool takes(unsigned r, int place) const { return r >= floor + (place > cut); }
};
struct Block {
  Shared& s;
  int turn;  // of `part`, so that one barrier a sum is enough
  // sum of x, the same in all lanes of a warp, over the warps before this one and over all. One barrier
  __device__ __forceinline__ int2 sum_before(int x) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    int* part = s.part[turn];
    turn ^= 1;
    if (lane == 0) part[warp] = x;
    __syncthreads();
    const int y = lane < WARPS ? part[lane] : 0;
    return make_int2(__reduce_add_sync(0xffffffffu, lane < warp ? y : 0), __reduce_add_sync(0xffffffffu, y));
  }
  // histogram[digit of r] += 1 for the ranks of which `counts` holds; a barrier comes behind
  template <class Source, class Counts>
  __device__ __forceinline__ void count(Source& x, int shift, int bits, Counts counts) {
    for (int begin = 0; begin < x.size; begin += SEGMENT) {
      const Segment at(begin, x.size);
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        if (i >= at.vectors) break;
        unsigned r[4];
        x.load(at.place(i), r);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (counts(r[e])) atomicAdd(s.histogram + (r[e] >> shift & ((1 << bits) - 1)), 1);
      }
    }
    __syncthreads();
  }
  // The largest digit d with at least `need` ranks of digit d and above: (d, ranks above d, ranks of d); d is -1 where
  // there are fewer. Each thread has four digits, in falling order, and leaves zeros.
  __device__ __forceinline__ int3 find_digit(int need) {
    const int top = 2047 - 4 * (int)threadIdx.x, lane = threadIdx.x & 31;
    int4& numbers = *(int4*)(s.histogram + top - 3);
    const int4 v = numbers;
    numbers = make_int4(0, 0, 0, 0);
    const int own = v.x + v.y + v.z + v.w;
    int upto = own;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const int y = __shfl_up_sync(0xffffffffu, upto, d);
      upto += lane >= d ? y : 0;
    }
    const int2 sums = sum_before(__shfl_sync(0xffffffffu, upto, 31));
    if (sums.y < need) return make_int3(-1, 0, 0);
    int above = sums.x + upto - own;
    if (above < need && above + own >= need) {
      int d = top, n = v.w;
      if (above + n < need) above += n, n = v.z, --d;
      if (above + n < need) above += n, n = v.y, --d;
      if (above + n < need) above += n, n = v.x, --d;
      s.found[0] = d, s.found[1] = above, s.found[2] = n;
    }
    __syncthreads();
    return make_int3(s.found[0], s.found[1], s.found[2]);
  }
  // emit(n, rank, place) for the n-th rank of which takes(rank, place) holds, in order of places; how many there are. A
  // barrier a segment
  template <class Source, class Takes, class Emit>
  __device__ __forceinline__ int each_taken(Source& x, Takes takes, Emit emit) {
    const int lane = threadIdx.x & 31;
    int all = 0;
    for (int begin = 0; begin < x.size; begin += SEGMENT) {
      const Segment at(begin, x.size);
      unsigned r[VECTORS * 4], taken = 0, numbers = 0;  // a byte a vector
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        if (i >= at.vectors) break;
        x.load(at.place(i), r + 4 * i);
        unsigned own = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) own |= (unsigned)takes(r[4 * i + e], at.place(i) + e) << e;
        taken |= own << (4 * i), numbers |= (unsigned)__popc(own) << (8 * i);
      }
      unsigned upto = numbers;  // of lanes up to this one
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const unsigned y = __shfl_up_sync(0xffffffffu, upto, d);
        upto += lane >= d ? y : 0u;
      }
      const unsigned sums = __shfl_sync(0xffffffffu, upto, 31);
      int own = 0;
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) own += sums >> (8 * i) & 255u;
      const int2 before = sum_before(own);
      int n = all + before.x;
      all += before.y;
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) {
        if (i >= at.vectors) break;
        int to = n + ((upto - numbers) >> (8 * i) & 255u);
        n += sums >> (8 * i) & 255u;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (taken >> (4 * i + e) & 1) emit(to++, r[4 * i + e], at.place(i) + e);
      }
    }
    return all;
  }
  // A threshold that takes the `need` largest ranks, or more of them but no more than `enough`; there are `need` at least.
  // guess: ranks below it are counted only where too few are not.
  template <class Source>
  __device__ __forceinline__ Threshold find_threshold(Source& x, int need, int enough, unsigned guess) {
    unsigned prefix = 0;
    int above = 0;
#pragma unroll
    for (int level = 0; level < 3; ++level) {
      const int shift = level == 0 ? 21 : level == 1 ? 10 : 0, bits = level == 2 ? 10 : 11;
      count(x, shift, bits, [&](unsigned r) { return level == 0 ? r >= guess : r >> (shift + bits) == prefix; });
      int3 digit = find_digit(need - above);
      if (level == 0 && digit.x < 0) {
        count(x, shift, bits, [&](unsigned r) { return r >= LOWEST; });
        digit = find_digit(need);
      }
      prefix = prefix << bits | digit.x;
      above += digit.y;
      if (above + digit.z <= enough) return {prefix << shift, INT_MAX};
    }
    each_taken(
        x, [&](unsigned r, int) { return r == prefix; },
        [&](int n, unsigned, int place) {
          if (n == need - above - 1) s.found[0] = place;
        });
    __syncthreads();
    return {prefix, s.found[0]};
  }
};
// how many of a sample, one in `step`, are looked for so that `need` ranks of all are hardly ever missed
static __device__ __forceinline__ int sample_need(int need, int step) {
  const float share = (float)need / (float)step;
  return (int)(share + 4.f * sqrtf(share)) + 4;
}
// The row's ranks into shared memory; a guess at where the `need` largest begin
static __device__ __forceinline__ unsigned hold_row(Block& b, Row& x, int need) {
  for (int begin = 0; begin < x.size; begin += SEGMENT) {
    const Segment at(begin, x.size);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      if (i >= at.vectors) break;
      unsigned r[4];
      x.load(at.place(i), r);
      *(uint4*)(b.s.ranks + at.place(i)) = make_uint4(r[0], r[1], r[2], r[3]);
      if (at.place(i) % SAMPLED == 0 && r[0] != UNSEEN) atomicAdd(b.s.histogram + (r[0] >> 21), 1);
    }
  }
  __syncthreads();
  const int digit = b.find_digit(sample_need(need, SAMPLED)).x;
  return digit > 0 ? (unsigned)digit << 21 : LOWEST;
}
// The same from a long row, of which a sample alone is held
static __device__ __forceinline__ unsigned sample_row(Block& b, Row& x, int need) {
  const int step = max(SAMPLED_LONG, (x.size + ROW - 1) / ROW);
  const int size = (x.high - x.low + step - 1) / step, wanted = sample_need(need, step);
  if (wanted >= size) return LOWEST;
  Held sample{b.s.ranks, size};
  for (int i = threadIdx.x; i < (size + SEGMENT - 1) / SEGMENT * SEGMENT; i += THREADS) {
    const int c = x.low + i * step;
    b.s.ranks[i] = i < size ? x.rank(c, x.scores[in_tiles(c)]) : UNSEEN;
  }
  __syncthreads();
  return b.find_threshold(sample, wanted, wanted + wanted / 4, LOWEST).floor;
}
// What a long row's threshold takes, into the list, in order; how many there are, of which LIST are kept at most
static __device__ __forceinline__ int make_list(Block& b, Row& x, Threshold threshold) {
  unsigned *ranks = b.s.ranks, *places = b.s.ranks + LIST;
  const int n = b.each_taken(
      x, [&](unsigned r, int place) { return threshold.takes(r, place); },
      [&](int to, unsigned r, int place) {
        if (to < LIST) ranks[to] = r, places[to] = place;
      });
  for (int i = n + threadIdx.x; i < LIST; i += THREADS) ranks[i] = UNSEEN;
  __syncthreads();
  return n;
}
// emit(n, rank, place_of(place)) for what the threshold takes of the ranks that are held, `width` in all, ORDERED at most
template <class Place, class Emit>
static __device__ __forceinline__ void write_taken(
    Block& b, Held& held, Threshold threshold, int width, Place place_of, Emit emit) {
  unsigned* ranks = b.s.ranks;  // in place: the n-th that is taken stands at n or behind it, and has been read
  unsigned short* order = (unsigned short*)b.s.histogram;
  b.each_taken(
      held, [&](unsigned r, int place) { return threshold.takes(r, place); },
      [&](int to, unsigned r, int place) { ranks[to] = r, order[to] = place; });
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += THREADS) emit(i, ranks[i], place_of(order[i]));
}
}  // namespace selection

// Row t: keys, their number and their scores. width: slots of a row. first, last: keys that are taken in any case.
static __device__ __forceinline__ void select_row(
    void* shared, const float* X, const int* blocks, const int* key_start, const int* key_end, int* IDX, int* COUNT,
    float* SC, int t, int width, int first, int last) {
  using namespace selection;
  Block b{*(Shared*)shared, 0};
  const ScoreRow row(blocks, key_start[t], key_end[t], t);
  const int visible = max(row.high - row.low, 0);
  const long long slots = (long long)t * width;
  IDX += slots, SC += slots, X += row.begin;
  if (threadIdx.x == 0) COUNT[t] = min(visible, width);
  if (visible <= width) {
    bool has_nan = false;
    for (int c = threadIdx.x; c < visible; c += THREADS) has_nan |= isnan_bits(X[in_tiles(row.low + c)]);
    has_nan = __syncthreads_or(has_nan);
    for (int c = threadIdx.x; c < width; c += THREADS) {
      IDX[c] = c < visible ? row.first_key + row.low + c : -1;
      SC[c] = has_nan ? __int_as_float(0x7fffffff) : c < visible ? X[in_tiles(row.low + c)] : -INFINITY;
    }
    return;
  }
  for (int i = threadIdx.x; i < 2048; i += THREADS) b.s.histogram[i] = 0;
  __syncthreads();
  const int origin = row.low & ~127;
  Row x{X, row.low, row.high, row.low + first, row.high - last, origin, row.high - origin, false};
  bool has_nan;
  auto emit = [&](int to, unsigned rank, int place) {
    const int column = origin + place;
    IDX[to] = row.first_key + column;
    SC[to] = has_nan ? __int_as_float(0x7fffffff) : rank == FORCED ? X[in_tiles(column)] : score_of(rank);
  };
  const bool is_held = x.size <= ROW, is_wide = width > ORDERED;
  Held held{b.s.ranks, x.size};
  Threshold threshold{LOWEST, INT_MAX};
  auto takes = [&](unsigned r, int place) { return threshold.takes(r, place); };
  if (is_held) {
    const unsigned guess = hold_row(b, x, width);
    threshold = b.find_threshold(held, width, width, guess);
  } else {
    if (!is_wide) threshold.floor = sample_row(b, x, width), held.size = make_list(b, x, threshold);
    if (is_wide || held.size < width || held.size > LIST) {
      threshold = b.find_threshold(x, width, is_wide ? width : LIST, LOWEST);
      if (!is_wide) held.size = make_list(b, x, threshold);
    }
    if (!is_wide) threshold = b.find_threshold(held, width, width, LOWEST);
  }
  has_nan = __syncthreads_or(x.has_nan);
  if (is_wide) {
    if (is_held) b.each_taken(held, takes, emit); else b.each_taken(x, takes, emit);
    return;
  }
  const unsigned* places = b.s.ranks + LIST;  // of a list
  write_taken(b, held, threshold, width, [&](int n) { return is_held ? n : (int)places[n]; }, emit);
}
