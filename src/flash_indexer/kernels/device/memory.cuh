#pragma once
// Loads, stores and numbers that the compiler neither merges nor moves across each other. Addresses of shared memory are
// integers: a pointer argument would bring a proxy fence into a main loop.
static __device__ __forceinline__ int load_int(const int* p, long long i) {
  int v;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ float load_float(const float* p, long long i) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p + i));
  return v;
}
static __device__ __forceinline__ int shared_address(const void* p) { return (int)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ int load_shared_int(int address) {
  int v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
static __device__ __forceinline__ unsigned load_shared_word(int address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
static __device__ __forceinline__ unsigned load_shared_half(int address) {
  unsigned short v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}
static __device__ __forceinline__ float load_shared_bfloat16(int address) {
  return __uint_as_float(load_shared_half(address) << 16);
}
static __device__ __forceinline__ float load_shared_float_once(int address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address));
  return v;
}
static __device__ __forceinline__ float2 load_shared_float2(int address) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address));
  return v;
}
static __device__ __forceinline__ float4 load_shared_float4(int address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address));
  return v;
}
static __device__ __forceinline__ int2 load_shared_int2(int address) {
  int2 v;
  asm volatile("ld.shared.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
static __device__ __forceinline__ int4 load_shared_int4(int address) {
  int4 v;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
// what another thread wrote: not before the accesses of memory that stand above it
static __device__ __forceinline__ float load_shared_float(int address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
static __device__ __forceinline__ void store_shared(int address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
static __device__ __forceinline__ void store_shared(int address, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(a), "f"(b) : "memory");
}
static __device__ __forceinline__ void store_shared(int address, float a, float b, float c, float d) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
static __device__ __forceinline__ void store_shared_int(int address, int v) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
static __device__ __forceinline__ void store_shared(int address, int a, int b) {
  asm volatile("st.shared.v2.s32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}
static __device__ __forceinline__ void store_shared(int address, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// four 8 x 8 matrices of bfloat16, of which a lane gives the address of one row and holds two elements of each
static __device__ __forceinline__ void store_shared_matrices(int address, const unsigned* v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// x in bfloat16
static __device__ __forceinline__ void store_shared_bfloat16(int address, float x) {
  unsigned short v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(x));
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}
// four 8 x 8 matrices of 16 bits, of which lane 8m + i gives the address of row i of the m-th one: transposed, so that lane l has
// column l / 4 of rows 2 (l % 4) and the next one. Where the rows of one are the same, that is an element in both halves
static __device__ __forceinline__ void load_shared_matrices_transposed(unsigned* v, int address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address));
}
// stores to shared memory become visible to the copy engine and to tensor cores
static __device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// so many bytes of shared memory to global memory, by the copy engine; such copies, also those that add, are waited for by the
// thread that asked for them
static __device__ __forceinline__ void store_bulk(void* to, int from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void commit_bulk() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// they have read what they copy
static __device__ __forceinline__ void wait_bulk_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
static __device__ __forceinline__ void wait_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// keeps what is made of it from being hoisted out of a loop, to where registers run out
static __device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// number of i with first + i * step < n; opaque, so that it is not hoisted above the role branch and spilled
static __device__ __forceinline__ int count_items(int n, int first, int step) {
  n = opaque(n);
  return n > first ? (int)((unsigned)(n - first + step - 1) / (unsigned)step) : 0;
}
