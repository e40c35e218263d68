// log p(x|z) of a Bernoulli decoder, summed over every row, its gradient and the gradient of that (math/bernoulli.h).
// Rows of logits may outnumber rows of x: samples come in front, and row r belongs to x[r mod x_rows]. Targets may be
// packed, eight to a byte.
//
// Bytes that must move, for logits of b bytes and targets of x bytes: forward b + x each, backward 2 b + x, double
// backward 3 b + x. At the 4.3 TB/s that a copy reaches on an H200, 2^26 float32 elements with float32 targets take no
// less than 0.125, 0.19 and 0.25 ms. In bfloat16 the arithmetic, one exp and in backward one division each, is the
// limit.
#include "../math/bernoulli.h"
#include "rows.cuh"

namespace vae_fast {
namespace cuda {
namespace {

// The targets of row r of the logits.
template <class X>
struct Targets {
  const X* row;

  __device__ Targets(const void* x, int64_t r, int64_t x_rows, int64_t cols)
      : row(row_of<X>(x, target_row(r, x_rows), cols)) {}

  template <bool kVector, int N>
  __device__ Chunk<X, N> load(int64_t c, int n) const {
    return load_chunk<kVector, N>(row + c, n);
  }
};

// Bits: a chunk lies within one byte, wherever the row starts.
template <>
struct Targets<Bits> {
  const uint8_t* row;

  __device__ Targets(const void* x, int64_t r, int64_t x_rows, int64_t cols)
      : row(row_of<uint8_t>(x, target_row(r, x_rows), (cols + 7) / 8)) {}

  template <bool kVector, int N>
  __device__ Chunk<Bits, N> load(int64_t c, int) const {
    static_assert(8 % N == 0, "a chunk of bits lies within one byte");
    return {static_cast<unsigned>(__ldg(row + (c >> 3))) >> (c & (8 - N))};  // c is a multiple of N
  }
};

template <class T, class X, bool kVectorRows>
struct LogLikelihood {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 1, N = kChunk<T>;

  BernoulliForward a;

  struct Row {
    const T* logits;
    Targets<X> x;
  };
  struct Input {
    Chunk<T, N> logits;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const { return {row_of<T>(a.logits, r, a.cols), {a.x, r, a.x_rows, a.cols}}; }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.logits + c, n), row.x.template load<kVector, N>(c, n)};
  }

  __device__ void apply(const Row&, const Input& in, int64_t, int n, Sums<R, kSums>& sums) const {
    static_assert(N <= BernoulliSum<R>::kMost, "one sum takes a chunk");
    // Of Math<R> also in half precision: the sum is a float, and may be one exp(-|l|) alone.
    BernoulliSum<R> sum;
    if constexpr (std::is_same_v<X, Bits>) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j < n) sum.add(in.logits.template get<R>(j), in.x.template get<R>(j));
      }
      sums.value[0] += sum.log_likelihood();
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (j < n) sum.add_finite(in.logits.template get<R>(j), in.x.template get<R>(j));
      }
      R value = sum.log_likelihood();
      if (value != value) {  // an infinite logit, or NaN
        sum = {};
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (j < n) sum.add(in.logits.template get<R>(j), in.x.template get<R>(j));
        }
        value = sum.log_likelihood();
      }
      sums.value[0] += value;
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
    Targets<X> x;
    T* grad_logits;
    R grad;
  };
  struct Input {
    Chunk<T, N> logits;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.logits, r, a.cols),
            {a.x, r, a.x_rows, a.cols},
            row_of<T>(a.grad_logits, r, a.cols),
            static_cast<const R*>(a.grad)[r]};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.logits + c, n), row.x.template load<kVector, N>(c, n)};
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
    Targets<X> x;
    T* grad_logits;
    R grad;
  };
  struct Input {
    Chunk<T, N> v, logits;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<T>(a.ggrad_logits, r, a.cols),
            row_of<T>(a.logits, r, a.cols),
            {a.x, r, a.x_rows, a.cols},
            row_of<T>(a.grad_logits, r, a.cols),
            static_cast<const R*>(a.grad)[r]};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_chunk<kVector, N>(row.v + c, n), load_chunk<kVector, N>(row.logits + c, n),
            row.x.template load<kVector, N>(c, n)};
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

template <class F>
int with_targets(DType dtype, DType x_dtype, F f) {
  if (x_dtype == DType::bits) return with_type(dtype, [&](auto t) { return f(t, Bits{}); });
  return with_types(dtype, x_dtype, f);
}

// vector_rows of the targets beside chunks of T
template <class T, class X>
bool vector_targets(int64_t cols, const void* x) {
  if constexpr (std::is_same_v<X, Bits>) {
    return true;
  } else {
    return vector_rows<X, kChunk<T>>(cols, {x});
  }
}

}  // namespace

int launch(const BernoulliForward& a, void* stream, const Workspace& workspace) {
  return with_targets(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access = vector_rows<T>(a.cols, {a.logits}) && vector_targets<T, X>(a.cols, a.x);
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(LogLikelihood<T, X, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

int launch(const BernoulliBackward& a, void* stream, const Workspace& workspace) {
  return with_targets(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access = vector_rows<T>(a.cols, {a.logits, a.grad_logits}) && vector_targets<T, X>(a.cols, a.x);
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(LogLikelihoodBackward<T, X, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

int launch(const BernoulliDoubleBackward& a, void* stream, const Workspace& workspace) {
  return with_targets(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access =
        vector_rows<T>(a.cols, {a.ggrad_logits, a.logits, a.grad_logits}) && vector_targets<T, X>(a.cols, a.x);
    return with_vector<T>(vector_access, [&](auto vector) {
      return launch_rows(LogLikelihoodDoubleBackward<T, X, vector.value>{a}, a.rows, a.cols, stream, workspace);
    });
  });
}

}  // namespace cuda
}  // namespace vae_fast
