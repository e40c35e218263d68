// The Python module vae_fast._C. Importing it registers the operators of ops.cpp; what it holds itself is what is no
// operator: facts about the build, and the native engine, which has a state.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <string>
#include <utility>
#include <vector>

#include "engine/arguments.h"
#include "engine/cpu_step.h"
#include "engine/update_rule.h"
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
            const std::vector<std::vector<at::Tensor>>& states, const std::string& optimizer, const py::dict& options,
            const at::Tensor& data, bool packed, bool dynamic, double scale, const at::Tensor& rows,
            const at::Tensor& sizes, const at::Tensor& seeds, int64_t updates) {
  TORCH_CHECK_VALUE(data.is_cpu(), "data: got device ", data.device(), ", wanted cpu");
  const Optimizer how = optimizer_of(optimizer, options);
  const Data described = data_of(data, packed, dynamic, scale, step.network());
  const Steps steps = steps_of(rows, sizes, seeds, updates, described.rows);
  std::vector<at::Tensor> held{data, rows, sizes, seeds};
  for (const auto& state : states) held.insert(held.end(), state.begin(), state.end());
  return {&step, std::move(held), parameters, parameters_of(parameters, states, step.network(), how, data.device()),
          how,   described,       steps,      at::empty({steps.count, 3}, at::kFloat)};
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

void adagrad_update(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& grads,
                    const std::vector<at::Tensor>& sums, const at::Tensor& step, double lr, double eps,
                    int64_t accumulate_steps) {
  TORCH_CHECK_VALUE(step.is_cpu() && step.scalar_type() == at::kFloat && step.numel() == 1, "step: got ",
                    step.toString(), " ", step.sizes(), ", wanted one float32 on the CPU");
  TORCH_CHECK_VALUE(grads.size() == parameters.size() && sums.size() == parameters.size(), "got ", parameters.size(),
                    " parameters, ", grads.size(), " grads and ", sums.size(), " sums, wanted as many of each");
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto check = [&](const char* name, const at::Tensor& t) {
      TORCH_CHECK_VALUE(
          t.is_cpu() && t.scalar_type() == at::kFloat && t.is_contiguous() && t.sizes() == parameters[i].sizes(), name,
          "[", i, "]: got ", t.toString(), " ", t.sizes(), t.is_contiguous() ? "" : " with gaps",
          ", wanted contiguous float32 on the CPU, ", parameters[i].sizes());
    };
    check("parameters", parameters[i]);
    check("grads", grads[i]);
    check("sums", sums[i]);
  }
  const Optimizer adagrad{OptimizerKind::adagrad, lr, eps, 0, 0, 0, 0, 0};
  const UpdateRule rule = rule_of(adagrad);
  const auto number = static_cast<int64_t>(*step.const_data_ptr<float>());
  const StepFactors factors = step_factors(rule.kind, lr, 0, 0, accumulate_steps, number);
  const py::gil_scoped_release release;
  for (size_t i = 0; i < parameters.size(); ++i) {
    cpu::launch(cpu::AdagradUpdate{parameters[i].numel(), rule, factors, grads[i].const_data_ptr<float>(),
                                   parameters[i].data_ptr<float>(), sums[i].data_ptr<float>()});
    for (const at::Tensor& changed : {parameters[i], sums[i]}) changed.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", &cpu::capability,
        "The instruction set of the CPU kernels in use: \"amx\", \"avx512_bf16\", \"avx512\", \"avx2\" or \"plain\".");

  m.def("adagrad_update", &adagrad_update, py::arg("parameters"), py::arg("grads"), py::arg("sums"), py::arg("step"),
        py::kw_only(), py::arg("lr"), py::arg("eps"), py::arg("accumulate_steps"),
        "A step of vae_fast.optim.Adagrad on float32 tensors, in one pass over each.");

  py::class_<CpuStep>(m, "CpuStep", "The native training step on a CPU; vae_fast.engines.NativeEngine drives it.")
      .def(py::init([](int64_t data_dim, std::vector<int64_t> encoder_hidden, int64_t latent_dim,
                       std::vector<int64_t> decoder_hidden, const std::string& activation,
                       const std::string& likelihood, const std::string& estimator, int64_t num_samples, double beta,
                       double weight_prior, const std::string& precision, double logvar_scale) {
             const Objective objective = objective_of(estimator, num_samples, beta, weight_prior);
             const Precision how = precision_of(precision);
             TORCH_CHECK_VALUE(objective.estimator != Estimator::wake_sleep || how == Precision::exact,
                               "estimator: got \"wake_sleep\" with precision \"", precision, "\", wanted \"exact\"");
             return new CpuStep(network_of(data_dim, std::move(encoder_hidden), latent_dim, std::move(decoder_hidden),
                                           activation, likelihood, logvar_scale),
                                objective, how);
           }),
           py::kw_only(), py::arg("data_dim"), py::arg("encoder_hidden"), py::arg("latent_dim"),
           py::arg("decoder_hidden"), py::arg("activation"), py::arg("likelihood"), py::arg("estimator"),
           py::arg("num_samples"), py::arg("beta"), py::arg("weight_prior"), py::arg("precision"),
           py::arg("logvar_scale") = 1.0)
      .def("prepare", &prepare, py::keep_alive<0, 1>(), py::kw_only(), py::arg("parameters"), py::arg("states"),
           py::arg("optimizer"), py::arg("options"), py::arg("data"), py::arg("packed"), py::arg("dynamic"),
           py::arg("scale"), py::arg("rows"), py::arg("sizes"), py::arg("seeds"), py::arg("updates"));
  py::class_<Run>(m, "Run", "Some steps of one model, from CpuStep.prepare.");
  m.def("run", &run, py::arg("runs"), "Carries out runs of different models; the terms [steps, 3] of each.");
#ifdef VAE_FAST_WITH_CUDA
  bind_cuda_step(m);
#endif
}
