// Microseconds of the parts of the native step that are matrix products, at the paper's sizes or others, each alone:
//
//   bench_products [THREADS] [BATCH] [INPUTS] [OUTPUTS] [ZEROS]    (1 100 784 500 0.8; ZEROS: of the data)
//
// Medians and 10 % quantiles of 200 calls; GFLOP/s of the dense product, also where zeros are left out.
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../engine/cpu_step.h"

using namespace vae_fast;

namespace {

int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

template <class Call>
void time_of(const char* name, double flops, Call call) {
  std::vector<double> times;
  for (int i = 0; i < 220; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    if (i >= 20) times.push_back(took.count());
  }
  std::sort(times.begin(), times.end());
  const double median = times[times.size() / 2];
  std::printf("%-32s %8.1f us (10 %%: %8.1f) %7.1f GFLOP/s\n", name, median, times[times.size() / 10],
              flops / median / 1e3);
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, double otherwise) { return argc > i ? std::atof(argv[i]) : otherwise; };
  at::set_num_threads(static_cast<int>(argument(1, 1)));
  const auto batch = static_cast<int64_t>(argument(2, 100)), inputs = static_cast<int64_t>(argument(3, 784));
  const auto outputs = static_cast<int64_t>(argument(4, 500));
  const double zeros = argument(5, 0.8);
  const cpu::TileShape tile = cpu::tile();
  const int64_t panels = (outputs + tile.panel - 1) / tile.panel, width = panels * tile.panel;
  const int64_t rows = round_up(batch, tile.rows), panel_rows = round_up(inputs, tile.panel);
  const int64_t in_ld = round_up(round_up(inputs, tile.rows), tile.panel) + tile.panel, out_ld = width + tile.panel;
  std::mt19937 random(0);
  std::uniform_real_distribution<float> uniform(0, 1);
  std::vector<std::unique_ptr<engine::Buffer>> memory;  // on cache lines, as a step has it
  const auto filled = [&](int64_t count) {
    memory.push_back(std::make_unique<engine::Buffer>());
    float* const values = memory.back()->at_least(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) values[i] = uniform(random);
    return values;
  };
  float *const in = filled(rows * in_ld), *const sparse = filled(rows * in_ld), *const grad_in = filled(rows * in_ld);
  float *const out = filled(rows * out_ld), *const grad = filled(rows * out_ld);
  for (int64_t i = 0; i < rows * in_ld; ++i)
    if (i % in_ld >= inputs || uniform(random) < zeros) sparse[i] = 0;
  float *const weight = filled(panel_rows * width), *const state = filled(panel_rows * width);
  float *const bias = filled(width), *const bias_state = filled(width);
  float* const sums = filled(width * (panel_rows + tile.rows));
  std::vector<int32_t> columns(static_cast<size_t>(batch * (inputs + cpu::Nonzeros::kSpare)));
  std::vector<int32_t> per_row(static_cast<size_t>(batch)), per_pair(static_cast<size_t>(inputs));
  std::vector<cpu::Nonzeros::Pair> pairs(static_cast<size_t>(batch * inputs));
  const cpu::Nonzeros nonzeros{batch, inputs, columns.data(), per_row.data(), pairs.data(), per_pair.data()};
  const double flops = 2.0 * static_cast<double>(batch * inputs * outputs);
  std::printf("%s, %d threads, %ld x %ld x %ld\n", cpu::capability(), at::get_num_threads(), static_cast<long>(batch),
              static_cast<long>(inputs), static_cast<long>(outputs));

  for (const bool lists : {false, true}) {
    const cpu::Matrix x{lists ? sparse : in, in_ld};
    const auto find = [&] {
      cpu::launch(cpu::NonzerosOfRows{nonzeros, x});
      cpu::launch(cpu::NonzerosOfColumns{nonzeros, x});
    };
    if (lists) time_of("lists of nonzeros", 0, find);
    cpu::Forward forward{};
    forward.epilogue = cpu::Epilogue::tanh;
    forward.rows = batch, forward.inputs = inputs, forward.outputs = outputs;
    forward.logvar_column = width;
    forward.in = x, forward.weight = weight, forward.bias = bias, forward.out = {out, out_ld};
    forward.nonzeros = lists ? &nonzeros : nullptr;
    time_of(lists ? "forward, tanh, zeros left out" : "forward, tanh", flops, [&] { cpu::launch(forward); });
    cpu::WeightGradient update{};
    update.rows = batch, update.inputs = inputs, update.outputs = outputs;
    update.logvar_column = width;
    update.in = x, update.grad_out = {grad, out_ld}, update.nonzeros = lists ? &nonzeros : nullptr;
    update.rule.kind = UpdateKind::adagrad, update.rule.eps = 1e-8f, update.rule.kept = 1;
    update.factors = {1e-9f, 1};
    update.weight = weight, update.bias = bias;
    update.state[0] = state, update.bias_state[0] = bias_state, update.sums = sums;
    time_of(lists ? "update, Adagrad, zeros left out" : "update, Adagrad", flops, [&] { cpu::launch(&update, 1); });
  }
  const cpu::InputGradient gradient{cpu::Epilogue::tanh, false,  batch,       inputs,          outputs,
                                    {grad, out_ld},      weight, {in, in_ld}, {grad_in, in_ld}};
  time_of("input gradient, tanh", flops, [&] { cpu::launch(gradient); });
}
