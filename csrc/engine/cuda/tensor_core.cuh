// What the engine's kernels take from the hardware beyond CUDA C++: products of a warp on tensor cores, copies from
// global to shared memory that do not wait, accesses of 16 bytes, shared memory of a size given at the launch, and
// launches that overlap. All but the last is there from sm_80 on, that from sm_90 on.
// tests/cuda_emulation/tensor_core.h has the same functions for the emulated device.
//
// A warp holds its operands in fragments; with g = lane / 4 and t = lane % 4 the lane has, of a 16 x K product,
//   A [16, K]: rows g and g + 8;   B [8, K], row n of it the n-th column of the product: row g;
//   C [16, 8]: c[0], c[1] = columns 2t, 2t + 1 of row g,  c[2], c[3] = the same of row g + 8
// and of the K indices, which A and B may number as they like so long as they agree:
//   TF32, K = 8:   a[0], a[1] = index t of rows g, g + 8,  a[2], a[3] = index t + 4;  b[0], b[1] = indices t, t + 4
//   BF16 and FP16, K = 16:  the same with pairs of indices: (2t, 2t + 1) for t, and (2t + 8, 2t + 9) for t + 4
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vae_fast {
namespace engine {

struct TF32 {};
struct BF16 {};
struct FP16 {};

}  // namespace engine
}  // namespace vae_fast

#if defined(VAE_FAST_CUDA_EMULATION)
#include <tensor_core.h>
#else

namespace vae_fast {
namespace engine {

// Two bfloat16, nearest, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

__device__ __forceinline__ void multiply_add(TF32, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply_add(BF16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b for M x N fragments of a warp. All lanes call it together.
template <class Format, int M, int N>
__device__ __forceinline__ void multiply_add(Format format, float (&c)[M][N][4], const uint32_t (&a)[M][4],
                                             const uint32_t (&b)[N][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) multiply_add(format, c[m][n], a[m], b[n]);
  }
}

// Starts to copy `valid` of 4 floats and to write zeros for the others: at once, which takes a source that is aligned
// to 16 bytes, or one by one.
__device__ __forceinline__ void copy_async(float* to, const float* from, int valid, bool aligned) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (aligned) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(4 * valid) : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* source = i < valid ? from + i : from;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared + 4 * i), "l"(source),
                   "r"(i < valid ? 4 : 0)
                   : "memory");
    }
  }
}

// Makes a group of this thread's copies since the last group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last kGroups groups of this thread have arrived.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Four floats of global memory in one access of 16 bytes, to which `from` and `to` are aligned. In assembly because the
// compiler, left to itself, makes four accesses of what stands beside branches on single elements.
__device__ __forceinline__ void read_four(const float* from, float (&v)[4]) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "l"(from));
}

__device__ __forceinline__ void write_four(float* to, const float (&v)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

// Where launches overlap (Way): a kernel may run before the launches ahead of it on the stream have ended. This waits
// for their end, and for what they wrote. Every block must call it.
__device__ __forceinline__ void wait_for_earlier_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next launch begin as soon as every block of this one has called it or ended.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float* dynamic_shared() {
  extern __shared__ float4 vae_fast_engine_shared[];
  return reinterpret_cast<float*>(vae_fast_engine_shared);
}

}  // namespace engine
}  // namespace vae_fast

#endif
