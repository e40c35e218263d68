// The kernels of epsilon.h for the GPU, through the package's own walk over rows. The noise of the forward is made as
// the package makes it; what is measured is the backward.
#include "../csrc/cuda/noise.cuh"
#include "../csrc/cuda/rows.cuh"
#include "../csrc/math/gaussian.h"
#include "epsilon.h"

namespace vae_fast {
namespace cuda {
namespace {

struct Flat {
  int64_t first;  // index of the row's first element
};

template <class T, class E, bool kVectorRows>
struct Store {
  using Element = T;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 0, N = kChunk<T>;
  using Row = Flat;

  StoreForward a;

  struct Input {
    Chunk<T, N> mu, logvar;
  };

  __device__ Row row(int64_t r) const { return {r * a.cols}; }
  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row_of<T>(a.mu, 0, 0) + row.first + c, n),
            load_chunk<kVector, N>(row_of<T>(a.logvar, 0, 0) + row.first + c, n)};
  }
  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<float, 0>&) const {
    const int64_t i = row.first + c;
    float eps[N], z[N];
    normals<kVector, ExactNormals>(*a.seed, i, n, eps);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[j] = reparameterize(in.mu.template get<float>(j), in.logvar.template get<float>(j), eps[j]);
    }
    store_chunk<kVector, N>(static_cast<T*>(a.z) + i, z, n);
    store_chunk<kVector, N>(static_cast<E*>(a.eps) + i, eps, n);
  }
};

template <class T, class E, bool kVectorRows>
struct Stored {
  using Element = T;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 0, N = kChunk<T>;
  using Row = Flat;

  StoreBackward a;

  struct Input {
    Chunk<T, N> grad_z, logvar;
    Chunk<E, N> eps;
  };

  __device__ Row row(int64_t r) const { return {r * a.cols}; }
  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row_of<T>(a.grad_z, 0, 0) + row.first + c, n),
            load_chunk<kVector, N>(row_of<T>(a.logvar, 0, 0) + row.first + c, n),
            load_chunk<kVector, N>(row_of<E>(a.eps, 0, 0) + row.first + c, n)};
  }
  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<float, 0>&) const {
    float to_mu[N], to_logvar[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      to_mu[j] = in.grad_z.template get<float>(j);
      const float half_sigma = 0.5f * standard_deviation(in.logvar.template get<float>(j));
      to_logvar[j] = half_sigma * (to_mu[j] * in.eps.template get<float>(j));
    }
    store_chunk<kVector, N>(static_cast<T*>(a.grad_mu) + row.first + c, to_mu, n);
    store_chunk<kVector, N>(static_cast<T*>(a.grad_logvar) + row.first + c, to_logvar, n);
  }
};

template <class T, bool kVectorRows>
struct Difference {
  using Element = T;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 0, N = kChunk<T>;
  using Row = Flat;

  DifferenceBackward a;

  struct Input {
    Chunk<T, N> grad_z, mu, z;
  };

  __device__ Row row(int64_t r) const { return {r * a.cols}; }
  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row_of<T>(a.grad_z, 0, 0) + row.first + c, n),
            load_chunk<kVector, N>(row_of<T>(a.mu, 0, 0) + row.first + c, n),
            load_chunk<kVector, N>(row_of<T>(a.z, 0, 0) + row.first + c, n)};
  }
  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<float, 0>&) const {
    float to_mu[N], to_logvar[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      to_mu[j] = in.grad_z.template get<float>(j);
      to_logvar[j] = 0.5f * (to_mu[j] * (in.z.template get<float>(j) - in.mu.template get<float>(j)));
    }
    store_chunk<kVector, N>(static_cast<T*>(a.grad_mu) + row.first + c, to_mu, n);
    store_chunk<kVector, N>(static_cast<T*>(a.grad_logvar) + row.first + c, to_logvar, n);
  }
};

// f(T{}, E{}): float, or bfloat16 with eps in either
template <class F>
int with_pair(DType dtype, DType eps_dtype, F f) {
  if (dtype == DType::f32) return f(float{}, float{});
  if (eps_dtype == DType::bf16) return f(__nv_bfloat16{}, __nv_bfloat16{});
  return f(__nv_bfloat16{}, float{});
}

}  // namespace

int launch(const StoreForward& a, void* stream) {
  return with_pair(a.dtype, a.eps_dtype, [&](auto t, auto e) {
    using T = decltype(t);
    return with_vector<T>(vector_rows<T>(a.cols, {a.mu, a.logvar, a.z, a.eps}), [&](auto vector) {
      return launch_rows(Store<T, decltype(e), vector.value>{a}, a.rows, a.cols, stream, {});
    });
  });
}

int launch(const StoreBackward& a, void* stream) {
  return with_pair(a.dtype, a.eps_dtype, [&](auto t, auto e) {
    using T = decltype(t);
    return with_vector<T>(
        vector_rows<T>(a.cols, {a.grad_z, a.logvar, a.eps, a.grad_mu, a.grad_logvar}),
        [&](auto vector) { return launch_rows(Stored<T, decltype(e), vector.value>{a}, a.rows, a.cols, stream, {}); });
  });
}

int launch(const DifferenceBackward& a, void* stream) {
  return with_pair(a.dtype, a.dtype, [&](auto t, auto) {
    using T = decltype(t);
    return with_vector<T>(vector_rows<T>(a.cols, {a.grad_z, a.mu, a.z, a.grad_mu, a.grad_logvar}), [&](auto vector) {
      return launch_rows(Difference<T, vector.value>{a}, a.rows, a.cols, stream, {});
    });
  });
}

}  // namespace cuda
}  // namespace vae_fast
