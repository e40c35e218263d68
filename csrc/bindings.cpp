// The Python module vae_fast._C. Importing it registers the operators of ops.cpp; what it holds itself is what is no
// operator: facts about the build, and the native engine, which has a state.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

#include "engine/cpu_step.h"
#include "kernels.h"

#ifdef VAE_FAST_WITH_CUDA
namespace vae_fast::engine {
void bind_cuda_step(pybind11::module_& m);  // engine/cuda/step.cpp
}
#endif

namespace {

namespace py = pybind11;
using namespace vae_fast;
using namespace vae_fast::engine;

template <class Enum>
Enum named(const char* argument, const std::string& got, const std::vector<std::pair<const char*, Enum>>& wanted) {
  std::string names;
  for (const auto& [name, value] : wanted) {
    if (got == name) return value;
    names += (names.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  }
  throw std::invalid_argument(std::string(argument) + ": got \"" + got + "\", wanted one of " + names);
}

float* floats(const at::Tensor& t, const std::string& name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.sizes() == shape,
                    name, ": got ", t.scalar_type(), " of shape ", t.sizes(), " on ", t.device(),
                    ", wanted contiguous Float of shape ", shape, " on cpu");
  return t.data_ptr<float>();
}

const int64_t* integers(const at::Tensor& t, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == at::kLong && t.is_contiguous() && t.sizes() == shape,
                    name, ": got ", t.scalar_type(), " of shape ", t.sizes(), " on ", t.device(),
                    ", wanted contiguous Long of shape ", shape, " on cpu");
  return t.data_ptr<int64_t>();
}

// What Python gives of an optimizer: its kind and its numbers by their torch names
Optimizer optimizer_of(const std::string& kind, const py::dict& numbers) {
  Optimizer o{};
  o.kind = named<OptimizerKind>("optimizer", kind,
                                {{"sgd", OptimizerKind::sgd},
                                 {"adagrad", OptimizerKind::adagrad},
                                 {"adam", OptimizerKind::adam},
                                 {"adamw", OptimizerKind::adamw}});
  const auto number = [&](const char* name) { return numbers.contains(name) ? numbers[name].cast<double>() : 0.0; };
  o.lr = number("lr"), o.eps = number("eps"), o.beta1 = number("beta1"), o.beta2 = number("beta2");
  o.momentum = number("momentum"), o.weight_decay = number("weight_decay");
  o.accumulate_steps = static_cast<int64_t>(number("accumulate_steps"));
  return o;
}

// Some steps of one model, checked and ready to be run; holds what they read and write.
struct Run {
  CpuStep* step;
  std::vector<at::Tensor> held, trained;
  std::vector<Parameter> parameters;
  Optimizer optimizer;
  Data data;
  Steps steps;
  at::Tensor terms;
  void operator()() const {
    step->run(parameters, optimizer, data, steps, reinterpret_cast<Terms*>(terms.data_ptr<float>()));
    // Autograd may have kept a parameter for a backward pass, which must not take these for the same values.
    for (const at::Tensor& tensor : trained) tensor.unsafeGetTensorImpl()->bump_version();
  }
};
static_assert(sizeof(Terms) == 3 * sizeof(float));

Run prepare(CpuStep& step, const std::vector<at::Tensor>& parameters,
            const std::vector<std::vector<at::Tensor>>& states, const std::string& optimizer, const py::dict& numbers,
            int64_t updates_before, const at::Tensor& values, bool packed, bool dynamic, double scale,
            const at::Tensor& rows, const at::Tensor& sizes, const at::Tensor& seeds) {
  const Optimizer how = optimizer_of(optimizer, numbers);
  const auto shapes = step.weight_shapes();
  TORCH_CHECK_VALUE(parameters.size() == 2 * shapes.size() && states.size() == parameters.size(), "parameters: got ",
                    parameters.size(), " and the states of ", states.size(), ", wanted ", 2 * shapes.size(),
                    " of each");
  std::vector<Parameter> all;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto [outputs, inputs] = shapes[i / 2];
    const std::vector<int64_t> shape = i % 2 == 0 ? std::vector<int64_t>{outputs, inputs} : std::vector{outputs};
    const std::string name = "parameters[" + std::to_string(i) + "]";
    Parameter p{floats(parameters[i], name, shape), {nullptr, nullptr}};
    TORCH_CHECK_VALUE(static_cast<int>(states[i].size()) == how.states(), "states[", i, "]: got ", states[i].size(),
                      " tensors, wanted ", how.states());
    for (size_t s = 0; s < states[i].size(); ++s) p.state[s] = floats(states[i][s], "states of " + name, shape);
    all.push_back(p);
  }
  const bool bytes = values.scalar_type() == at::kByte;
  TORCH_CHECK_VALUE(values.device().is_cpu() && values.dim() == 2 && values.is_contiguous() &&
                        (bytes || (values.scalar_type() == at::kFloat && !packed)),
                    "values: got ", values.scalar_type(), " of shape ", values.sizes(), " on ", values.device(),
                    ", wanted contiguous Byte or Float [N, D] on cpu");
  const int64_t features = shapes.front().second;
  TORCH_CHECK_VALUE(values.size(1) == (packed ? (features + 7) / 8 : features), "values: got ", values.size(1),
                    " columns, wanted ", features, packed ? " bits" : "");
  const Data data{packed  ? DType::bits
                  : bytes ? DType::u8
                          : DType::f32,
                  dynamic,
                  static_cast<float>(scale),
                  values.size(0),
                  features,
                  values.const_data_ptr()};
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) > 0, "rows: got shape ", rows.sizes(), ", wanted [steps, width]");
  const Steps steps{rows.size(0),
                    rows.size(1),
                    integers(rows, "rows", rows.sizes()),
                    integers(sizes, "sizes", {rows.size(0)}),
                    integers(seeds, "seeds", {rows.size(0), 2}),
                    updates_before};
  for (int64_t s = 0; s < steps.count; ++s) {
    TORCH_CHECK_VALUE(steps.sizes[s] >= 1 && steps.sizes[s] <= steps.width, "sizes[", s, "]: got ", steps.sizes[s],
                      ", wanted 1 to ", steps.width);
    for (int64_t b = 0; b < steps.sizes[s]; ++b) {
      const int64_t row = steps.rows[s * steps.width + b];
      TORCH_CHECK_VALUE(row >= 0 && row < data.rows, "rows[", s, ", ", b, "]: got ", row, ", wanted 0 to ",
                        data.rows - 1);
    }
  }
  std::vector<at::Tensor> held{values, rows, sizes, seeds};
  for (const auto& state : states) held.insert(held.end(), state.begin(), state.end());
  return {
      &step, std::move(held), parameters, std::move(all), how, data, steps, at::empty({steps.count, 3}, at::kFloat)};
}

// Several models at once have one thread each, one model has all of them.
std::vector<at::Tensor> run(const std::vector<Run*>& runs) {
  {
    const py::gil_scoped_release release;
    if (runs.size() == 1) {
      (*runs[0])();
    } else {
      at::parallel_for(0, static_cast<int64_t>(runs.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) (*runs[static_cast<size_t>(i)])();
      });
    }
  }
  std::vector<at::Tensor> terms;
  for (const Run* one : runs) terms.push_back(one->terms);
  return terms;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", &cpu::capability,
        "The instruction set of the CPU kernels in use: \"avx512\", \"avx2\" or \"plain\".");

  py::class_<CpuStep>(m, "CpuStep", "The native training step on a CPU; vae_fast.engines.NativeEngine drives it.")
      .def(py::init([](int64_t data_dim, std::vector<int64_t> encoder_hidden, int64_t latent_dim,
                       std::vector<int64_t> decoder_hidden, const std::string& activation,
                       const std::string& likelihood, const std::string& estimator, int64_t num_samples, double beta,
                       double weight_prior, const std::string& precision) {
             const Network network{
                 data_dim,
                 latent_dim,
                 std::move(encoder_hidden),
                 std::move(decoder_hidden),
                 named<Activation>("activation", activation, {{"tanh", Activation::tanh}, {"relu", Activation::relu}}),
                 named<Likelihood>("likelihood", likelihood,
                                   {{"bernoulli", Likelihood::bernoulli},
                                    {"gaussian", Likelihood::gaussian},
                                    {"gaussian_sigmoid_mean", Likelihood::gaussian_sigmoid_mean}})};
             const Objective objective{named<Estimator>("estimator", estimator,
                                                        {{"sgvb_b", Estimator::sgvb_b}, {"sgvb_a", Estimator::sgvb_a}}),
                                       num_samples, static_cast<float>(beta), static_cast<float>(weight_prior)};
             return new CpuStep(
                 network, objective,
                 named<Precision>("precision", precision, {{"exact", Precision::exact}, {"fast", Precision::fast}}));
           }),
           py::kw_only(), py::arg("data_dim"), py::arg("encoder_hidden"), py::arg("latent_dim"),
           py::arg("decoder_hidden"), py::arg("activation"), py::arg("likelihood"), py::arg("estimator"),
           py::arg("num_samples"), py::arg("beta"), py::arg("weight_prior"), py::arg("precision"))
      .def("prepare", &prepare, py::keep_alive<0, 1>(), py::kw_only(), py::arg("parameters"), py::arg("states"),
           py::arg("optimizer"), py::arg("numbers"), py::arg("updates_before"), py::arg("values"), py::arg("packed"),
           py::arg("dynamic"), py::arg("scale"), py::arg("rows"), py::arg("sizes"), py::arg("seeds"));
  py::class_<Run>(m, "Run", "Some steps of one model, from CpuStep.prepare.");
  m.def("run", &run, py::arg("runs"), "Carries out runs of different models; the terms [steps, 3] of each.");
#ifdef VAE_FAST_WITH_CUDA
  bind_cuda_step(m);
#endif
}
