// The kernels of epsilon.h for the CPU, and all of them as operators, torch.ops.vae_fast_epsilon; see epsilon.py. One
// pass each, over the vectors and formulas of the package's own kernels.
#include "epsilon.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#if defined(VAE_FAST_WITH_CUDA)
#include <c10/cuda/CUDAStream.h>
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif
// The compiler is given -march: as wide as what this processor has and the package uses.
#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VAE_FAST_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VAE_FAST_VECTOR_BYTES 32
#else
#define VAE_FAST_VECTOR_BYTES 16
#endif
#define VAE_FAST_CAPABILITY epsilon
#include "../csrc/cpu/kernels.inl"

namespace vae_fast {
namespace cpu {
namespace epsilon {
namespace {

// f(T{}, E{}): float, or bfloat16 with eps in either
template <class F>
void with_pair(DType dtype, DType eps_dtype, F f) {
  if (dtype == DType::f32) return f(float{}, float{});
  if (eps_dtype == DType::bf16) return f(BF16{}, BF16{});
  f(BF16{}, float{});
}

void run_epsilon(const StoreForward& a, int64_t begin, int64_t end) {
  with_pair(a.dtype, a.eps_dtype, [&](auto t, auto e) {
    using T = decltype(t);
    using V = Vector<T>;
    using M = Memory<V>;
    Noise<float> noise(*a.seed);
    const T *mu = static_cast<const T*>(a.mu), *logvar = static_cast<const T*>(a.logvar);
    for_each_vector<V>(begin, end, [&](int64_t i, int64_t n) {
      const V eps = M::load(noise.at(i, n, end), n);
      M::store(static_cast<decltype(e)*>(a.eps) + i, eps, n);
      M::store(static_cast<T*>(a.z) + i, reparameterize(M::load(mu + i, n), M::load(logvar + i, n), eps), n);
    });
  });
}

void run_epsilon(const StoreBackward& a, int64_t begin, int64_t end) {
  with_pair(a.dtype, a.eps_dtype, [&](auto t, auto e) {
    using T = decltype(t);
    using V = Vector<T>;
    using M = Memory<V>;
    for_each_vector<V>(begin, end, [&](int64_t i, int64_t n) {
      const V g = M::load(static_cast<const T*>(a.grad_z) + i, n);
      const V eps = M::load(static_cast<const decltype(e)*>(a.eps) + i, n);
      const V half_sigma = constant<V>(0.5) * standard_deviation(M::load(static_cast<const T*>(a.logvar) + i, n));
      M::store(static_cast<T*>(a.grad_mu) + i, g, n);
      M::store(static_cast<T*>(a.grad_logvar) + i, half_sigma * (g * eps), n);
    });
  });
}

void run_epsilon(const DifferenceBackward& a, int64_t begin, int64_t end) {
  with_pair(a.dtype, a.dtype, [&](auto t, auto) {
    using T = decltype(t);
    using V = Vector<T>;
    using M = Memory<V>;
    for_each_vector<V>(begin, end, [&](int64_t i, int64_t n) {
      const V g = M::load(static_cast<const T*>(a.grad_z) + i, n);
      const V noise = M::load(static_cast<const T*>(a.z) + i, n) - M::load(static_cast<const T*>(a.mu) + i, n);
      M::store(static_cast<T*>(a.grad_mu) + i, g, n);
      M::store(static_cast<T*>(a.grad_logvar) + i, constant<V>(0.5) * (g * noise), n);
    });
  });
}

}  // namespace
}  // namespace epsilon
}  // namespace cpu

namespace {

DType type_of(const at::Tensor& tensor) { return tensor.scalar_type() == at::kFloat ? DType::f32 : DType::bf16; }

template <class Args>
void launch(const at::Tensor& on, const Args& args) {
  if (on.is_cpu()) {
    at::parallel_for(0, args.rows * args.cols, 8192,
                     [&](int64_t begin, int64_t end) { cpu::epsilon::run_epsilon(args, begin, end); });
    return;
  }
#if defined(VAE_FAST_WITH_CUDA)
  const int error = cuda::launch(args, c10::cuda::getCurrentCUDAStream(on.get_device()).stream());
  TORCH_CHECK(error == 0, "the CUDA launch failed: ", error);
#else
  TORCH_CHECK(false, "on: got a tensor on ", on.device(), ", wanted one on the CPU: this was built without CUDA");
#endif
}

std::tuple<at::Tensor, at::Tensor> store_forward(const at::Tensor& mu, const at::Tensor& logvar, const at::Tensor& seed,
                                                 at::ScalarType eps_dtype) {
  at::Tensor z = at::empty_like(mu), eps = at::empty_like(mu, mu.options().dtype(eps_dtype));
  launch(mu, StoreForward{type_of(mu), type_of(eps), mu.size(0), mu.size(1), mu.const_data_ptr(),
                          logvar.const_data_ptr(), seed.const_data_ptr<int64_t>(), z.data_ptr(), eps.data_ptr()});
  return {z, eps};
}

std::tuple<at::Tensor, at::Tensor> store_backward(const at::Tensor& grad_z, const at::Tensor& logvar,
                                                  const at::Tensor& eps) {
  at::Tensor grad_mu = at::empty_like(grad_z), grad_logvar = at::empty_like(grad_z);
  launch(grad_z,
         StoreBackward{type_of(grad_z), type_of(eps), grad_z.size(0), grad_z.size(1), grad_z.const_data_ptr(),
                       logvar.const_data_ptr(), eps.const_data_ptr(), grad_mu.data_ptr(), grad_logvar.data_ptr()});
  return {grad_mu, grad_logvar};
}

std::tuple<at::Tensor, at::Tensor> difference_backward(const at::Tensor& grad_z, const at::Tensor& mu,
                                                       const at::Tensor& z) {
  at::Tensor grad_mu = at::empty_like(grad_z), grad_logvar = at::empty_like(grad_z);
  launch(grad_z,
         DifferenceBackward{type_of(grad_z), grad_z.size(0), grad_z.size(1), grad_z.const_data_ptr(),
                            mu.const_data_ptr(), z.const_data_ptr(), grad_mu.data_ptr(), grad_logvar.data_ptr()});
  return {grad_mu, grad_logvar};
}

}  // namespace
}  // namespace vae_fast

TORCH_LIBRARY(vae_fast_epsilon, m) {
  m.def("store_forward(Tensor mu, Tensor logvar, Tensor seed, ScalarType eps_dtype) -> (Tensor, Tensor)",
        vae_fast::store_forward);
  m.def("store_backward(Tensor grad_z, Tensor logvar, Tensor eps) -> (Tensor, Tensor)", vae_fast::store_backward);
  m.def("difference_backward(Tensor grad_z, Tensor mu, Tensor z) -> (Tensor, Tensor)", vae_fast::difference_backward);
}
