#include "cpu_step.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "../math/splitmix.h"
#include "update_rule.h"

namespace vae_fast::engine {

using cpu::Epilogue;
using cpu::Matrix;

namespace {

int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// The nearest bfloat16, as a float
float to_bfloat16(float value) {
  uint32_t u;
  std::memcpy(&u, &value, sizeof u);
  if (value == value) u = (u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u;
  std::memcpy(&value, &u, sizeof u);
  return value;
}

double sum(const std::vector<double>& values, int64_t count) {
  return std::accumulate(values.begin(), values.begin() + count, 0.0);
}

Epilogue hidden_epilogue(Activation activation) {
  switch (activation) {
    case Activation::tanh:
      return Epilogue::tanh;
    case Activation::relu:
      return Epilogue::relu;
    case Activation::softplus:
      return Epilogue::softplus;
  }
  return Epilogue::none;
}

}  // namespace

CpuStep::CpuStep(const Network& network, const Objective& objective, Precision precision)
    : network_(network),
      objective_(objective),
      fast_(precision == Precision::fast),
      leaves_zeros_out_(!fast_ || cpu::matrix_unit() != cpu::MatrixUnit::tiles),
      tile_(cpu::tile()) {
  const Epilogue hidden = hidden_epilogue(network.activation);
  int64_t inputs = network.data_dim;
  const auto add = [&](std::vector<int64_t> groups, Epilogue epilogue) {
    Layer layer;
    layer.inputs = inputs;
    for (int64_t outputs : groups) layer.outputs += outputs;
    layer.groups = std::move(groups);
    layer.epilogue = epilogue;
    inputs = layer.groups[0];
    layers_.push_back(std::move(layer));
  };
  for (int64_t width : network.encoder_hidden) add({width}, hidden);
  heads_ = layers_.size();
  add({network.latent_dim, network.latent_dim}, Epilogue::none);
  for (int64_t width : network.decoder_hidden) add({width}, hidden);
  if (network.likelihood == Likelihood::bernoulli)
    add({network.data_dim}, Epilogue::bernoulli);
  else
    add({network.data_dim, network.data_dim}, Epilogue::none);
}

// Between torch's order of a weight, [outputs, inputs], and panels of outputs
void CpuStep::exchange(const std::vector<Parameter>& parameters, const Optimizer& optimizer, bool import) {
  size_t first = 0;  // of a layer's parameters
  for (Layer& layer : layers_) {
    const int64_t panel_rows = round_up(layer.inputs, tile_.panel), width = round_up(layer.outputs, tile_.panel);
    const auto weights = static_cast<size_t>(panel_rows * width), biases = static_cast<size_t>(width);
    for (int s = -1; s < optimizer.states(); ++s) {
      Buffer& ours = s < 0 ? layer.weight : layer.state[s];
      Buffer& our_biases = s < 0 ? layer.bias : layer.bias_state[s];
      if (import) {  // What fills the last panel up may be NaN, after training that went wrong.
        float* const panel = ours.at_least(weights) + panel_rows * (width - tile_.panel);
        const int64_t rest = width - layer.outputs;
        for (int64_t k = 0; k < panel_rows; ++k) std::fill_n(panel + (k + 1) * tile_.panel - rest, rest, 0.0f);
        std::fill_n(our_biases.at_least(biases) + layer.outputs, rest, 0.0f);
      }
      int64_t column = 0;
      for (size_t g = 0; g < layer.groups.size(); ++g) {
        const int64_t outputs = layer.groups[g];
        const Parameter &weight = parameters[first + 2 * g], &bias = parameters[first + 2 * g + 1];
        cpu::launch(
            cpu::Exchange{import, layer.inputs, outputs, column, ours.data(), s < 0 ? weight.value : weight.state[s]});
        float *const panels = our_biases.data() + column, *const theirs = s < 0 ? bias.value : bias.state[s];
        import ? std::copy_n(theirs, outputs, panels) : std::copy_n(panels, outputs, theirs);
        column += outputs;
      }
    }
    first += 2 * layer.groups.size();
    if (import && fast_) {
      float* rounded = layer.operand.at_least(weights);
      for (size_t i = 0; i < weights; ++i) rounded[i] = to_bfloat16(layer.weight.data()[i]);
    }
  }
}

// Columns to whole panels and whole tiles, whichever reads them; never a multiple of a page, whose rows would all fall
// into the same lines of the cache.
Matrix CpuStep::matrix(Buffer& buffer, int64_t rows, int64_t columns) const {
  int64_t ld = round_up(round_up(columns, tile_.rows), tile_.panel);
  if (ld % 256 == 0) ld += tile_.panel;
  return {buffer.at_least(static_cast<size_t>(round_up(rows, tile_.rows) * ld)), ld};
}

void CpuStep::reserve(int64_t batch) {
  if (batch <= batch_) return;
  batch_ = batch;
  const int64_t decoded = batch * objective_.num_samples;
  const bool wake_sleep = objective_.estimator == Estimator::wake_sleep;
  exact_x_ = matrix(x_, batch, network_.data_dim);
  Matrix in = fast_ ? matrix(x_operand_, batch, network_.data_dim) : exact_x_;
  if (wake_sleep) {
    dreamed_x_ = matrix(dream_of_x_, batch, network_.data_dim);
    dreamed_z_ = matrix(dream_of_z_, batch, network_.latent_dim);
  }
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    const int64_t rows = i > heads_ ? decoded : batch, width = round_up(layer.outputs, tile_.panel);
    layer.in = in;
    layer.out = matrix(layer.output, rows, width);
    const bool hidden = i != heads_ && i + 1 < layers_.size();
    layer.grad_out = hidden ? matrix(layer.gradient, rows, width) : layer.out;
    in = i == heads_ ? matrix(z_, decoded, network_.latent_dim) : layer.out;
    if (rows > tile_.depth)
      layer.sums.at_least(static_cast<size_t>(width * (round_up(layer.inputs, tile_.panel) + tile_.rows)));
  }
  matrix(grad_z_, decoded, network_.latent_dim);
  const auto room = static_cast<size_t>(batch), columns = static_cast<size_t>(network_.data_dim);
  if (leaves_zeros_out_) {
    columns_.resize(room * (columns + cpu::Nonzeros::kSpare)), per_row_.resize(room);
    pairs_.resize(room * ((columns + 1) / 2)), per_pair_.resize((columns + 1) / 2);
  }
  const int64_t widest = wake_sleep ? std::max(network_.latent_dim, network_.data_dim) : network_.latent_dim;
  eps_.at_least(static_cast<size_t>(decoded * widest));
  log_likelihood_.resize(static_cast<size_t>(decoded));
  kl_.resize(static_cast<size_t>(batch));
}

// Of the encoder's first layer's input, for its two products
void CpuStep::find_nonzeros(Matrix x, int64_t batch, bool by_rows) {
  nonzeros_ = nullptr;
  if (!leaves_zeros_out_) return;
  if (by_rows) cpu::launch(cpu::NonzerosOfRows{found_, x});
  // Lists save nothing where 0.6 of the elements are not zero (bench_products); 0.4 stays clear of that. On a matrix
  // unit the products that they replace are predicted to take 0.56 of the time.
  const int64_t percent = cpu::on_matrix_unit(fast_, batch) ? 25 : 40;
  const int64_t count = std::accumulate(per_row_.begin(), per_row_.begin() + batch, int64_t{0});
  if (100 * count > percent * batch * network_.data_dim) return;
  cpu::launch(cpu::NonzerosOfColumns{found_, x});
  nonzeros_ = &found_;
}

int64_t CpuStep::forward(Layer& layer, Matrix in, int64_t rows, Epilogue epilogue, const Targets& targets) {
  cpu::Forward a{};
  a.epilogue = epilogue, a.fast = fast_;
  a.rows = rows, a.inputs = layer.inputs, a.outputs = layer.outputs;
  a.in = in, a.nonzeros = &layer == &layers_[0] ? nonzeros_ : nullptr;
  a.weight = operand(layer), a.bias = layer.bias.data(), a.out = layer.out;
  a.logvar_column = logvar_column(layer), a.logvar_scale = network_.logvar_scale;
  a.x = targets.x, a.x_rows = targets.rows, a.scale = targets.scale;
  const int64_t tiles = cpu::tiles_of(a).tiles();
  if (epilogue == Epilogue::bernoulli) {
    log_likelihood_.resize(std::max(log_likelihood_.size(), static_cast<size_t>(tiles)));
    a.log_likelihood = log_likelihood_.data();
  }
  cpu::launch(a);
  return tiles;
}

// (mu, logvar) of q(z|x)
void CpuStep::encode(Matrix x, int64_t batch) {
  layers_[0].in = x;
  for (size_t i = 0; i <= heads_; ++i) forward(layers_[i], layers_[i].in, batch, layers_[i].epilogue, {});
}

// The outputs of p(x|z); of a Bernoulli with targets the gradients of its logits instead, and, returned, of how many
// tiles the log-likelihoods
int64_t CpuStep::decode(Matrix z, int64_t rows, const Targets& targets) {
  int64_t tiles = 0;
  for (size_t i = heads_ + 1; i < layers_.size(); ++i) {
    const Epilogue epilogue = layers_[i].epilogue;
    const bool outputs_alone = epilogue == Epilogue::bernoulli && targets.rows == 0;
    tiles = forward(layers_[i], i == heads_ + 1 ? z : layers_[i].in, rows, outputs_alone ? Epilogue::none : epilogue,
                    targets);
  }
  return tiles;
}

// Decodes z, of `rows` rows, and turns the outputs into their gradients; returns the mean log-likelihood.
double CpuStep::decode_and_compare(Matrix z, int64_t rows, int64_t batch) {
  const Layer& output = layers_.back();
  const Targets targets{exact_x_, batch, static_cast<float>(1.0 / static_cast<double>(rows))};
  int64_t partial_sums = decode(z, rows, targets);
  if (network_.likelihood != Likelihood::bernoulli) {
    partial_sums = rows;
    cpu::launch(cpu::GaussianLoss{network_.likelihood == Likelihood::gaussian_sigmoid_mean, fast_, rows,
                                  network_.data_dim, network_.data_dim, batch, output.out, exact_x_, targets.scale,
                                  1.0f, log_likelihood_.data()});
  }
  return sum(log_likelihood_, partial_sums) / static_cast<double>(rows);
}

// The gradient in the input of layer i from that of its output
void CpuStep::input_gradient(size_t i, int64_t rows, Matrix grad_in) {
  const bool after_latent = i == heads_ + 1;
  const Layer& layer = layers_[i];
  cpu::launch(cpu::InputGradient{after_latent ? Epilogue::none : layers_[i - 1].epilogue, fast_, rows, layer.inputs,
                                 layer.outputs, layer.grad_out, operand(layer), layer.in, grad_in});
}

void CpuStep::update(int64_t batch, int64_t decoded, const Optimizer& optimizer, int64_t number) {
  const UpdateRule rule = rule_of(optimizer);
  const StepFactors factors =
      step_factors(rule.kind, optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.accumulate_steps, number);
  updates_.clear();
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    updates_.push_back({i > heads_ ? decoded : batch,
                        layer.inputs,
                        layer.outputs,
                        layer.in,
                        layer.grad_out,
                        logvar_column(layer),
                        network_.logvar_scale,
                        i == 0 ? nonzeros_ : nullptr,
                        rule,
                        factors,
                        objective_.weight_prior,
                        layer.weight.data(),
                        layer.bias.data(),
                        {layer.state[0].data(), layer.state[1].data()},
                        {layer.bias_state[0].data(), layer.bias_state[1].data()},
                        fast_ ? layer.operand.data() : nullptr,
                        layer.sums.data()});
  }
  cpu::launch(updates_.data(), static_cast<int>(updates_.size()));
}

Terms CpuStep::step(const Data& data, const int64_t* rows, int64_t batch, const int64_t* seeds,
                    const Optimizer& optimizer, int64_t update_number) {
  const int64_t samples = objective_.num_samples, decoded = batch * samples, latent = network_.latent_dim;
  const bool wake_sleep = objective_.estimator == Estimator::wake_sleep;
  const bool estimated = wake_sleep || objective_.estimator == Estimator::sgvb_a;
  const Layer& heads = layers_[heads_];
  const Matrix in = fast_ ? matrix(x_operand_, batch_, network_.data_dim) : exact_x_, z = layers_[heads_ + 1].in;

  found_ = {batch, network_.data_dim, columns_.data(), per_row_.data(), pairs_.data(), per_pair_.data()};
  cpu::launch(cpu::Gather{data.dtype, data.dynamic, data.scale, batch, data.cols, seeds[1], data.values, rows, exact_x_,
                          in, leaves_zeros_out_ ? &found_ : nullptr});
  find_nonzeros(in, batch, false);
  encode(in, batch);
  cpu::launch(PhiloxNormal{DType::f32, decoded * latent, &seeds[0], eps_.data()});
  cpu::launch(
      cpu::LatentForward{estimated, fast_, batch, latent, latent, samples, heads.out, eps_.data(), z, kl_.data()});
  const double kl = sum(kl_, batch) / static_cast<double>(batch);

  double log_likelihood;
  if (wake_sleep) {
    dream(batch, seeds[0]);
    log_likelihood = decode_and_compare(z, batch, batch);
    for (size_t i = layers_.size(); i-- > heads_ + 2;) input_gradient(i, batch, layers_[i - 1].grad_out);
    find_nonzeros(dreamed_x_, batch, true);
    encode(dreamed_x_, batch);
    // log q(z'|x') goes to kl_, which has been summed; nobody asks for it.
    cpu::launch(cpu::GaussianLoss{false, fast_, batch, latent, latent, batch, heads.out, dreamed_z_,
                                  1.0f / static_cast<float>(batch), network_.logvar_scale, kl_.data()});
  } else {
    const Matrix grad_z = matrix(grad_z_, batch_ * samples, latent);
    log_likelihood = decode_and_compare(z, decoded, batch);
    for (size_t i = layers_.size(); i-- > heads_ + 1;)
      input_gradient(i, decoded, i == heads_ + 1 ? grad_z : layers_[i - 1].grad_out);
    cpu::launch(cpu::LatentBackward{estimated, fast_, batch, latent, latent, samples, heads.out, eps_.data(), z, grad_z,
                                    objective_.beta / static_cast<float>(batch), network_.logvar_scale});
  }
  for (size_t i = heads_; i > 0; --i) input_gradient(i, batch, layers_[i - 1].grad_out);
  update(batch, decoded, optimizer, update_number);
  return {static_cast<float>(log_likelihood - static_cast<double>(objective_.beta) * kl),
          static_cast<float>(log_likelihood), static_cast<float>(kl)};
}

// (z', x') ~ p(z) p(x|z)
void CpuStep::dream(int64_t batch, int64_t seed) {
  const int64_t latent = network_.latent_dim, data_dim = network_.data_dim;
  const int64_t of_z = substream(seed, kDreamOfZ), of_x = substream(seed, kDreamOfX);
  cpu::launch(PhiloxNormal{DType::f32, batch * latent, &of_z, eps_.data()});
  for (int64_t b = 0; b < batch; ++b)
    std::copy_n(eps_.data() + b * latent, latent, dreamed_z_.data + b * dreamed_z_.ld);
  decode(dreamed_z_, batch, {});
  if (network_.likelihood != Likelihood::bernoulli)
    cpu::launch(PhiloxNormal{DType::f32, batch * data_dim, &of_x, eps_.data()});
  cpu::launch(
      cpu::Dream{network_.likelihood, batch, data_dim, data_dim, of_x, layers_.back().out, eps_.data(), dreamed_x_});
}

void CpuStep::run(const std::vector<Parameter>& parameters, const Optimizer& optimizer, const Data& data,
                  const Steps& steps, Terms* terms) {
  reserve(*std::max_element(steps.sizes, steps.sizes + steps.count));
  exchange(parameters, optimizer, true);
  for (int64_t s = 0; s < steps.count; ++s)
    terms[s] = step(data, steps.rows + s * steps.width, steps.sizes[s], steps.seeds + 2 * s, optimizer,
                    steps.updates_before + s + 1);
  exchange(parameters, optimizer, false);
}

}  // namespace vae_fast::engine
