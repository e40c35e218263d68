// log p(x|z) of a Bernoulli decoder, summed over every row, its gradient and the gradient of that (math/bernoulli.h).
// Rows of logits may outnumber rows of x: samples come in front, and row r belongs to x[r mod x_rows].
//
// Bytes that must move, for logits of b bytes and targets of x bytes: forward b + x each, backward 2 b + x, double
// backward 3 b + x. At the 4.3 TB/s that a copy reaches on an H200, 2^26 float32 elements with float32 targets take no
// less than 0.125, 0.19 and 0.25 ms. In bfloat16 the arithmetic, one exp and one log1p or division each, is the limit.
#include "../math/bernoulli.h"
#include "rows.cuh"

namespace vae_fast {
namespace cuda {
namespace {

template <class T, class X, bool kVectorRows>
struct LogLikelihood {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 1, N = kChunk<T>;

  BernoulliForward a;

  struct Row {
    const T* logits;
    const X* x;
  };
  struct Input {
    Chunk<T, N> logits;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.logits, r, a.cols), row_of<X>(a.x, target_row(r, a.x_rows), a.cols)};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.logits + c, n), load_chunk<kVector, N>(row.x + c, n)};
  }

  __device__ void apply(const Row&, const Input& in, int64_t, int n, Sums<R, kSums>& sums) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const R term = bernoulli_log_likelihood<R, Arithmetic<T>>(in.logits.template get<R>(j), in.x.template get<R>(j));
      sums.value[0] += j < n ? term : R{};
    }
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.log_likelihood); }
};

template <class T, class X, bool kVectorRows>
struct LogLikelihoodBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 0, N = kChunk<T>;

  BernoulliBackward a;

  struct Row {
    const T* logits;
    const X* x;
    T* grad_logits;
    R grad;
  };
  struct Input {
    Chunk<T, N> logits;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.logits, r, a.cols), row_of<X>(a.x, target_row(r, a.x_rows), a.cols),
            row_of<T>(a.grad_logits, r, a.cols), static_cast<const R*>(a.grad)[r]};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.logits + c, n), load_chunk<kVector, N>(row.x + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>&) const {
    R out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      out[j] = row.grad * bernoulli_grad_logit<R, Arithmetic<T>>(in.logits.template get<R>(j), in.x.template get<R>(j));
    }
    store_chunk<kVector, N>(row.grad_logits + c, out, n);
  }
};

template <class T, class X, bool kVectorRows>
struct LogLikelihoodDoubleBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 1, N = kChunk<T>;

  BernoulliDoubleBackward a;

  struct Row {
    const T *v, *logits;
    const X* x;
    T* grad_logits;
    R grad;
  };
  struct Input {
    Chunk<T, N> v, logits;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.ggrad_logits, r, a.cols), row_of<T>(a.logits, r, a.cols),
            row_of<X>(a.x, target_row(r, a.x_rows), a.cols), row_of<T>(a.grad_logits, r, a.cols),
            static_cast<const R*>(a.grad)[r]};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.v + c, n), load_chunk<kVector, N>(row.logits + c, n),
            load_chunk<kVector, N>(row.x + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>& sums) const {
    R out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const R v = in.v.template get<R>(j), logit = in.logits.template get<R>(j);
      out[j] = row.grad * v * bernoulli_curvature<R, Arithmetic<T>>(logit);
      const R term = v * bernoulli_grad_logit<R, Arithmetic<T>>(logit, in.x.template get<R>(j));
      sums.value[0] += j < n ? term : R{};
    }
    store_chunk<kVector, N>(row.grad_logits + c, out, n);
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.ggrad); }
};

}  // namespace

int launch(const BernoulliForward& a, void* stream, const Workspace& workspace) {
  return with_types(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access = vector_rows<T>(a.cols, {a.logits}) && vector_rows<X, kChunk<T>>(a.cols, {a.x});
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(LogLikelihood<T, X, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

int launch(const BernoulliBackward& a, void* stream, const Workspace& workspace) {
  return with_types(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access =
        vector_rows<T>(a.cols, {a.logits, a.grad_logits}) && vector_rows<X, kChunk<T>>(a.cols, {a.x});
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(LogLikelihoodBackward<T, X, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

int launch(const BernoulliDoubleBackward& a, void* stream, const Workspace& workspace) {
  return with_types(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access =
        vector_rows<T>(a.cols, {a.ggrad_logits, a.logits, a.grad_logits}) && vector_rows<X, kChunk<T>>(a.cols, {a.x});
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(LogLikelihoodDoubleBackward<T, X, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

}  // namespace cuda
}  // namespace vae_fast
