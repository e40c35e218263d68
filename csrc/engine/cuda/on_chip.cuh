// What the persistent kernel takes from the hardware beyond tensor_core.cuh: half-precision products and the loads of
// their fragments, bulk copies into shared memory with the barriers that count their bytes, and events by which the
// blocks of a grid wait for each other. All of it is there from sm_90 on.
// tests/cuda_emulation/on_chip.h has the same functions for the emulated device.
#pragma once

#include <cuda_fp16.h>

#include "tensor_core.cuh"

namespace vae_fast {
namespace engine {

// A barrier in shared memory that counts the bytes of bulk copies, phase after phase.
using Arrival = uint64_t;

}  // namespace engine
}  // namespace vae_fast

#if defined(VAE_FAST_CUDA_EMULATION)
#include <on_chip.h>
#else

namespace vae_fast {
namespace engine {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void multiply_add(FP16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 x 8 halves, whose 32 rows of 16 bytes the lanes point at, those of matrix i at lanes 8 i: of each
// the lane has in r[i] row lane / 4, columns 2 (lane % 4) and the next.
__device__ __forceinline__ void load_fragments(uint32_t (&r)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the matrices transposed: column lane / 4, rows 2 (lane % 4) and the next.
__device__ __forceinline__ void load_transposed_fragments(uint32_t (&r)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ uint16_t half_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ float half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Bytes 0 and 1 of a word, or with `upper` 2 and 3, as two halves: 1024 + byte is 0x6400 + byte.
__device__ __forceinline__ uint32_t halves_of_bytes(uint32_t word, bool upper) {
  const uint32_t raised = __byte_perm(word, 0x64646464u, upper ? 0x4342 : 0x4140), base = 0x64006400u;
  uint32_t halves;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(raised), "r"(base));
  return halves;
}

// The same number, of which the compiler knows no more
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Of what other blocks have written, past the first-level cache
template <class T>
__device__ __forceinline__ T read_through(const T* from) {
  return __ldcg(from);
}

// --- bulk copies -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void start_arrivals(Arrival* arrivals, int count) {
  for (int i = 0; i < count; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals + i)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The next phase of the barrier ends when so many bytes have come. One thread says it, and before the copies start.
__device__ __forceinline__ void expect_bytes(Arrival* arrival, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)), "r"(bytes)
               : "memory");
}

// Starts to copy; all three are multiples of 16 bytes.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, Arrival* arrival) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(arrival))
               : "memory");
}

// Bulk copies read global memory and write shared memory by a way of their own. These stand between a thread's ordinary
// accesses and the copies that come after them, in the order of barriers and events.
__device__ __forceinline__ void order_global_before_copies() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
__device__ __forceinline__ void order_shared_before_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ int64_t cycles() { return clock64(); }

// A wait that lasts is an error of this program: it ends in an error rather than never.
class Patience {
 public:
  __device__ __forceinline__ Patience() { start_ = clock64(); }
  __device__ __forceinline__ void wait() const {
    if (clock64() - start_ > 40'000'000'000) __trap();  // 20 s
  }

 private:
  long long start_;
};

__device__ __forceinline__ bool bytes_are_here(Arrival* arrival, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(arrival)), "r"(phase)
      : "memory");
  return done != 0;
}

// All lanes of a warp call it together.
__device__ __forceinline__ void wait_for_bytes(Arrival* arrival, uint32_t phase) {
  if (!bytes_are_here(arrival, phase)) {
    const Patience patience;
    while (!bytes_are_here(arrival, phase)) patience.wait();
  }
  __syncwarp();
}

// --- events ----------------------------------------------------------------------------------------------------------

// A counter in global memory. What a block's threads did before the __syncthreads() in front of add_to is seen by those
// behind the __syncthreads() after wait_for.
__device__ __forceinline__ void add_to(uint32_t* event) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(event) : "memory");
}

__device__ __forceinline__ void wait_for(const uint32_t* event, uint32_t target) {
  const Patience patience;
  for (;;) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(event) : "memory");
    if (static_cast<int32_t>(value - target) >= 0) return;
    patience.wait();
  }
}

}  // namespace engine
}  // namespace vae_fast

#endif
