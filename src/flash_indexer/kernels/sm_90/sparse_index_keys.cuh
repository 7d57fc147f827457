#pragma once
#include "../device/accumulator.cuh"
#include "../device/cluster.cuh"
#include "../device/wgmma.cuh"
#include "sparse_index_rings.cuh"
// d_index_k of a range of keys, 64 of its columns, over a run of tokens: sums stay in shared memory, tokens stream past.
namespace index_keys {
using sparse_index::Stage, sparse_index::copy_row, sparse_index::copies_arrive, sparse_index::piece;
using sparse_index::own_mask, sparse_index::mask_of_heads;
constexpr int KEYS = 256, GROUPS = 3, RANGE = KEYS * GROUPS;  // of a warpgroup; warpgroups
constexpr int COLUMNS = 64, HEADS = 64, SLOTS = 64, STAGES = 3;  // slots of a warpgroup in a stage
constexpr int TOKEN = HEADS * COLUMNS * 2, SLOT = 16;
// shared memory, in bytes
constexpr int SUMS = 0, X = SUMS + RANGE * COLUMNS * 4, W = X + STAGES * TOKEN, INFO = W + STAGES * HEADS * 4;
constexpr int STATES = INFO + STAGES * GROUPS * SLOTS * SLOT, BARRIERS = STATES + STAGES * 16, BYTES = BARRIERS + 16 * STAGES;
constexpr int NONE = 0, SOME = 1, END = 2;  // what a stage has for a warpgroup
struct Problem {
  const char* q;  // index_q [T, I, E] bfloat16
  const float *w, *di;
  const int* indices;
  const uint2* masks;
  const int2* spans;  // [T, runs]: slots, from the first to behind the last, of keys 256r .. 256r + 255
  int T, I, S, E, width, runs;
};
// A token's slots of this range, at most SLOTS for each warpgroup at a time
struct Step {
  int token, at, end;
};
struct Slot {
  uint2 mask;
  float di;
  int key;  // in the range; -1 for none
};

struct Work {
  const Problem& x;
  int sm, lane, warp, run, column;  // run: the first of this range's three
  __device__ __forceinline__ Work(const Problem& x, int sm, int range, int column)
      : x(x), sm(sm), lane(threadIdx.x & 31), warp(threadIdx.x >> 5 & 3), run(range * GROUPS), column(column) {}
  __device__ __forceinline__ int full(int n) const { return sm + BARRIERS + 8 * n; }
  __device__ __forceinline__ int empty(int n) const { return sm + BARRIERS + 8 * (STAGES + n); }
  __device__ __forceinline__ int state_at(int n, int group) const { return sm + STATES + 16 * n + 4 * group; }
  __device__ __forceinline__ int slot_at(int n, int group, int i) const {
    return sm + INFO + ((n * GROUPS + group) * SLOTS + i) * SLOT;
  }
  // where 8 columns of a key lie, 8g .. 8g + 7: keys that a warp adds to at once then lie in different banks as a rule
  __device__ __forceinline__ int sums_at(int key, int g) const {
    return sm + SUMS + key * (COLUMNS * 4) + ((g ^ (key & 7)) << 5);
  }
  __device__ __forceinline__ Slot slot_of(const Step& step, int i) const {
    Slot s{make_uint2(0u, 0u), 0.f, -1};
    if (warp >= GROUPS || step.at + i >= step.end) return s;
    const long long at = (long long)step.token * x.width + step.at + i;
    const int key = load_int(x.indices, at), local = key - run * KEYS;
    if ((unsigned)key >= (unsigned)x.S || local >> 8 != warp) return s;
    s.mask = __ldg(x.masks + at), s.di = load_float(x.di, at), s.key = local;
    return s;
  }
  __device__ __forceinline__ void put_slot(int n, int i, const Slot& s) const {
    store_shared(slot_at(n, warp, i), (int)s.mask.x, (int)s.mask.y, __float_as_int(s.di), s.key);
  }

  // warps 12 to 15: tokens of [first, end) that have a slot in the range
  __device__ __forceinline__ void feed(int first, int end) const {
    int base = first - 32, begin = 0, stop = 0, parts = 0, token = 0, part = 0, left = 0;
    unsigned waiting = 0;  // of the 32 tokens from base on
    auto advance = [&](Step& step) {
      if (part + 1 < left) {
        ++part;
      } else {
        while (!waiting) {
          base += 32;
          if (base >= end) return false;
          begin = stop = parts = 0;
          if (base + lane < end) {
            const int2* spans = x.spans + (long long)(base + lane) * x.runs;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
              const int2 span = run + g < x.runs ? __ldg(spans + run + g) : make_int2(0, 0);
              parts = max(parts, (span.y - span.x + SLOTS - 1) / SLOTS);
              if (g == warp) begin = span.x, stop = span.y;
            }
          }
          waiting = __ballot_sync(0xffffffffu, parts > 0);
        }
        token = __ffs(waiting) - 1, waiting &= waiting - 1, part = 0;
        left = __shfl_sync(0xffffffffu, parts, token);
      }
      step.token = base + token;
      step.at = __shfl_sync(0xffffffffu, begin, token) + part * SLOTS;
      step.end = __shfl_sync(0xffffffffu, stop, token);
      return true;
    };
    Stage y;
    Step step{}, next{};
    bool more = advance(step);
    Slot low = slot_of(step, lane), high = slot_of(step, lane + 32);
    if (!more) low.key = high.key = -1;
    while (more) {
      const bool another = advance(next);
      Slot next_low = low, next_high = high;
      if (another) next_low = slot_of(next, lane), next_high = slot_of(next, lane + 32);
      barrier_wait(empty(y.n), y.parity ^ 1);
      const int c = lane & 7;
#pragma unroll
      for (int i = 0; i < HEADS / 16; ++i) {
        const int head = warp * 16 + i * 4 + (lane >> 3);
        copy_row(sm + X + y.n * TOKEN + piece<COLUMNS, HEADS>(head, c),
                 x.q + (((long long)step.token * x.I + min(head, x.I - 1)) * x.E + column) * 2 + c * 16,
                 head < x.I ? 16 : 0);
      }
      if (warp < GROUPS) {
        put_slot(y.n, lane, low), put_slot(y.n, lane + 32, high);
        const bool some = __any_sync(0xffffffffu, low.key >= 0 || high.key >= 0);
        if (lane == 0) store_shared(state_at(y.n, warp), __int_as_float(some ? SOME : NONE));
      } else {
        const float* w = x.w + (long long)step.token * x.I;
#pragma unroll
        for (int h = 0; h < HEADS; h += 32)
          store_shared(sm + W + (y.n * HEADS + h + lane) * 4, h + lane < x.I ? w[h + lane] : 0.f);
      }
      copies_arrive(full(y.n));
      barrier_arrive(full(y.n));
      y.next(STAGES);
      step = next, low = next_low, high = next_high, more = another;
    }
    barrier_wait(empty(y.n), y.parity ^ 1);
    if (warp < GROUPS && lane == 0) store_shared(state_at(y.n, warp), __int_as_float(END));
    copies_arrive(full(y.n));
    barrier_arrive(full(y.n));
  }

  // a warpgroup: sums[keys] += P X    P = di w [logit > 0]
  __device__ __forceinline__ void add(int group) const {
    Stage y;
    const int row = warpgroup_row();
    for (;;) {
      barrier_wait(full(y.n), y.parity);
      fence_shared();
      const int state = __float_as_int(load_shared_float(state_at(y.n, group)));
      if (state == END) break;
      if (state == SOME) {
        const int token = wg_uniform(sm + X + y.n * TOKEN), weights = sm + W + y.n * HEADS * 4 + (lane & 3) * 8;
        const int4 a = load_shared_int4(slot_at(y.n, group, row)), b = load_shared_int4(slot_at(y.n, group, row + 8));
        const unsigned own_a = own_mask(make_uint2(a.x, a.y)), own_b = own_mask(make_uint2(b.x, b.y));
        const float di_a = __int_as_float(a.z), di_b = __int_as_float(b.z);
        unsigned p[16];
#pragma unroll
        for (int g = 0; g < 8; ++g) {
          const float2 w = load_shared_float2(weights + g * 32);
          p[2 * g] = define_word(pack(w.x * di_a, w.y * di_a), mask_of_heads(own_a, g));
          p[2 * g + 1] = define_word(pack(w.x * di_b, w.y * di_b), mask_of_heads(own_b, g));
        }
        float d[COLUMNS / 2];
#pragma unroll
        for (int j = 0; j < COLUMNS / 2; ++j) d[j] = 0.f;
        wg_accumulate<HEADS, COLUMNS>(d, p, token >> 4);
        tl::wait_wgmma<0>();
        tl::warpgroup_fence_operand(d, COLUMNS / 2);
        release(y.n);
        meet(1 + group, 128);  // what other warps added to these keys for the token before is there
        add_row(a.w, d);
        add_row(b.w, d + 2);
      } else {
        release(y.n);
      }
      y.next(STAGES);
    }
  }
  __device__ __forceinline__ void release(int n) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty(n));
  }
  // d[4g], d[4g + 1]: columns 8g + 2 (lane % 4) and the next
  __device__ __forceinline__ void add_row(int key, const float* d) const {
    if (key < 0) return;
    float2 old[COLUMNS / 8];
#pragma unroll
    for (int g = 0; g < COLUMNS / 8; ++g) {
      const int at = sums_at(key, g) + (lane & 3) * 8;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(old[g].x), "=f"(old[g].y) : "r"(at) : "memory");
    }
#pragma unroll
    for (int g = 0; g < COLUMNS / 8; ++g)
      store_shared(sums_at(key, g) + (lane & 3) * 8, old[g].x + d[4 * g], old[g].y + d[4 * g + 1]);
  }
};
}  // namespace index_keys

// OUT[part, keys of the range, 64 columns] = their sums over the part's tokens, by 512 threads
static __device__ __forceinline__ void sparse_index_keys(
    int sm, const void* q, const float* w, const float* di, const int* indices, const int* masks, const int* spans,
    float* out, int T, int I, int S, int E, int width, int range, int part, int length) {
  using namespace index_keys;
  const Problem x{(const char*)q, w, di, indices, (const uint2*)masks, (const int2*)spans, T, I, S, E, width,
                  (S + KEYS - 1) / KEYS};
  const int halves = E / COLUMNS, column = range % halves * COLUMNS;
  range /= halves;
  const Work work(x, sm, range, column);
  const int warpgroup = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0);
  for (int i = threadIdx.x; i < RANGE * COLUMNS / 4; i += 512) store_shared(sm + SUMS + i * 16, 0.f, 0.f, 0.f, 0.f);
  if (threadIdx.x == 0) {
    if (sm & 1023) __trap();
    for (int n = 0; n < STAGES; ++n) barrier_init(work.full(n), 256), barrier_init(work.empty(n), 4 * GROUPS);
    barriers_ready();
  }
  __syncthreads();
  if (warpgroup == GROUPS) work.feed(part * length, min((part + 1) * length, T)); else work.add(warpgroup);
  __syncthreads();
  out += (long long)part * S * E + column;
  for (int i = threadIdx.x; i < RANGE * COLUMNS / 4; i += 512) {
    const int key = i / (COLUMNS / 4), c = i % (COLUMNS / 4), global = range * RANGE + key;
    if (global < S) *(float4*)(out + (long long)global * E + c * 4) = load_shared_float4(work.sums_at(key, c / 2) + c % 2 * 16);
  }
}
