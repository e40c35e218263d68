// What every file of operators needs: the checks of arguments, outputs to fill, the launch of a kernel.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "kernels.h"
#ifdef VAE_FAST_WITH_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

namespace vae_fast {

using at::Tensor;

// --- checks: each names the argument, what came and what was wanted --------------------------------------------------

inline DType dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      return DType::u8;
  }
}

inline void check_floating(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(dtype_of(t.scalar_type()) != DType::u8, name, ": got dtype ", t.scalar_type(),
                   ", wanted float32, float64, float16 or bfloat16");
}

inline void check_has_features(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() >= 1, name, ": got a tensor without dimensions, wanted [..., D]");
}

inline void check_device(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  TORCH_CHECK_VALUE(t.device() == other.device(), name, ": got device ", t.device(), ", wanted ", other.device(),
                    ", where ", other_name, " is");
}

inline void check_dtype(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  TORCH_CHECK_TYPE(t.scalar_type() == other.scalar_type(), name, ": got dtype ", t.scalar_type(), ", wanted ",
                   other.scalar_type(), ", the dtype of ", other_name);
}

inline void check_shape(const char* name, const Tensor& t, const char* what, c10::SymIntArrayRef wanted) {
  TORCH_CHECK_VALUE(t.sym_sizes() == wanted, name, ": got shape ", t.sym_sizes(), ", wanted ", wanted, ", ", what);
}

// x [..., D] against the decoder's output [samples..., ..., D], whose shape is `wanted`
inline void check_target_shape(const Tensor& x, const char* output_name, c10::SymIntArrayRef wanted) {
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(dtype_of(type) != DType::u8 || type == at::kByte || type == at::kBool, "x: got dtype ", type,
                   ", wanted float32, float64, float16, bfloat16, uint8 or bool");
  const auto dims = static_cast<size_t>(x.dim());
  TORCH_CHECK_VALUE(dims >= 1 && dims <= wanted.size() && wanted.slice(wanted.size() - dims) == x.sym_sizes(),
                    "x: got shape ", x.sym_sizes(), ", wanted the last dimensions of ", output_name,
                    ", whose shape is ", wanted);
}

// --- what every kernel function needs --------------------------------------------------------------------------------

inline at::ScalarType loss_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline Tensor empty(c10::SymIntArrayRef sizes, const Tensor& like, at::ScalarType type) {
  return at::empty_symint(sizes, like.options().dtype(type));
}

inline Tensor not_wanted(const Tensor& like) { return at::empty({0}, like.options()); }

inline c10::SymIntArrayRef datapoints(const Tensor& t) { return t.sym_sizes().slice(0, t.dim() - 1); }

inline Tensor empty_loss(const Tensor& t) { return empty(datapoints(t), t, loss_type(t)); }

inline void check_loss_grad(const char* name, const Tensor& grad, const Tensor& t) {
  check_shape(name, grad, "one value per datapoint", datapoints(t));
  TORCH_CHECK_TYPE(grad.scalar_type() == loss_type(t), name, ": got dtype ", grad.scalar_type(), ", wanted ",
                   loss_type(t));
  check_device(name, grad, "the output", t);
}

// A log-likelihood's gradient in x is a sum over the samples that ATen can take.
inline Tensor grad_target(const Tensor& per_sample, const Tensor& x) {
  return at::sum_to(per_sample, x.sym_sizes()).to(x.scalar_type());
}

inline void* pointer(const Tensor& t) { return t.defined() && t.numel() > 0 ? t.data_ptr() : nullptr; }

template <class Args>
void launch(const char* name, const Tensor& on, const Args& args) {
  if (on.is_cpu()) return cpu::launch(args);
#ifdef VAE_FAST_WITH_CUDA
  const c10::DeviceGuard guard(on.device());
  Tensor memory;  // freed in the order of the stream
  const auto workspace = [&](size_t bytes) {
    memory = at::empty({static_cast<int64_t>(bytes)}, on.options().dtype(at::kByte));
    return memory.data_ptr();
  };
  const int error = cuda::launch(args, c10::cuda::getCurrentCUDAStream(on.get_device()).stream(), workspace);
  TORCH_CHECK(error == 0, name, ": the CUDA launch failed: ", cuda::error_string(error));
#else
  TORCH_CHECK(false, name, ": got a tensor on ", on.device(),
              ", but this build of vae_fast has no CUDA kernels; `vae-fast doctor` says why and how to mend it");
#endif
}

// Inside a namespace: calls operator `name` through the dispatcher, with the arguments of kernel::name.
#define VAE_FAST_DISPATCHED(name)                                                                               \
  constexpr auto name = [](const auto&... args) {                                                               \
    static const auto op =                                                                                      \
        c10::Dispatcher::singleton().findSchemaOrThrow("vae_fast::" #name, "").typed<decltype(kernel::name)>(); \
    return op.call(args...);                                                                                    \
  }

}  // namespace vae_fast
