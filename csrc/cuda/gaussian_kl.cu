// KL(N(mu, exp(logvar)) || N(0, I)) of every row, its gradient and the gradient of that (math/gaussian.h).
//
// Bytes that must move, for elements of b bytes and rows that are not tiny: forward 2 b each (mu, logvar), backward 4 b
// (both, and both gradients), double backward 6 b. At the 4.3 TB/s that a copy reaches on an H200, 2^26 float32
// elements take no less than 0.125, 0.25 and 0.37 ms; exp and expm1 hide behind that.
#include "../math/gaussian.h"
#include "rows.cuh"

namespace vae_fast {
namespace cuda {
namespace {

template <class T, bool kVectorRows>
struct KLForward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 1, N = kChunk<T>;

  GaussianKLForward a;

  struct Row {
    const T *mu, *logvar;
  };
  struct Input {
    Chunk<T, N> mu, logvar;
  };

  __device__ Row row(int64_t r) const { return {row_of<T>(a.mu, r, a.cols), row_of<T>(a.logvar, r, a.cols)}; }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.mu + c, n), load_chunk<kVector, N>(row.logvar + c, n)};
  }

  __device__ void apply(const Row&, const Input& in, int64_t, int n, Sums<R, kSums>& sums) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const R term = gaussian_kl<R, Arithmetic<T>>(in.mu.template get<R>(j), in.logvar.template get<R>(j));
      sums.value[0] += j < n ? term : R{};
    }
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.kl); }
};

template <class T, bool kVectorRows>
struct KLBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 0, N = kChunk<T>;

  GaussianKLBackward a;

  struct Row {
    const T *mu, *logvar;
    T *grad_mu, *grad_logvar;
    R grad_kl;
  };
  struct Input {
    Chunk<T, N> mu, logvar;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.mu, r, a.cols), row_of<T>(a.logvar, r, a.cols), row_of<T>(a.grad_mu, r, a.cols),
            row_of<T>(a.grad_logvar, r, a.cols), static_cast<const R*>(a.grad_kl)[r]};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    Input in = {};
    if (a.grad_mu) in.mu = load_chunk<kVector, N>(row.mu + c, n);
    if (a.grad_logvar) in.logvar = load_chunk<kVector, N>(row.logvar + c, n);
    return in;
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>&) const {
    R out[N];
    if (a.grad_mu) {
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = row.grad_kl * in.mu.template get<R>(j);
      store_chunk<kVector, N>(row.grad_mu + c, out, n);
    }
    if (a.grad_logvar) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        out[j] = row.grad_kl * gaussian_kl_grad_logvar<R, Arithmetic<T>>(in.logvar.template get<R>(j));
      }
      store_chunk<kVector, N>(row.grad_logvar + c, out, n);
    }
  }
};

template <class T, bool kVectorRows>
struct KLDoubleBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 1, N = kChunk<T>, kRegisters = 80;

  GaussianKLDoubleBackward a;

  struct Row {
    const T *v_mu, *v_logvar, *mu, *logvar;
    T *grad_mu, *grad_logvar;
    R grad_kl;
  };
  struct Input {
    Chunk<T, N> v_mu, v_logvar, mu, logvar;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.ggrad_mu, r, a.cols),   row_of<T>(a.ggrad_logvar, r, a.cols),
            row_of<T>(a.mu, r, a.cols),         row_of<T>(a.logvar, r, a.cols),
            row_of<T>(a.grad_mu, r, a.cols),    row_of<T>(a.grad_logvar, r, a.cols),
            static_cast<const R*>(a.grad_kl)[r]};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.v_mu + c, n), load_chunk<kVector, N>(row.v_logvar + c, n),
            load_chunk<kVector, N>(row.mu + c, n), load_chunk<kVector, N>(row.logvar + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>& sums) const {
    R to_mu[N], to_logvar[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const R v_mu = in.v_mu.template get<R>(j), v_logvar = in.v_logvar.template get<R>(j);
      const R logvar = in.logvar.template get<R>(j);
      to_mu[j] = row.grad_kl * v_mu;
      to_logvar[j] = row.grad_kl * along(v_logvar, gaussian_kl_curvature_logvar(logvar));
      const R term = along(v_mu, in.mu.template get<R>(j)) + along(v_logvar, gaussian_kl_grad_logvar(logvar));
      sums.value[0] += j < n ? term : R{};
    }
    store_chunk<kVector, N>(row.grad_mu + c, to_mu, n);
    store_chunk<kVector, N>(row.grad_logvar + c, to_logvar, n);
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.ggrad_kl); }
};

}  // namespace

int launch(const GaussianKLForward& a, void* stream, const Workspace& workspace) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    return with_vector<T>(vector_rows<T>(a.cols, {a.mu, a.logvar}), [&](auto vector) {
      return launch_rows(KLForward<T, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

int launch(const GaussianKLBackward& a, void* stream, const Workspace& workspace) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    return with_vector<T>(vector_rows<T>(a.cols, {a.mu, a.logvar, a.grad_mu, a.grad_logvar}), [&](auto vector) {
      return launch_rows(KLBackward<T, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

int launch(const GaussianKLDoubleBackward& a, void* stream, const Workspace& workspace) {
  return with_type(a.dtype, [&](auto t) {
    using T = decltype(t);
    const bool vector_access =
        vector_rows<T>(a.cols, {a.ggrad_mu, a.ggrad_logvar, a.mu, a.logvar, a.grad_mu, a.grad_logvar});
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(KLDoubleBackward<T, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

}  // namespace cuda
}  // namespace vae_fast
