#pragma once
#include "../device/memory.cuh"
// What the kernels of the indexer at the selected keys share: rings of stages that warps fill by 16-byte copies, and which
// heads' logits of a key are positive, in 64 bits.
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
// Heads 8g + 2q and 8g + 2q + 1 (q = lane % 4, the columns of an accumulator) are the bits g and 16 + g of `own` where q is
// even, 8 higher where it is odd; the first word has q = 0 and 1, the second 2 and 3. In all four lanes of a row
static __device__ __forceinline__ uint2 head_mask(unsigned own) {
  own <<= threadIdx.x & 1 ? 8 : 0;
  own |= __shfl_xor_sync(0xffffffffu, own, 1);
  const unsigned other = __shfl_xor_sync(0xffffffffu, own, 2);
  return threadIdx.x & 2 ? make_uint2(other, own) : make_uint2(own, other);
}
// 0xffff in each half where the bit of the lane's head 8g + 2q, 8g + 2q + 1 is set. own: the lane's word, shifted to its bits
static __device__ __forceinline__ unsigned own_mask(uint2 mask) {
  return (threadIdx.x & 2 ? mask.y : mask.x) >> (threadIdx.x & 1 ? 8 : 0);
}
static __device__ __forceinline__ unsigned mask_of_heads(unsigned own, int g) {
  const unsigned bits = own >> g & 0x00010001u;
  return (bits << 16) - bits;
}
}  // namespace sparse_index
