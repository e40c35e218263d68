// The last linear layer of a Bernoulli decoder and its log-likelihood in one:
//   log p(x|z) = sum_d log Bernoulli(x_d; sigmoid(l_d)),   l = h weight^T + bias
// for h [rows, H], weight [D, H] and x [rows, D], without ever storing the logits l [rows, D]: they are made tile by
// tile, by torch's matrix product into one buffer that stays in the cache, and used there (BernoulliTile in kernels.h).
//
// With g_r the upstream gradient of a row and delta = g_r (x - sigmoid(l)), which takes the place of l in the tile or,
// in half precision on a GPU, stands in a tile beside it,
//   grad h = delta weight,   grad weight = delta^T h,   grad bias = sum_r delta
//
// Two ways. Where every row may have a gradient of its own, forward makes the logits and backward makes them again:
// four products in all. Of the sum over rows the gradient is known up to one factor, so forward makes it, three
// products as in any linear layer, and backward scales it.
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"

namespace vae_fast {
namespace {

using std::optional;
using Needs = std::array<bool, 3>;  // of h, weight, bias, whose gradients are wanted; others come back with no elements

void check_layer(const Tensor& h, const Tensor& weight, const optional<Tensor>& bias, const Tensor& x) {
  check_floating("h", h);
  TORCH_CHECK_VALUE(h.dim() >= 1, "h: got a tensor without dimensions, wanted [..., H]");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.sym_size(1) == h.sym_size(-1), "weight: got shape ", weight.sym_sizes(),
                    ", wanted [D, ", h.sym_size(-1), "], with the last dimension of h");
  check_dtype("weight", weight, "h", h);
  check_device("weight", weight, "h", h);
  const c10::SymInt outputs = weight.sym_size(0);
  if (bias) {
    check_shape("bias", *bias, "one value per row of weight", outputs);
    check_dtype("bias", *bias, "h", h);
    check_device("bias", *bias, "h", h);
  }
  c10::SymDimVector logits(datapoints(h).begin(), datapoints(h).end());
  logits.push_back(outputs);
  check_target_shape(x, "the logits", logits);
  check_device("x", x, "h", h);
}

// --- the pass over the tiles -----------------------------------------------------------------------------------------

// Elements of a tile: on a CPU half a megabyte of floats for every thread, about what its own cache holds (on one
// thread anything from a quarter to four times that took the same time, within 8 %); on a GPU a fraction of its L2, of
// `two` tiles half as much.
int64_t tile_elements(bool on_cpu, bool two) {
  return on_cpu ? std::min<int64_t>(at::get_num_threads(), 64) << 17 : int64_t{1} << (two ? 22 : 23);
}

// The size of equal parts of n, of about `most` at most; but for the last a multiple of 64, so that tiles are aligned.
int64_t part(int64_t n, int64_t most) {
  const int64_t parts = std::max<int64_t>((n + most - 1) / most, 1);
  return std::max<int64_t>(((n + parts - 1) / parts + 63) / 64 * 64, 64);
}

// out = a b; where a and b are of half precision, out may be of float
void set_to_product(Tensor out, const Tensor& a, const Tensor& b) {
  if (out.scalar_type() == a.scalar_type())
    at::mm_out(out, a, b);
  else
    at::mm_out(out, a, b, out.scalar_type());
}

// sum += a b, likewise
void add_product(Tensor sum, const Tensor& a, const Tensor& b) {
  if (sum.scalar_type() == a.scalar_type())
    sum.addmm_(a, b);
  else
    at::addmm_out(sum, sum, a, b, sum.scalar_type());
}

struct Layer {
  const Tensor &h, &weight;
  const optional<Tensor>& bias;
  const Tensor& x;
};

struct Sums {
  Tensor log_likelihood;                  // [rows] double, if wanted
  Tensor grad_h, grad_weight, grad_bias;  // of sum_r grad[r] log_likelihood[r], as `Needs` says
};

// Outputs outside, rows inside: a block of weight stays in the cache and its gradient is completed there. Every sum has
// a fixed order. Sums are of float (of double in double) whatever the tensors are, and so are logits: rounded to half
// precision, each would be off by up to 2^-9 of itself, and the sum over rows by more than all else together. A row's
// log-likelihood adds up over the blocks in double.
Sums pass(const char* name, const Layer& layer, const Tensor& grad, bool wants_log_likelihood, Needs needs,
          at::ScalarType grad_type) {
  const at::ScalarType real = loss_type(layer.h);
  // Processors multiply halves to halves slowly and round them; a GPU's matrix units do neither.
  const at::ScalarType type = layer.h.is_cpu() ? real : layer.h.scalar_type();
  const int64_t width = layer.h.size(-1), outputs = layer.weight.size(0);
  const int64_t rows = c10::multiply_integers(layer.h.sizes().slice(0, layer.h.dim() - 1));
  const int64_t x_rows = c10::multiply_integers(layer.x.sizes().slice(0, layer.x.dim() - 1));
  const bool needs_any = needs[0] || needs[1] || needs[2];

  const Tensor h = layer.h.reshape({rows, width}).to(type);
  const auto zeros = [&](at::IntArrayRef sizes, at::ScalarType t) { return at::zeros(sizes, h.options().dtype(t)); };
  const Tensor bias = layer.bias ? layer.bias->to(type).contiguous() : zeros({outputs}, type);
  const Tensor bytes = layer.x.scalar_type() == at::kBool ? layer.x.view(at::kByte) : layer.x;
  const Tensor x = bytes.reshape({x_rows, outputs});
  const bool x_as_it_is =
      x.stride(1) == 1 && (x.scalar_type() == at::kByte || x.scalar_type() == type || x.scalar_type() == at::kFloat);
  Sums sums;
  if (wants_log_likelihood) sums.log_likelihood = zeros({rows}, at::kDouble);
  if (needs[0]) sums.grad_h = zeros({rows, width}, real);
  if (needs[1]) sums.grad_weight = zeros({outputs, width}, grad_type);
  if (needs[2]) sums.grad_bias = zeros({outputs}, real);

  const bool two_tiles = type != real;
  const int64_t elements = tile_elements(h.is_cpu(), two_tiles);  // about square: every product then has the most work
  const int64_t some_rows = std::clamp<int64_t>(rows, 64, static_cast<int64_t>(std::sqrt(elements)));
  const int64_t block_cols = part(outputs, elements / some_rows);
  const int64_t block_rows = part(rows, elements / block_cols);
  const int64_t most = std::min(block_rows, rows) * std::min(block_cols, outputs);
  const Tensor product_buffer = at::empty({most}, h.options().dtype(real));
  const Tensor delta_buffer = two_tiles && needs_any ? at::empty({most}, h.options()) : product_buffer;
  const Tensor row_sums = at::empty({std::min(block_rows, rows)}, h.options().dtype(real));

  for (int64_t c = 0; c < outputs && rows > 0; c += block_cols) {
    const int64_t n = std::min(block_cols, outputs - c);
    const Tensor weight = layer.weight.narrow(0, c, n).to(type), bias_block = bias.narrow(0, c, n);
    Tensor target = x.narrow(1, c, n);
    if (!x_as_it_is) target = target.to(x.scalar_type() == at::kByte ? at::kByte : real).contiguous();
    Tensor grad_weight = needs[1] ? sums.grad_weight.narrow(0, c, n) : Tensor();
    if (needs[1] && grad_type != real) grad_weight = zeros({n, width}, real);

    for (int64_t r = 0; r < rows; r += block_rows) {
      const int64_t m = std::min(block_rows, rows - r);
      const Tensor products = product_buffer.narrow(0, 0, m * n).view({m, n});
      const Tensor delta = delta_buffer.narrow(0, 0, m * n).view({m, n});
      const Tensor h_block = h.narrow(0, r, m);
      set_to_product(products, h_block, weight.t());
      const Tensor row_grad = grad.defined() ? grad.narrow(0, r, m) : Tensor();
      launch(name, h,
             BernoulliTile{dtype_of(type), dtype_of(target.scalar_type()), m, n, r, x_rows, target.stride(0),
                           wants_log_likelihood, needs_any, pointer(target), pointer(bias_block), pointer(row_grad),
                           pointer(row_sums), pointer(products), pointer(delta)});
      if (wants_log_likelihood) sums.log_likelihood.narrow(0, r, m).add_(row_sums.narrow(0, 0, m));
      if (needs[0]) add_product(sums.grad_h.narrow(0, r, m), delta, weight);
      if (needs[1]) add_product(grad_weight, delta.t(), h_block);
      if (needs[2]) sums.grad_bias.narrow(0, c, n).add_(delta.sum({0}, false, real));
    }
    if (needs[1] && grad_type != real) sums.grad_weight.narrow(0, c, n).copy_(grad_weight);
  }
  if (needs[0]) sums.grad_h = sums.grad_h.to(grad_type).view(layer.h.sizes());
  if (needs[2]) sums.grad_bias = sums.grad_bias.to(grad_type);
  return sums;
}

// --- one function per operator, for every device ---------------------------------------------------------------------

namespace kernel {

Tensor linear_bernoulli_log_likelihood_forward(const Tensor& h, const Tensor& weight, const optional<Tensor>& bias,
                                               const Tensor& x) {
  check_layer(h, weight, bias, x);
  if (h.is_meta()) return empty_loss(h);
  const Sums sums = pass("linear_bernoulli_log_likelihood", {h, weight, bias, x}, Tensor(), true, {}, loss_type(h));
  return sums.log_likelihood.to(loss_type(h)).view(h.sizes().slice(0, h.dim() - 1));
}

std::tuple<Tensor, Tensor, Tensor> empty_grads(const Tensor& h, const Tensor& weight, Needs needs,
                                               at::ScalarType type) {
  return {needs[0] ? empty(h.sym_sizes(), h, type) : not_wanted(h),
          needs[1] ? empty(weight.sym_sizes(), h, type) : not_wanted(h),
          needs[2] ? empty(weight.sym_sizes().slice(0, 1), h, type) : not_wanted(h)};
}

std::tuple<Tensor, Tensor, Tensor> linear_bernoulli_log_likelihood_backward(const Tensor& grad, const Tensor& h,
                                                                            const Tensor& weight,
                                                                            const optional<Tensor>& bias,
                                                                            const Tensor& x, Needs needs) {
  check_layer(h, weight, bias, x);
  check_loss_grad("grad", grad, h);
  if (h.is_meta()) return empty_grads(h, weight, needs, h.scalar_type());
  const Sums sums = pass("linear_bernoulli_log_likelihood_backward", {h, weight, bias, x}, grad.contiguous().view({-1}),
                         false, needs, h.scalar_type());
  const auto given = [&](const Tensor& g) { return g.defined() ? g : not_wanted(h); };
  return {given(sums.grad_h), given(sums.grad_weight), given(sums.grad_bias)};
}

// The sum over rows and its gradients, in the type of the loss.
std::tuple<Tensor, Tensor, Tensor, Tensor> linear_bernoulli_log_likelihood_sum_and_grads(const Tensor& h,
                                                                                         const Tensor& weight,
                                                                                         const optional<Tensor>& bias,
                                                                                         const Tensor& x, Needs needs) {
  check_layer(h, weight, bias, x);
  if (h.is_meta())
    return std::tuple_cat(std::tuple(empty({}, h, loss_type(h))), empty_grads(h, weight, needs, loss_type(h)));
  const Sums sums =
      pass("linear_bernoulli_log_likelihood_sum", {h, weight, bias, x}, Tensor(), true, needs, loss_type(h));
  const auto given = [&](const Tensor& g) { return g.defined() ? g : empty({0}, h, loss_type(h)); };
  return {sums.log_likelihood.sum().to(loss_type(h)), given(sums.grad_h), given(sums.grad_weight),
          given(sums.grad_bias)};
}

Tensor linear_bernoulli_log_likelihood_sum(const Tensor& h, const Tensor& weight, const optional<Tensor>& bias,
                                           const Tensor& x) {
  return std::get<0>(linear_bernoulli_log_likelihood_sum_and_grads(h, weight, bias, x, {}));
}

}  // namespace kernel

namespace dispatched {
VAE_FAST_DISPATCHED(linear_bernoulli_log_likelihood_forward);
VAE_FAST_DISPATCHED(linear_bernoulli_log_likelihood_backward);
VAE_FAST_DISPATCHED(linear_bernoulli_log_likelihood_sum);
VAE_FAST_DISPATCHED(linear_bernoulli_log_likelihood_sum_and_grads);
}  // namespace dispatched

// --- autograd --------------------------------------------------------------------------------------------------------

namespace autograd {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// Below, bias is the last input: it may be missing, and then the edges after it would move.

// log p is linear in x, with the logits for a gradient; whoever asks for that has them stored. In the loss's type,
// which a `grad` without dimensions does not impose.
Tensor grad_x(const Tensor& grad, const Tensor& h, const Tensor& weight, const optional<Tensor>& bias,
              const Tensor& x) {
  return grad_target(grad * at::linear(h, weight, bias).to(loss_type(h)), x);
}

// Gradients from `make`, known to autograd as functions of all the inputs that have no derivative of their own.
struct NoSecondDerivative : Function<NoSecondDerivative> {
  template <class Make>
  static variable_list forward(AutogradContext*, const Make& make, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, const optional<Tensor>&) {
    BelowAutograd guard;
    return make();
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "linear_bernoulli_log_likelihood: its second derivatives are not implemented; "
                                "bernoulli_log_likelihood(F.linear(h, weight, bias), x) has them");
    return {};
  }
};

struct PerRow : Function<PerRow> {
  static Tensor forward(AutogradContext* ctx, const Tensor& h, const Tensor& weight, const Tensor& x,
                        const optional<Tensor>& bias) {
    BelowAutograd guard;
    ctx->save_for_backward({h, weight, x, bias.value_or(Tensor())});
    return dispatched::linear_bernoulli_log_likelihood_forward(h, weight, bias, x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &h = saved[0], &weight = saved[1], &x = saved[2];
    const optional<Tensor> bias = saved[3].defined() ? optional<Tensor>(saved[3]) : std::nullopt;
    const Needs needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1), bias && ctx->needs_input_grad(3)};
    variable_list out(4);
    if (ctx->needs_input_grad(2)) out[2] = grad_x(grads[0].unsqueeze(-1), h, weight, bias, x);
    if (!needs[0] && !needs[1] && !needs[2]) return out;
    const auto [to_h, to_weight, to_bias] =
        dispatched::linear_bernoulli_log_likelihood_backward(grads[0], h, weight, bias, x, needs);
    if (needs[0]) out[0] = to_h;
    if (needs[1]) out[1] = to_weight;
    if (needs[2]) out[3] = to_bias;
    return out;
  }
};

struct Sum : Function<Sum> {
  static Tensor forward(AutogradContext* ctx, const Tensor& h, const Tensor& weight, const Tensor& x,
                        const optional<Tensor>& bias, Needs needs) {
    BelowAutograd guard;
    const auto [sum, to_h, to_weight, to_bias] =
        dispatched::linear_bernoulli_log_likelihood_sum_and_grads(h, weight, bias, x, needs);
    ctx->save_for_backward({h, weight, x, bias.value_or(Tensor()), to_h, to_weight, to_bias});
    return sum;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &grad = grads[0], &h = saved[0], &weight = saved[1], &x = saved[2];
    const optional<Tensor> bias = saved[3].defined() ? optional<Tensor>(saved[3]) : std::nullopt;
    variable_list out(5);
    if (ctx->needs_input_grad(2)) out[2] = grad_x(grad, h, weight, bias, x);
    const auto scaled = [&] {
      variable_list units{saved[4], saved[5], saved[6]};
      for (Tensor& unit : units) unit = (unit * grad).to(h.scalar_type());
      return units;
    };
    const auto to = NoSecondDerivative::apply(scaled, grad, h, weight, x, bias);
    if (ctx->needs_input_grad(0)) out[0] = to[0];
    if (ctx->needs_input_grad(1)) out[1] = to[1];
    if (bias && ctx->needs_input_grad(3)) out[3] = to[2];
    return out;
  }
};

Tensor linear_bernoulli_log_likelihood_forward(const Tensor& h, const Tensor& weight, const optional<Tensor>& bias,
                                               const Tensor& x) {
  return PerRow::apply(h, weight, x, bias);
}

std::tuple<Tensor, Tensor, Tensor> linear_bernoulli_log_likelihood_backward(const Tensor& grad, const Tensor& h,
                                                                            const Tensor& weight,
                                                                            const optional<Tensor>& bias,
                                                                            const Tensor& x, Needs needs) {
  const auto make = [&]() -> variable_list {
    const auto [to_h, to_weight, to_bias] =
        dispatched::linear_bernoulli_log_likelihood_backward(grad, h, weight, bias, x, needs);
    return {to_h, to_weight, to_bias};
  };
  const auto out = NoSecondDerivative::apply(make, grad, h, weight, x, bias);
  return {out[0], out[1], out[2]};
}

Tensor linear_bernoulli_log_likelihood_sum(const Tensor& h, const Tensor& weight, const optional<Tensor>& bias,
                                           const Tensor& x) {
  const auto wanted = [](const Tensor& t) { return at::GradMode::is_enabled() && t.requires_grad(); };
  return Sum::apply(h, weight, x, bias, Needs{wanted(h), wanted(weight), bias && wanted(*bias)});
}

}  // namespace autograd

// --- autocast: h, weight and bias as those of a linear layer ---------------------------------------------------------

namespace autocast {

template <class Op>
Tensor call(const Op& op, const Tensor& h, const Tensor& weight, const optional<Tensor>& bias, const Tensor& x) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::autocast_dispatch_keyset);
  const auto device = h.device().type();
  const auto low = [&](const auto& t) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), t, device);
  };
  return op(low(h), low(weight), low(bias), x);
}

Tensor linear_bernoulli_log_likelihood_forward(const Tensor& h, const Tensor& weight, const optional<Tensor>& bias,
                                               const Tensor& x) {
  return call(dispatched::linear_bernoulli_log_likelihood_forward, h, weight, bias, x);
}
Tensor linear_bernoulli_log_likelihood_sum(const Tensor& h, const Tensor& weight, const optional<Tensor>& bias,
                                           const Tensor& x) {
  return call(dispatched::linear_bernoulli_log_likelihood_sum, h, weight, bias, x);
}

}  // namespace autocast

}  // namespace

// --- schemas and registrations ---------------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(vae_fast, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("linear_bernoulli_log_likelihood_forward(Tensor h, Tensor weight, Tensor? bias, Tensor x) -> Tensor", tags);
  m.def(
      "linear_bernoulli_log_likelihood_backward(Tensor grad, Tensor h, Tensor weight, Tensor? bias, Tensor x,"
      " bool[3] needs) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def("linear_bernoulli_log_likelihood_sum(Tensor h, Tensor weight, Tensor? bias, Tensor x) -> Tensor", tags);
  m.def(
      "linear_bernoulli_log_likelihood_sum_and_grads(Tensor h, Tensor weight, Tensor? bias, Tensor x, bool[3] needs)"
      " -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
}

#define VAE_FAST_IMPL(space, name) m.impl(#name, TORCH_FN(space::name));
#define VAE_FAST_IMPL_ALL(m)                                      \
  VAE_FAST_IMPL(kernel, linear_bernoulli_log_likelihood_forward)  \
  VAE_FAST_IMPL(kernel, linear_bernoulli_log_likelihood_backward) \
  VAE_FAST_IMPL(kernel, linear_bernoulli_log_likelihood_sum)      \
  VAE_FAST_IMPL(kernel, linear_bernoulli_log_likelihood_sum_and_grads)
TORCH_LIBRARY_IMPL(vae_fast, CPU, m){VAE_FAST_IMPL_ALL(m)} TORCH_LIBRARY_IMPL(vae_fast, CUDA, m){
    VAE_FAST_IMPL_ALL(m)} TORCH_LIBRARY_IMPL(vae_fast, Meta, m){VAE_FAST_IMPL_ALL(m)}

TORCH_LIBRARY_IMPL(vae_fast, Autograd, m) {
  VAE_FAST_IMPL(autograd, linear_bernoulli_log_likelihood_forward)
  VAE_FAST_IMPL(autograd, linear_bernoulli_log_likelihood_backward)
  VAE_FAST_IMPL(autograd, linear_bernoulli_log_likelihood_sum)
  m.impl("linear_bernoulli_log_likelihood_sum_and_grads", torch::autograd::autogradNotImplementedFallback());
}

#define VAE_FAST_IMPL_AUTOCAST(m)                                  \
  VAE_FAST_IMPL(autocast, linear_bernoulli_log_likelihood_forward) \
  VAE_FAST_IMPL(autocast, linear_bernoulli_log_likelihood_sum)
TORCH_LIBRARY_IMPL(vae_fast, AutocastCPU, m){VAE_FAST_IMPL_AUTOCAST(m)} TORCH_LIBRARY_IMPL(vae_fast, AutocastCUDA, m) {
  VAE_FAST_IMPL_AUTOCAST(m)
}

}  // namespace vae_fast
