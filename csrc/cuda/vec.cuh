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
#include "../math/math.h"

namespace vae_fast {
namespace cuda {

// Arithmetic is done, and losses are kept, in Real<T>.
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How: see math/math.h.
template <class T>
using Arithmetic = std::conditional_t<sizeof(T) == 2, HalfPrecisionMath, Math<Real<T>>>;

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

// What a thread has read and not yet used stays as it came, small elements several to a register: the fewest registers
// in flight, and no instructions to take them apart but those that convert them.
template <class T>
using Word = std::conditional_t<(sizeof(T) < 4), uint32_t, T>;
template <class T>
constexpr int kPerWord = sizeof(Word<T>) / sizeof(T);

// Element k of a word, in the type of the arithmetic.
template <class T>
__device__ __forceinline__ auto unpack(Word<T> word, int k) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return Math<float>::from_bits(k == 0 ? word << 16 : word & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &word, sizeof pair);
    return k == 0 ? __low2float(pair) : __high2float(pair);
  } else if constexpr (std::is_same_v<T, uint8_t>) {
    // 2^23 + byte, less 2^23: a conversion would go to the unit that has exp to do
    return Math<float>::from_bits(__byte_perm(word, 0x4B000000u, 0x7440u + static_cast<unsigned>(k))) - 8388608.0f;
  } else {
    return word;
  }
}

// Two neighbours, rounded: the half types have one instruction for that.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float a, float b) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(a, b);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

template <class T, int N>
struct Chunk {
  Word<T> words[(N + kPerWord<T> - 1) / kPerWord<T>];

  template <class R>
  __device__ __forceinline__ R get(int i) const {
    return static_cast<R>(unpack<T>(words[i / kPerWord<T>], i % kPerWord<T>));
  }

  // Element by element: into words that are zero, and out of them.
  __device__ __forceinline__ void put(int i, T value) {
    if constexpr (kPerWord<T> == 1) {
      words[i] = value;
    } else {
      uint32_t bits = 0;
      memcpy(&bits, &value, sizeof value);
      words[i / kPerWord<T>] |= bits << (32 / kPerWord<T> * (i % kPerWord<T>));
    }
  }
  __device__ __forceinline__ T take(int i) const {
    if constexpr (kPerWord<T> == 1) {
      return words[i];
    } else {
      const uint32_t bits = words[i / kPerWord<T>] >> (32 / kPerWord<T> * (i % kPerWord<T>));
      T value;
      memcpy(&value, &bits, sizeof value);
      return value;
    }
  }
};

// Elements of 0 and 1, eight to a byte.
struct Bits {};

template <int N>
struct Chunk<Bits, N> {
  unsigned bits;

  template <class>
  __device__ __forceinline__ bool get(int i) const {
    return bits >> i & 1;
  }
};

// The n <= N elements at p; the rest are zero. With kVector n is N and p is aligned to kAccessBytes.
template <bool kVector, int N, class T>
__device__ __forceinline__ Chunk<T, N> load_chunk(const T* p, int n) {
  Chunk<T, N> chunk = {};
  if constexpr (kVector) {
    using Access = typename AccessOf<kAccessBytes<T, N>>::Type;
    constexpr int kAccesses = static_cast<int>(sizeof(chunk) / sizeof(Access));
    Access parts[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) parts[i] = __ldg(reinterpret_cast<const Access*>(p) + i);
    memcpy(&chunk, parts, sizeof(chunk));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < n) chunk.put(i, p[i]);
    }
  }
  return chunk;
}

// The first n values, rounded to T, to p; under the conditions of load_chunk.
template <bool kVector, int N, class T>
__device__ __forceinline__ void store_chunk(T* p, const Real<T> (&values)[N], int n) {
  Chunk<T, N> chunk;
#pragma unroll
  for (int i = 0; i < N; i += kPerWord<T>) {
    if constexpr (kPerWord<T> == 1) {
      chunk.words[i] = values[i];
    } else {
      chunk.words[i / 2] = round_pair<T>(values[i], values[i + 1]);
    }
  }
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
      if (i < n) p[i] = chunk.take(i);
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
