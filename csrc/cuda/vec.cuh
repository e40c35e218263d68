// Element types and chunks: the N neighbouring elements of a row that a thread handles at a time.
//
// A chunk is 16 bytes of the operator's type. Where every row starts on a chunk boundary (kVector) it moves in one
// access, and so do the targets beside it, which may be of another type (32 bytes in two); elsewhere the same thread
// handles the same elements, one access each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "../kernels.h"

namespace vae_fast {
namespace cuda {

// Arithmetic is done, and losses are kept, in Real<T>.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

template <class T, int N>
constexpr int kAccessBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;

template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<4> {
  using Type = uint32_t;
};
template <>
struct AccessOf<8> {
  using Type = uint2;
};
template <>
struct AccessOf<16> {
  using Type = uint4;
};

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ double to_float(double a) { return a; }
__device__ __forceinline__ float to_float(__half a) { return __half2float(a); }
__device__ __forceinline__ float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
__device__ __forceinline__ float to_float(uint8_t a) { return static_cast<float>(a); }

// Two neighbours at a time: the half types have one instruction for that.
__device__ __forceinline__ void round_pair(float a, float b, float* out) { out[0] = a, out[1] = b; }
__device__ __forceinline__ void round_pair(double a, double b, double* out) { out[0] = a, out[1] = b; }
__device__ __forceinline__ void round_pair(float a, float b, __half* out) {
  const __half2 pair = __floats2half2_rn(a, b);
  out[0] = __low2half(pair), out[1] = __high2half(pair);
}
__device__ __forceinline__ void round_pair(float a, float b, __nv_bfloat16* out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  out[0] = __low2bfloat16(pair), out[1] = __high2bfloat16(pair);
}

// What a thread has read and not yet used stays in the type it came in: the fewest registers in flight.
template <class T, int N>
struct Chunk {
  T values[N];

  template <class R>
  __device__ __forceinline__ R get(int i) const {
    return static_cast<R>(to_float(values[i]));
  }
};

// The n <= N elements at p; the rest are zero. With kVector n is N and p is aligned to kAccessBytes.
template <bool kVector, int N, class T>
__device__ __forceinline__ Chunk<T, N> load_chunk(const T* p, int n) {
  Chunk<T, N> chunk;
  if constexpr (kVector) {
    using Access = typename AccessOf<kAccessBytes<T, N>>::Type;
    constexpr int kAccesses = static_cast<int>(sizeof(chunk) / sizeof(Access));
    Access parts[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) parts[i] = __ldg(reinterpret_cast<const Access*>(p) + i);
    memcpy(&chunk, parts, sizeof(chunk));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) chunk.values[i] = i < n ? p[i] : T{};
  }
  return chunk;
}

// The first n values, rounded to T, to p; under the conditions of load_chunk.
template <bool kVector, int N, class T>
__device__ __forceinline__ void store_chunk(T* p, const Real<T> (&values)[N], int n) {
  Chunk<T, N> chunk;
#pragma unroll
  for (int i = 0; i < N; i += 2) round_pair(values[i], values[i + 1], chunk.values + i);
  if constexpr (kVector) {
    using Access = typename AccessOf<kAccessBytes<T, N>>::Type;
    constexpr int kAccesses = static_cast<int>(sizeof(chunk) / sizeof(Access));
    Access parts[kAccesses];
    memcpy(parts, &chunk, sizeof(chunk));
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) reinterpret_cast<Access*>(p)[i] = parts[i];
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < n) p[i] = chunk.values[i];
    }
  }
}

// --- host: from run-time types to templates --------------------------------------------------------------------------

// Whether every row of these [rows, cols] tensors of X starts where a chunk of N elements can be moved as vectors; null
// is fine.
template <class X, int N = kChunk<X>>
bool vector_rows(int64_t cols, std::initializer_list<const void*> tensors) {
  bool all = cols % N == 0;
  for (const void* tensor : tensors) all = all && reinterpret_cast<uintptr_t>(tensor) % kAccessBytes<X, N> == 0;
  return all;
}

// f(T{}) for the element type that `dtype` names.
template <class F>
int with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(__half{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

// f(T{}, X{}): x comes in the type of the other tensors, in float or in bytes.
template <class F>
int with_types(DType dtype, DType x_dtype, F f) {
  return with_type(dtype, [&](auto t) -> int {
    if (x_dtype == DType::u8) return f(t, uint8_t{});
    if (x_dtype == dtype) return f(t, t);
    if (x_dtype == DType::f32) return f(t, float{});
    return cudaErrorInvalidValue;
  });
}

// f(std::true_type{}) or f(std::false_type{})
template <class F>
int with_bool(bool value, F f) {
  return value ? f(std::true_type{}) : f(std::false_type{});
}

// The same for a kernel's kVector. double is there for gradient checks: it always goes one element at a time, which
// saves a fifth of the kernels.
template <class T, class F>
int with_vector(bool vector, F f) {
  if constexpr (std::is_same_v<T, double>) {
    return f(std::false_type{});
  } else {
    return with_bool(vector, f);
  }
}

}  // namespace cuda
}  // namespace vae_fast
