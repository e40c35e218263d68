// The native step on networks and minibatches of awkward sizes, for the sanitizers; and that training lowers the loss,
// whatever the number of threads, to the same bits. That a step is right is tested from Python (tests/test_native.py).
#include "../engine/cpu_step.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>

using namespace vae_fast;
using namespace vae_fast::engine;

namespace {

struct Case {
  Network network;
  Objective objective;
  Optimizer optimizer;
  Precision precision;
  DType dtype;
  int64_t batch;
};

std::vector<Terms> train(const Case& c) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.1f);
  CpuStep step(c.network, c.objective, c.precision);
  std::vector<std::vector<float>> memory;
  std::vector<Parameter> parameters;
  const auto tensor = [&](int64_t count, bool zero) {
    memory.emplace_back(static_cast<size_t>(count));
    if (!zero)
      for (float& value : memory.back()) value = normal(random);
    return memory.back().data();
  };
  for (const auto& shape : parameter_shapes(c.network)) {
    const int64_t count = shape.size() == 2 ? shape[0] * shape[1] : shape[0];
    parameters.push_back({tensor(count, false), {tensor(count, true), tensor(count, true)}});
  }
  constexpr int64_t kRows = 40, kSteps = 25;
  const int64_t row_bytes = c.dtype == DType::f32  ? 4 * c.network.data_dim
                            : c.dtype == DType::u8 ? c.network.data_dim
                                                   : (c.network.data_dim + 7) / 8;
  std::vector<uint8_t> values(static_cast<size_t>(kRows * row_bytes));
  for (auto& value : values) value = random() % 3 ? 0 : static_cast<uint8_t>(random());
  if (c.dtype == DType::f32)
    for (int64_t i = 0; i < kRows * c.network.data_dim; ++i)
      reinterpret_cast<float*>(values.data())[i] = static_cast<float>(random() % 100) / 100;
  std::vector<int64_t> rows, sizes, seeds;
  for (int64_t s = 0; s < kSteps; ++s) {
    sizes.push_back(s % 5 == 4 ? 1 : c.batch);
    for (int64_t b = 0; b < c.batch; ++b) rows.push_back(static_cast<int64_t>(random()) % kRows);
    seeds.push_back(s), seeds.push_back(s + 100);
  }
  std::vector<Terms> terms(kSteps);
  const Data data{c.dtype, c.dtype == DType::u8, c.dtype == DType::u8 ? 1.0f / 255 : 1.0f,
                  kRows,   c.network.data_dim,   values.data()};
  step.run(parameters, c.optimizer, data, {kSteps, c.batch, rows.data(), sizes.data(), seeds.data(), 0}, terms.data());
  return terms;
}

}  // namespace

int main() {
  try {
    std::printf("instruction set: %s\n", cpu::capability());
  } catch (const std::runtime_error& missing) {
    std::printf("%s\n", missing.what());
    return 77;
  }
  const Optimizer adagrad{OptimizerKind::adagrad, 0.05, 1e-8, 0, 0, 0, 0, 0};
  const Optimizer adam{OptimizerKind::adam, 0.01, 1e-8, 0.9, 0.999, 0, 0, 0};
  const Optimizer sgd{OptimizerKind::sgd, 1e-3, 0, 0, 0, 0, 0, 0};
  const Objective one{Estimator::sgvb_b, 1, 1.0f, 0.0f}, several{Estimator::sgvb_a, 3, 0.5f, 0.01f},
      wake_sleep{Estimator::wake_sleep, 1, 1.0f, 0.01f};
  const std::vector<Case> cases = {
      {{37, 3, {19}, {19}, Activation::tanh, Likelihood::bernoulli}, one, adagrad, Precision::exact, DType::u8, 23},
      {{1, 1, {1}, {}, Activation::relu, Likelihood::bernoulli}, one, sgd, Precision::exact, DType::bits, 1},
      {{33, 4, {21}, {18}, Activation::softplus, Likelihood::gaussian}, one, sgd, Precision::exact, DType::f32, 9},
      {{65, 17, {}, {33, 5}, Activation::relu, Likelihood::gaussian}, several, adam, Precision::exact, DType::f32, 7},
      {{30, 2, {40, 3}, {64}, Activation::tanh, Likelihood::gaussian_sigmoid_mean},
       one,
       adam,
       Precision::fast,
       DType::f32,
       130},
      {{129, 5, {16}, {16}, Activation::tanh, Likelihood::bernoulli},
       several,
       adagrad,
       Precision::fast,
       DType::bits,
       301},
      {{37, 17, {19}, {5, 19}, Activation::tanh, Likelihood::bernoulli, 0.1f},
       wake_sleep,
       adagrad,
       Precision::exact,
       DType::u8,
       23},
      {{65, 3, {}, {40}, Activation::relu, Likelihood::gaussian_sigmoid_mean, 0.1f},
       wake_sleep,
       adam,
       Precision::exact,
       DType::f32,
       130},
  };
  int failures = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    at::set_num_threads(1);
    const auto alone = train(cases[i]);
    at::set_num_threads(2);
    const auto together = train(cases[i]);
    const bool same = std::memcmp(alone.data(), together.data(), alone.size() * sizeof(Terms)) == 0;
    const bool lower = alone[alone.size() - 2].elbo > alone[0].elbo;
    const bool finite = std::isfinite(alone.back().elbo);
    bool near = true;  // bfloat16 products to those of float32, while the parameters are the same
    if (cases[i].precision == Precision::fast) {
      Case other = cases[i];
      other.precision = Precision::exact;
      const float exact = train(other)[0].elbo;
      near = std::fabs(alone[0].elbo - exact) < 0.005f * std::fabs(exact);
    }
    if (same && lower && finite && near) continue;
    std::printf("case %zu: elbo %g to %g, threads %s%s\n", i, alone[0].elbo, alone[alone.size() - 2].elbo,
                same ? "agree" : "disagree", near ? "" : ", far from exact");
    ++failures;
  }
  return failures == 0 ? 0 : 1;
}
