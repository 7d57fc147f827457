#pragma once
#include "../device/accumulator.cuh"
#include "../device/additions.cuh"
#include "../device/cluster.cuh"
#include "../device/fixed_point.cuh"
#include "../device/wgmma.cuh"
// The indexer at the selected keys, gradients and scores: tiles of 128 gathered keys of one token after the other.
namespace sparse_index {
static __device__ __forceinline__ void copy_row(int to, const char* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void copies_arrive(int barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// byte at which piece c of 16 bytes of a row lies in a tile of so many rows, swizzled as `Tile` reads it
template <int E, int ROWS>
static __device__ __forceinline__ int piece(int row, int c) {
  if (E == 32) return row * 64 + ((c ^ (row >> 1 & 3)) << 4);
  return (c >> 3) * (ROWS * 128) + row * 128 + (((c & 7) ^ (row & 7)) << 4);
}
struct Stage {
  int n = 0, parity = 0;
  __device__ __forceinline__ void next(int count) {
    if (++n == count) n = 0, parity ^= 1;
  }
};
constexpr int KEYS = 128, HEADS = 64, TOKENS = 2, ADDERS = 2;  // stages of tokens, warpgroups that add
// shared memory, in bytes
template <int E>
struct Layout {
  static constexpr int STAGES = E == 128 ? 3 : 4;  // of keys
  static constexpr int KEY = KEYS * E * 2, TOKEN = HEADS * E * 2;
  static constexpr int ROW = E * 4 + 16;  // of sums, padded so that rows begin in different banks
  static constexpr int SUMS = 64 * ROW;
  static constexpr int Y = 0, X = Y + STAGES * KEY, Z = X + TOKENS * TOKEN;
  static constexpr int W = Z + ADDERS * SUMS;                  // weights of a token
  static constexpr int NUMBERS = W + TOKENS * HEADS * 4;       // of a key: number, di, di in bfloat16, scale
  static constexpr int NUMBER_BYTES = KEYS * 14;
  static constexpr int BARRIERS = NUMBERS + STAGES * NUMBER_BYTES;
  static constexpr int BYTES = BARRIERS + 16 * (STAGES + TOKENS);
};
struct Problem {
  const char *q, *k;  // index_q [T, I, E], index_k [S, E] bfloat16
  const float *w, *di;
  const int *indices, *count;
  const int* bound;    // of a key's sums, with its largest term
  const float* most;
  char* dq;
  float* dw;
  int* sums;  // of integers; where sums are of float32 its bits, and bound and most are null
  float* scores;  // [T, width]
  int T, I, S, width, bits, wants;
};
constexpr int WANTS_QUERY = 1, WANTS_KEY = 2, WANTS_SCORES = 4;
static __device__ __forceinline__ int tiles_of(int count) { return (count + KEYS - 1) / KEYS; }

template <int E>
struct Work {
  using L = Layout<E>;
  const Problem& x;
  int sm, lane, warp;  // of the warpgroup
  __device__ __forceinline__ Work(const Problem& x, int sm)
      : x(x), sm(sm), lane(threadIdx.x & 31), warp(threadIdx.x >> 5 & 3) {}
  __device__ __forceinline__ int key_full(int n) const { return sm + L::BARRIERS + 8 * n; }
  __device__ __forceinline__ int key_empty(int n) const { return sm + L::BARRIERS + 8 * (L::STAGES + n); }
  __device__ __forceinline__ int token_full(int n) const { return sm + L::BARRIERS + 16 * L::STAGES + 8 * n; }
  __device__ __forceinline__ int token_empty(int n) const {
    return sm + L::BARRIERS + 16 * L::STAGES + 8 * (TOKENS + n);
  }
  // of key stage n: what number i of 128 stands at
  __device__ __forceinline__ int number_at(int n, int i) const { return sm + L::NUMBERS + n * L::NUMBER_BYTES + 4 * i; }
  __device__ __forceinline__ int di_at(int n, int i) const { return number_at(n, KEYS + i); }
  __device__ __forceinline__ int scale_at(int n, int i) const { return number_at(n, 2 * KEYS + i); }
  __device__ __forceinline__ int low_di_at(int n, int i) const { return number_at(n, 3 * KEYS) + 2 * i; }
  __device__ __forceinline__ int count_of(int t) const { return min(max(load_int(x.count, t), 0), x.width); }
  // the loads of what goes back may still be under way, and an arrival doesn't wait for them
  __device__ __forceinline__ void release(int barrier) const {
    fence_shared();
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  // warps 12 to 15: tokens and their keys into the rings
  __device__ __forceinline__ void feed() const {
    constexpr int PIECES = E / 8, ROWS = 32 / PIECES;  // of a row, rows that an instruction copies
    const int tid = threadIdx.x & 127, c = lane % PIECES, r = lane / PIECES;
    Stage y, z;
    for (int t = blockIdx.x; t < x.T; t += gridDim.x) {
      const int count = count_of(t), tiles = tiles_of(count);
      if (!tiles) continue;
      const long long slots = (long long)t * x.width;
      int key = tid < count ? load_int(x.indices, slots + tid) : -1;
      const bool has_di = !(x.wants & WANTS_SCORES);
      float di = has_di && tid < count ? load_float(x.di, slots + tid) : 0.f;
      barrier_wait(token_empty(z.n), z.parity ^ 1);
#pragma unroll
      for (int i = 0; i < HEADS / (4 * ROWS); ++i) {
        const int head = (warp * (HEADS / (4 * ROWS)) + i) * ROWS + r;
        copy_row(sm + L::X + z.n * L::TOKEN + piece<E, HEADS>(head, c),
                 x.q + ((long long)t * x.I + min(head, x.I - 1)) * (E * 2) + c * 16, head < x.I ? 16 : 0);
      }
      if (tid < HEADS)
        store_shared(sm + L::W + (z.n * HEADS + tid) * 4,
                     tid < x.I ? load_float(x.w, (long long)t * x.I + tid) : 0.f);
      copies_arrive(token_full(z.n));
      barrier_arrive(token_full(z.n));
      z.next(TOKENS);
      for (int i = 0; i < tiles; ++i) {
        const bool is_key = (unsigned)key < (unsigned)x.S;
        const int own = is_key ? key : -1;
        const float own_di = is_key ? di : 0.f;
        const bool is_summed = is_key && (x.wants & WANTS_KEY) && x.bound;
        const int bound = is_summed ? load_int(x.bound, key) : 0;
        const float most = is_summed ? load_float(x.most, key) : 0.f;
        const int next = (i + 1) * KEYS + tid;
        key = next < count ? load_int(x.indices, slots + next) : -1;
        di = has_di && next < count ? load_float(x.di, slots + next) : 0.f;
        barrier_wait(key_empty(y.n), y.parity ^ 1);
#pragma unroll
        for (int j = 0; j < 32 / ROWS; ++j) {
          const int row = j * ROWS + r, k = __shfl_sync(0xffffffffu, own, row);
          copy_row(sm + L::Y + y.n * L::KEY + piece<E, KEYS>(warp * 32 + row, c),
                   x.k + (long long)max(k, 0) * (E * 2) + c * 16, k >= 0 ? 16 : 0);
        }
        store_shared(number_at(y.n, tid), __int_as_float(own));
        store_shared(di_at(y.n, tid), own_di);
        store_shared(scale_at(y.n, tid), fixed_scale(bound, most, x.bits));
        store_shared_bfloat16(low_di_at(y.n, tid), own_di);
        copies_arrive(key_full(y.n));
        barrier_arrive(key_full(y.n));
        y.next(L::STAGES);
      }
    }
  }

  // warps 8 to 11: d_index_q and d_index_w of a token, summed over its tiles
  //   S = X Y^T    P = di [S > 0]    O += P Y
  __device__ __forceinline__ void sum_queries() const {
    Stage y, z;
    for (int t = blockIdx.x; t < x.T; t += gridDim.x) {
      const int tiles = tiles_of(count_of(t));
      float o[E / 2];
#pragma unroll
      for (int i = 0; i < E / 2; ++i) o[i] = 0.f;
      float w0 = 0.f, w1 = 0.f, d0 = 0.f, d1 = 0.f;
      const int row = warpgroup_row();
      if (tiles) {
        barrier_wait(token_full(z.n), z.parity);
        fence_shared();
        const int token = wg_uniform(sm + L::X + z.n * L::TOKEN);
        for (int i = 0; i < tiles; ++i) {
          barrier_wait(key_full(y.n), y.parity);
          fence_shared();
          const int keys = wg_uniform(sm + L::Y + y.n * L::KEY);
          float s[64];
          unsigned p[32];
          wg_product<KEYS, E, HEADS>(s, token >> 4, keys >> 4);
          tl::wait_wgmma<0>();
          tl::warpgroup_fence_operand(s, 64);
          const int at = low_di_at(y.n, 0) + (lane & 3) * 4;
#pragma unroll
          for (int g = 0; g < 16; ++g) {
            const unsigned d = load_shared_word(at + g * 16);
            p[2 * g] = define_word(d, mask_positive(s[4 * g], s[4 * g + 1]));
            p[2 * g + 1] = define_word(d, mask_positive(s[4 * g + 2], s[4 * g + 3]));
          }
          wg_accumulate<KEYS, E>(o, p, keys >> 4);
          tl::wait_wgmma<0>();
          tl::warpgroup_fence_operand(o, E / 2);
          release(key_empty(y.n));
          y.next(L::STAGES);
        }
        w0 = load_shared_float(sm + L::W + (z.n * HEADS + row) * 4);
        w1 = load_shared_float(sm + L::W + (z.n * HEADS + row + 8) * 4);
        // d_w = rowsum(X O)
#pragma unroll
        for (int g = 0; g < E / 8; ++g) {
          const unsigned a = load_shared_word(token + piece<E, HEADS>(row, g) + (lane & 3) * 4);
          const unsigned b = load_shared_word(token + piece<E, HEADS>(row + 8, g) + (lane & 3) * 4);
          d0 += o[4 * g] * low_half(a) + o[4 * g + 1] * high_half(a);
          d1 += o[4 * g + 2] * low_half(b) + o[4 * g + 3] * high_half(b);
        }
        release(token_empty(z.n));
        z.next(TOKENS);
      }
      d0 = quad_sum(d0), d1 = quad_sum(d1);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int head = row + 8 * h;
        if (head >= x.I) continue;
        const long long at = (long long)t * x.I + head;
        if ((lane & 3) == 0) x.dw[at] = h ? d1 : d0;
        unsigned* to = (unsigned*)(x.dq + at * (E * 2)) + (lane & 3);
        const float w = h ? w1 : w0;
#pragma unroll
        for (int g = 0; g < E / 8; ++g) to[4 * g] = pack(o[4 * g + 2 * h] * w, o[4 * g + 2 * h + 1] * w);
      }
    }
  }

  // a tile of a token, as warpgroups 0 and 1 have it: addresses of its heads and of the lane's weights
  struct Place {
    int t, tile, count, token, weights;
  };
  // warps 0 to 3, 4 to 7: of 64 keys of each tile
  //   S = Y X^T
  // numbers = read(stage) while the product runs; use(S, numbers, place) once the stage is free again
  template <class Read, class Use>
  __device__ __forceinline__ void each_product(int half, Read read, Use use) const {
    Stage y, z;
    for (int t = blockIdx.x; t < x.T; t += gridDim.x) {
      const int count = count_of(t), tiles = tiles_of(count);
      if (!tiles) continue;
      barrier_wait(token_full(z.n), z.parity);
      fence_shared();
      const int token = wg_uniform(sm + L::X + z.n * L::TOKEN);
      const int weights = sm + L::W + z.n * HEADS * 4 + (lane & 3) * 8;
      for (int i = 0; i < tiles; ++i) {
        barrier_wait(key_full(y.n), y.parity);
        fence_shared();
        const int keys = wg_uniform(sm + L::Y + y.n * L::KEY);
        float s[32];
        wg_product<HEADS, E, KEYS>(s, (keys >> 4) + half * Tile<E, KEYS>::HALF, token >> 4);
        const auto numbers = read(y.n);
        tl::wait_wgmma<0>();
        tl::warpgroup_fence_operand(s, 32);
        release(key_empty(y.n));
        y.next(L::STAGES);
        use(s, numbers, Place{t, i, count, token, weights});
      }
      release(token_empty(z.n));
      z.next(TOKENS);
    }
  }
  // of a thread's two keys di and scale, and the keys that it adds to: one (EXACT), or four after a trade
  template <bool EXACT>
  struct Numbers {
    float di[2], scale[2];
    int keys[EXACT ? 1 : 4];
  };
  // d_index_k
  //   P = di w [S > 0]    sums[keys] += P X
  template <bool EXACT>
  __device__ __forceinline__ void add_keys(int half) const {
    const int row = half * 64 + warpgroup_row(), first = half * 64 + warp * 16;
    const int out = sm + L::Z + half * L::SUMS + warp * 16 * L::ROW;  // the warp's rows
    const auto read = [&](int n) {
      Numbers<EXACT> y;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        y.di[h] = load_shared_float(di_at(n, row + 8 * h));
        y.scale[h] = EXACT ? load_shared_float(scale_at(n, row + 8 * h)) : 1.f;
      }
#pragma unroll
      for (int i = 0; i < (EXACT ? 1 : 4); ++i)
        y.keys[i] = load_shared_int(
            number_at(n, first + (EXACT ? lane & 15 : ((lane / 4) & ~1) + (i & 1) + 8 * (i / 2))));
      return y;
    };
    each_product(half, read, [&](float (&s)[32], const Numbers<EXACT>& y, const Place& at) {
      unsigned p[16];
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        const float2 w = load_shared_float2(at.weights + g * 32);
#pragma unroll
        for (int h = 0; h < 2; ++h)
          p[2 * g + h] = define_word(
              pack(w.x * y.di[h], w.y * y.di[h]), mask_positive(s[4 * g + 2 * h], s[4 * g + 2 * h + 1]));
      }
      float d[E / 2];
#pragma unroll
      for (int j = 0; j < E / 2; ++j) d[j] = 0.f;
      wg_accumulate<HEADS, E>(d, p, at.token >> 4);
      tl::wait_wgmma<0>();
      tl::warpgroup_fence_operand(d, E / 2);
      if constexpr (EXACT)
        add_integers(d, y, out);
      else
        add_floats(d, y);
    });
    if (EXACT && lane < 16) wait_bulk();
  }
  // rows of a warp's accumulators in units of their scale, by way of shared memory
  __device__ __forceinline__ void add_integers(const float (&d)[E / 2], const Numbers<true>& y, int out) const {
    if (lane < 16) wait_bulk_read();
    __syncwarp();
#pragma unroll
    for (int g = 0; g < E / 8; ++g) {
      const int to = out + (lane >> 2) * L::ROW + g * 32 + (lane & 3) * 8;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_shared(to + 8 * h * L::ROW, __float2int_rn(d[4 * g + 2 * h] * y.scale[h]),
                     __float2int_rn(d[4 * g + 2 * h + 1] * y.scale[h]));
    }
    fence_shared();
    __syncwarp();
    if (lane < 16) {
      if (y.keys[0] >= 0) add_bulk(x.sums + (long long)y.keys[0] * E, out + lane * L::ROW, E * 4);
      commit_bulk();
    }
  }
  __device__ __forceinline__ void add_floats(float (&d)[E / 2], const Numbers<false>& y) const {
    trade_rows<E>(d);
#pragma unroll
    for (int m = 0; m < E / 32; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (y.keys[i] >= 0)
          add_to((float*)x.sums + (long long)y.keys[i] * E + traded_column() + 32 * m, d + 16 * m + 4 * i);
  }
  // scores[t, slot] = sum_j w_j ReLU(S)
  __device__ __forceinline__ void score_keys(int half) const {
    const int row = half * 64 + warpgroup_row();
    each_product(half, [](int) { return 0; }, [&](float (&s)[32], int, const Place& at) {
      float first = 0.f, second = 0.f;
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        const float2 w = load_shared_float2(at.weights + g * 32);
        first = fmaf(w.x, relu(s[4 * g]), fmaf(w.y, relu(s[4 * g + 1]), first));
        second = fmaf(w.x, relu(s[4 * g + 2]), fmaf(w.y, relu(s[4 * g + 3]), second));
      }
      first = quad_sum(first), second = quad_sum(second);
      const int slot = at.tile * KEYS + row;
      float* to = x.scores + (long long)at.t * x.width + slot;
      if ((lane & 3) == 0 && slot < at.count) to[0] = first;
      if ((lane & 3) == 0 && slot + 8 < at.count) to[8] = second;
    });
  }
  // who has nothing to do lets the others go on
  __device__ __forceinline__ void pass() const {
    Stage y, z;
    for (int t = blockIdx.x; t < x.T; t += gridDim.x) {
      const int tiles = tiles_of(count_of(t));
      if (!tiles) continue;
      for (int i = 0; i < tiles; ++i) {
        barrier_wait(key_full(y.n), y.parity);
        release(key_empty(y.n));
        y.next(L::STAGES);
      }
      release(token_empty(z.n));
      z.next(TOKENS);
    }
  }
};
enum { SCORES, FLOATS, INTEGERS };  // what warpgroups 0 and 1 make: scores, or d_index_k's sums of such terms
}  // namespace sparse_index

// Barriers, then each warpgroup to its work, for 512 threads; `sm` the address of BYTES of shared memory, a multiple of 1,024
template <int E, int WHAT>
static __device__ __forceinline__ void work_on_selected_keys(int sm, const sparse_index::Problem& x) {
  using namespace sparse_index;
  const Work<E> work(x, sm);
  const int warpgroup = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0);
  if (threadIdx.x == 0) {
    if (sm & 1023) __trap();
    for (int n = 0; n < Layout<E>::STAGES; ++n) barrier_init(work.key_full(n), 256), barrier_init(work.key_empty(n), 12);
    for (int n = 0; n < TOKENS; ++n) barrier_init(work.token_full(n), 256), barrier_init(work.token_empty(n), 12);
    barriers_ready();
  }
  __syncthreads();
  if (warpgroup == 3) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    work.feed();
  } else if (warpgroup == 2) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    if (WHAT != SCORES && (x.wants & WANTS_QUERY)) work.sum_queries(); else work.pass();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 120;");
    if constexpr (WHAT == SCORES) work.score_keys(warpgroup);
    else if (x.wants & WANTS_KEY) work.template add_keys<WHAT == INTEGERS>(warpgroup);
    else work.pass();
  }
}
template <int E, bool EXACT>
static __device__ __forceinline__ void sparse_index_gradients(
    int sm, const void* q, const void* k, const float* w, const float* di, const int* indices, const int* count,
    const int* bound, const float* most, void* dq, float* dw, int* sums, int T, int I, int S, int width, int bits,
    int wants) {
  const sparse_index::Problem x{
      (const char*)q, (const char*)k, w, di, indices, count, EXACT ? bound : nullptr, most, (char*)dq, dw,
      sums, nullptr, T, I, S, width, bits, wants};
  work_on_selected_keys<E, EXACT ? sparse_index::INTEGERS : sparse_index::FLOATS>(sm, x);
}
template <int E>
static __device__ __forceinline__ void sparse_index_scores(
    int sm, const void* q, const void* k, const float* w, const int* indices, const int* count, float* scores, int T,
    int I, int S, int width) {
  const sparse_index::Problem x{
      (const char*)q, (const char*)k, w, nullptr, indices, count, nullptr, nullptr, nullptr, nullptr, nullptr, scores, T,
      I, S, width, 0, sparse_index::WANTS_SCORES};
  work_on_selected_keys<E, sparse_index::SCORES>(sm, x);
}
