// The CPU kernels: loops over math/. This file is compiled once per instruction set (plain.cpp, avx2.cpp, avx512.cpp);
// dispatch.cpp picks the build to run and shares the work among threads. A kernel here does the work items
// [begin, end) of its launch: rows where it sums over a row, elements where it does not.
//
// One pass over memory; one owner per sum, in an order that depends on the shape alone.
#include "../math/bernoulli.h"
#include "../math/gaussian.h"
#include "../math/philox.h"
#include "vector.h"

namespace vae_fast {
namespace cpu {
namespace VAE_FAST_CAPABILITY {
namespace {

VAE_FAST_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// The sum over a row of blocks and a rest: block(c, k) gives the sum, in float lanes, of the k <= kBlock full vectors
// from element c on, rest(c, n) the vector of the last n elements. Blocks add up in double, and where they are double
// themselves, what these additions round off adds up beside them (Neumaier, 1974): the error does not grow with the
// width of the row.
template <class V, int kBlock, class Block, class Rest>
VAE_FAST_INLINE double row_sum_in_blocks(int64_t cols, Block block, Rest rest) {
  constexpr int64_t lanes = Memory<V>::lanes;
  double total = 0, rounded_off = 0;
  const auto add = [&](double term) {
    const double sum = total + term, of_term = sum - total;
    if constexpr (lanes == 1) rounded_off += (total - (sum - of_term)) + (term - of_term);
    total = sum;
  };
  int64_t c = 0;
  while (c + lanes <= cols) {
    const int64_t vectors = min((cols - c) / lanes, kBlock);
    add(Memory<V>::sum(block(c, vectors)));
    c += vectors * lanes;
  }
  if (c < cols) add(Memory<V>::sum(Memory<V>::keep(rest(c, cols - c), cols - c)));
  if constexpr (lanes != 1) return total;
  const double sum = total + rounded_off;
  return sum == sum ? sum : total;  // of an infinite total what was rounded off is NaN
}

// sum_c term(c, n) over a row, where term gives the vector of elements [c, c + n)
template <class V, class Term>
VAE_FAST_INLINE double row_sum(int64_t cols, Term term) {
  constexpr int64_t lanes = Memory<V>::lanes;
  return row_sum_in_blocks<V, 64>(
      cols,
      [&](int64_t c, int64_t vectors) {
        V sum{};
        for (int64_t k = 0; k < vectors; ++k) sum = sum + term(c + k * lanes, lanes);
        return sum;
      },
      term);
}

template <class V, class Body>
VAE_FAST_INLINE void for_each_vector(int64_t begin, int64_t end, Body body) {
  constexpr int64_t lanes = Memory<V>::lanes;
  int64_t c = begin;
  for (; c + lanes <= end; c += lanes) body(c, lanes);
  if (c < end) body(c, end - c);
}

// Splits the flat range [begin, end) of a [rows, cols] tensor into its rows: body(row, first, last) with flat offsets.
template <class Body>
VAE_FAST_INLINE void for_each_row_segment(int64_t begin, int64_t end, int64_t cols, Body body) {
  int64_t row = begin / cols;
  while (begin < end) {
    int64_t last = min(end, (row + 1) * cols);
    body(row, begin, last);
    begin = last;
    ++row;
  }
}

// f(T{}) for the element type that `dtype` names.
template <class F>
VAE_FAST_INLINE void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(F16{});
    case DType::bf16:
      return f(BF16{});
    case DType::u8:
    case DType::bits:
      return;
  }
}

// f(T{}, X{}): x comes in the type of the other tensors, in float or in bytes.
template <class F>
VAE_FAST_INLINE void with_types(DType dtype, DType x_dtype, F f) {
  with_type(dtype, [&](auto t) {
    if (x_dtype == DType::u8) return f(t, uint8_t{});
    if (x_dtype == dtype) return f(t, t);
    f(t, float{});
  });
}

// The same where x may also be packed, eight elements to a byte.
template <class F>
VAE_FAST_INLINE void with_targets(DType dtype, DType x_dtype, F f) {
  if (x_dtype == DType::bits) return with_type(dtype, [&](auto t) { f(t, Bits{}); });
  with_types(dtype, x_dtype, f);
}

// --- Gaussian KL -----------------------------------------------------------------------------------------------------

template <class T>
void gaussian_kl_forward(const GaussianKLForward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  for (int64_t r = begin; r < end; ++r) {
    const T* mu = static_cast<const T*>(a.mu) + r * a.cols;
    const T* logvar = static_cast<const T*>(a.logvar) + r * a.cols;
    static_cast<Scalar<T>*>(a.kl)[r] = static_cast<Scalar<T>>(row_sum<V>(
        a.cols, [&](int64_t c, int64_t n) { return gaussian_kl(M::load(mu + c, n), M::load(logvar + c, n)); }));
  }
}

template <class T>
void gaussian_kl_backward(const GaussianKLBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  const T *mu = static_cast<const T*>(a.mu), *logvar = static_cast<const T*>(a.logvar);
  T *grad_mu = static_cast<T*>(a.grad_mu), *grad_logvar = static_cast<T*>(a.grad_logvar);
  for_each_row_segment(begin, end, a.cols, [&](int64_t row, int64_t first, int64_t last) {
    Scalar<T> g = static_cast<const Scalar<T>*>(a.grad_kl)[row];
    for_each_vector<V>(first, last, [&](int64_t i, int64_t n) {
      if (grad_mu) M::store(grad_mu + i, g * M::load(mu + i, n), n);
      if (grad_logvar) M::store(grad_logvar + i, g * gaussian_kl_grad_logvar(M::load(logvar + i, n)), n);
    });
  });
}

template <class T>
void gaussian_kl_double_backward(const GaussianKLDoubleBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = r * a.cols;
    const T *v_mu = static_cast<const T*>(a.ggrad_mu) + row, *v_logvar = static_cast<const T*>(a.ggrad_logvar) + row;
    const T *mu = static_cast<const T*>(a.mu) + row, *logvar = static_cast<const T*>(a.logvar) + row;
    T *grad_mu = static_cast<T*>(a.grad_mu) + row, *grad_logvar = static_cast<T*>(a.grad_logvar) + row;
    Scalar<T> g = static_cast<const Scalar<T>*>(a.grad_kl)[r];
    static_cast<Scalar<T>*>(a.ggrad_kl)[r] = static_cast<Scalar<T>>(row_sum<V>(a.cols, [&](int64_t c, int64_t n) {
      V vm = M::load(v_mu + c, n), vl = M::load(v_logvar + c, n), lv = M::load(logvar + c, n);
      M::store(grad_mu + c, g * vm, n);
      M::store(grad_logvar + c, g * along(vl, gaussian_kl_curvature_logvar(lv)), n);
      return along(vm, M::load(mu + c, n)) + along(vl, gaussian_kl_grad_logvar(lv));
    }));
  }
}

// --- noise and the reparameterized sample ----------------------------------------------------------------------------

constexpr int64_t kNoiseBlock = 1024;

constexpr int kTogether = 2;  // vectors of counters
constexpr int kNormalsAtOnce = 4 * kTogether * kLanes;

// eps(seed, first + 0 .. first + kNormalsAtOnce - 1), first a multiple of 4. Of the n lanes of a vector of counters,
// lane 4 q + i holds number i n/4 + q: transposing every quarter of four lanes then leaves the normals in their order.
VAE_FAST_INLINE void normals(int64_t seed, int64_t first, float* out) {
  VU offset;
  for (int i = 0; i < kLanes; ++i) offset[i] = static_cast<uint32_t>(i % 4 * (kLanes / 4) + i / 4);
  VU c[kTogether][4] = {};
  for (int k = 0; k < kTogether; ++k) {
    const uint64_t counter = static_cast<uint64_t>(first / 4 + k * kLanes);
    const uint32_t base = static_cast<uint32_t>(counter), high = static_cast<uint32_t>(counter >> 32);
    c[k][0] = offset + base;
    c[k][1] = c[k][0] < base ? VU{} + (high + 1) : VU{} + high;
  }
  philox4x32_10<VF, kTogether>(c, static_cast<uint32_t>(seed),
                               static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32));
  for (int k = 0; k < kTogether; ++k) {
    VF eps[4];
    box_muller(c[k][0], c[k][1], eps[0], eps[1]);
    box_muller(c[k][2], c[k][3], eps[2], eps[3]);
    transpose_quarters(eps);
    for (int i = 0; i < 4; ++i) from_floats(out + (4 * k + i) * kLanes, eps[i]);
  }
}

VAE_FAST_INLINE void normals(int64_t seed, int64_t first, double* out) {
  for (int i = 0; i < kNormalsAtOnce; i += 4) philox_normal4(seed, (first + i) / 4, out + i);
}

// A window on the sequence eps(seed, 0), eps(seed, 1), …, made kNoiseBlock at a time.
template <class Real>
class Noise {
 public:
  explicit Noise(int64_t seed) : seed_(seed) {}

  // The n normals from element `first` on. Makes no more than up to element `last`, rounded up to whole vectors.
  VAE_FAST_INLINE const Real* at(int64_t first, int64_t n, int64_t last) {
    if (first < first_ || first + n > last_) make(first, last > first + n ? last : first + n);
    return buffer_ + (first - first_);
  }

 private:
  __attribute__((noinline)) void make(int64_t first, int64_t last) {
    first_ = last_ = first & ~int64_t{3};
    for (last = min(last, first_ + kNoiseBlock); last_ < last; last_ += kNormalsAtOnce)
      normals(seed_, last_, buffer_ + (last_ - first_));
  }

  int64_t seed_, first_ = 0, last_ = 0;
  Real buffer_[kNoiseBlock + 2 * kNormalsAtOnce];
};

template <class T>
void reparameterize_forward(const ReparameterizeForward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  Noise<Scalar<T>> noise(*a.seed);
  for (int64_t s = 0; s < a.samples; ++s) {
    const int64_t last = (s * a.rows + end) * a.cols;
    for (int64_t r = begin; r < end; ++r) {
      const T* mu = static_cast<const T*>(a.mu) + r * a.cols;
      const T* logvar = static_cast<const T*>(a.logvar) + r * a.cols;
      const int64_t row = (s * a.rows + r) * a.cols;
      T* z = static_cast<T*>(a.z) + row;
      auto sample = [&](int64_t c, int64_t n, V m, V lv) {
        M::store(z + c, reparameterize(m, lv, M::load(noise.at(row + c, n, last), n)), n);
      };
      if (a.kl && s == 0) {
        static_cast<Scalar<T>*>(a.kl)[r] = static_cast<Scalar<T>>(row_sum<V>(a.cols, [&](int64_t c, int64_t n) {
          V m = M::load(mu + c, n), lv = M::load(logvar + c, n);
          sample(c, n, m, lv);
          return gaussian_kl(m, lv);
        }));
      } else {
        for_each_vector<V>(0, a.cols,
                           [&](int64_t c, int64_t n) { sample(c, n, M::load(mu + c, n), M::load(logvar + c, n)); });
      }
    }
  }
  if (a.kl && a.samples == 0) {
    GaussianKLForward kl{a.dtype, a.rows, a.cols, a.mu, a.logvar, a.kl};
    gaussian_kl_forward<T>(kl, begin, end);
  }
}

// sum_s grad_z and sum_s grad_z eps of the n <= kNoiseBlock elements from `first` on, samples in order
template <class T>
VAE_FAST_INLINE void sum_samples(const void* grad_z, int64_t samples, int64_t elements, int64_t first, int64_t n,
                                 Noise<Scalar<T>>& noise, Scalar<T>* sum, Scalar<T>* weighted) {
  using V = Vector<T>;
  using M = Memory<V>;
  for (int64_t i = 0; i < n; ++i) sum[i] = weighted[i] = 0;
  for (int64_t s = 0; s < samples; ++s) {
    const int64_t offset = s * elements + first;
    const T* g = static_cast<const T*>(grad_z) + offset;
    for_each_vector<V>(0, n, [&](int64_t i, int64_t m) {
      V gz = M::load(g + i, m), eps = M::load(noise.at(offset + i, m, offset + n), m);
      M::store(sum + i, M::load(sum + i, m) + gz, m);
      M::store(weighted + i, Math<V>::fma(gz, eps, M::load(weighted + i, m)), m);
    });
  }
}

template <class T>
void reparameterize_backward(const ReparameterizeBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  Noise<Scalar<T>> noise(*a.seed);
  Scalar<T> sum[kNoiseBlock], weighted[kNoiseBlock];
  const T *mu = static_cast<const T*>(a.mu), *logvar = static_cast<const T*>(a.logvar);
  T *grad_mu = static_cast<T*>(a.grad_mu), *grad_logvar = static_cast<T*>(a.grad_logvar);
  for (int64_t b = begin; b < end; b += kNoiseBlock) {
    const int64_t e = min(b + kNoiseBlock, end);
    sum_samples<T>(a.grad_z, a.grad_z ? a.samples : 0, a.rows * a.cols, b, e - b, noise, sum, weighted);
    for_each_row_segment(b, e, a.cols, [&](int64_t row, int64_t first, int64_t last) {
      Scalar<T> g = a.grad_kl ? static_cast<const Scalar<T>*>(a.grad_kl)[row] : Scalar<T>{0};
      for_each_vector<V>(first, last, [&](int64_t i, int64_t n) {
        V lv = M::load(logvar + i, n);
        V to_mu = M::load(sum + (i - b), n);
        V to_logvar = constant<V>(0.5) * standard_deviation(lv) * M::load(weighted + (i - b), n);
        if (a.grad_kl) {
          to_mu = to_mu + g * M::load(mu + i, n);
          to_logvar = to_logvar + g * gaussian_kl_grad_logvar(lv);
        }
        if (grad_mu) M::store(grad_mu + i, to_mu, n);
        if (grad_logvar) M::store(grad_logvar + i, to_logvar, n);
      });
    });
  }
}

template <class T>
void reparameterize_double_backward(const ReparameterizeDoubleBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  Noise<Scalar<T>> noise(*a.seed);
  Scalar<T> sum[kNoiseBlock], weighted[kNoiseBlock];
  const T *v_mu = static_cast<const T*>(a.ggrad_mu), *v_logvar = static_cast<const T*>(a.ggrad_logvar);
  const T* logvar = static_cast<const T*>(a.logvar);
  for (int64_t b = begin; b < end; b += kNoiseBlock) {
    const int64_t e = min(b + kNoiseBlock, end), elements = a.rows * a.cols;
    sum_samples<T>(a.grad_z, a.samples, elements, b, e - b, noise, sum, weighted);
    for_each_vector<V>(b, e, [&](int64_t i, int64_t n) {
      V scale = constant<V>(0.25) * standard_deviation(M::load(logvar + i, n));
      M::store(static_cast<T*>(a.grad_logvar) + i, M::load(v_logvar + i, n) * scale * M::load(weighted + (i - b), n),
               n);
    });
    for (int64_t s = 0; s < a.samples; ++s) {
      T* out = static_cast<T*>(a.ggrad_z) + s * elements;
      for_each_vector<V>(b, e, [&](int64_t i, int64_t n) {
        V eps = M::load(noise.at(s * elements + i, n, s * elements + e), n);
        V scale = constant<V>(0.5) * standard_deviation(M::load(logvar + i, n));
        M::store(out + i, Math<V>::fma(M::load(v_logvar + i, n) * scale, eps, M::load(v_mu + i, n)), n);
      });
    }
  }
}

template <class T>
void philox_normal(const PhiloxNormal& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  Noise<Scalar<T>> noise(*a.seed);
  for_each_vector<V>(begin, end, [&](int64_t i, int64_t n) {
    M::store(static_cast<T*>(a.out) + i, M::load(noise.at(i, n, end), n), n);
  });
}

// --- Bernoulli log-likelihood ----------------------------------------------------------------------------------------

// The sum of log p over a row, where add(sum, c, n) adds the elements [c, c + n).
template <class V, class Add>
VAE_FAST_INLINE double bernoulli_row_sum(int64_t cols, Add add) {
  constexpr int64_t lanes = Memory<V>::lanes;
  const auto sum = [&](int64_t c, int64_t vectors, int64_t n) {
    BernoulliSum<V> block;
    for (int64_t k = 0; k < vectors; ++k) add(block, c + k * lanes, n);
    return block.log_likelihood();
  };
  return row_sum_in_blocks<V, BernoulliSum<V>::kMost>(
      cols, [&](int64_t c, int64_t vectors) { return sum(c, vectors, lanes); },
      [&](int64_t c, int64_t n) { return sum(c, 1, n); });
}

// Row r of the targets: something to add an index to and load from
template <class X>
VAE_FAST_INLINE const X* target_row(const X* x, int64_t r, int64_t cols) {
  return x + r * cols;
}
VAE_FAST_INLINE Bits target_row(const Bits* x, int64_t r, int64_t cols) {
  return {reinterpret_cast<const uint8_t*>(x) + r * ((cols + 7) / 8), 0};
}

template <class T, class X>
void bernoulli_forward(const BernoulliForward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  for (int64_t r = begin; r < end; ++r) {
    const T* logits = static_cast<const T*>(a.logits) + r * a.cols;
    const auto x = target_row(static_cast<const X*>(a.x), r % a.x_rows, a.cols);
    double sum = bernoulli_row_sum<V>(a.cols, [&](BernoulliSum<V>& group, int64_t c, int64_t n) {
      group.add_finite(M::load(logits + c, n), M::load(x + c, n));
    });
    if (sum != sum)  // a NaN, or an infinite logit
      sum = bernoulli_row_sum<V>(a.cols, [&](BernoulliSum<V>& group, int64_t c, int64_t n) {
        group.add(M::load(logits + c, n), M::load(x + c, n));
      });
    static_cast<Scalar<T>*>(a.log_likelihood)[r] = static_cast<Scalar<T>>(sum);
  }
}

template <class T, class X>
void bernoulli_backward(const BernoulliBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  const T* logits = static_cast<const T*>(a.logits);
  T* grad_logits = static_cast<T*>(a.grad_logits);
  for_each_row_segment(begin, end, a.cols, [&](int64_t row, int64_t first, int64_t last) {
    Scalar<T> g = static_cast<const Scalar<T>*>(a.grad)[row];
    // so that x + i stands beside logits + i
    const auto x = target_row(static_cast<const X*>(a.x), row % a.x_rows, a.cols) + -row * a.cols;
    for_each_vector<V>(first, last, [&](int64_t i, int64_t n) {
      M::store(grad_logits + i, g * bernoulli_grad_logit(M::load(logits + i, n), M::load(x + i, n)), n);
    });
  });
}

template <class T, class X>
void bernoulli_double_backward(const BernoulliDoubleBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  for (int64_t r = begin; r < end; ++r) {
    const T* v = static_cast<const T*>(a.ggrad_logits) + r * a.cols;
    const T* logits = static_cast<const T*>(a.logits) + r * a.cols;
    const auto x = target_row(static_cast<const X*>(a.x), r % a.x_rows, a.cols);
    T* grad_logits = static_cast<T*>(a.grad_logits) + r * a.cols;
    Scalar<T> g = static_cast<const Scalar<T>*>(a.grad)[r];
    static_cast<Scalar<T>*>(a.ggrad)[r] = static_cast<Scalar<T>>(row_sum<V>(a.cols, [&](int64_t c, int64_t n) {
      V vc = M::load(v + c, n), l = M::load(logits + c, n);
      M::store(grad_logits + c, g * vc * bernoulli_curvature(l), n);
      return vc * bernoulli_grad_logit(l, M::load(x + c, n));
    }));
  }
}

template <class T, class X>
void bernoulli_tile(const BernoulliTile& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = begin; r < end; ++r) {
    const auto* products = static_cast<const Scalar<T>*>(a.products) + r * a.cols;
    T* delta = static_cast<T*>(a.delta) + r * a.cols;
    const X* x = static_cast<const X*>(a.x) + (a.first_row + r) % a.x_rows * a.x_stride;
    const Scalar<T> g = a.grad ? static_cast<const Scalar<T>*>(a.grad)[r] : Scalar<T>{1};
    const auto logit = [&](int64_t c, int64_t n) { return M::load(products + c, n) + M::load(bias + c, n); };
    if (!a.wants_log_likelihood) {
      for_each_vector<V>(0, a.cols, [&](int64_t c, int64_t n) {
        M::store(delta + c, g * bernoulli_grad_logit(logit(c, n), M::load(x + c, n)), n);
      });
      continue;
    }
    const auto add = [&](BernoulliSum<V>& sum, int64_t c, int64_t n) {
      const V l = logit(c, n), target = M::load(x + c, n), t = bernoulli_odds(l);
      sum.add(l, target, t);
      if (a.wants_grad) M::store(delta + c, g * bernoulli_grad_logit(l, target, t), n);
    };
    static_cast<Scalar<T>*>(a.log_likelihood)[r] = static_cast<Scalar<T>>(bernoulli_row_sum<V>(a.cols, add));
  }
}

// --- Gaussian log-likelihood -----------------------------------------------------------------------------------------

// logvar of a row: one value for everything, or a tensor beside mean
template <class T>
struct LogVariance {
  using V = Vector<T>;
  const T* values;
  bool scalar;
  V first;
  LogVariance(const void* logvar, bool is_scalar)
      : values(static_cast<const T*>(logvar)),
        scalar(is_scalar),
        first(is_scalar ? Memory<V>::broadcast(values) : V{}) {}
  VAE_FAST_INLINE V at(int64_t i, int64_t n) const { return scalar ? first : Memory<V>::load(values + i, n); }
};

template <class T, class X>
void gaussian_forward(const GaussianForward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  const LogVariance<T> logvar(a.logvar, a.logvar_scalar);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = r * a.cols;
    const T* mean = static_cast<const T*>(a.mean) + row;
    const X* x = static_cast<const X*>(a.x) + (r % a.x_rows) * a.cols;
    static_cast<Scalar<T>*>(a.log_likelihood)[r] = static_cast<Scalar<T>>(row_sum<V>(a.cols, [&](int64_t c, int64_t n) {
      V lv = logvar.at(row + c, n);
      return GaussianResidual<V>(M::load(mean + c, n), lv, M::load(x + c, n)).log_likelihood(lv);
    }));
  }
}

template <class T, class X>
void gaussian_backward(const GaussianBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  const LogVariance<T> logvar(a.logvar, a.logvar_scalar);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = r * a.cols;
    const T* mean = static_cast<const T*>(a.mean) + row;
    const X* x = static_cast<const X*>(a.x) + (r % a.x_rows) * a.cols;
    T* grad_mean = a.grad_mean ? static_cast<T*>(a.grad_mean) + row : nullptr;
    T* grad_logvar = a.grad_logvar && !a.logvar_scalar ? static_cast<T*>(a.grad_logvar) + row : nullptr;
    Scalar<T> g = static_cast<const Scalar<T>*>(a.grad)[r];
    double total = row_sum<V>(a.cols, [&](int64_t c, int64_t n) {
      GaussianResidual<V> residual(M::load(mean + c, n), logvar.at(row + c, n), M::load(x + c, n));
      V to_logvar = g * residual.grad_logvar();
      if (grad_mean) M::store(grad_mean + c, g * residual.grad_mean(), n);
      if (grad_logvar) M::store(grad_logvar + c, to_logvar, n);
      return to_logvar;
    });
    if (a.grad_logvar && a.logvar_scalar) static_cast<Scalar<T>*>(a.grad_logvar)[r] = static_cast<Scalar<T>>(total);
  }
}

template <class T, class X>
void gaussian_double_backward(const GaussianDoubleBackward& a, int64_t begin, int64_t end) {
  using V = Vector<T>;
  using M = Memory<V>;
  const LogVariance<T> logvar(a.logvar, a.logvar_scalar);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = r * a.cols;
    const T* v_mean = static_cast<const T*>(a.ggrad_mean) + row;
    const T* mean = static_cast<const T*>(a.mean) + row;
    const X* x = static_cast<const X*>(a.x) + (r % a.x_rows) * a.cols;
    T* grad_mean = static_cast<T*>(a.grad_mean) + row;
    Scalar<T> g = static_cast<const Scalar<T>*>(a.grad)[r];
    Scalar<T> v_row = a.logvar_scalar ? static_cast<const Scalar<T>*>(a.ggrad_logvar)[r] : Scalar<T>{0};
    double to_logvar_row = 0;
    // <v, gradient of log p> summed over the row, and its derivatives, from the second derivatives in math/gaussian.h
    auto terms = [&](int64_t c, int64_t n, V& to_logvar) {
      GaussianResidual<V> residual(M::load(mean + c, n), logvar.at(row + c, n), M::load(x + c, n));
      V vm = M::load(v_mean + c, n);
      V vl = a.logvar_scalar ? V{} + v_row : M::load(static_cast<const T*>(a.ggrad_logvar) + row + c, n);
      M::store(grad_mean + c, g * (along(vm, residual.curvature_mean()) + along(vl, residual.curvature_mixed())), n);
      to_logvar = g * (along(vm, residual.curvature_mixed()) + along(vl, residual.curvature_logvar()));
      return along(vm, residual.grad_mean()) + along(vl, residual.grad_logvar());
    };
    double ggrad = row_sum<V>(a.cols, [&](int64_t c, int64_t n) {
      V to_logvar, term = terms(c, n, to_logvar);
      if (a.logvar_scalar)
        to_logvar_row += Memory<V>::sum(Memory<V>::keep(to_logvar, n));
      else
        M::store(static_cast<T*>(a.grad_logvar) + row + c, to_logvar, n);
      return term;
    });
    static_cast<Scalar<T>*>(a.ggrad)[r] = static_cast<Scalar<T>>(ggrad);
    if (a.logvar_scalar) static_cast<Scalar<T>*>(a.grad_logvar)[r] = static_cast<Scalar<T>>(to_logvar_row);
  }
}

}  // namespace

// --- one entry per kernel --------------------------------------------------------------------------------------------

#define VAE_FAST_RUN(Args, kernel)                                           \
  void run(const Args& a, int64_t begin, int64_t end) {                      \
    with_type(a.dtype, [&](auto t) { kernel<decltype(t)>(a, begin, end); }); \
  }
VAE_FAST_RUN(GaussianKLForward, gaussian_kl_forward)
VAE_FAST_RUN(GaussianKLBackward, gaussian_kl_backward)
VAE_FAST_RUN(GaussianKLDoubleBackward, gaussian_kl_double_backward)
VAE_FAST_RUN(ReparameterizeForward, reparameterize_forward)
VAE_FAST_RUN(ReparameterizeBackward, reparameterize_backward)
VAE_FAST_RUN(ReparameterizeDoubleBackward, reparameterize_double_backward)
VAE_FAST_RUN(PhiloxNormal, philox_normal)
#undef VAE_FAST_RUN

#define VAE_FAST_RUN(Args, kernel)                                                                            \
  void run(const Args& a, int64_t begin, int64_t end) {                                                       \
    with_types(a.dtype, a.x_dtype, [&](auto t, auto x) { kernel<decltype(t), decltype(x)>(a, begin, end); }); \
  }
VAE_FAST_RUN(BernoulliTile, bernoulli_tile)
VAE_FAST_RUN(GaussianForward, gaussian_forward)
VAE_FAST_RUN(GaussianBackward, gaussian_backward)
VAE_FAST_RUN(GaussianDoubleBackward, gaussian_double_backward)
#undef VAE_FAST_RUN

#define VAE_FAST_RUN(Args, kernel)                                                                              \
  void run(const Args& a, int64_t begin, int64_t end) {                                                         \
    with_targets(a.dtype, a.x_dtype, [&](auto t, auto x) { kernel<decltype(t), decltype(x)>(a, begin, end); }); \
  }
VAE_FAST_RUN(BernoulliForward, bernoulli_forward)
VAE_FAST_RUN(BernoulliBackward, bernoulli_backward)
VAE_FAST_RUN(BernoulliDoubleBackward, bernoulli_double_backward)
#undef VAE_FAST_RUN

}  // namespace VAE_FAST_CAPABILITY
}  // namespace cpu
}  // namespace vae_fast
