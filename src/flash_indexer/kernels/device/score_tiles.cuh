#pragma once
// Where a query's scores lie: in tiles of 128 tokens by 128 keys, [tiles * 128, 128], those that its block of 128 tokens
// may see, one after the other. Columns are counted from the first key of the block's first tile.
static __device__ __forceinline__ long long in_tiles(int column) {
  return (long long)(column >> 7) * 16384 + (column & 127);
}
struct ScoreRow {
  long long begin;     // of column 0
  int first_key;       // of column 0
  int width;           // columns
  int low, high;       // columns that the query sees
  // blocks: (tile base, first key tile, end, 0) of each block
  __device__ __forceinline__ ScoreRow() {}
  __device__ __forceinline__ ScoreRow(const int* blocks, int key_start, int key_end, int t)
      : ScoreRow(*(const int4*)(blocks + 4 * (t >> 7)), key_start, key_end, t) {}
  __device__ __forceinline__ ScoreRow(int4 block, int key_start, int key_end, int t) {
    first_key = block.y << 7, width = (block.z - block.y) << 7;
    low = max(key_start, first_key) - first_key, high = min(key_end, first_key + width) - first_key;
    begin = ((long long)(block.x + block.y) * 128 + (t & 127)) * 128;
  }
};
