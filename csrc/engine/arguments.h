// What Python gives the native step, on either device, checked and in the terms of network.h. The arguments have the
// same names in CpuStep and CudaStep (vae_fast/_C.pyi).
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "network.h"

namespace vae_fast::engine {

// The position of `got` among the names of an enumeration, which stand in its order
template <class Choice>
Choice choose(const char* name, const std::string& got, std::initializer_list<const char*> wanted) {
  std::string names;
  int position = 0;
  for (const char* choice : wanted) {
    if (got == choice) return static_cast<Choice>(position);
    names += (position++ ? ", \"" : "\"") + std::string(choice) + "\"";
  }
  C10_THROW_ERROR(ValueError, c10::str(name, ": got \"", got, "\", wanted one of ", names));
}

inline Network network_of(int64_t data_dim, std::vector<int64_t> encoder_hidden, int64_t latent_dim,
                          std::vector<int64_t> decoder_hidden, const std::string& activation,
                          const std::string& likelihood, double logvar_scale = 1) {
  return {data_dim,
          latent_dim,
          std::move(encoder_hidden),
          std::move(decoder_hidden),
          choose<Activation>("activation", activation, {"tanh", "relu", "softplus"}),
          choose<Likelihood>("likelihood", likelihood, {"bernoulli", "gaussian", "gaussian_sigmoid_mean"}),
          static_cast<float>(logvar_scale)};
}

inline Objective objective_of(const std::string& estimator, int64_t num_samples, double beta, double weight_prior) {
  TORCH_CHECK_VALUE(num_samples >= 1, "num_samples: got ", num_samples, ", wanted an integer of 1 or more");
  TORCH_CHECK_VALUE(estimator != "wake_sleep" || (num_samples == 1 && beta == 1),
                    "estimator: got \"wake_sleep\" with num_samples ", num_samples, " and beta ", beta,
                    ", wanted 1 and 1");
  return {choose<Estimator>("estimator", estimator, {"sgvb_b", "sgvb_a", "wake_sleep"}), num_samples,
          static_cast<float>(beta), static_cast<float>(weight_prior)};
}

inline Precision precision_of(const std::string& name) {
  return choose<Precision>("precision", name, {"exact", "fast"});
}

// An optimizer's kind and its numbers by their torch names; what it has not may be left out
inline Optimizer optimizer_of(const std::string& name, const pybind11::dict& options) {
  Optimizer optimizer = {};
  optimizer.kind = choose<OptimizerKind>("optimizer", name, {"sgd", "adagrad", "adam", "adamw"});
  for (const auto& [key, value] : options) {
    const std::string option = pybind11::cast<std::string>(key);
    const double number = pybind11::cast<double>(value);
    const std::pair<const char*, double*> reals[] = {
        {"lr", &optimizer.lr},       {"eps", &optimizer.eps},           {"beta1", &optimizer.beta1},
        {"beta2", &optimizer.beta2}, {"momentum", &optimizer.momentum}, {"weight_decay", &optimizer.weight_decay}};
    bool known = option == "accumulate_steps";
    if (known) optimizer.accumulate_steps = static_cast<int64_t>(number);
    for (const auto& [real, place] : reals) {
      if (option == real) *place = number, known = true;
    }
    TORCH_CHECK_VALUE(known, "options: got \"", option,
                      "\", wanted lr, eps, beta1, beta2, momentum, weight_decay or accumulate_steps");
  }
  return optimizer;
}

// Training data [N, D] of uint8 or float32, or packed, uint8 [N, ceil(D / 8)]
inline Data data_of(const at::Tensor& data, bool packed, bool dynamic, double scale, const Network& network) {
  const at::ScalarType type = data.scalar_type();
  TORCH_CHECK_VALUE(type == at::kByte || (type == at::kFloat && !packed), "data: got dtype ", type, ", wanted uint8",
                    packed ? ", which packed bits are" : " or float32");
  const int64_t width = packed ? (network.data_dim + 7) / 8 : network.data_dim;
  TORCH_CHECK_VALUE(data.dim() == 2 && data.size(1) == width && data.is_contiguous(), "data: got shape ", data.sizes(),
                    " and strides ", data.strides(), ", wanted contiguous [N, ", width, "]");
  const DType dtype = packed ? DType::bits : type == at::kFloat ? DType::f32 : DType::u8;
  return {dtype, dynamic, static_cast<float>(scale), data.size(0), network.data_dim, data.const_data_ptr()};
}

inline float* trained(const std::string& name, const at::Tensor& t, at::IntArrayRef shape, const at::Device& device) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": got shape ", t.sizes(), ", wanted ", shape);
  TORCH_CHECK_VALUE(t.scalar_type() == at::kFloat, name, ": got dtype ", t.scalar_type(), ", wanted float32");
  TORCH_CHECK_VALUE(t.device() == device, name, ": got device ", t.device(), ", wanted ", device, ", where data is");
  TORCH_CHECK_VALUE(t.is_contiguous(), name, ": got strides ", t.strides(), ", wanted a contiguous tensor");
  return t.mutable_data_ptr<float>();
}

// Parameters in the order of named_parameters(), and for each state of the optimizer one tensor for each parameter
inline std::vector<Parameter> parameters_of(const std::vector<at::Tensor>& parameters,
                                            const std::vector<std::vector<at::Tensor>>& states, const Network& network,
                                            const Optimizer& optimizer, const at::Device& device) {
  const auto shapes = parameter_shapes(network);
  TORCH_CHECK_VALUE(parameters.size() == shapes.size(), "parameters: got ", parameters.size(), " tensors, wanted ",
                    shapes.size());
  TORCH_CHECK_VALUE(static_cast<int>(states.size()) == optimizer.states(), "states: got ", states.size(),
                    " lists, wanted ", optimizer.states());
  std::vector<Parameter> all(shapes.size());
  for (size_t i = 0; i < shapes.size(); ++i)
    all[i].value = trained("parameters[" + std::to_string(i) + "]", parameters[i], shapes[i], device);
  for (size_t k = 0; k < states.size(); ++k) {
    const std::string name = "states[" + std::to_string(k) + "]";
    TORCH_CHECK_VALUE(states[k].size() == shapes.size(), name, ": got ", states[k].size(), " tensors, wanted ",
                      shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i)
      all[i].state[k] = trained(name + "[" + std::to_string(i) + "]", states[k][i], shapes[i], device);
  }
  return all;
}

inline const int64_t* integers(const char* name, const at::Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": got shape ", t.sizes(), ", wanted ", shape);
  TORCH_CHECK_VALUE(t.scalar_type() == at::kLong && t.is_cpu() && t.is_contiguous(), name, ": got ", t.scalar_type(),
                    " on ", t.device(), ", wanted contiguous int64 on the CPU");
  return t.const_data_ptr<int64_t>();
}

// Steps of minibatches of data with `data_rows` rows
inline Steps steps_of(const at::Tensor& rows, const at::Tensor& sizes, const at::Tensor& seeds, int64_t updates,
                      int64_t data_rows) {
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) > 0, "rows: got shape ", rows.sizes(), ", wanted [steps, width]");
  const int64_t n = rows.size(0), width = rows.size(1);
  const Steps steps{n,
                    width,
                    integers("rows", rows, {n, width}),
                    integers("sizes", sizes, {n}),
                    integers("seeds", seeds, {n, 2}),
                    updates};
  for (int64_t s = 0; s < n; ++s) {
    TORCH_CHECK_VALUE(steps.sizes[s] >= 1 && steps.sizes[s] <= width, "sizes[", s, "]: got ", steps.sizes[s],
                      ", wanted 1 to ", width);
    for (int64_t b = 0; b < steps.sizes[s]; ++b) {
      const int64_t row = steps.rows[s * width + b];
      TORCH_CHECK_VALUE(row >= 0 && row < data_rows, "rows[", s, ", ", b, "]: got ", row, ", wanted 0 to ",
                        data_rows - 1);
    }
  }
  return steps;
}

}  // namespace vae_fast::engine
