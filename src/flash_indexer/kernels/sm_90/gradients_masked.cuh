#pragma once
#include "../device/accumulator.cuh"
#include "../device/cluster.cuh"
#include "../device/items.cuh"
#include "../device/mask_words.cuh"
#include "../device/wgmma.cuh"
// A stage of the ring: the tile of w·index_q, then di and the mask words of 128 rows for two key tiles
template <int E, int IP, int STAGES>
struct MaskedRing {
  static constexpr int TILE_BYTES = 256 * E, DI_BYTES = 128 / IP * 256, MASK_BYTES = 2048;
  static constexpr int DI = TILE_BYTES, MASKS = DI + 2 * DI_BYTES, BYTES = MASKS + 2 * MASK_BYTES;
  static_assert(BYTES % 512 == 0, "swizzled tiles begin where their pattern does");
  int ring, barriers, stage, parity;
  __device__ __forceinline__ int at() const { return ring + stage * BYTES; }
  __device__ __forceinline__ int full() const { return barriers + 8 * stage; }
  __device__ __forceinline__ int empty() const { return barriers + 8 * (STAGES + stage); }
  __device__ __forceinline__ int seen() const { return barriers + 16 * STAGES + 4 * stage; }  // bit v: key tile v is
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};
// tiles of 128 rows (token, head) of an item's quarters of blocks, those that hold a token below ntok
template <int IP>
static __device__ __forceinline__ int gm_steps(int quarter, int quarter_end, int ntok) {
  return max(min(quarter_end * 32, ntok) - quarter * 32, 0) * IP + 127 >> 7;
}
// What P's rows 16k .. 16k + 15 are made of: bits of the thread's keys, and di of its four keys twice in a word, of one token
// or of two
template <int IP>
struct MaskedSlice {
  static constexpr int TOKENS = IP == 8 ? 2 : 1;
  unsigned bits[2];  // of rows 2 (lane % 4), + 1, and of those 8 rows on
  unsigned value[TOKENS][4];
  // di: the address that the lane gives for the first token's; mask: of its first word; k a constant, after which the slice
  // before has the token's di already
  __device__ __forceinline__ void load(int k, int first, int di, int mask, const MaskedSlice& before) {
#pragma unroll
    for (int half = 0; half < 2; ++half) bits[half] = load_shared_word(mask + k * 256 + half * 128);
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
      if (k == first || k * 16 % IP == 0) {
        load_shared_matrices_transposed(value[t], di + (k * 16 / IP + t) * 256);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) value[t][i] = before.value[t][i];
      }
  }
};
// p = di * mask of rows 16 FIRST .. 16 (FIRST + 4) - 1, transposed: rows keys, columns (token, head); p0 of the
// warpgroup's first 64 keys, p1 of the others. factor: brings the bits of p0's keys to the top of each byte; 0: none is set.
// A row of di is all eight rows of a matrix, of which a lane then has its key's element twice. What a slice is made of is
// loaded before the one before it is formed
template <int IP, int FIRST>
static __device__ __forceinline__ void gm_form(unsigned* p0, unsigned* p1, int di, int mask, unsigned factor) {
  const int lane = threadIdx.x & 31, matrix = lane >> 3;
  di += (threadIdx.x >> 5 & 3) * 32 + (matrix >> 1) * 128 + (matrix & 1) * 16;
  mask += 4 * mask_word(2 * (lane & 3), lane >> 3, lane >> 2 & 1);
  MaskedSlice<IP> slice, coming;
  coming.load(FIRST, FIRST, di, mask, coming);
#pragma unroll
  for (int k = FIRST; k < FIRST + 4; ++k) {
    slice = coming;
    if (k < FIRST + 3) coming.load(k + 1, FIRST, di, mask, slice);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned first = slice.bits[half] * factor, second = slice.bits[half] * (factor * 16);
      const unsigned* value = slice.value[IP == 8 ? half : 0];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        p0[4 * k + 2 * half + h] = define_word(value[h], spread_signs(first, h));
        p1[4 * k + 2 * half + h] = define_word(value[2 + h], spread_signs(second, h));
      }
    }
  }
}
// o0 += p0 Y and o1 += p1 Y over rows 16 FIRST .. 16 (FIRST + 4) - 1 of Y, a tile of 128 rows
template <int E, int FIRST>
static __device__ __forceinline__ void gm_accumulate(float* o0, float* o1, unsigned* p0, unsigned* p1, int y) {
  using namespace tl;
  using Y = Tile<E, 128>;
  warpgroup_fence_operand(p0 + 4 * FIRST, 16);
  warpgroup_fence_operand(p1 + 4 * FIRST, 16);
  warpgroup_fence_operand(o0, E / 2);
  warpgroup_fence_operand(o1, E / 2);
  warpgroup_arrive();
#pragma unroll
  for (int k = FIRST; k < FIRST + 4; ++k)
    wgmma_rs<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, E, 16, false, true, 1, 1>(
        p0 + 4 * k, Y::descriptor(y + Y::along_column(k) + (128 * Y::ROW >> 4 << 16)), (uint32_t*)o0, 1);
#pragma unroll
  for (int k = FIRST; k < FIRST + 4; ++k)
    wgmma_rs<DataType::kBFloat16, DataType::kBFloat16, DataType::kFloat32, 64, E, 16, false, true, 1, 1>(
        p1 + 4 * k, Y::descriptor(y + Y::along_column(k) + (128 * Y::ROW >> 4 << 16)), (uint32_t*)o1, 1);
  warpgroup_commit_batch();
  warpgroup_fence_operand(o0, E / 2);
  warpgroup_fence_operand(o1, E / 2);
  warpgroup_fence_operand(p0 + 4 * FIRST, 16);
  warpgroup_fence_operand(p1 + 4 * FIRST, 16);
}
// two groups of products of each of `COUNT` steps, of which at most two are under way; none at the end
template <int E, int IP, int COUNT, class Ring>
static __device__ __forceinline__ void gm_group(Ring& ring, float* o0, float* o1, unsigned* p0, unsigned* p1) {
  const int v = threadIdx.x >> 7;
  const unsigned shift = 1u << (threadIdx.x >> 5 & 3);
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    const int before = ring.empty();
    if (u > 0) ring.next();
    barrier_wait(ring.full(), ring.parity);
    const int at = wg_uniform(ring.at()), di = at + Ring::DI + v * Ring::DI_BYTES;
    const int mask = at + Ring::MASKS + v * Ring::MASK_BYTES, y = wg_uniform(at >> 4);
    const unsigned factor = load_shared_int(ring.seen()) >> v & 1 ? shift : 0;
    if (u > 0) tl::wait_wgmma<1>();
    gm_form<IP, 0>(p0, p1, di, mask, factor);
    gm_accumulate<E, 0>(o0, o1, p0, p1, y);
    if (u > 0) {
      tl::wait_wgmma<1>();
      barrier_arrive(before);
    }
    gm_form<IP, 4>(p0, p1, di, mask, factor);
    gm_accumulate<E, 4>(o0, o1, p0, p1, y);
  }
  tl::wait_wgmma<0>();
  tl::warpgroup_fence_operand(o0, E / 2);
  tl::warpgroup_fence_operand(o1, E / 2);
  barrier_arrive(ring.empty());
  ring.next();
}
// 64 rows of the pair of key tiles, from `first` on. slot < 0: SUM[pair * 256 + r] += o[r], or = where not `adds`, rows below S;
// otherwise PART[slot * 128 + r % 128] = o[r], with the slots of a pair's second tiles behind all those of the first ones
template <int E>
static __device__ __forceinline__ void gm_store(
    const float* o, float* SUM, float* PART, int pair, int slot, int slots, int first, int S, bool adds) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = first + warpgroup_row() + 8 * h;
    const bool part = slot >= 0;
    const long long row = part ? (long long)(slot + (r >> 7) * slots) * 128 + (r & 127) : (long long)pair * 256 + r;
    float2* p = (float2*)((part ? PART : SUM) + row * E) + (threadIdx.x & 3);
    if (!part && row >= S) continue;
#pragma unroll
    for (int g = 0; g < E / 8; ++g) {
      const float x = o[4 * g + 2 * h], y = o[4 * g + 2 * h + 1];
      if (part || !adds)
        p[4 * g] = make_float2(x, y);
      else  // by the memory, which no thread waits for; no other one adds to the same in this launch
        asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p + 4 * g), "f"(x), "f"(y) : "memory");
    }
  }
}
// d_index_k of pairs of key tiles, warpgroup v the v-th one of the pair
template <int E, int IP, int STAGES>
static __device__ __forceinline__ void gm_sum(
    float* SUM, float* PART, const int* ITEMS, int ntok, int nitems, int grid, int slots, int S, bool adds, int ring_,
    int barriers) {
  MaskedRing<E, IP, STAGES> ring = {ring_, barriers, 0, 0};
  float o0[E / 2], o1[E / 2];
  unsigned p0[32], p1[32];
  const int items = count_items(nitems, blockIdx.x, grid);
  for (int it = 0; it < items; ++it) {
    const int4 item = *(const int4*)(ITEMS + 4 * (blockIdx.x + it * grid));
    const int n = gm_steps<IP>(item.y, item.z, ntok);
    if (n == 0) continue;
#pragma unroll
    for (int i = 0; i < E / 2; ++i) o0[i] = o1[i] = 0.0f;
    for (int i = 0; i < n / 2; ++i) gm_group<E, IP, 2>(ring, o0, o1, p0, p1);
    if (n & 1) gm_group<E, IP, 1>(ring, o0, o1, p0, p1);
    const int first = (threadIdx.x >> 7) * 128;
    gm_store<E>(o0, SUM, PART, item.x, item.w, slots, first, S, adds);
    gm_store<E>(o1, SUM, PART, item.x, item.w, slots, first + 64, S, adds);
  }
}
// the warp that copies: lane 0 Y, lanes 1 and 2 di of both key tiles, lanes 3 and 4 their masks
template <int E, int IP, int STAGES>
static __device__ __forceinline__ void gm_feed(
    const void* WQ, const void* DI, const void* MASKS, const void* MORE, int pitch, const int* BLOCKS, const int* ITEMS,
    int base, int ntok, int nitems, int grid, int ring_, int barriers) {
  using Ring = MaskedRing<E, IP, STAGES>;
  Ring ring = {ring_, barriers, 0, 1};
  const int lane = threadIdx.x & 31, v = (lane - 1) & 1;
  const int bytes = lane == 0 ? Ring::TILE_BYTES : lane < 3 ? Ring::DI_BYTES : Ring::MASK_BYTES;
  const int to = lane == 0 ? 0 : lane < 3 ? Ring::DI + v * Ring::DI_BYTES : Ring::MASKS + v * Ring::MASK_BYTES;
  const int items = count_items(nitems, blockIdx.x, grid);
  for (int it = 0; it < items; ++it) {
    const int4 item = *(const int4*)(ITEMS + 4 * (blockIdx.x + it * grid));
    int steps = gm_steps<IP>(item.y, item.z, ntok), i = (item.y & 3) * (IP / 4);
    for (int block = item.y >> 2; steps > 0; ++block, i = 0) {
      const int4 seen = *(const int4*)(BLOCKS + 4 * block);
      const int first = 2 * item.x;
      const int bits = (first >= seen.y && first < seen.z) | (first + 1 >= seen.y && first + 1 < seen.z) << 1;
      const bool copies = lane == 0 || (lane < 5 && (bits >> v & 1));
      const long long score_tile = seen.x + first + v, masks = score_tile * pitch * Ring::MASK_BYTES;
      const char* from = lane == 0  ? (const char*)WQ + (long long)(block - (base >> 7)) * (IP * Ring::TILE_BYTES)
                         : lane < 3 ? (const char*)DI + score_tile * 32768
                                    : (const char*)MASKS + masks;
      const char* more = (const char*)MORE + masks - 32 * Ring::MASK_BYTES;
      for (; i < IP && steps > 0; ++i, --steps, ring.next()) {
        const int full = ring.full();
        barrier_wait(ring.empty(), ring.parity);
        if (lane == 0) {
          store_shared_int(ring.seen(), bits);
          barrier_expect(full, Ring::TILE_BYTES + ((bits & 1) + (bits >> 1)) * (Ring::DI_BYTES + Ring::MASK_BYTES));
        }
        __syncwarp();
        if (copies) copy_bulk(ring.at() + to, (IP > 32 && lane > 2 && i >= 32 ? more : from) + i * bytes, bytes, full);
      }
    }
  }
}
// before the roles part
template <int STAGES>
static __device__ __forceinline__ void gm_begin(int barriers) {
  if (threadIdx.x < STAGES) {
    barrier_init(barriers + 8 * threadIdx.x, 1);
    barrier_init(barriers + 8 * (STAGES + threadIdx.x), 256);  // every thread hands a stage back for itself
    barriers_ready();
  }
  __syncthreads();
}
