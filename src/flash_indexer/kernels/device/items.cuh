#pragma once
#include <tl_templates/cuda/common.h>
#include <tl_templates/cuda/intrin.h>
#include "memory.cuh"
// Items of work lists, as items.py describes them, and the order in which the tiles of an item are visited.
namespace row_item {
enum { TOKEN, KEY_HEAD, FIRST_KEY, TILES, RIGHT, LEFT, SEEN };
}
namespace key_item {
enum { KEY_TILE, FIRST, END, WHOLE, WHOLE_END, SLOT };
}
enum { ITEM = 8, ITEM_BYTES = 4 * ITEM };  // numbers of an item, bytes
// Number of the tile that is visited as the i-th: the masked ones, first .. whole - 1 and from `end` on, then whole .. end
// - 1. A macro, for `end` is read only where it is needed, and the compiler branches where a function makes the choice.
#define VISITED(i, first, whole, end, masked)                     \
  ((i) < (whole) - (first) ? (first) + (i)                        \
   : (i) < (masked)        ? (i) - ((whole) - (first)) + (end)    \
                           : (i) - (masked) + (whole))
// A row item in shared memory, by its address.
static __device__ __forceinline__ int item_field(int item, int n) { return load_shared_int(item + n * 4); }
static __device__ __forceinline__ int masked_tiles(int item) {
  return item_field(item, row_item::RIGHT) + item_field(item, row_item::TILES) - item_field(item, row_item::LEFT);
}
// the masked tiles but the first one
static __device__ __forceinline__ int masked_tiles_left(int item) {
  return item_field(item, row_item::RIGHT) - 1 + item_field(item, row_item::TILES) - item_field(item, row_item::LEFT);
}
static __device__ __forceinline__ int whole_tiles(int item) {
  return item_field(item, row_item::LEFT) - item_field(item, row_item::RIGHT);
}
// first of the N keys of the tile visited as the i-th
template <int N>
static __device__ __forceinline__ int first_key(int item, int i) {
  const int right = item_field(item, row_item::RIGHT), left = item_field(item, row_item::LEFT);
  const int masked = masked_tiles(item);
  return item_field(item, row_item::FIRST_KEY) - N * VISITED(i, 0, right, left, masked);
}
// As `first_key`, with fields read only where they are needed: of a tile that is masked, and of any. With `first_key` in place
// of the second one the compiler lays out the registers of `attention`'s main loop anew.
static __device__ __forceinline__ int visited_masked(int item, int i) {
  const int right = item_field(item, row_item::RIGHT);
  return VISITED(i, 0, right, item_field(item, row_item::LEFT), i + 1);
}
template <int N>
static __device__ __forceinline__ int first_masked_key(int item, int i) {
  return item_field(item, row_item::FIRST_KEY) - visited_masked(item, i) * N;
}
template <int N>
static __device__ __forceinline__ int first_key_late(int item, int i) {
  const int masked = masked_tiles_left(item) + 1;
  const int first = item_field(item, row_item::FIRST_KEY);
  return first - N * (i < masked ? visited_masked(item, i) : i - masked + item_field(item, row_item::RIGHT));
}
// A row item on its way from the list to shared memory: lanes 0 to 7 of the warp that feeds hold its eight fields (the
// other lanes hold them again), and all that this warp asks comes by shuffles.
static __device__ __forceinline__ int lane_field(const int* items, int at) {
  return load_int(items, (long long)at * ITEM + (threadIdx.x & 7));
}
static __device__ __forceinline__ int pick_field(int fields, int n) { return __shfl_sync(0xffffffffu, fields, n); }
// all eight by the lane that then arrives at a barrier: it need not speak for others
static __device__ __forceinline__ void put_item(int address, int fields) {
  int v[ITEM];
#pragma unroll
  for (int n = 0; n < ITEM; ++n) v[n] = pick_field(fields, n);
  if (cute::elect_one_sync()) {
    store_shared(address, v[0], v[1], v[2], v[3]);
    store_shared(address + 16, v[4], v[5], v[6], v[7]);
  }
}
template <int N>
static __device__ __forceinline__ int pick_first_key(int fields, int i) {
  const int first = pick_field(fields, row_item::FIRST_KEY), tiles = pick_field(fields, row_item::TILES);
  const int right = pick_field(fields, row_item::RIGHT), left = pick_field(fields, row_item::LEFT);
  const int masked = right + tiles - left;
  return first - N * VISITED(i, 0, right, left, masked);
}
// A key item in the list itself, read where it is needed; its row tiles are visited in that order too, for each key head.
static __device__ __forceinline__ int list_field(const int* items, int at, int n) { return load_int(items, at + n); }
static __device__ __forceinline__ int row_tiles(const int* items, int at) {
  return list_field(items, at, key_item::END) - list_field(items, at, key_item::FIRST);
}
static __device__ __forceinline__ int whole_row_tiles(const int* items, int at) {
  return list_field(items, at, key_item::WHOLE_END) - list_field(items, at, key_item::WHOLE);
}
static __device__ __forceinline__ int masked_row_tiles(const int* items, int at) {
  return row_tiles(items, at) - whole_row_tiles(items, at);
}
static __device__ __forceinline__ int visited_row_tile(const int* items, int at, int i) {
  const int first = list_field(items, at, key_item::FIRST), whole = list_field(items, at, key_item::WHOLE);
  const int end = list_field(items, at, key_item::WHOLE_END);
  const int masked = masked_row_tiles(items, at);
  return VISITED(i, first, whole, end, masked);
}
