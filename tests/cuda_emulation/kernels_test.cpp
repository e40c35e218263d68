// Every launch of csrc/cuda against the formulas of csrc/math in double, by plain loops: all types, widths around every
// boundary of the row table, misaligned tensors, repeated targets, several samples, outputs that are not wanted.
//
//   kernels_test [--quick] [KERNEL ...]   the kernels to test, by the name of their struct in kernels.h; all without
//   names
//
// tests/test_cuda_emulation.py builds it with g++ on the emulated device of this folder; with nvcc it is the same test
// on a real one, --quick for compute-sanitizer (bench/gpu.py).
#include "../../csrc/kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/math/bernoulli.h"
#include "../../csrc/math/gaussian.h"
#include "../../csrc/math/philox.h"

using namespace vae_fast;
using Values = std::vector<double>;

// --- the cases -------------------------------------------------------------------------------------------------------

std::vector<int64_t> all_cols = {0, 1, 3, 4, 5, 8, 20, 31, 32, 33, 127, 128, 784, 1025, 4500, 5000};
const int64_t kRows[] = {0, 1, 2, 7};
const DType kTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

const char* name_of(DType t) {
  const char* names[] = {"f32", "f64", "f16", "bf16", "u8", "bits"};
  return names[static_cast<int>(t)];
}

int64_t size_of(DType t) {
  const int64_t sizes[] = {4, 8, 2, 2, 1};
  return sizes[static_cast<int>(t)];
}

// Relative distance of neighbours in t, and the smallest one.
double epsilon_of(DType t) {
  return t == DType::f64 ? 0x1p-52 : t == DType::f32 ? 0x1p-23 : t == DType::f16 ? 0x1p-10 : 0x1p-7;
}
double tiny_of(DType t) { return t == DType::f64 ? 0x1p-1074 : t == DType::f16 ? 0x1p-24 : 0x1p-133; }

DType loss_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }

// How a tensor lies in memory: all aligned, or some or all of them shifted by so many elements.
int64_t shift = 1;
enum class Layout { aligned, one_shifted, all_shifted };
const Layout kLayouts[] = {Layout::aligned, Layout::one_shifted, Layout::all_shifted};

struct Case {
  DType dtype, x_dtype;
  int64_t rows, cols, samples, x_rows;
  Layout layout;
};

std::string describe(const Case& c) {
  char text[160];
  std::snprintf(text, sizeof text, "%s x %s, %lld x %lld, samples %lld, x_rows %lld, layout %d", name_of(c.dtype),
                name_of(c.x_dtype), static_cast<long long>(c.rows), static_cast<long long>(c.cols),
                static_cast<long long>(c.samples), static_cast<long long>(c.x_rows), static_cast<int>(c.layout));
  return text;
}

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "%s\n", message.c_str());
  std::exit(1);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) fail(std::string("CUDA: ") + cudaGetErrorString(error));
}

// --- tensors ---------------------------------------------------------------------------------------------------------

void encode(DType t, double value, unsigned char* p) {
  const float f = static_cast<float>(value);
  if (t == DType::f64) std::memcpy(p, &value, 8);
  if (t == DType::f32) std::memcpy(p, &f, 4);
  if (t == DType::u8) *p = static_cast<unsigned char>(value);
  if (t == DType::f16) {
    const __half h = __float2half_rn(f);
    std::memcpy(p, &h, 2);
  }
  if (t == DType::bf16) {
    const __nv_bfloat16 b = __float2bfloat16_rn(f);
    std::memcpy(p, &b, 2);
  }
}

double decode(DType t, const unsigned char* p) {
  double d = 0;
  float f = 0;
  __half h;
  __nv_bfloat16 b;
  switch (t) {
    case DType::f64:
      std::memcpy(&d, p, 8);
      return d;
    case DType::f32:
      std::memcpy(&f, p, 4);
      return static_cast<double>(f);
    case DType::f16:
      std::memcpy(&h, p, 2);
      return static_cast<double>(__half2float(h));
    case DType::bf16:
      std::memcpy(&b, p, 2);
      return static_cast<double>(__bfloat162float(b));
    default:
      return *p;
  }
}

enum class Use { input, output };

// A tensor on the device. Bytes around it are 0xff, which is NaN in every type. An output lies between two guards of
// them and `intact` finds who wrote there; an input ends where its memory ends, so that who reads on is stopped by the
// device.
class Tensor {
 public:
  Tensor(DType type, int64_t count, bool shifted, Use use)
      : type_(type),
        count_(count),
        front_(kGuard + (shifted ? shift * size_of(type) : 0)),
        back_(use == Use::output ? kGuard : 0),
        values(static_cast<size_t>(count)) {
    bytes_.assign(static_cast<size_t>(front_ + count * size_of(type) + back_), 0xff);
    check(cudaMalloc(&memory_, bytes_.size()));
    upload();
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { cudaFree(memory_); }

  // Draws the values, rounded to the type, and puts them on the device.
  Tensor& fill(const std::function<double()>& draw) {
    for (int64_t i = 0; i < count_; ++i) {
      encode(type_, draw(), element(i));
      values[static_cast<size_t>(i)] = decode(type_, element(i));
    }
    upload();
    return *this;
  }

  // What a launch wrote.
  const Values& fetch() {
    check(cudaMemcpy(bytes_.data(), memory_, bytes_.size(), cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < count_; ++i) values[static_cast<size_t>(i)] = decode(type_, element(i));
    return values;
  }

  bool intact() const {
    const auto is_guard = [](unsigned char byte) { return byte == 0xff; };
    return std::all_of(bytes_.begin(), bytes_.begin() + front_, is_guard) &&
           std::all_of(bytes_.end() - back_, bytes_.end(), is_guard);
  }

  void* pointer() const { return static_cast<char*>(memory_) + front_; }
  DType type() const { return type_; }

 private:
  static constexpr int64_t kGuard = 32;

  unsigned char* element(int64_t i) { return bytes_.data() + front_ + i * size_of(type_); }
  void upload() { check(cudaMemcpy(memory_, bytes_.data(), bytes_.size(), cudaMemcpyHostToDevice)); }

  DType type_;
  int64_t count_, front_, back_;
  std::vector<unsigned char> bytes_;
  void* memory_ = nullptr;

 public:
  Values values;
};

uint64_t random_state = 1;

double uniform() {  // splitmix64
  uint64_t z = random_state += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
double symmetric() { return 6 * uniform() - 3; }

// The tensors of one case; the first one made is the one that Layout::one_shifted shifts.
class Tensors {
 public:
  explicit Tensors(const Case& c) : case_(c) {}
  ~Tensors() {
    for (Tensor* t : all_) delete t;
  }
  Tensor& input(int64_t count) { return make(case_.dtype, count, Use::input).fill(symmetric); }
  Tensor& output(int64_t count) { return make(case_.dtype, count, Use::output); }
  Tensor& loss_input() { return make(loss_of(case_.dtype), case_.rows, Use::input).fill(symmetric); }
  Tensor& loss_output() { return loss_output(case_.rows); }
  Tensor& loss_output(int64_t count) { return make(loss_of(case_.dtype), count, Use::output); }
  // Its rows may be further apart than they are wide.
  Tensor& target(bool binary, int64_t gap = 0) {
    if (case_.x_dtype == DType::bits) return packed_target();
    const bool hard = case_.x_dtype == DType::u8;
    return make(case_.x_dtype, case_.x_rows * (case_.cols + gap), Use::input).fill([=] {
      if (hard || (binary && uniform() < 0.5)) return uniform() < 0.5 ? 0.0 : 1.0;
      return binary ? uniform() : symmetric();
    });
  }
  // Bytes on the device, and their bits as its values. The unused bits of a row are drawn too: they must not matter.
  Tensor& packed_target() {
    const int64_t width = (case_.cols + 7) / 8;
    Tensor& x = make(DType::u8, case_.x_rows * width, Use::input).fill([] { return std::floor(256 * uniform()); });
    Values bits;
    for (int64_t r = 0; r < case_.x_rows; ++r) {
      for (int64_t c = 0; c < case_.cols; ++c)
        bits.push_back(static_cast<int>(x.values[static_cast<size_t>(r * width + c / 8)]) >> c % 8 & 1);
    }
    x.values = bits;
    return x;
  }
  const int64_t* seed(int64_t value) {
    all_.push_back(new Tensor(DType::f64, 1, false, Use::input));  // eight bytes; their meaning is the kernel's
    check(cudaMemcpy(all_.back()->pointer(), &value, sizeof value, cudaMemcpyHostToDevice));
    return static_cast<const int64_t*>(all_.back()->pointer());
  }

 private:
  Tensor& make(DType type, int64_t count, Use use) {
    const bool shifted = case_.layout == Layout::all_shifted || (case_.layout == Layout::one_shifted && all_.empty());
    all_.push_back(new Tensor(type, count, shifted, use));
    return *all_.back();
  }

  Case case_;
  std::vector<Tensor*> all_;
};

// --- comparison ------------------------------------------------------------------------------------------------------

bool quick = false;
int64_t cases_run = 0;
double worst = 0;  // error over bound

// |got - wanted| against rounding to the output's type, plus `slack` units of the arithmetic's type at the size of the
// terms.
void compare(const Case& c, const char* what, Tensor& got, const Values& wanted, const Values& size, double slack) {
  const Values& values = got.fetch();
  if (!got.intact()) fail(describe(c) + ": " + what + " was written beyond its ends");
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double rounding = 0.501 * epsilon_of(got.type()) * std::fabs(wanted[i]) + tiny_of(got.type());
    const double bound = rounding + slack * epsilon_of(loss_of(c.dtype)) * size[i];
    const double error = std::fabs(values[i] - wanted[i]);
    if (!(error <= bound)) {
      char text[200];
      std::snprintf(text, sizeof text, ": %s[%zu] is %.17g, wanted %.17g (error %.3g, bound %.3g)", what, i, values[i],
                    wanted[i], error, bound);
      fail(describe(c) + text);
    }
    worst = std::max(worst, error / bound);
  }
}

// What a launch asks for to sum wide rows: NaN all over, between two guards.
std::unique_ptr<Tensor> memory;
int64_t workspaces = 0;
const cuda::Workspace workspace = [](size_t bytes) {
  if (memory) fail("a launch asked for memory twice");
  memory = std::make_unique<Tensor>(DType::u8, static_cast<int64_t>(bytes), false, Use::output);
  ++workspaces;
  return memory->pointer();
};

void launched(const Case& c, int error) {
  if (error != 0) fail(describe(c) + ": launch failed: " + cuda::error_string(error));
  check(cudaDeviceSynchronize());
  ++cases_run;
  if (!memory) return;
  memory->fetch();
  if (!memory->intact()) fail(describe(c) + ": the workspace was written beyond its ends");
  memory.reset();
}

// A value and the sum of the sizes of its terms, which bounds its rounding error.
struct Sum {
  double value = 0, size = 0;
  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
};

struct Expected {
  Values value, size;
  explicit Expected(int64_t count) : value(static_cast<size_t>(count)), size(static_cast<size_t>(count)) {}
  void set(int64_t i, const Sum& sum) {
    value[static_cast<size_t>(i)] = sum.value;
    size[static_cast<size_t>(i)] = sum.size;
  }
};

constexpr double kElementSlack = 16, kRowSlack = 64;

void compare(const Case& c, const char* what, Tensor& got, const Expected& e, double slack) {
  compare(c, what, got, e.value, e.size, slack);
}

double at(const Tensor& t, int64_t i) { return t.values[static_cast<size_t>(i)]; }

std::vector<double> noise(int64_t seed, int64_t count) {
  std::vector<double> eps(static_cast<size_t>((count + 3) / 4 * 4));
  for (size_t i = 0; i < eps.size(); i += 4) philox_normal4(seed, static_cast<int64_t>(i / 4), &eps[i]);
  return eps;
}

// --- the kernels -----------------------------------------------------------------------------------------------------

using R = double;

void test(const Case& c, GaussianKLForward) {
  Tensors t(c);
  Tensor &mu = t.input(c.rows * c.cols), &logvar = t.input(c.rows * c.cols), &kl = t.loss_output();
  launched(c, cuda::launch(GaussianKLForward{c.dtype, c.rows, c.cols, mu.pointer(), logvar.pointer(), kl.pointer()},
                           nullptr, workspace));
  Expected wanted(c.rows);
  for (int64_t r = 0; r < c.rows; ++r) {
    Sum sum;
    for (int64_t i = r * c.cols; i < (r + 1) * c.cols; ++i) sum.add(gaussian_kl<R>(at(mu, i), at(logvar, i)));
    wanted.set(r, sum);
  }
  compare(c, "kl", kl, wanted, kRowSlack);
}

void test(const Case& c, GaussianKLBackward) {
  for (int outputs = 1; outputs <= 3; ++outputs) {  // bit 0: grad_mu, bit 1: grad_logvar
    Tensors t(c);
    const int64_t n = c.rows * c.cols;
    Tensor &mu = t.input(n), &logvar = t.input(n), &grad_kl = t.loss_input();
    Tensor &grad_mu = t.output(n), &grad_logvar = t.output(n);
    launched(c, cuda::launch(GaussianKLBackward{c.dtype, c.rows, c.cols, grad_kl.pointer(), mu.pointer(),
                                                logvar.pointer(), outputs & 1 ? grad_mu.pointer() : nullptr,
                                                outputs & 2 ? grad_logvar.pointer() : nullptr},
                             nullptr, workspace));
    Expected to_mu(n), to_logvar(n);
    for (int64_t i = 0; i < n; ++i) {
      Sum m, l;
      m.add(at(grad_kl, i / c.cols) * at(mu, i));
      l.add(at(grad_kl, i / c.cols) * gaussian_kl_grad_logvar<R>(at(logvar, i)));
      to_mu.set(i, m);
      to_logvar.set(i, l);
    }
    if (outputs & 1) compare(c, "grad_mu", grad_mu, to_mu, kElementSlack);
    if (outputs & 2) compare(c, "grad_logvar", grad_logvar, to_logvar, kElementSlack);
  }
}

void test(const Case& c, GaussianKLDoubleBackward) {
  Tensors t(c);
  const int64_t n = c.rows * c.cols;
  Tensor &v_mu = t.input(n), &v_logvar = t.input(n), &grad_kl = t.loss_input(), &mu = t.input(n), &logvar = t.input(n);
  Tensor &ggrad_kl = t.loss_output(), &grad_mu = t.output(n), &grad_logvar = t.output(n);
  launched(c, cuda::launch(GaussianKLDoubleBackward{c.dtype, c.rows, c.cols, v_mu.pointer(), v_logvar.pointer(),
                                                    grad_kl.pointer(), mu.pointer(), logvar.pointer(),
                                                    ggrad_kl.pointer(), grad_mu.pointer(), grad_logvar.pointer()},
                           nullptr, workspace));
  Expected to_grad(c.rows), to_mu(n), to_logvar(n);
  for (int64_t r = 0; r < c.rows; ++r) {
    Sum g;
    for (int64_t i = r * c.cols; i < (r + 1) * c.cols; ++i) {
      Sum m, l;
      g.add(at(v_mu, i) * at(mu, i));
      g.add(at(v_logvar, i) * gaussian_kl_grad_logvar<R>(at(logvar, i)));
      m.add(at(grad_kl, r) * at(v_mu, i));
      l.add(at(grad_kl, r) * at(v_logvar, i) * gaussian_kl_curvature_logvar<R>(at(logvar, i)));
      to_mu.set(i, m);
      to_logvar.set(i, l);
    }
    to_grad.set(r, g);
  }
  compare(c, "ggrad_kl", ggrad_kl, to_grad, kRowSlack);
  compare(c, "grad_mu", grad_mu, to_mu, kElementSlack);
  compare(c, "grad_logvar", grad_logvar, to_logvar, kElementSlack);
}

constexpr int64_t kSeed = -0x123456789abcdefll;

void test(const Case& c, ReparameterizeForward) {
  for (const bool with_kl : {false, true}) {
    Tensors t(c);
    const int64_t n = c.rows * c.cols;
    Tensor &mu = t.input(n), &logvar = t.input(n), &z = t.output(c.samples * n), &kl = t.loss_output();
    launched(c, cuda::launch(ReparameterizeForward{c.dtype, c.rows, c.cols, c.samples, mu.pointer(), logvar.pointer(),
                                                   t.seed(kSeed), z.pointer(), with_kl ? kl.pointer() : nullptr},
                             nullptr, workspace));
    const Values eps = noise(kSeed, c.samples * n);
    Expected sample(c.samples * n), divergence(c.rows);
    for (int64_t i = 0; i < c.samples * n; ++i) {
      Sum s;
      s.add(at(mu, i % n));
      s.add(standard_deviation<R>(at(logvar, i % n)) * eps[static_cast<size_t>(i)]);
      sample.set(i, s);
    }
    for (int64_t r = 0; r < c.rows; ++r) {
      Sum sum;
      for (int64_t i = r * c.cols; i < (r + 1) * c.cols; ++i) sum.add(gaussian_kl<R>(at(mu, i), at(logvar, i)));
      divergence.set(r, sum);
    }
    compare(c, "z", z, sample, kElementSlack);
    if (with_kl) compare(c, "kl", kl, divergence, kRowSlack);
  }
}

void test(const Case& c, ReparameterizeBackward) {
  for (int present = 1; present <= 3; ++present) {    // bit 0: grad_z, bit 1: grad_kl
    for (int outputs = 1; outputs <= 3; ++outputs) {  // bit 0: grad_mu, bit 1: grad_logvar
      if (present != 3 && outputs != 3 && c.cols > 33) continue;
      Tensors t(c);
      const int64_t n = c.rows * c.cols;
      Tensor &grad_z = t.input(c.samples * n), &grad_kl = t.loss_input(), &mu = t.input(n), &logvar = t.input(n);
      Tensor &grad_mu = t.output(n), &grad_logvar = t.output(n);
      const bool z = present & 1, kl = present & 2;
      launched(c, cuda::launch(
                      ReparameterizeBackward{c.dtype, c.rows, c.cols, c.samples, z ? grad_z.pointer() : nullptr,
                                             kl ? grad_kl.pointer() : nullptr, kl ? mu.pointer() : nullptr,
                                             logvar.pointer(), t.seed(kSeed), outputs & 1 ? grad_mu.pointer() : nullptr,
                                             outputs & 2 ? grad_logvar.pointer() : nullptr},
                      nullptr, workspace));
      const Values eps = noise(kSeed, c.samples * n);
      Expected to_mu(n), to_logvar(n);
      for (int64_t i = 0; i < n; ++i) {
        Sum m, l;
        const double half_sigma = 0.5 * standard_deviation<R>(at(logvar, i));
        for (int64_t s = 0; z && s < c.samples; ++s) {
          m.add(at(grad_z, s * n + i));
          l.add(at(grad_z, s * n + i) * eps[static_cast<size_t>(s * n + i)] * half_sigma);
        }
        if (kl) {
          m.add(at(grad_kl, i / c.cols) * at(mu, i));
          l.add(at(grad_kl, i / c.cols) * gaussian_kl_grad_logvar<R>(at(logvar, i)));
        }
        to_mu.set(i, m);
        to_logvar.set(i, l);
      }
      if (outputs & 1) compare(c, "grad_mu", grad_mu, to_mu, kElementSlack);
      if (outputs & 2) compare(c, "grad_logvar", grad_logvar, to_logvar, kElementSlack);
    }
  }
}

void test(const Case& c, ReparameterizeDoubleBackward) {
  Tensors t(c);
  const int64_t n = c.rows * c.cols;
  Tensor &v_mu = t.input(n), &v_logvar = t.input(n), &grad_z = t.input(c.samples * n), &logvar = t.input(n);
  Tensor &ggrad_z = t.output(c.samples * n), &grad_logvar = t.output(n);
  launched(c, cuda::launch(ReparameterizeDoubleBackward{c.dtype, c.rows, c.cols, c.samples, v_mu.pointer(),
                                                        v_logvar.pointer(), grad_z.pointer(), logvar.pointer(),
                                                        t.seed(kSeed), ggrad_z.pointer(), grad_logvar.pointer()},
                           nullptr, workspace));
  const Values eps = noise(kSeed, c.samples * n);
  Expected to_grad_z(c.samples * n), to_logvar(n);
  for (int64_t i = 0; i < n; ++i) {
    Sum l;
    const double sigma = standard_deviation<R>(at(logvar, i));
    for (int64_t s = 0; s < c.samples; ++s) {
      const double e = eps[static_cast<size_t>(s * n + i)];
      Sum g;
      g.add(at(v_mu, i));
      g.add(at(v_logvar, i) * e * sigma / 2);
      l.add(at(v_logvar, i) * at(grad_z, s * n + i) * e * sigma / 4);
      to_grad_z.set(s * n + i, g);
    }
    to_logvar.set(i, l);
  }
  compare(c, "ggrad_z", ggrad_z, to_grad_z, kElementSlack);
  compare(c, "grad_logvar", grad_logvar, to_logvar, kElementSlack);
}

void test(const Case& c, PhiloxNormal) {
  Tensors t(c);
  const int64_t n = c.rows * c.cols;
  Tensor& out = t.output(n);
  launched(c, cuda::launch(PhiloxNormal{c.dtype, n, t.seed(kSeed), out.pointer()}, nullptr, workspace));
  const Values eps = noise(kSeed, n);
  Expected wanted(n);
  for (int64_t i = 0; i < n; ++i) {
    Sum e;
    e.add(eps[static_cast<size_t>(i)]);
    wanted.set(i, e);
  }
  compare(c, "out", out, wanted, kElementSlack);
}

void test(const Case& c, BernoulliForward) {
  Tensors t(c);
  Tensor &logits = t.input(c.rows * c.cols), &x = t.target(true), &out = t.loss_output();
  launched(c, cuda::launch(BernoulliForward{c.dtype, c.x_dtype, c.rows, c.x_rows, c.cols, logits.pointer(), x.pointer(),
                                            out.pointer()},
                           nullptr, workspace));
  Expected wanted(c.rows);
  for (int64_t r = 0; r < c.rows; ++r) {
    Sum sum;
    for (int64_t j = 0; j < c.cols; ++j)
      sum.add(bernoulli_log_likelihood<R>(at(logits, r * c.cols + j), at(x, r % c.x_rows * c.cols + j)));
    wanted.set(r, sum);
  }
  compare(c, "log_likelihood", out, wanted, kRowSlack);
}

void test(const Case& c, BernoulliBackward) {
  Tensors t(c);
  const int64_t n = c.rows * c.cols;
  Tensor &logits = t.input(n), &x = t.target(true), &grad = t.loss_input(), &out = t.output(n);
  launched(c, cuda::launch(BernoulliBackward{c.dtype, c.x_dtype, c.rows, c.x_rows, c.cols, grad.pointer(),
                                             logits.pointer(), x.pointer(), out.pointer()},
                           nullptr, workspace));
  Expected wanted(n);
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t j = 0; j < c.cols; ++j) {
      Sum g;
      g.add(at(grad, r) * bernoulli_grad_logit<R>(at(logits, r * c.cols + j), at(x, r % c.x_rows * c.cols + j)));
      g.size += std::fabs(at(grad, r));  // x - y may cancel
      wanted.set(r * c.cols + j, g);
    }
  }
  compare(c, "grad_logits", out, wanted, kElementSlack);
}

void test(const Case& c, BernoulliDoubleBackward) {
  Tensors t(c);
  const int64_t n = c.rows * c.cols;
  Tensor &v = t.input(n), &grad = t.loss_input(), &logits = t.input(n), &x = t.target(true);
  Tensor &ggrad = t.loss_output(), &grad_logits = t.output(n);
  launched(
      c, cuda::launch(BernoulliDoubleBackward{c.dtype, c.x_dtype, c.rows, c.x_rows, c.cols, v.pointer(), grad.pointer(),
                                              logits.pointer(), x.pointer(), ggrad.pointer(), grad_logits.pointer()},
                      nullptr, workspace));
  Expected to_grad(c.rows), to_logits(n);
  for (int64_t r = 0; r < c.rows; ++r) {
    Sum g;
    for (int64_t j = 0; j < c.cols; ++j) {
      const int64_t i = r * c.cols + j;
      Sum l;
      g.add(at(v, i) * bernoulli_grad_logit<R>(at(logits, i), at(x, r % c.x_rows * c.cols + j)));
      g.size += std::fabs(at(v, i));
      l.add(at(grad, r) * at(v, i) * bernoulli_curvature<R>(at(logits, i)));
      to_logits.set(i, l);
    }
    to_grad.set(r, g);
  }
  compare(c, "ggrad", ggrad, to_grad, kRowSlack);
  compare(c, "grad_logits", grad_logits, to_logits, kElementSlack);
}

void test(const Case& c, BernoulliTile) {
  for (int outputs = 1; outputs <= 3; ++outputs) {  // bit 0: log_likelihood, bit 1: the gradient
    Tensors t(c);
    const int64_t n = c.rows * c.cols, gap = outputs == 2 ? 16 : outputs == 3 ? 1 : 0, first_row = outputs - 1;
    const bool wants_sum = outputs & 1, wants_grad = outputs & 2, with_grad = outputs == 2;
    const bool in_place = loss_of(c.dtype) == c.dtype;
    Tensor& products = t.loss_output(n).fill(symmetric);
    Tensor &delta = in_place ? products : t.output(n).fill(symmetric), &bias = t.input(c.cols);
    Tensor& x = t.target(true, gap);
    Tensor &grad = t.loss_input(), &sum = t.loss_output();
    Expected to_sum(c.rows), to_delta(n);
    for (int64_t r = 0; r < c.rows; ++r) {
      Sum row;
      for (int64_t j = 0; j < c.cols; ++j) {
        const double logit = at(products, r * c.cols + j) + at(bias, j), g = with_grad ? at(grad, r) : 1;
        const double target = at(x, (first_row + r) % c.x_rows * (c.cols + gap) + j);
        Sum element;
        element.add(g * bernoulli_grad_logit<R>(logit, target));
        element.size += std::fabs(g);  // x - y may cancel
        to_delta.set(r * c.cols + j, element);
        row.add(bernoulli_log_likelihood<R>(logit, target));
      }
      to_sum.set(r, row);
    }
    const Values products_before = products.values, delta_before = delta.values;
    launched(
        c, cuda::launch(BernoulliTile{c.dtype, c.x_dtype, c.rows, c.cols, first_row, c.x_rows, c.cols + gap, wants_sum,
                                      wants_grad, x.pointer(), bias.pointer(), with_grad ? grad.pointer() : nullptr,
                                      sum.pointer(), products.pointer(), delta.pointer()},
                        nullptr, workspace));
    if (wants_sum) compare(c, "log_likelihood", sum, to_sum, kRowSlack);
    if (wants_grad)
      compare(c, "delta", delta, to_delta, kElementSlack);
    else
      compare(c, "delta", delta, delta_before, delta_before, 0);
    if (!in_place) compare(c, "products", products, products_before, products_before, 0);
  }
}

void test(const Case& c, GaussianForward) {
  for (const bool one : {false, true}) {
    Tensors t(c);
    Tensor &mean = t.input(c.rows * c.cols), &x = t.target(false), &logvar = t.input(one ? 1 : c.rows * c.cols);
    Tensor& out = t.loss_output();
    launched(c, cuda::launch(GaussianForward{c.dtype, c.x_dtype, c.rows, c.x_rows, c.cols, one, mean.pointer(),
                                             logvar.pointer(), x.pointer(), out.pointer()},
                             nullptr, workspace));
    Expected wanted(c.rows);
    for (int64_t r = 0; r < c.rows; ++r) {
      Sum sum;
      for (int64_t j = 0; j < c.cols; ++j) {
        const int64_t i = r * c.cols + j;
        const double lv = at(logvar, one ? 0 : i);
        sum.add(GaussianResidual<R>(at(mean, i), lv, at(x, r % c.x_rows * c.cols + j)).log_likelihood(lv));
      }
      sum.size *= 2;
      wanted.set(r, sum);
    }
    compare(c, "log_likelihood", out, wanted, kRowSlack);
  }
}

void test(const Case& c, GaussianBackward) {
  for (const bool one : {false, true}) {
    for (int outputs = 1; outputs <= 3; ++outputs) {  // bit 0: grad_mean, bit 1: grad_logvar
      Tensors t(c);
      const int64_t n = c.rows * c.cols;
      Tensor &mean = t.input(n), &x = t.target(false), &logvar = t.input(one ? 1 : n), &grad = t.loss_input();
      Tensor &grad_mean = t.output(n), &grad_logvar = one ? t.loss_output() : t.output(n);
      launched(c, cuda::launch(GaussianBackward{c.dtype, c.x_dtype, c.rows, c.x_rows, c.cols, one, grad.pointer(),
                                                mean.pointer(), logvar.pointer(), x.pointer(),
                                                outputs & 1 ? grad_mean.pointer() : nullptr,
                                                outputs & 2 ? grad_logvar.pointer() : nullptr},
                               nullptr, workspace));
      Expected to_mean(n), to_logvar(n), to_one(c.rows);
      for (int64_t r = 0; r < c.rows; ++r) {
        Sum row;
        for (int64_t j = 0; j < c.cols; ++j) {
          const int64_t i = r * c.cols + j;
          const GaussianResidual<R> residual(at(mean, i), at(logvar, one ? 0 : i), at(x, r % c.x_rows * c.cols + j));
          Sum m, l;
          m.add(at(grad, r) * residual.grad_mean());
          l.add(at(grad, r) * residual.grad_logvar());
          l.size += std::fabs(at(grad, r));
          row.add(l.value);
          row.size += std::fabs(at(grad, r));
          to_mean.set(i, m);
          to_logvar.set(i, l);
        }
        to_one.set(r, row);
      }
      if (outputs & 1) compare(c, "grad_mean", grad_mean, to_mean, kElementSlack);
      if (outputs & 2)
        compare(c, "grad_logvar", grad_logvar, one ? to_one : to_logvar, one ? kRowSlack : kElementSlack);
    }
  }
}

void test(const Case& c, GaussianDoubleBackward) {
  for (const bool one : {false, true}) {
    Tensors t(c);
    const int64_t n = c.rows * c.cols;
    Tensor &v_mean = t.input(n), &v_logvar = one ? t.loss_input() : t.input(n), &grad = t.loss_input();
    Tensor &mean = t.input(n), &logvar = t.input(one ? 1 : n), &x = t.target(false);
    Tensor &ggrad = t.loss_output(), &grad_mean = t.output(n), &grad_logvar = one ? t.loss_output() : t.output(n);
    launched(c, cuda::launch(
                    GaussianDoubleBackward{c.dtype, c.x_dtype, c.rows, c.x_rows, c.cols, one, v_mean.pointer(),
                                           v_logvar.pointer(), grad.pointer(), mean.pointer(), logvar.pointer(),
                                           x.pointer(), ggrad.pointer(), grad_mean.pointer(), grad_logvar.pointer()},
                    nullptr, workspace));
    Expected to_grad(c.rows), to_mean(n), to_logvar(n), to_one(c.rows);
    for (int64_t r = 0; r < c.rows; ++r) {
      Sum g, row;
      for (int64_t j = 0; j < c.cols; ++j) {
        const int64_t i = r * c.cols + j;
        const GaussianResidual<R> residual(at(mean, i), at(logvar, one ? 0 : i), at(x, r % c.x_rows * c.cols + j));
        const double vm = at(v_mean, i), vl = at(v_logvar, one ? r : i);
        Sum m, l;
        g.add(vm * residual.grad_mean());
        g.add(vl * residual.grad_logvar());
        g.size += std::fabs(vl);
        m.add(at(grad, r) * vm * residual.curvature_mean());
        m.add(at(grad, r) * vl * residual.curvature_mixed());
        l.add(at(grad, r) * vm * residual.curvature_mixed());
        l.add(at(grad, r) * vl * residual.curvature_logvar());
        row.add(l.value);
        row.size += l.size;
        to_mean.set(i, m);
        to_logvar.set(i, l);
      }
      to_grad.set(r, g);
      to_one.set(r, row);
    }
    compare(c, "ggrad", ggrad, to_grad, kRowSlack);
    compare(c, "grad_mean", grad_mean, to_mean, kElementSlack);
    compare(c, "grad_logvar", grad_logvar, one ? to_one : to_logvar, one ? kRowSlack : kElementSlack);
  }
}

// --- which cases for which kernel ------------------------------------------------------------------------------------

template <class Args>
concept HasTargets = requires(Args a) { a.x_rows; };
template <class Args>
concept TakesBits = HasTargets<Args> && !requires(Args a) { a.logvar; } && !requires(Args a) { a.x_stride; };
template <class Args>
concept HasSamples = requires(Args a) { a.samples; };

bool one_of(int64_t value, std::initializer_list<int64_t> list) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

template <class Args>
void run(const char* name) {
  cases_run = workspaces = 0;
  worst = 0;
  for (DType dtype : kTypes) {
    for (int64_t cols : all_cols) {
      for (int64_t rows : kRows) {
        for (Layout layout : kLayouts) {
          if (cols > 128 && (rows == 2 || layout == Layout::all_shifted)) continue;  // 1 and 7 rows: enough
          if (quick && (rows != 7 || layout == Layout::all_shifted || !one_of(cols, {1, 5, 20, 784, 5000}))) continue;
          Case c{dtype, dtype, rows, cols, 1, rows, layout};
          if constexpr (HasSamples<Args>) {
            for (int64_t samples : {0, 1, 3}) {
              c.samples = samples;
              if (samples == 1 || layout == Layout::aligned || cols < 128) test(c, Args{});
            }
          } else if constexpr (HasTargets<Args>) {
            for (DType x_dtype : {dtype, DType::f32, DType::u8, DType::bits}) {
              if (x_dtype == DType::bits && !TakesBits<Args>) continue;
              c.x_dtype = x_dtype;
              c.x_rows = rows == 7 ? 3 : rows;  // rows of x repeat, the last time not to the end
              if (x_dtype != DType::f32 || dtype != DType::f32 || layout == Layout::aligned) test(c, Args{});
            }
          } else {
            test(c, Args{});
          }
        }
      }
    }
  }
  std::printf("%s: %lld launches, %lld with a workspace, error at most %.2f of its bound\n", name,
              static_cast<long long>(cases_run), static_cast<long long>(workspaces), worst);
}

// A NaN stays in its row, and in an element-wise result in its place.
void run_nan() {
  const Case c{DType::f32, DType::f32, 7, 20, 1, 7, Layout::aligned};
  Tensors t(c);
  Tensor &logits = t.input(c.rows * c.cols), &x = t.target(true), &out = t.loss_output();
  int64_t i = 0;
  logits.fill([&] { return i++ == 3 * c.cols + 5 ? std::numeric_limits<double>::quiet_NaN() : symmetric(); });
  launched(c, cuda::launch(BernoulliForward{c.dtype, c.x_dtype, c.rows, c.x_rows, c.cols, logits.pointer(), x.pointer(),
                                            out.pointer()},
                           nullptr, workspace));
  const Values& values = out.fetch();
  for (int64_t r = 0; r < c.rows; ++r) {
    if (std::isnan(values[static_cast<size_t>(r)]) != (r == 3)) fail("NaN: row 3 alone holds one");
  }
  std::printf("NaN: in its row only\n");
}

// A row's sum has the same bits whatever the other rows are, also where several blocks share the row.
void run_alone() {
  for (int64_t cols : {20, 784, 5000}) {
    const Case c{DType::f32, DType::f32, 7, cols, 1, 7, Layout::aligned};
    Tensors t(c);
    Tensor &mu = t.input(c.rows * cols), &logvar = t.input(c.rows * cols), &all = t.loss_output(),
           &one = t.loss_output();
    launched(c, cuda::launch(GaussianKLForward{c.dtype, c.rows, cols, mu.pointer(), logvar.pointer(), all.pointer()},
                             nullptr, workspace));
    launched(c, cuda::launch(GaussianKLForward{c.dtype, 1, cols, mu.pointer(), logvar.pointer(), one.pointer()},
                             nullptr, workspace));
    if (all.fetch()[0] != one.fetch()[0]) fail(describe(c) + ": the first row's sum depends on the others");
  }
  std::printf("alone: the same sum\n");
}

void run_errors() {
  const int error = cuda::launch(GaussianKLForward{DType::u8, 1, 1, nullptr, nullptr, nullptr}, nullptr, workspace);
  if (error == 0 || std::string(cuda::error_string(error)) != "invalid argument")
    fail("errors: a dtype without a kernel launched");
  std::printf("errors: an unknown dtype is refused\n");
}

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "--quick") == 0) {
    quick = true;
    --argc;
    ++argv;
  }
  const auto wanted = [&](const char* name) {
    return argc < 2 || std::any_of(argv + 1, argv + argc, [&](const char* arg) { return std::strcmp(arg, name) == 0; });
  };
#define VAE_FAST_RUN(Args) \
  if (wanted(#Args)) run<Args>(#Args);
  VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_RUN)
#undef VAE_FAST_RUN
  if (wanted("NaN")) run_nan();
  if (wanted("alone")) run_alone();
  if (wanted("errors")) run_errors();
  return 0;
}
