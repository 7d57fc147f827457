#pragma once
#define INDEX_SPANS_THREADS 256
#define INDEX_RUNS 1024  // at most
// The slots of each run of 256 keys: from the first to behind the last, (0, 0) for none. In any order of keys
static __device__ __forceinline__ void index_spans(
    const int* IDX, const int* COUNT, int* SPANS, int t, int width, int S, int runs) {
  __shared__ int first[INDEX_RUNS], last[INDEX_RUNS];
  for (int r = threadIdx.x; r < runs; r += INDEX_SPANS_THREADS) first[r] = INT_MAX, last[r] = -1;
  __syncthreads();
  const int count = min(max(COUNT[t], 0), width);
  const int* keys = IDX + (long long)t * width;
  for (int i = threadIdx.x; i < count; i += INDEX_SPANS_THREADS) {
    const int key = keys[i], r = key >> 8;
    if ((unsigned)key >= (unsigned)S) continue;
    if (i == 0 || keys[i - 1] >> 8 != r) atomicMin(first + r, i);
    if (i + 1 == count || keys[i + 1] >> 8 != r) atomicMax(last + r, i);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < runs; r += INDEX_SPANS_THREADS)
    ((int2*)SPANS)[(long long)t * runs + r] = last[r] < 0 ? make_int2(0, 0) : make_int2(first[r], last[r] + 1);
}
