// log p(x|z) of a Gaussian decoder, summed over every row, its gradient and the gradient of that (math/gaussian.h).
// logvar is a tensor beside mean or one value for everything (kOneLogvar); rows of x repeat as in bernoulli.cu.
//
// Bytes that must move, for elements of b bytes and targets of x bytes: forward 2 b + x each, backward 4 b + x, double
// backward 6 b + x; with one logvar b + x, 2 b + x and 3 b + x. At the 4.3 TB/s that a copy reaches on an H200, 2^26
// float32 elements take no less than 0.19, 0.31 and 0.44 ms; with one logvar 0.125, 0.19 and 0.25 ms.
#include "../math/gaussian.h"
#include "rows.cuh"

namespace vae_fast {
namespace cuda {
namespace {

// logvar of a row, or the one value, read once
template <class T, bool kOneLogvar>
struct Logvar {
  const T* values;
  T one;

  __device__ Logvar(const void* logvar, int64_t r, int64_t cols)
      : values(kOneLogvar ? nullptr : row_of<T>(logvar, r, cols)),
        one(kOneLogvar ? *static_cast<const T*>(logvar) : T{}) {}

  template <bool kVector, int N>
  __device__ Chunk<T, N> load(int64_t c, int n) const {
    if constexpr (!kOneLogvar) return load_chunk<kVector, N>(values + c, n);
    Chunk<T, N> chunk = {};
#pragma unroll
    for (int j = 0; j < N; ++j) chunk.put(j, one);
    return chunk;
  }
};

// The one variance of all elements: exp and the division are done once a row, and an element's division is a product.
template <class R>
struct OneVariance {
  R logvar, variance, precision;
  bool exact;  // whether the product takes the division's place: both are normal numbers

  OneVariance() = default;
  __device__ explicit OneVariance(R lv) : logvar(lv), variance(Math<R>::exp(lv)), precision(R{1} / variance) {
    constexpr R kLeast = static_cast<R>(sizeof(R) == 4 ? 0x1p-126 : 0x1p-1022);
    exact = variance >= kLeast && precision >= kLeast;
  }

  __device__ __forceinline__ GaussianResidual<R> residual(R mean, R x) const {
    return GaussianResidual<R>(mean, x, variance, precision);
  }
};

template <class T, class X, bool kVectorRows, bool kOneLogvar>
struct LogLikelihood {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 1, N = kChunk<T>;
  static constexpr int kRegisters = sizeof(T) == 8 ? 128 : kVectorRows ? 64 : 80;

  GaussianForward a;

  struct Row {
    const T* mean;
    const X* x;
    Logvar<T, kOneLogvar> logvar;
    OneVariance<R> one;
  };
  struct Input {
    Chunk<T, N> mean, logvar;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.mean, r, a.cols), row_of<X>(a.x, target_row(r, a.x_rows), a.cols), {a.logvar, r, a.cols}, {}};
  }

  __device__ void prepare(Row& row) const {
    if constexpr (kOneLogvar) row.one = OneVariance<R>(row.logvar.template load<kVector, N>(0, N).template get<R>(0));
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.mean + c, n), row.logvar.template load<kVector, N>(c, n),
            load_chunk<kVector, N>(row.x + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t, int n, Sums<R, kSums>& sums) const {
    if constexpr (kOneLogvar) {
      if (row.one.exact) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const auto residual = row.one.residual(in.mean.template get<R>(j), in.x.template get<R>(j));
          const R term = residual.log_likelihood(row.one.logvar);
          sums.value[0] += j < n ? term : R{};
        }
        return;
      }
    }
    R sum{};
    bool large = false;  // a variance whose inverse is no normal float, which the quotient takes for zero
    if constexpr (!kOneLogvar) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const R logvar = in.logvar.template get<R>(j);
        large |= sizeof(R) == 4 && logvar > R(87.3);
        GaussianResidual<R> residual(in.mean.template get<R>(j), in.x.template get<R>(j), Math<R>::exp(logvar), R{});
        residual.s = Math<R>::quotient(residual.d, residual.v);
        const R term = residual.log_likelihood(logvar);
        sum += j < n ? term : R{};
      }
    }
    if (kOneLogvar || large || sum != sum) {  // NaN is also what overflowed in the quotient, but not in a division
      sum = R{};
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const R logvar = in.logvar.template get<R>(j);
        const GaussianResidual<R> residual(in.mean.template get<R>(j), logvar, in.x.template get<R>(j));
        const R term = residual.log_likelihood(logvar);
        sum += j < n ? term : R{};
      }
    }
    sums.value[0] += sum;
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.log_likelihood); }
};

// kSumLogvar: grad_logvar is wanted and is the sum over the row, that of the one logvar.
template <class T, class X, bool kVectorRows, bool kOneLogvar, bool kSumLogvar>
struct LogLikelihoodBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = kSumLogvar ? 1 : 0, N = kChunk<T>;

  GaussianBackward a;

  struct Row {
    const T* mean;
    const X* x;
    Logvar<T, kOneLogvar> logvar;
    int64_t first;
    R grad;
    OneVariance<R> one;
  };
  struct Input {
    Chunk<T, N> mean, logvar;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.mean, r, a.cols),
            row_of<X>(a.x, target_row(r, a.x_rows), a.cols),
            {a.logvar, r, a.cols},
            r * a.cols,
            static_cast<const R*>(a.grad)[r],
            {}};
  }

  __device__ void prepare(Row& row) const {
    if constexpr (kOneLogvar) row.one = OneVariance<R>(row.logvar.template load<kVector, N>(0, N).template get<R>(0));
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.mean + c, n), row.logvar.template load<kVector, N>(c, n),
            load_chunk<kVector, N>(row.x + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>& sums) const {
    R to_mean[N], to_logvar[N];
    const auto add = [&](int j, const GaussianResidual<R>& residual) {
      to_mean[j] = row.grad * residual.grad_mean();
      to_logvar[j] = row.grad * residual.grad_logvar();
      if constexpr (kSumLogvar) sums.value[0] += j < n ? to_logvar[j] : R{};
    };
    if (kOneLogvar && row.one.exact) {
#pragma unroll
      for (int j = 0; j < N; ++j) add(j, row.one.residual(in.mean.template get<R>(j), in.x.template get<R>(j)));
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        add(j, {in.mean.template get<R>(j), in.logvar.template get<R>(j), in.x.template get<R>(j)});
      }
    }
    if (a.grad_mean) store_chunk<kVector, N>(static_cast<T*>(a.grad_mean) + row.first + c, to_mean, n);
    if constexpr (!kOneLogvar) {
      if (a.grad_logvar) store_chunk<kVector, N>(static_cast<T*>(a.grad_logvar) + row.first + c, to_logvar, n);
    }
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.grad_logvar); }
};

template <class T, class X, bool kVectorRows, bool kOneLogvar>
struct LogLikelihoodDoubleBackward {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = kOneLogvar ? 2 : 1, N = kChunk<T>, kRegisters = 128;

  GaussianDoubleBackward a;

  struct Row {
    const T *v_mean, *mean;
    const X* x;
    Logvar<T, kOneLogvar> logvar;
    int64_t first;
    R grad, v_logvar;  // the second for the one logvar
  };
  struct Input {
    Chunk<T, N> v_mean, v_logvar, mean, logvar;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.ggrad_mean, r, a.cols),
            row_of<T>(a.mean, r, a.cols),
            row_of<X>(a.x, target_row(r, a.x_rows), a.cols),
            {a.logvar, r, a.cols},
            r * a.cols,
            static_cast<const R*>(a.grad)[r],
            kOneLogvar ? static_cast<const R*>(a.ggrad_logvar)[r] : R{}};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    Input in;
    in.v_mean = load_chunk<kVector, N>(row.v_mean + c, n);
    if constexpr (!kOneLogvar) {
      in.v_logvar = load_chunk<kVector, N>(static_cast<const T*>(a.ggrad_logvar) + row.first + c, n);
    }
    in.mean = load_chunk<kVector, N>(row.mean + c, n);
    in.logvar = row.logvar.template load<kVector, N>(c, n);
    in.x = load_chunk<kVector, N>(row.x + c, n);
    return in;
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>& sums) const {
    R to_mean[N], to_logvar[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const GaussianResidual<R> residual(in.mean.template get<R>(j), in.logvar.template get<R>(j),
                                         in.x.template get<R>(j));
      const R v_mean = in.v_mean.template get<R>(j);
      R v_logvar = row.v_logvar;
      if constexpr (!kOneLogvar) v_logvar = in.v_logvar.template get<R>(j);
      to_mean[j] = row.grad * (along(v_mean, residual.curvature_mean()) + along(v_logvar, residual.curvature_mixed()));
      to_logvar[j] =
          row.grad * (along(v_mean, residual.curvature_mixed()) + along(v_logvar, residual.curvature_logvar()));
      const R term = along(v_mean, residual.grad_mean()) + along(v_logvar, residual.grad_logvar());
      sums.value[0] += j < n ? term : R{};
      if constexpr (kOneLogvar) sums.value[1] += j < n ? to_logvar[j] : R{};
    }
    store_chunk<kVector, N>(static_cast<T*>(a.grad_mean) + row.first + c, to_mean, n);
    if constexpr (!kOneLogvar) {
      store_chunk<kVector, N>(static_cast<T*>(a.grad_logvar) + row.first + c, to_logvar, n);
    }
  }

  __host__ __device__ R* sum(int k) const { return static_cast<R*>(k == 0 ? a.ggrad : a.grad_logvar); }
};

// f(T{}, X{}, vector, one_logvar) as types; `tensors` are those in T whose rows are walked.
template <class Args, class F>
int with_layout(const Args& a, std::initializer_list<const void*> tensors, F f) {
  return with_types(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access = vector_rows<T>(a.cols, tensors) && vector_rows<X, kChunk<T>>(a.cols, {a.x}) &&
                               (a.logvar_scalar || vector_rows<T>(a.cols, {a.logvar}));
    return with_vector<T>(vector_access, [&](auto vector) {
      return with_bool(a.logvar_scalar, [&](auto one_logvar) { return f(t, x, vector, one_logvar); });
    });
  });
}

}  // namespace

int launch(const GaussianForward& a, void* stream, const Workspace& workspace) {
  return with_layout(a, {a.mean}, [&](auto t, auto x, auto vector, auto one_logvar) {
    using Op = LogLikelihood<decltype(t), decltype(x), vector.value, one_logvar.value>;
    return launch_rows(Op{a}, a.rows, a.cols, stream, workspace);
  });
}

int launch(const GaussianBackward& a, void* stream, const Workspace& workspace) {
  const void* grad_logvar = a.logvar_scalar ? nullptr : a.grad_logvar;
  return with_layout(a, {a.mean, a.grad_mean, grad_logvar}, [&](auto t, auto x, auto vector, auto one_logvar) {
    using T = decltype(t);
    using X = decltype(x);
    if constexpr (one_logvar.value) {
      if (a.grad_logvar) {
        return launch_rows(LogLikelihoodBackward<T, X, vector.value, true, true>{a}, a.rows, a.cols, stream, workspace);
      }
    }
    return launch_rows(LogLikelihoodBackward<T, X, vector.value, one_logvar.value, false>{a}, a.rows, a.cols, stream,
                       workspace);
  });
}

int launch(const GaussianDoubleBackward& a, void* stream, const Workspace& workspace) {
  const void *v_logvar = a.logvar_scalar ? nullptr : a.ggrad_logvar,
             *grad_logvar = a.logvar_scalar ? nullptr : a.grad_logvar;
  return with_layout(a, {a.ggrad_mean, v_logvar, a.mean, a.grad_mean, grad_logvar},
                     [&](auto t, auto x, auto vector, auto one_logvar) {
                       using Op = LogLikelihoodDoubleBackward<decltype(t), decltype(x), vector.value, one_logvar.value>;
                       return launch_rows(Op{a}, a.rows, a.cols, stream, workspace);
                     });
}

}  // namespace cuda
}  // namespace vae_fast
