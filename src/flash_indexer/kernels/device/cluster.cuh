#pragma once
#include "memory.cuh"
// Barriers in shared memory by their addresses, and what two CTAs of a cluster do with each other's. The 32-bit address
// of a CTA's own shared memory carries its rank in bits 24 and above.
static __device__ __forceinline__ int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// all threads of the cluster
static __device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// the same place in the shared memory of the cluster's CTA of that rank
static __device__ __forceinline__ int of_rank(int address, int rank) {
  int there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
static __device__ __forceinline__ void barrier_init(int barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// barriers are initialised, for the other CTA as well once cluster_sync is past
static __device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
static __device__ __forceinline__ void barrier_arrive(int barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// without a release of cluster scope, which would wait for all additions to memory that are under way
static __device__ __forceinline__ void barrier_arrive_there(int barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// one arrival, and so many bytes that are written to this CTA
static __device__ __forceinline__ void barrier_expect(int barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void barrier_wait(int barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// 16 bytes to the other CTA, counted by its barrier
static __device__ __forceinline__ void send(int to, float a, float b, float c, float d, int barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
               : "memory");
}
// so many bytes of this CTA's shared memory to the other's, counted by its barrier
static __device__ __forceinline__ void send_bulk(int to, int from, int bytes, int barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "r"(from),
      "r"(bytes), "r"(barrier)
      : "memory");
}
// so many bytes of global memory, a multiple of 16, to this CTA's shared memory, counted by its barrier
static __device__ __forceinline__ void copy_bulk(int to, const void* from, int bytes, int barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}
// all threads of one or more warpgroups: barrier `id` of the hardware's 16
static __device__ __forceinline__ void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
