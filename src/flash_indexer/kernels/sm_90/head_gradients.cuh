#pragma once
#include "../device/accumulator.cuh"
#include "../device/items.cuh"
#include "../device/rows.cuh"
#define HG_NOTHING 1e30f  // a logsumexp so large that the exponential is zero: of padding, and where there is no query
// intervals of the thread's two rows of queries; padding and tokens t >= n see nothing
template <int HG>
static __device__ __forceinline__ void hg_limits(int* limits, int item, const int* KS, const int* KE, int n) {
  const int t0 = item_field(item, row_item::TOKEN);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = thread_row(h), t = t0 + Rows<HG, 128>::token(r);
    const bool none = Rows<HG, 128>::padding(r) || t >= n;
    limits[2 * h] = none ? 0 : load_int(KS, t);
    limits[2 * h + 1] = none ? 0 : load_int(KE, t);
  }
}
