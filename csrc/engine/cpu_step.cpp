#include "cpu_step.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

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

}  // namespace

CpuStep::CpuStep(const Network& network, const Objective& objective, Precision precision)
    : network_(network), objective_(objective), fast_(precision == Precision::fast), tile_(cpu::tile()) {
  const Epilogue hidden = network.activation == Activation::tanh ? Epilogue::tanh : Epilogue::relu;
  int64_t inputs = network.data_dim;
  const auto add = [&](std::vector<int64_t> groups, Epilogue epilogue) {
    Layer layer;
    layer.inputs = inputs;
    for (int64_t outputs : groups) layer.panels += (outputs + tile_.panel - 1) / tile_.panel;
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
  size_t parameter = 0;
  for (Layer& layer : layers_) {
    const int64_t panel_rows = round_up(layer.inputs, tile_.panel), width = layer.panels * tile_.panel;
    const auto weights = static_cast<size_t>(panel_rows * width), biases = static_cast<size_t>(width);
    if (import) {
      layer.weight.at_least(weights), layer.bias.at_least(biases);
      layer.weight.clear(), layer.bias.clear();
      for (int s = 0; s < optimizer.states(); ++s) {
        layer.state[s].at_least(weights), layer.bias_state[s].at_least(biases);
        layer.state[s].clear(), layer.bias_state[s].clear();
      }
    }
    const auto move = [&](float& ours, float& theirs) { import ? ours = theirs : theirs = ours; };
    int64_t column = 0;
    for (const int64_t outputs : layer.groups) {
      const Parameter &weight = parameters[parameter], &bias = parameters[parameter + 1];
      parameter += 2;
      for (int s = -1; s < optimizer.states(); ++s) {
        float* panels = s < 0 ? layer.weight.data() : layer.state[s].data();
        float* torch_weight = s < 0 ? weight.value : weight.state[s];
        at::parallel_for(0, outputs, std::max<int64_t>(1, 32768 / layer.inputs), [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            const int64_t c = column + n;
            float* ours = panels + c / tile_.panel * panel_rows * tile_.panel + c % tile_.panel;
            float* theirs = torch_weight + n * layer.inputs;
            for (int64_t k = 0; k < layer.inputs; ++k) move(ours[k * tile_.panel], theirs[k]);
          }
        });
        float* ours = (s < 0 ? layer.bias.data() : layer.bias_state[s].data()) + column;
        float* theirs = s < 0 ? bias.value : bias.state[s];
        for (int64_t n = 0; n < outputs; ++n) move(ours[n], theirs[n]);
      }
      column += round_up(outputs, tile_.panel);
    }
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
  exact_x_ = matrix(x_, batch, network_.data_dim);
  Matrix in = fast_ ? matrix(x_operand_, batch, network_.data_dim) : exact_x_;
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    const int64_t rows = i > heads_ ? decoded : batch, width = layer.panels * tile_.panel;
    layer.in = in;
    layer.out = matrix(layer.output, rows, width);
    const bool hidden = i != heads_ && i + 1 < layers_.size();
    layer.grad_out = hidden ? matrix(layer.gradient, rows, width) : layer.out;
    in = i == heads_ ? matrix(z_, decoded, network_.latent_dim) : layer.out;
    if (rows > tile_.depth)
      layer.sums.at_least(static_cast<size_t>(width * (round_up(layer.inputs, tile_.panel) + tile_.rows)));
  }
  matrix(grad_z_, decoded, network_.latent_dim);
  const int64_t row_tiles = round_up(batch, tile_.rows) / tile_.rows;
  const int64_t column_tiles = round_up(network_.data_dim, tile_.rows) / tile_.rows;
  of_rows_.resize(static_cast<size_t>(row_tiles)), columns_.resize(static_cast<size_t>(row_tiles * network_.data_dim));
  of_columns_.resize(static_cast<size_t>(column_tiles)), row_numbers_.resize(static_cast<size_t>(column_tiles * batch));
  eps_.at_least(static_cast<size_t>(decoded * network_.latent_dim));
  const int64_t blocks = (decoded + tile_.block - 1) / tile_.block;
  log_likelihood_.resize(static_cast<size_t>(std::max(decoded, blocks * layers_.back().panels)));
  kl_.resize(static_cast<size_t>(batch));
}

Terms CpuStep::step(const Data& data, const int64_t* rows, int64_t batch, const int64_t* seeds,
                    const Optimizer& optimizer, int64_t update) {
  const int64_t samples = objective_.num_samples, decoded = batch * samples, latent = network_.latent_dim;
  const bool estimated = objective_.estimator == Estimator::sgvb_a;
  const float scale = static_cast<float>(1.0 / static_cast<double>(decoded));
  Layer &heads = layers_[heads_], &output = layers_.back();
  const Matrix x = exact_x_, z = layers_[heads_ + 1].in, grad_z = matrix(grad_z_, batch_ * samples, latent);
  const int64_t half = round_up(latent, tile_.panel);

  const auto forward = [&](Layer& layer, int64_t n) {
    cpu::Forward a{};
    a.epilogue = layer.epilogue, a.fast = fast_;
    a.rows = n, a.inputs = layer.inputs, a.outputs = layer.groups[0], a.panels = layer.panels;
    a.in = layer.in, a.nonzero = &layer == &layers_[0] ? of_rows_.data() : nullptr;
    a.weight = operand(layer), a.bias = layer.bias.data(), a.out = layer.out;
    a.x = x, a.x_rows = batch, a.scale = scale;
    a.log_likelihood = layer.epilogue == Epilogue::bernoulli ? log_likelihood_.data() : nullptr;
    cpu::launch(a);
  };

  cpu::launch(cpu::Gather{data.dtype, data.dynamic, data.scale, batch, data.cols, seeds[1], data.values, rows, x,
                          layers_[0].in});
  cpu::launch(cpu::FindZeros{batch, network_.data_dim, layers_[0].in, columns_.data(), row_numbers_.data(),
                             of_rows_.data(), of_columns_.data()});
  for (size_t i = 0; i <= heads_; ++i) forward(layers_[i], batch);
  cpu::launch(PhiloxNormal{DType::f32, decoded * latent, &seeds[0], eps_.data()});
  cpu::launch(
      cpu::LatentForward{estimated, fast_, batch, latent, half, samples, heads.out, eps_.data(), z, kl_.data()});
  for (size_t i = heads_ + 1; i < layers_.size(); ++i) forward(layers_[i], decoded);
  int64_t partial_sums = (decoded + tile_.block - 1) / tile_.block * output.panels;
  if (network_.likelihood != Likelihood::bernoulli) {
    partial_sums = decoded;
    cpu::launch(cpu::GaussianLoss{network_.likelihood == Likelihood::gaussian_sigmoid_mean, fast_, decoded,
                                  network_.data_dim, round_up(network_.data_dim, tile_.panel), batch, output.out, x,
                                  scale, log_likelihood_.data()});
  }

  for (size_t i = layers_.size(); i-- > 1;) {
    Layer& layer = layers_[i];
    const bool after_latent = i == heads_ + 1;
    Layer& before = layers_[i - 1];
    cpu::launch(cpu::InputGradient{after_latent ? Epilogue::none : before.epilogue, fast_, i > heads_ ? decoded : batch,
                                   layer.inputs, layer.panels, layer.grad_out, operand(layer), layer.in,
                                   after_latent ? grad_z : before.grad_out});
    if (after_latent)
      cpu::launch(cpu::LatentBackward{estimated, fast_, batch, latent, half, samples, heads.out, eps_.data(), z, grad_z,
                                      objective_.beta / static_cast<float>(batch)});
  }

  const UpdateRule rule = rule_of(optimizer);
  const StepFactors factors =
      step_factors(rule.kind, optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.accumulate_steps, update);
  updates_.clear();
  for (size_t i = 0; i < layers_.size(); ++i) {
    Layer& layer = layers_[i];
    updates_.push_back({i > heads_ ? decoded : batch,
                        layer.inputs,
                        layer.panels,
                        layer.in,
                        layer.grad_out,
                        i == 0 ? of_columns_.data() : nullptr,
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

  const auto mean = [](const std::vector<double>& values, int64_t count, int64_t over) {
    return std::accumulate(values.begin(), values.begin() + count, 0.0) / static_cast<double>(over);
  };
  const double log_likelihood = mean(log_likelihood_, partial_sums, decoded), kl = mean(kl_, batch, batch);
  return {static_cast<float>(log_likelihood - static_cast<double>(objective_.beta) * kl),
          static_cast<float>(log_likelihood), static_cast<float>(kl)};
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
