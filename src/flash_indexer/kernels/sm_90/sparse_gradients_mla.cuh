#pragma once
#include "sparse_gradients_half.cuh"
#include "sparse_gradients_pair.cuh"
// The kernel, in either form: see sparse_gradients_mla.py for the picture.
namespace sparse {
template <class Form, bool EXACT>
__device__ __forceinline__ void work(const Problem& x, int sm) {
  // a launch of 384 threads has 168 registers for each, and no more: who wants them would wait for ever
  static_assert(2 * Form::ATTENDING_REGISTERS + Form::ADDING_REGISTERS <= 3 * 168);
  const int warpgroup = __shfl_sync(0xffffffffu, (int)threadIdx.x >> 7, 0);
  if ((sm & 0xffffff) != BASE) __trap();
  Form::begin(sm);
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Form::ADDING_REGISTERS));
    Form::template add<EXACT>(x, sm);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Form::ATTENDING_REGISTERS));
    if (warpgroup == 0)
      Form::template attend<0>(x, sm);
    else
      Form::template attend<1>(x, sm);
  }
  Form::end();
}
}  // namespace sparse

// For 384 threads; `sm` the address of the form's BYTES of shared memory. HALF: up to 64 heads, one CTA a token; otherwise
// two of a cluster
template <bool EXACT, bool HALF>
static __device__ __forceinline__ void sparse_gradients(
    int sm, const void* q, const void* k, const void* g, const int* indices, const int* count, const float* lse,
    const float* delta, void* dq, float* dk, float* p_sum, const float* grid, int* sums, int T, int H, int S, int width,
    float scale) {
  using namespace sparse;
  const Problem x{(const char*)q, (const char*)k, (const char*)g, indices, count, lse, delta, (char*)dq, dk, p_sum,
                  grid, sums, sums + (int64_t)S * D, sums + (int64_t)S * D * 2, T, H, S, width, scale};
  if constexpr (HALF)
    work<sparse_half::Form, EXACT>(x, sm);
  else
    work<sparse_pair::Form, EXACT>(x, sm);
}
