// Element offsets beyond 2^31 and noise counters beyond 2^32: kernels run on the last rows of tensors so large that
// only those rows ever get memory.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "kernels.h"
#include "math/bernoulli.h"
#include "math/philox.h"

using namespace vae_fast;

namespace vae_fast::cpu::plain {  // of csrc/cpu/plain.cpp; the other instruction sets compile the same loops
void run(const BernoulliForward& args, int64_t begin, int64_t end);
void run(const BernoulliBackward& args, int64_t begin, int64_t end);
void run(const PhiloxNormal& args, int64_t begin, int64_t end);
}  // namespace vae_fast::cpu::plain

float* allocate(int64_t count) {
  void* memory = mmap(nullptr, static_cast<size_t>(count) * sizeof(float), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory != MAP_FAILED) return static_cast<float*>(memory);
  std::printf("this system does not lend so many addresses\n");
  std::exit(77);
}

void check(const char* what, double got, double wanted) {
  if (std::fabs(got - wanted) <= 1e-5 * std::fabs(wanted)) return;
  std::fprintf(stderr, "%s: got %.9g, wanted %.9g\n", what, got, wanted);
  std::exit(1);
}

int main() {
  const int64_t rows = (int64_t{1} << 22) + 1, cols = 1031, last = (rows - 1) * cols;  // last > 2^32
  float *logits = allocate(rows * cols), *grad_logits = allocate(rows * cols);
  float *sums = allocate(rows), *grad = allocate(rows), *x = allocate(cols);
  double sum = 0;
  for (int64_t c = 0; c < cols; ++c) {
    logits[last + c] = static_cast<float>(c % 17) - 8;
    x[c] = static_cast<float>(c % 2);
    sum += bernoulli_log_likelihood<double>(logits[last + c], x[c]);
  }
  grad[rows - 1] = 2;
  cpu::plain::run(BernoulliForward{DType::f32, DType::f32, rows, 1, cols, logits, x, sums}, rows - 1, rows);
  check("log_likelihood", sums[rows - 1], sum);
  cpu::plain::run(BernoulliBackward{DType::f32, DType::f32, rows, 1, cols, grad, logits, x, grad_logits}, last,
                  last + cols);
  for (int64_t c = 0; c < cols; ++c)
    check("grad_logits", grad_logits[last + c], 2 * bernoulli_grad_logit<double>(logits[last + c], x[c]));

  const int64_t count = int64_t{1} << 36, seed = 7;  // counters beyond 2^32: the high word counts
  float* noise = allocate(count);
  cpu::plain::run(PhiloxNormal{DType::f32, count, &seed, noise}, count - 6, count);
  for (int64_t i = count - 6; i < count; ++i) {
    double eps[4];
    philox_normal4(seed, i / 4, eps);
    check("noise", noise[i], eps[i % 4]);
  }
}
