// What happens to a tile of logits of the last linear layer between its matrix products (linear_bernoulli.cpp): the
// bias is added, log p(x|z) is summed over every row, and the gradient is written (math/bernoulli.h): over the
// products, or beside them where those are floats and the gradient, a factor of the next products, is of half
// precision.
//
// The tile stays in the L2 cache from one product to the next, so this kernel moves x bytes of memory for an element,
// the targets. Its work, an exp, a log1p and a division, is small beside the two to six times H additions and
// multiplications of an element's products.
#include "../math/bernoulli.h"
#include "rows.cuh"

namespace vae_fast {
namespace cuda {
namespace {

// A chunk of a tensor that this kernel may also write: not through the read-only cache.
template <bool kVector, int N, class T>
__device__ __forceinline__ Chunk<T, N> load_own_chunk(const T* p, int n) {
  if constexpr (kVector) {
    Chunk<T, N> chunk;
    uint4 parts[sizeof(chunk) / sizeof(uint4)];
    static_assert(sizeof(chunk) == sizeof(parts));
#pragma unroll
    for (size_t i = 0; i < sizeof(chunk) / sizeof(uint4); ++i) parts[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(&chunk, parts, sizeof(chunk));
    return chunk;
  } else {
    return load_chunk<false, N>(p, n);
  }
}

template <class T, class X, bool kVectorRows, bool kWantsGrad>
struct Tile {
  using Element = T;
  using R = Real<T>;
  static constexpr bool kVector = kVectorRows;
  static constexpr int kSums = 1, N = kChunk<T>, kRegisters = sizeof(T) == 8 ? 128 : 80;

  BernoulliTile a;

  struct Row {
    const R* products;
    T* delta;
    const X* x;
    R grad;
  };
  struct Input {
    Chunk<R, N> products;
    Chunk<T, N> bias;
    Chunk<X, N> x;
  };

  __device__ Row row(int64_t r) const {
    return {row_of<R>(a.products, r, a.cols), row_of<T>(a.delta, r, a.cols),
            row_of<X>(a.x, target_row(a.first_row + r, a.x_rows), a.x_stride),
            a.grad ? static_cast<const R*>(a.grad)[r] : R{1}};
  }

  __device__ Input load(const Row& row, int64_t c, int n) const {
    return {load_own_chunk<kVector, N>(row.products + c, n),
            load_chunk<kVector, N>(static_cast<const T*>(a.bias) + c, n), load_chunk<kVector, N>(row.x + c, n)};
  }

  __device__ void apply(const Row& row, const Input& in, int64_t c, int n, Sums<R, kSums>& sums) const {
    R out[N];
    BernoulliSum<R> sum;  // of Math<R> also in half precision: logits and sum are floats
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const R logit = in.products.template get<R>(j) + in.bias.template get<R>(j), x = in.x.template get<R>(j);
      const R t = bernoulli_odds<R>(logit);
      if (j < n) sum.add(logit, x, t);
      out[j] = row.grad * bernoulli_grad_logit<R, Arithmetic<T>>(logit, x, t);
    }
    sums.value[0] += sum.log_likelihood();
    if constexpr (kWantsGrad) store_chunk<kVector, N>(row.delta + c, out, n);
  }

  __host__ __device__ R* sum(int) const { return static_cast<R*>(a.log_likelihood); }
};

}  // namespace

int launch(const BernoulliTile& a, void* stream, const Workspace& workspace) {
  return with_types(a.dtype, a.x_dtype, [&](auto t, auto x) {
    using T = decltype(t);
    using X = decltype(x);
    const bool vector_access = vector_rows<T>(a.cols, {a.delta, a.bias}) &&
                               vector_rows<Real<T>, kChunk<T>>(a.cols, {a.products}) &&
                               vector_rows<X, kChunk<T>>(a.x_stride, {a.x});
    return with_vector<T>(vector_access, [&](auto vector) {
      return with_bool(a.wants_grad, [&](auto wants_grad) {
        return launch_rows(Tile<T, X, vector.value, wants_grad.value>{a}, a.rows, a.cols, stream, workspace);
      });
    });
  });
}

}  // namespace cuda
}  // namespace vae_fast
