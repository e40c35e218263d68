// The operators of vae_fast: schema, checks of the arguments, autograd. (The last linear layer with its log-likelihood
// is in linear_bernoulli.cpp.)
//
// Read from top to bottom: checks; `kernel`, one function per operator for every device (it checks, allocates and calls
// the CPU or CUDA kernel; on meta tensors it stops after allocating, which makes it the fake kernel of torch.compile);
// `autograd`, the same operators above the dispatcher; the schemas and registrations.
//
// A loss op is a triple: X_forward, X_backward and X_double_backward, each the derivative of the one before it.
// Losses keep their inputs and recompute in backward; noise is recomputed from its seed.
#include <ATen/autocast_mode.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "checks.h"

namespace vae_fast {
namespace {

using std::optional;
using Needs = std::array<bool, 2>;  // which of two gradients are wanted; the other comes back with no elements

// --- checks, beside those of checks.h
// ---------------------------------------------------------------------------------

void check_same(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  TORCH_CHECK_VALUE(t.sym_sizes() == other.sym_sizes(), name, ": got shape ", t.sym_sizes(), ", wanted ",
                    other.sym_sizes(), ", the shape of ", other_name);
  check_dtype(name, t, other_name, other);
  check_device(name, t, other_name, other);
}

void check_posterior(const Tensor& mu, const Tensor& logvar) {
  check_floating("mu", mu);
  check_has_features("mu", mu);
  check_same("logvar", logvar, "mu", mu);
}

void check_seed(const Tensor& seed, const char* other_name, const Tensor& other) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "seed: got dtype ", seed.scalar_type(), ", wanted int64");
  TORCH_CHECK_VALUE(seed.sym_numel() == 1, "seed: got shape ", seed.sym_sizes(), ", wanted one element");
  check_device("seed", seed, other_name, other);
}

// x [..., D] against the decoder's output [samples..., ..., D]
void check_target(const Tensor& x, const char* output_name, const Tensor& output) {
  check_floating(output_name, output);
  check_has_features(output_name, output);
  check_target_shape(x, output_name, output.sym_sizes());
  check_device("x", x, output_name, output);
}

// x [..., ceil(D / 8)] of packed bits
void check_packed_target(const Tensor& x, const Tensor& logits) {
  check_floating("logits", logits);
  check_has_features("logits", logits);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kByte, "x: got dtype ", x.scalar_type(),
                   ", wanted uint8 with packed=True, as pack_bits makes it");
  const auto sizes = logits.sym_sizes();
  c10::SymDimVector wanted(sizes.end() - std::min(x.dim(), logits.dim()), sizes.end());
  if (!wanted.empty()) wanted.back() = (wanted.back() + 7) / 8;
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_sizes() == c10::SymIntArrayRef(wanted), "x: got shape ", x.sym_sizes(),
                    ", wanted the last dimensions of logits, whose shape is ", sizes,
                    ", with ceil(D / 8) bytes in the last one, for packed=True");
  check_device("x", x, "logits", logits);
}

void check_bernoulli(const Tensor& logits, const Tensor& x, bool packed) {
  packed ? check_packed_target(x, logits) : check_target(x, "logits", logits);
}

// --- what kernel functions need, beside that of checks.h -------------------------------------------------------------

Tensor empty_contiguous(const Tensor& t) { return empty(t.sym_sizes(), t, t.scalar_type()); }

int64_t rows_of(const Tensor& t) { return c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)); }
int64_t cols_of(const Tensor& t) { return t.size(-1); }

// The target as kernels take it: of the output's type, float or bytes.
Tensor kernel_target(const Tensor& x, const Tensor& output) {
  if (x.scalar_type() == at::kBool) return x.contiguous().view(at::kByte);
  if (x.scalar_type() == at::kByte || x.scalar_type() == output.scalar_type()) return x.contiguous();
  return x.to(loss_type(output)).contiguous();
}

DType target_type(const Tensor& x, bool packed) { return packed ? DType::bits : dtype_of(x.scalar_type()); }

// --- one function per operator, for every device ---------------------------------------------------------------------

namespace kernel {

Tensor philox_normal(c10::SymIntArrayRef shape, const Tensor& seed, at::ScalarType dtype) {
  check_seed(seed, "seed", seed);
  Tensor out = empty(shape, seed, dtype);
  check_floating("dtype", out);
  if (out.is_meta() || out.numel() == 0) return out;
  launch("philox_normal", out,
         PhiloxNormal{dtype_of(dtype), out.numel(), seed.const_data_ptr<int64_t>(), out.data_ptr()});
  return out;
}

std::tuple<Tensor, Tensor> sample(const char* name, const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                  const optional<c10::SymInt>& num_samples, bool with_kl) {
  check_posterior(mu, logvar);
  check_seed(seed, "mu", mu);
  c10::SymDimVector shape(mu.sym_sizes().begin(), mu.sym_sizes().end());
  if (num_samples) {
    TORCH_CHECK_VALUE(*num_samples >= 1, "num_samples: got ", *num_samples, ", wanted a positive integer or None");
    shape.insert(shape.begin(), *num_samples);
  }
  Tensor z = empty(shape, mu, mu.scalar_type());
  Tensor kl = with_kl ? empty_loss(mu) : Tensor();
  if (mu.is_meta() || rows_of(mu) == 0) return {z, kl};
  const Tensor m = mu.contiguous(), lv = logvar.contiguous();
  const int64_t samples = num_samples ? num_samples->expect_int() : 1;
  launch(name, mu,
         ReparameterizeForward{dtype_of(mu.scalar_type()), rows_of(mu), cols_of(mu), samples, pointer(m), pointer(lv),
                               seed.const_data_ptr<int64_t>(), pointer(z), pointer(kl)});
  return {z, kl};
}

Tensor reparameterize_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                              optional<c10::SymInt> num_samples) {
  return std::get<0>(sample("reparameterize", mu, logvar, seed, num_samples, false));
}

std::tuple<Tensor, Tensor> reparameterize_with_kl_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                                          optional<c10::SymInt> num_samples) {
  return sample("reparameterize_with_kl", mu, logvar, seed, num_samples, true);
}

// grad_z is [..., Z], or [samples, ..., Z] with one dimension more than logvar
void check_sample_grad(const Tensor& grad_z, const Tensor& logvar) {
  const auto sizes = grad_z.sym_sizes();
  const size_t extra = grad_z.dim() > logvar.dim() ? 1 : 0;
  TORCH_CHECK_VALUE(sizes.slice(extra) == logvar.sym_sizes(), "grad_z: got shape ", sizes, ", wanted ",
                    logvar.sym_sizes(), ", the shape of logvar, perhaps with samples in front");
  TORCH_CHECK_TYPE(grad_z.scalar_type() == logvar.scalar_type(), "grad_z: got dtype ", grad_z.scalar_type(),
                   ", wanted ", logvar.scalar_type(), ", the dtype of logvar");
  check_device("grad_z", grad_z, "logvar", logvar);
}

int64_t samples_of(const Tensor& grad_z, const Tensor& logvar) {
  return grad_z.dim() > logvar.dim() ? grad_z.size(0) : 1;
}

std::tuple<Tensor, Tensor> sample_backward(const char* name, const Tensor& grad_z, const Tensor& grad_kl,
                                           const Tensor& mu, const Tensor& logvar, const Tensor& seed, Needs needs) {
  check_seed(seed, "logvar", logvar);
  if (grad_z.defined()) check_sample_grad(grad_z, logvar);
  if (grad_kl.defined()) check_posterior(mu, logvar), check_loss_grad("grad_kl", grad_kl, logvar);
  Tensor grad_mu = needs[0] ? empty_contiguous(logvar) : not_wanted(logvar);
  Tensor grad_logvar = needs[1] ? empty_contiguous(logvar) : not_wanted(logvar);
  if (logvar.is_meta() || logvar.numel() == 0) return {grad_mu, grad_logvar};
  const Tensor lv = logvar.contiguous(), m = grad_kl.defined() ? mu.contiguous() : Tensor();
  const Tensor gz = grad_z.defined() ? grad_z.contiguous() : Tensor();
  const Tensor gkl = grad_kl.defined() ? grad_kl.contiguous() : Tensor();
  launch(name, logvar,
         ReparameterizeBackward{dtype_of(logvar.scalar_type()), rows_of(logvar), cols_of(logvar),
                                gz.defined() ? samples_of(gz, logvar) : 0, pointer(gz), pointer(gkl), pointer(m),
                                pointer(lv), seed.const_data_ptr<int64_t>(), pointer(grad_mu), pointer(grad_logvar)});
  return {grad_mu, grad_logvar};
}

std::tuple<Tensor, Tensor> reparameterize_backward(const Tensor& grad_z, const Tensor& logvar, const Tensor& seed,
                                                   Needs needs) {
  return sample_backward("reparameterize_backward", grad_z, Tensor(), Tensor(), logvar, seed, needs);
}

std::tuple<Tensor, Tensor> reparameterize_with_kl_backward(const optional<Tensor>& grad_z,
                                                           const optional<Tensor>& grad_kl, const Tensor& mu,
                                                           const Tensor& logvar, const Tensor& seed, Needs needs) {
  return sample_backward("reparameterize_with_kl_backward", grad_z.value_or(Tensor()), grad_kl.value_or(Tensor()), mu,
                         logvar, seed, needs);
}

std::tuple<Tensor, Tensor> reparameterize_double_backward(const Tensor& ggrad_mu, const Tensor& ggrad_logvar,
                                                          const Tensor& grad_z, const Tensor& logvar,
                                                          const Tensor& seed) {
  check_seed(seed, "logvar", logvar);
  check_sample_grad(grad_z, logvar);
  check_same("ggrad_mu", ggrad_mu, "logvar", logvar);
  check_same("ggrad_logvar", ggrad_logvar, "logvar", logvar);
  Tensor ggrad_z = empty_contiguous(grad_z), grad_logvar = empty_contiguous(logvar);
  if (logvar.is_meta() || logvar.numel() == 0) return {ggrad_z, grad_logvar};
  const Tensor vm = ggrad_mu.contiguous(), vl = ggrad_logvar.contiguous(), gz = grad_z.contiguous(),
               lv = logvar.contiguous();
  launch("reparameterize_double_backward", logvar,
         ReparameterizeDoubleBackward{dtype_of(logvar.scalar_type()), rows_of(logvar), cols_of(logvar),
                                      samples_of(gz, logvar), pointer(vm), pointer(vl), pointer(gz), pointer(lv),
                                      seed.const_data_ptr<int64_t>(), pointer(ggrad_z), pointer(grad_logvar)});
  return {ggrad_z, grad_logvar};
}

Tensor gaussian_kl_forward(const Tensor& mu, const Tensor& logvar) {
  check_posterior(mu, logvar);
  Tensor kl = empty_loss(mu);
  if (mu.is_meta() || kl.numel() == 0) return kl;
  const Tensor m = mu.contiguous(), lv = logvar.contiguous();
  launch("gaussian_kl", mu,
         GaussianKLForward{dtype_of(mu.scalar_type()), rows_of(mu), cols_of(mu), pointer(m), pointer(lv), pointer(kl)});
  return kl;
}

std::tuple<Tensor, Tensor> gaussian_kl_backward(const Tensor& grad_kl, const Tensor& mu, const Tensor& logvar,
                                                Needs needs) {
  check_posterior(mu, logvar);
  check_loss_grad("grad_kl", grad_kl, mu);
  Tensor grad_mu = needs[0] ? empty_contiguous(mu) : not_wanted(mu);
  Tensor grad_logvar = needs[1] ? empty_contiguous(mu) : not_wanted(mu);
  if (mu.is_meta() || mu.numel() == 0) return {grad_mu, grad_logvar};
  const Tensor g = grad_kl.contiguous(), m = mu.contiguous(), lv = logvar.contiguous();
  launch("gaussian_kl_backward", mu,
         GaussianKLBackward{dtype_of(mu.scalar_type()), rows_of(mu), cols_of(mu), pointer(g), pointer(m), pointer(lv),
                            pointer(grad_mu), pointer(grad_logvar)});
  return {grad_mu, grad_logvar};
}

std::tuple<Tensor, Tensor, Tensor> gaussian_kl_double_backward(const Tensor& ggrad_mu, const Tensor& ggrad_logvar,
                                                               const Tensor& grad_kl, const Tensor& mu,
                                                               const Tensor& logvar) {
  check_posterior(mu, logvar);
  check_loss_grad("grad_kl", grad_kl, mu);
  check_same("ggrad_mu", ggrad_mu, "mu", mu);
  check_same("ggrad_logvar", ggrad_logvar, "mu", mu);
  Tensor ggrad_kl = empty_loss(mu), grad_mu = empty_contiguous(mu), grad_logvar = empty_contiguous(mu);
  if (mu.is_meta() || ggrad_kl.numel() == 0) return {ggrad_kl, grad_mu, grad_logvar};
  const Tensor vm = ggrad_mu.contiguous(), vl = ggrad_logvar.contiguous(), g = grad_kl.contiguous();
  const Tensor m = mu.contiguous(), lv = logvar.contiguous();
  launch("gaussian_kl_double_backward", mu,
         GaussianKLDoubleBackward{dtype_of(mu.scalar_type()), rows_of(mu), cols_of(mu), pointer(vm), pointer(vl),
                                  pointer(g), pointer(m), pointer(lv), pointer(ggrad_kl), pointer(grad_mu),
                                  pointer(grad_logvar)});
  return {ggrad_kl, grad_mu, grad_logvar};
}

Tensor bernoulli_log_likelihood_forward(const Tensor& logits, const Tensor& x, bool packed) {
  check_bernoulli(logits, x, packed);
  Tensor out = empty_loss(logits);
  if (logits.is_meta() || out.numel() == 0) return out;
  const Tensor l = logits.contiguous(), t = kernel_target(x, logits);
  launch("bernoulli_log_likelihood", logits,
         BernoulliForward{dtype_of(l.scalar_type()), target_type(t, packed), rows_of(l), rows_of(t), cols_of(l),
                          pointer(l), pointer(t), pointer(out)});
  return out;
}

Tensor bernoulli_log_likelihood_backward(const Tensor& grad, const Tensor& logits, const Tensor& x, bool packed) {
  check_bernoulli(logits, x, packed);
  check_loss_grad("grad", grad, logits);
  Tensor grad_logits = empty_contiguous(logits);
  if (logits.is_meta() || logits.numel() == 0) return grad_logits;
  const Tensor g = grad.contiguous(), l = logits.contiguous(), t = kernel_target(x, logits);
  launch("bernoulli_log_likelihood_backward", logits,
         BernoulliBackward{dtype_of(l.scalar_type()), target_type(t, packed), rows_of(l), rows_of(t), cols_of(l),
                           pointer(g), pointer(l), pointer(t), pointer(grad_logits)});
  return grad_logits;
}

std::tuple<Tensor, Tensor> bernoulli_log_likelihood_double_backward(const Tensor& ggrad_logits, const Tensor& grad,
                                                                    const Tensor& logits, const Tensor& x,
                                                                    bool packed) {
  check_bernoulli(logits, x, packed);
  check_loss_grad("grad", grad, logits);
  check_same("ggrad_logits", ggrad_logits, "logits", logits);
  Tensor ggrad = empty_loss(logits), grad_logits = empty_contiguous(logits);
  if (logits.is_meta() || ggrad.numel() == 0) return {ggrad, grad_logits};
  const Tensor v = ggrad_logits.contiguous(), g = grad.contiguous(), l = logits.contiguous(),
               t = kernel_target(x, logits);
  launch("bernoulli_log_likelihood_double_backward", logits,
         BernoulliDoubleBackward{dtype_of(l.scalar_type()), target_type(t, packed), rows_of(l), rows_of(t), cols_of(l),
                                 pointer(v), pointer(g), pointer(l), pointer(t), pointer(ggrad), pointer(grad_logits)});
  return {ggrad, grad_logits};
}

// logvar has the shape of mean, or no dimensions: one variance for everything. Its gradient is then one value per
// datapoint, in the type of the loss, until autograd sums it.
bool check_gaussian(const Tensor& mean, const Tensor& logvar, const Tensor& x) {
  check_target(x, "mean", mean);
  if (logvar.dim() > 0) {
    check_same("logvar", logvar, "mean", mean);
    return false;
  }
  TORCH_CHECK_TYPE(logvar.scalar_type() == mean.scalar_type(), "logvar: got dtype ", logvar.scalar_type(), ", wanted ",
                   mean.scalar_type(), ", the dtype of mean");
  check_device("logvar", logvar, "mean", mean);
  return true;
}

Tensor gaussian_log_likelihood_forward(const Tensor& mean, const Tensor& logvar, const Tensor& x) {
  const bool scalar = check_gaussian(mean, logvar, x);
  Tensor out = empty_loss(mean);
  if (mean.is_meta() || out.numel() == 0) return out;
  const Tensor m = mean.contiguous(), lv = logvar.contiguous(), t = kernel_target(x, mean);
  launch("gaussian_log_likelihood", mean,
         GaussianForward{dtype_of(m.scalar_type()), dtype_of(t.scalar_type()), rows_of(m), rows_of(t), cols_of(m),
                         scalar, pointer(m), pointer(lv), pointer(t), pointer(out)});
  return out;
}

std::tuple<Tensor, Tensor> gaussian_log_likelihood_backward(const Tensor& grad, const Tensor& mean,
                                                            const Tensor& logvar, const Tensor& x, Needs needs) {
  const bool scalar = check_gaussian(mean, logvar, x);
  check_loss_grad("grad", grad, mean);
  Tensor grad_mean = needs[0] ? empty_contiguous(mean) : not_wanted(mean);
  Tensor grad_logvar = !needs[1] ? not_wanted(mean) : scalar ? empty_loss(mean) : empty_contiguous(mean);
  if (mean.is_meta() || rows_of(mean) == 0) return {grad_mean, grad_logvar};
  const Tensor g = grad.contiguous(), m = mean.contiguous(), lv = logvar.contiguous(), t = kernel_target(x, mean);
  launch(
      "gaussian_log_likelihood_backward", mean,
      GaussianBackward{dtype_of(m.scalar_type()), dtype_of(t.scalar_type()), rows_of(m), rows_of(t), cols_of(m), scalar,
                       pointer(g), pointer(m), pointer(lv), pointer(t), pointer(grad_mean), pointer(grad_logvar)});
  return {grad_mean, grad_logvar};
}

std::tuple<Tensor, Tensor, Tensor> gaussian_log_likelihood_double_backward(const Tensor& ggrad_mean,
                                                                           const Tensor& ggrad_logvar,
                                                                           const Tensor& grad, const Tensor& mean,
                                                                           const Tensor& logvar, const Tensor& x) {
  const bool scalar = check_gaussian(mean, logvar, x);
  check_loss_grad("grad", grad, mean);
  check_same("ggrad_mean", ggrad_mean, "mean", mean);
  if (scalar)
    check_loss_grad("ggrad_logvar", ggrad_logvar, mean);
  else
    check_same("ggrad_logvar", ggrad_logvar, "mean", mean);
  Tensor ggrad = empty_loss(mean), grad_mean = empty_contiguous(mean);
  Tensor grad_logvar = scalar ? empty_loss(mean) : empty_contiguous(mean);
  if (mean.is_meta() || ggrad.numel() == 0) return {ggrad, grad_mean, grad_logvar};
  const Tensor vm = ggrad_mean.contiguous(), vl = ggrad_logvar.contiguous(), g = grad.contiguous();
  const Tensor m = mean.contiguous(), lv = logvar.contiguous(), t = kernel_target(x, mean);
  launch("gaussian_log_likelihood_double_backward", mean,
         GaussianDoubleBackward{dtype_of(m.scalar_type()), dtype_of(t.scalar_type()), rows_of(m), rows_of(t),
                                cols_of(m), scalar, pointer(vm), pointer(vl), pointer(g), pointer(m), pointer(lv),
                                pointer(t), pointer(ggrad), pointer(grad_mean), pointer(grad_logvar)});
  return {ggrad, grad_mean, grad_logvar};
}

}  // namespace kernel

// --- the same operators, called through the dispatcher ---------------------------------------------------------------

namespace dispatched {
VAE_FAST_DISPATCHED(reparameterize_forward);
VAE_FAST_DISPATCHED(reparameterize_backward);
VAE_FAST_DISPATCHED(reparameterize_double_backward);
VAE_FAST_DISPATCHED(reparameterize_with_kl_forward);
VAE_FAST_DISPATCHED(reparameterize_with_kl_backward);
VAE_FAST_DISPATCHED(gaussian_kl_forward);
VAE_FAST_DISPATCHED(gaussian_kl_backward);
VAE_FAST_DISPATCHED(gaussian_kl_double_backward);
VAE_FAST_DISPATCHED(bernoulli_log_likelihood_forward);
VAE_FAST_DISPATCHED(bernoulli_log_likelihood_backward);
VAE_FAST_DISPATCHED(bernoulli_log_likelihood_double_backward);
VAE_FAST_DISPATCHED(gaussian_log_likelihood_forward);
VAE_FAST_DISPATCHED(gaussian_log_likelihood_backward);
VAE_FAST_DISPATCHED(gaussian_log_likelihood_double_backward);
}  // namespace dispatched

// --- autograd --------------------------------------------------------------------------------------------------------

namespace autograd {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

Needs needs(AutogradContext* ctx, size_t first, size_t second) {
  return {ctx->needs_input_grad(first), ctx->needs_input_grad(second)};
}

Tensor wanted(const Tensor& grad, bool is_wanted) { return is_wanted ? grad : Tensor(); }

Tensor or_zeros(const Tensor& grad, bool is_there, const Tensor& like) {
  return is_there && grad.defined() ? grad : at::zeros_like(like);
}

variable_list list(const std::tuple<Tensor, Tensor>& pair) { return {std::get<0>(pair), std::get<1>(pair)}; }

// Outputs that nobody asked for carry no gradient of their own.
variable_list outputs(AutogradContext* ctx, const std::tuple<Tensor, Tensor>& pair, Needs needs) {
  ctx->saved_data["need_first"] = needs[0];
  ctx->saved_data["need_second"] = needs[1];
  variable_list unwanted;
  if (!needs[0]) unwanted.push_back(std::get<0>(pair));
  if (!needs[1]) unwanted.push_back(std::get<1>(pair));
  ctx->mark_non_differentiable(unwanted);
  ctx->set_materialize_grads(false);
  return list(pair);
}

// The gradients that reached those two outputs, zeros where none did.
std::array<Tensor, 2> output_grads(AutogradContext* ctx, const variable_list& grads, const Tensor& like_first,
                                   const Tensor& like_second) {
  return {or_zeros(grads[0], ctx->saved_data["need_first"].toBool(), like_first),
          or_zeros(grads[1], ctx->saved_data["need_second"].toBool(), like_second)};
}

bool no_grads(const variable_list& grads) {
  for (const auto& g : grads)
    if (g.defined()) return false;
  return true;
}

struct GaussianKL : Function<GaussianKL> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar) {
    BelowAutograd guard;
    ctx->save_for_backward({mu, logvar});
    return dispatched::gaussian_kl_forward(mu, logvar);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Needs want = needs(ctx, 0, 1);
    const auto [grad_mu, grad_logvar] = dispatched::gaussian_kl_backward(grads[0], saved[0], saved[1], want);
    return {wanted(grad_mu, want[0]), wanted(grad_logvar, want[1])};
  }
};

struct GaussianKLBackward : Function<GaussianKLBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_kl, const Tensor& mu, const Tensor& logvar,
                               Needs want) {
    BelowAutograd guard;
    ctx->save_for_backward({grad_kl, mu, logvar});
    return outputs(ctx, dispatched::gaussian_kl_backward(grad_kl, mu, logvar, want), want);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (no_grads(grads)) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const auto v = output_grads(ctx, grads, saved[1], saved[2]);
    const auto [ggrad_kl, grad_mu, grad_logvar] =
        dispatched::gaussian_kl_double_backward(v[0], v[1], saved[0], saved[1], saved[2]);
    return {ggrad_kl, grad_mu, grad_logvar, Tensor()};
  }
};

struct Reparameterize : Function<Reparameterize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                        const optional<c10::SymInt>& num_samples) {
    BelowAutograd guard;
    ctx->save_for_backward({logvar, seed});
    return dispatched::reparameterize_forward(mu, logvar, seed, num_samples);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Needs want = needs(ctx, 0, 1);
    const auto [grad_mu, grad_logvar] = dispatched::reparameterize_backward(grads[0], saved[0], saved[1], want);
    return {wanted(grad_mu, want[0]), wanted(grad_logvar, want[1]), Tensor(), Tensor()};
  }
};

struct ReparameterizeBackward : Function<ReparameterizeBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad_z, const Tensor& logvar, const Tensor& seed,
                               Needs want) {
    BelowAutograd guard;
    ctx->save_for_backward({grad_z, logvar, seed});
    return outputs(ctx, dispatched::reparameterize_backward(grad_z, logvar, seed, want), want);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (no_grads(grads)) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const auto v = output_grads(ctx, grads, saved[1], saved[1]);
    const auto [ggrad_z, grad_logvar] =
        dispatched::reparameterize_double_backward(v[0], v[1], saved[0], saved[1], saved[2]);
    return {ggrad_z, grad_logvar, Tensor(), Tensor()};
  }
};

struct ReparameterizeWithKL : Function<ReparameterizeWithKL> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                               const optional<c10::SymInt>& num_samples) {
    BelowAutograd guard;
    ctx->save_for_backward({mu, logvar, seed});
    ctx->set_materialize_grads(false);  // z or kl may be unused: its gradient then costs nothing
    return list(dispatched::reparameterize_with_kl_forward(mu, logvar, seed, num_samples));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (no_grads(grads)) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const Needs want = needs(ctx, 0, 1);
    const auto given = [](const Tensor& g) { return g.defined() ? optional<Tensor>(g) : std::nullopt; };
    const auto [grad_mu, grad_logvar] = dispatched::reparameterize_with_kl_backward(given(grads[0]), given(grads[1]),
                                                                                    saved[0], saved[1], saved[2], want);
    return {wanted(grad_mu, want[0]), wanted(grad_logvar, want[1]), Tensor(), Tensor()};
  }
};

struct ReparameterizeWithKLBackward : Function<ReparameterizeWithKLBackward> {
  static variable_list forward(AutogradContext* ctx, const optional<Tensor>& grad_z, const optional<Tensor>& grad_kl,
                               const Tensor& mu, const Tensor& logvar, const Tensor& seed, Needs want) {
    BelowAutograd guard;
    ctx->save_for_backward({grad_z.value_or(Tensor()), grad_kl.value_or(Tensor()), mu, logvar, seed});
    return outputs(ctx, dispatched::reparameterize_with_kl_backward(grad_z, grad_kl, mu, logvar, seed, want), want);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (no_grads(grads)) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad_z = saved[0], &grad_kl = saved[1], &mu = saved[2], &logvar = saved[3], &seed = saved[4];
    const auto v = output_grads(ctx, grads, mu, logvar);
    Tensor ggrad_z, ggrad_kl, grad_mu, grad_logvar;
    if (grad_z.defined())
      std::tie(ggrad_z, grad_logvar) = dispatched::reparameterize_double_backward(v[0], v[1], grad_z, logvar, seed);
    if (grad_kl.defined()) {
      Tensor from_kl;
      std::tie(ggrad_kl, grad_mu, from_kl) = dispatched::gaussian_kl_double_backward(v[0], v[1], grad_kl, mu, logvar);
      grad_logvar = grad_logvar.defined() ? grad_logvar + from_kl : from_kl;
    }
    return {ggrad_z, ggrad_kl, grad_mu, grad_logvar, Tensor(), Tensor()};
  }
};

// log p is linear in x, so grad_target serves its gradient and that of its gradient.
struct BernoulliLogLikelihood : Function<BernoulliLogLikelihood> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& x, bool packed) {
    BelowAutograd guard;
    ctx->saved_data["packed"] = packed;
    ctx->save_for_backward({logits, x});
    return dispatched::bernoulli_log_likelihood_forward(logits, x, packed);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &logits = saved[0], &x = saved[1];
    const bool packed = ctx->saved_data["packed"].toBool();
    Tensor grad_logits, grad_x;
    if (ctx->needs_input_grad(0))
      grad_logits = dispatched::bernoulli_log_likelihood_backward(grads[0], logits, x, packed);
    if (ctx->needs_input_grad(1)) grad_x = grad_target(grads[0].unsqueeze(-1) * logits, x);
    return {grad_logits, grad_x, Tensor()};
  }
};

struct BernoulliLogLikelihoodBackward : Function<BernoulliLogLikelihoodBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& logits, const Tensor& x, bool packed) {
    BelowAutograd guard;
    ctx->saved_data["packed"] = packed;
    ctx->save_for_backward({grad, logits, x});
    return dispatched::bernoulli_log_likelihood_backward(grad, logits, x, packed);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &logits = saved[1], &x = saved[2];
    const bool packed = ctx->saved_data["packed"].toBool();
    const auto [ggrad, grad_logits] =
        dispatched::bernoulli_log_likelihood_double_backward(grads[0], grad, logits, x, packed);
    Tensor grad_x;
    if (ctx->needs_input_grad(2)) grad_x = grad_target(grads[0] * grad.unsqueeze(-1), x);
    return {ggrad, grad_logits, grad_x, Tensor()};
  }
};

// The gradient in x is minus that in mean, summed over the samples.
struct GaussianLogLikelihood : Function<GaussianLogLikelihood> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mean, const Tensor& logvar, const Tensor& x) {
    BelowAutograd guard;
    ctx->save_for_backward({mean, logvar, x});
    return dispatched::gaussian_log_likelihood_forward(mean, logvar, x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &logvar = saved[1], &x = saved[2];
    const bool need_mean = ctx->needs_input_grad(0), need_logvar = ctx->needs_input_grad(1);
    const bool need_x = ctx->needs_input_grad(2);
    auto [grad_mean, grad_logvar] = dispatched::gaussian_log_likelihood_backward(
        grads[0], saved[0], logvar, x, Needs{need_mean || need_x, need_logvar});
    if (need_logvar && logvar.dim() == 0) grad_logvar = grad_logvar.sum().to(logvar.scalar_type());
    Tensor grad_x = need_x ? grad_target(-grad_mean, x) : Tensor();
    return {wanted(grad_mean, need_mean), wanted(grad_logvar, need_logvar), grad_x};
  }
};

struct GaussianLogLikelihoodBackward : Function<GaussianLogLikelihoodBackward> {
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, const Tensor& mean, const Tensor& logvar,
                               const Tensor& x, Needs want) {
    BelowAutograd guard;
    ctx->save_for_backward({grad, mean, logvar, x});
    return outputs(ctx, dispatched::gaussian_log_likelihood_backward(grad, mean, logvar, x, want), want);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (no_grads(grads)) return variable_list(5);
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = saved[0], &mean = saved[1], &logvar = saved[2], &x = saved[3];
    const bool scalar = logvar.dim() == 0;
    const auto v = output_grads(ctx, grads, mean, scalar ? grad : logvar);
    auto [ggrad, grad_mean, grad_logvar] =
        dispatched::gaussian_log_likelihood_double_backward(v[0], v[1], grad, mean, logvar, x);
    if (scalar) grad_logvar = grad_logvar.sum().to(logvar.scalar_type());
    Tensor grad_x = ctx->needs_input_grad(3) ? grad_target(-grad_mean, x) : Tensor();
    return {ggrad, grad_mean, grad_logvar, grad_x, Tensor()};
  }
};

std::tuple<Tensor, Tensor> pair(const variable_list& tensors) { return {tensors[0], tensors[1]}; }

Tensor gaussian_kl_forward(const Tensor& mu, const Tensor& logvar) { return GaussianKL::apply(mu, logvar); }
std::tuple<Tensor, Tensor> gaussian_kl_backward(const Tensor& grad_kl, const Tensor& mu, const Tensor& logvar,
                                                Needs needs) {
  return pair(GaussianKLBackward::apply(grad_kl, mu, logvar, needs));
}
Tensor reparameterize_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                              optional<c10::SymInt> num_samples) {
  return Reparameterize::apply(mu, logvar, seed, num_samples);
}
std::tuple<Tensor, Tensor> reparameterize_backward(const Tensor& grad_z, const Tensor& logvar, const Tensor& seed,
                                                   Needs needs) {
  return pair(ReparameterizeBackward::apply(grad_z, logvar, seed, needs));
}
std::tuple<Tensor, Tensor> reparameterize_with_kl_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                                          optional<c10::SymInt> num_samples) {
  return pair(ReparameterizeWithKL::apply(mu, logvar, seed, num_samples));
}
std::tuple<Tensor, Tensor> reparameterize_with_kl_backward(const optional<Tensor>& grad_z,
                                                           const optional<Tensor>& grad_kl, const Tensor& mu,
                                                           const Tensor& logvar, const Tensor& seed, Needs needs) {
  return pair(ReparameterizeWithKLBackward::apply(grad_z, grad_kl, mu, logvar, seed, needs));
}
Tensor bernoulli_log_likelihood_forward(const Tensor& logits, const Tensor& x, bool packed) {
  return BernoulliLogLikelihood::apply(logits, x, packed);
}
Tensor bernoulli_log_likelihood_backward(const Tensor& grad, const Tensor& logits, const Tensor& x, bool packed) {
  return BernoulliLogLikelihoodBackward::apply(grad, logits, x, packed);
}
Tensor gaussian_log_likelihood_forward(const Tensor& mean, const Tensor& logvar, const Tensor& x) {
  return GaussianLogLikelihood::apply(mean, logvar, x);
}
std::tuple<Tensor, Tensor> gaussian_log_likelihood_backward(const Tensor& grad, const Tensor& mean,
                                                            const Tensor& logvar, const Tensor& x, Needs needs) {
  return pair(GaussianLogLikelihoodBackward::apply(grad, mean, logvar, x, needs));
}

}  // namespace autograd

// --- autocast: arguments that must agree are promoted to the widest type among them ----------------------------------
// The operators compute in float32 whatever comes, so nothing is lost by leaving half-precision arguments as they are.

namespace autocast {

using NoAutocast = c10::impl::ExcludeDispatchKeyGuard;

std::array<Tensor, 2> promote(const Tensor& a, const Tensor& b) {
  const auto type = at::promote_types(a.scalar_type(), b.scalar_type());
  return {a.to(type), b.to(type)};
}

Tensor gaussian_kl_forward(const Tensor& mu, const Tensor& logvar) {
  NoAutocast guard(c10::autocast_dispatch_keyset);
  const auto [m, lv] = promote(mu, logvar);
  return dispatched::gaussian_kl_forward(m, lv);
}
Tensor reparameterize_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                              optional<c10::SymInt> num_samples) {
  NoAutocast guard(c10::autocast_dispatch_keyset);
  const auto [m, lv] = promote(mu, logvar);
  return dispatched::reparameterize_forward(m, lv, seed, num_samples);
}
std::tuple<Tensor, Tensor> reparameterize_with_kl_forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                                                          optional<c10::SymInt> num_samples) {
  NoAutocast guard(c10::autocast_dispatch_keyset);
  const auto [m, lv] = promote(mu, logvar);
  return dispatched::reparameterize_with_kl_forward(m, lv, seed, num_samples);
}
Tensor gaussian_log_likelihood_forward(const Tensor& mean, const Tensor& logvar, const Tensor& x) {
  NoAutocast guard(c10::autocast_dispatch_keyset);
  const auto [m, lv] = promote(mean, logvar);
  return dispatched::gaussian_log_likelihood_forward(m, lv, x);
}

}  // namespace autocast

}  // namespace

// --- schemas and registrations ---------------------------------------------------------------------------------------

TORCH_LIBRARY(vae_fast, m) {
  m.set_python_module("vae_fast");
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("philox_normal(SymInt[] shape, Tensor seed, ScalarType dtype) -> Tensor", tags);

  m.def("reparameterize_forward(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples) -> Tensor", tags);
  m.def("reparameterize_backward(Tensor grad_z, Tensor logvar, Tensor seed, bool[2] needs) -> (Tensor, Tensor)", tags);
  m.def(
      "reparameterize_double_backward(Tensor ggrad_mu, Tensor ggrad_logvar, Tensor grad_z, Tensor logvar, Tensor seed)"
      " -> (Tensor, Tensor)",
      tags);

  m.def(
      "reparameterize_with_kl_forward(Tensor mu, Tensor logvar, Tensor seed, SymInt? num_samples) -> (Tensor, Tensor)",
      tags);
  m.def(
      "reparameterize_with_kl_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor seed,"
      " bool[2] needs) -> (Tensor, Tensor)",
      tags);

  m.def("gaussian_kl_forward(Tensor mu, Tensor logvar) -> Tensor", tags);
  m.def("gaussian_kl_backward(Tensor grad_kl, Tensor mu, Tensor logvar, bool[2] needs) -> (Tensor, Tensor)", tags);
  m.def(
      "gaussian_kl_double_backward(Tensor ggrad_mu, Tensor ggrad_logvar, Tensor grad_kl, Tensor mu, Tensor logvar)"
      " -> (Tensor, Tensor, Tensor)",
      tags);

  m.def("bernoulli_log_likelihood_forward(Tensor logits, Tensor x, bool packed=False) -> Tensor", tags);
  m.def("bernoulli_log_likelihood_backward(Tensor grad, Tensor logits, Tensor x, bool packed=False) -> Tensor", tags);
  m.def(
      "bernoulli_log_likelihood_double_backward(Tensor ggrad_logits, Tensor grad, Tensor logits, Tensor x,"
      " bool packed=False) -> (Tensor, Tensor)",
      tags);

  m.def("gaussian_log_likelihood_forward(Tensor mean, Tensor logvar, Tensor x) -> Tensor", tags);
  m.def(
      "gaussian_log_likelihood_backward(Tensor grad, Tensor mean, Tensor logvar, Tensor x, bool[2] needs)"
      " -> (Tensor, Tensor)",
      tags);
  m.def(
      "gaussian_log_likelihood_double_backward(Tensor ggrad_mean, Tensor ggrad_logvar, Tensor grad, Tensor mean,"
      " Tensor logvar, Tensor x) -> (Tensor, Tensor, Tensor)",
      tags);
}

#define VAE_FAST_IMPL(name) m.impl(#name, TORCH_FN(kernel::name));
#define VAE_FAST_IMPL_ALL(m)                              \
  VAE_FAST_IMPL(philox_normal)                            \
  VAE_FAST_IMPL(reparameterize_forward)                   \
  VAE_FAST_IMPL(reparameterize_backward)                  \
  VAE_FAST_IMPL(reparameterize_double_backward)           \
  VAE_FAST_IMPL(reparameterize_with_kl_forward)           \
  VAE_FAST_IMPL(reparameterize_with_kl_backward)          \
  VAE_FAST_IMPL(gaussian_kl_forward)                      \
  VAE_FAST_IMPL(gaussian_kl_backward)                     \
  VAE_FAST_IMPL(gaussian_kl_double_backward)              \
  VAE_FAST_IMPL(bernoulli_log_likelihood_forward)         \
  VAE_FAST_IMPL(bernoulli_log_likelihood_backward)        \
  VAE_FAST_IMPL(bernoulli_log_likelihood_double_backward) \
  VAE_FAST_IMPL(gaussian_log_likelihood_forward)          \
  VAE_FAST_IMPL(gaussian_log_likelihood_backward)         \
  VAE_FAST_IMPL(gaussian_log_likelihood_double_backward)

TORCH_LIBRARY_IMPL(vae_fast, CPU, m){VAE_FAST_IMPL_ALL(m)} TORCH_LIBRARY_IMPL(vae_fast, CUDA, m){
    VAE_FAST_IMPL_ALL(m)} TORCH_LIBRARY_IMPL(vae_fast, Meta, m){VAE_FAST_IMPL_ALL(m)}
#undef VAE_FAST_IMPL
#define VAE_FAST_IMPL(name) m.impl(#name, TORCH_FN(autograd::name));
TORCH_LIBRARY_IMPL(vae_fast, Autograd, m) {
  VAE_FAST_IMPL(reparameterize_forward)
  VAE_FAST_IMPL(reparameterize_backward)
  VAE_FAST_IMPL(reparameterize_with_kl_forward)
  VAE_FAST_IMPL(reparameterize_with_kl_backward)
  VAE_FAST_IMPL(gaussian_kl_forward)
  VAE_FAST_IMPL(gaussian_kl_backward)
  VAE_FAST_IMPL(bernoulli_log_likelihood_forward)
  VAE_FAST_IMPL(bernoulli_log_likelihood_backward)
  VAE_FAST_IMPL(gaussian_log_likelihood_forward)
  VAE_FAST_IMPL(gaussian_log_likelihood_backward)
  // Third derivatives: an error when they are asked for.
  m.impl("reparameterize_double_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gaussian_kl_double_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("bernoulli_log_likelihood_double_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gaussian_log_likelihood_double_backward", torch::autograd::autogradNotImplementedFallback());
}

#undef VAE_FAST_IMPL
#define VAE_FAST_IMPL(name) m.impl(#name, TORCH_FN(autocast::name));
#define VAE_FAST_IMPL_AUTOCAST(m)               \
  VAE_FAST_IMPL(reparameterize_forward)         \
  VAE_FAST_IMPL(reparameterize_with_kl_forward) \
  VAE_FAST_IMPL(gaussian_kl_forward)            \
  VAE_FAST_IMPL(gaussian_log_likelihood_forward)
TORCH_LIBRARY_IMPL(vae_fast, AutocastCPU, m){VAE_FAST_IMPL_AUTOCAST(m)} TORCH_LIBRARY_IMPL(vae_fast, AutocastCUDA, m) {
  VAE_FAST_IMPL_AUTOCAST(m)
}

}  // namespace vae_fast
