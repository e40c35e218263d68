// z = mu + exp(logvar / 2) eps for every sample, with the KL divergence in the same pass; its gradient, the gradient of
// that, and the noise itself. eps is not stored: every kernel makes it again from (seed, element index), see
// math/philox.h. Samples are added up in a register, in order.
//
// Bytes that must move, for S samples of elements of b bytes: forward (2 + S) b, backward (S + 1 or 2 inputs + 2
// gradients) b, double backward (2 S + 4) b. The floor is higher where eps is made faster than z is written: an H200
// makes about 0.6e12 normals a second, so 2^26 of them take 0.11 ms, and a forward of float32 moves its bytes in 0.19
// ms, one of bfloat16 in 0.09 ms.
#include "../math/gaussian.h"
#include "noise.cuh"
#include "rows.cuh"

namespace vae_fast {
namespace cuda {
namespace {

// How a gradient's normals are made: what is rounded to half precision needs not all of their digits, and has those it
// needs in three quarters of the instructions. z itself is made of the normals to their last bit.
template <class T>
using GradientNormals = std::conditional_t<sizeof(T) == 2, HalfPrecisionNormals, ExactNormals>;

// Normals are a computation: independent chains in one thread keep a processor as busy as more threads do.
template <class T, bool kVector>
constexpr int registers = sizeof(T) == 8 ? 128
                          : kVector      ? 80
                                         : 96;

template <class T, bool kVectorRows, bool kWithKL>
struct Sample {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = kWithKL ? 1 : 0, N = kChunk<T>;
  static constexpr int kRegisters = registers<T, kVector>;

  ReparameterizeForward a;

  struct Row {
    const T *mu, *logvar;
    int64_t first, seed;  // index of the row's first element in the first sample
  };
  struct Input {
    Chunk<T, N> mu, logvar;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.mu, r, a.cols), row_of<T>(a.logvar, r, a.cols), r * a.cols, *a.seed};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.mu + c, n), load_chunk<kVector, N>(row.logvar + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>& sums) const {
    R mu[N], logvar[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      mu[j] = in.mu.template get<R>(j);
      logvar[j] = in.logvar.template get<R>(j);
      if constexpr (kWithKL) {
        const R term = gaussian_kl<R, Arithmetic<T>>(mu[j], logvar[j]);
        sums.value[0] += j < n ? term : R{};
      }
    }
    int64_t i = row.first + c;
    for (int64_t s = 0; s < a.samples; ++s, i += a.rows * a.cols) {
      R eps[N];
      normals<kVector, ExactNormals>(row.seed, i, n, eps);
#pragma unroll
      for (int j = 0; j < N; ++j) eps[j] = reparameterize<R, Arithmetic<T>>(mu[j], logvar[j], eps[j]);
      store_chunk<kVector, N>(static_cast<T*>(a.z) + i, eps, n);
    }
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.kl); }
};

template <class T, bool kVectorRows>
struct SampleBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 0, N = kChunk<T>;
  static constexpr int kRegisters = sizeof(T) == 8 ? 128 : 96;

  ReparameterizeBackward a;

  struct Row {
    const T *mu, *logvar;
    int64_t first, seed;
    R grad_kl;
  };
  struct Input {
    Chunk<T, N> mu, logvar;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.mu, r, a.cols), row_of<T>(a.logvar, r, a.cols), r * a.cols, *a.seed,
            a.grad_kl ? static_cast<const R*>(a.grad_kl)[r] : R{}};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    Input in = {};
    if (a.grad_kl && a.grad_mu) in.mu = load_chunk<kVector, N>(row.mu + c, n);
    if (a.grad_logvar) in.logvar = load_chunk<kVector, N>(row.logvar + c, n);
    return in;
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>&) const {
    R to_mu[N] = {}, weighted[N] = {};  // sum_s grad_z, sum_s grad_z eps
    const int64_t samples = a.grad_z ? a.samples : 0;
    int64_t i = row.first + c;
    for (int64_t s = 0; s < samples; ++s, i += a.rows * a.cols) {
      const Chunk<T, N> grad_z = load_chunk<kVector, N>(static_cast<const T*>(a.grad_z) + i, n);
      R eps[N] = {};
      if (a.grad_logvar) normals<kVector, GradientNormals<T>>(row.seed, i, n, eps);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const R g = grad_z.template get<R>(j);
        to_mu[j] += g;
        weighted[j] = Math<R>::fma(g, eps[j], weighted[j]);
      }
    }
    if (a.grad_mu) {
      if (a.grad_kl) {
#pragma unroll
        for (int j = 0; j < N; ++j) to_mu[j] += row.grad_kl * in.mu.template get<R>(j);
      }
      store_chunk<kVector, N>(static_cast<T*>(a.grad_mu) + row.first + c, to_mu, n);
    }
    if (a.grad_logvar) {
      R to_logvar[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const R logvar = in.logvar.template get<R>(j);
        to_logvar[j] = constant<R>(0.5) * standard_deviation<R, Arithmetic<T>>(logvar) * weighted[j];
        if (a.grad_kl) to_logvar[j] += row.grad_kl * gaussian_kl_grad_logvar<R, Arithmetic<T>>(logvar);
      }
      store_chunk<kVector, N>(static_cast<T*>(a.grad_logvar) + row.first + c, to_logvar, n);
    }
  }
};

template <class T, bool kVectorRows>
struct SampleDoubleBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 0, N = kChunk<T>;
  static constexpr int kRegisters = registers<T, kVector>;

  ReparameterizeDoubleBackward a;

  struct Row {
    const T *v_mu, *v_logvar, *logvar;
    int64_t first, seed;
  };
  struct Input {
    Chunk<T, N> v_mu, v_logvar, logvar;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.ggrad_mu, r, a.cols), row_of<T>(a.ggrad_logvar, r, a.cols), row_of<T>(a.logvar, r, a.cols),
            r * a.cols, *a.seed};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.v_mu + c, n), load_chunk<kVector, N>(row.v_logvar + c, n),
            load_chunk<kVector, N>(row.logvar + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>&) const {
    R half_sigma_v[N], weighted[N] = {};  // v_logvar dz/dlogvar / eps, sum_s grad_z eps
#pragma unroll
    for (int j = 0; j < N; ++j) {
      half_sigma_v[j] =
          in.v_logvar.template get<R>(j) * (constant<R>(0.5) * standard_deviation(in.logvar.template get<R>(j)));
    }
    int64_t i = row.first + c;
    for (int64_t s = 0; s < a.samples; ++s, i += a.rows * a.cols) {
      const Chunk<T, N> grad_z = load_chunk<kVector, N>(static_cast<const T*>(a.grad_z) + i, n);
      R eps[N], to_grad_z[N];
      normals<kVector, ExactNormals>(row.seed, i, n, eps);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        weighted[j] = Math<R>::fma(grad_z.template get<R>(j), eps[j], weighted[j]);
        to_grad_z[j] = Math<R>::fma(half_sigma_v[j], eps[j], in.v_mu.template get<R>(j));
      }
      store_chunk<kVector, N>(static_cast<T*>(a.ggrad_z) + i, to_grad_z, n);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) weighted[j] = constant<R>(0.5) * half_sigma_v[j] * weighted[j];
    store_chunk<kVector, N>(static_cast<T*>(a.grad_logvar) + row.first + c, weighted, n);
  }
};

// One row of `count` elements, so that every chunk begins with a counter. Only the last one may be short.
template <class T>
struct Normal {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = false;
  static constexpr int kSums = 0, N = kChunk<T>;
  static constexpr int kRegisters = registers<T, kVector>;

  PhiloxNormal a;
  bool vector_out;

  struct Row {
    int64_t seed;
  };
  struct Input {};

  __device__ Row row(int64_t) const { return {*a.seed}; }
  __device__ Input load(const Row&, int64_t, int) const { return {}; }

  __device__ void apply(const Row& row, const Input&, int64_t c, int n, Sums<R, kSums>&) const {
    R eps[N];
    normals<true, ExactNormals>(row.seed, c, n, eps);
    T* out = static_cast<T*>(a.out) + c;
    if (vector_out && n == N) {
      store_chunk<true, N>(out, eps, n);
    } else {
      store_chunk<false, N>(out, eps, n);
    }
  }
};

}  // namespace

int launch(const ReparameterizeForward& a, void* stream, const Workspace& workspace) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    return with_vector<T>(vector_rows<T>(a.cols, {a.mu, a.logvar, a.z}), [&](auto vector) {
      return with_bool(a.kl != nullptr, [&](auto kl) {
        return launch_rows(Sample<T, vector.value, kl.value>{a}, a.rows, a.cols, stream, workspace);
      });
    });
  });
}

int launch(const ReparameterizeBackward& a, void* stream, const Workspace& workspace) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    return with_vector<T>(vector_rows<T>(a.cols, {a.grad_z, a.mu, a.logvar, a.grad_mu, a.grad_logvar}),
                          [&](auto vector) {
                            return launch_rows(SampleBackward<T, vector.value>{a}, a.rows, a.cols, stream, workspace);
                          });
  });
}

int launch(const ReparameterizeDoubleBackward& a, void* stream, const Workspace& workspace) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    const bool vector_access =
        vector_rows<T>(a.cols, {a.ggrad_mu, a.ggrad_logvar, a.grad_z, a.logvar, a.ggrad_z, a.grad_logvar});
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(SampleDoubleBackward<T, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

int launch(const PhiloxNormal& a, void* stream, const Workspace& workspace) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    return launch_rows(Normal<T>{a, vector_rows<T>(0, {a.out})}, 1, a.count, stream, workspace);
  });
}

}  // namespace cuda
}  // namespace vae_fast
