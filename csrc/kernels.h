// What an operator asks of a kernel: plain pointers and sizes, no torch. ops.cpp fills one of these structs and hands
// it to cpu::launch or cuda::launch; both namespaces have one overload for every struct here.
//
// A [..., D] tensor is rows x cols, contiguous, cols = D. `dtype` is that of the tensors named after it; sums over a
// row ("loss" below: one value per datapoint) are float, or double where dtype is f64. Arithmetic is done in that type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace vae_fast {

enum class DType : int8_t { f32, f64, f16, bf16, u8, bits };  // bits: eight to a byte, the first in the lowest bit

// kl[r] = sum_c KL(N(mu, exp(logvar)) || N(0, 1))
struct GaussianKLForward {
  DType dtype;
  int64_t rows, cols;
  const void* mu;      // [rows, cols]
  const void* logvar;  // [rows, cols]
  void* kl;            // [rows] loss
};

// grad_mu = grad_kl mu, grad_logvar = grad_kl expm1(logvar) / 2; an output that is not wanted is null
struct GaussianKLBackward {
  DType dtype;
  int64_t rows, cols;
  const void* grad_kl;  // [rows] loss
  const void* mu;       // [rows, cols]
  const void* logvar;   // [rows, cols]
  void* grad_mu;        // [rows, cols] or null
  void* grad_logvar;    // [rows, cols] or null
};

// The gradient of <ggrad_mu, grad_mu> + <ggrad_logvar, grad_logvar> above.
struct GaussianKLDoubleBackward {
  DType dtype;
  int64_t rows, cols;
  const void* ggrad_mu;      // [rows, cols]
  const void* ggrad_logvar;  // [rows, cols]
  const void* grad_kl;       // [rows] loss
  const void* mu;            // [rows, cols]
  const void* logvar;        // [rows, cols]
  void* ggrad_kl;            // [rows] loss
  void* grad_mu;             // [rows, cols]
  void* grad_logvar;         // [rows, cols]
};

// z[s, r, c] = mu + exp(logvar / 2) eps(seed, (s rows + r) cols + c), and kl as above unless it is null
struct ReparameterizeForward {
  DType dtype;
  int64_t rows, cols, samples;
  const void* mu;       // [rows, cols]
  const void* logvar;   // [rows, cols]
  const int64_t* seed;  // [1], on the device
  void* z;              // [samples, rows, cols]
  void* kl;             // [rows] loss, or null
};

// grad_mu     = sum_s grad_z                             + grad_kl mu
// grad_logvar = sum_s grad_z eps exp(logvar / 2) / 2     + grad_kl expm1(logvar) / 2
struct ReparameterizeBackward {
  DType dtype;
  int64_t rows, cols, samples;
  const void* grad_z;   // [samples, rows, cols] or null: no gradient reached z
  const void* grad_kl;  // [rows] loss, or null: no gradient reached kl
  const void* mu;       // [rows, cols]; read only where grad_kl is there
  const void* logvar;   // [rows, cols]
  const int64_t* seed;  // [1], on the device
  void* grad_mu;        // [rows, cols] or null
  void* grad_logvar;    // [rows, cols] or null
};

// The gradient of <ggrad_mu, grad_mu> + <ggrad_logvar, grad_logvar> above, of the terms with grad_z.
struct ReparameterizeDoubleBackward {
  DType dtype;
  int64_t rows, cols, samples;
  const void* ggrad_mu;      // [rows, cols]
  const void* ggrad_logvar;  // [rows, cols]
  const void* grad_z;        // [samples, rows, cols]
  const void* logvar;        // [rows, cols]
  const int64_t* seed;       // [1], on the device
  void* ggrad_z;             // [samples, rows, cols]
  void* grad_logvar;         // [rows, cols]
};

// eps(seed, 0 .. count - 1), rounded to dtype from float, or made in double for f64
struct PhiloxNormal {
  DType dtype;
  int64_t count;
  const int64_t* seed;  // [1], on the device
  void* out;            // [count]
};

// log_likelihood[r] = sum_c log Bernoulli(x[r mod x_rows, c]; sigmoid(logits[r, c]))
struct BernoulliForward {
  DType dtype;    // of logits
  DType x_dtype;  // dtype, f32, u8 (values 0 and 1; bool is u8), or bits
  int64_t rows, x_rows, cols;
  const void* logits;    // [rows, cols]
  const void* x;         // [x_rows, cols], or bits [x_rows, ceil(cols / 8)] of bytes
  void* log_likelihood;  // [rows] loss
};

// grad_logits = grad (x - sigmoid(logits))
struct BernoulliBackward {
  DType dtype, x_dtype;
  int64_t rows, x_rows, cols;
  const void* grad;    // [rows] loss
  const void* logits;  // [rows, cols]
  const void* x;       // [x_rows, cols]
  void* grad_logits;   // [rows, cols]
};

// The gradient of <ggrad_logits, grad_logits> above, in grad and logits.
struct BernoulliDoubleBackward {
  DType dtype, x_dtype;
  int64_t rows, x_rows, cols;
  const void* ggrad_logits;  // [rows, cols]
  const void* grad;          // [rows] loss
  const void* logits;        // [rows, cols]
  const void* x;             // [x_rows, cols]
  void* ggrad;               // [rows] loss
  void* grad_logits;         // [rows, cols]
};

// A tile of a decoder's last linear layer, some of its rows and outputs: with l = products[r, c] + bias[c] and
// t = x[(first_row + r) mod x_rows, c],
//   log_likelihood[r] = sum_c log Bernoulli(t; sigmoid(l))    and    delta[r, c] = grad[r] (t - sigmoid(l))
struct BernoulliTile {
  DType dtype, x_dtype;
  int64_t rows, cols;  // of the tile
  int64_t first_row, x_rows;
  int64_t x_stride;           // elements from a row of x to the next
  bool wants_log_likelihood;  // or else what it holds afterwards means nothing
  bool wants_grad;            // whether delta is written
  const void* x;              // [x_rows, cols]
  const void* bias;           // [cols]
  const void* grad;           // [rows] loss, or null for ones
  void* log_likelihood;       // [rows] loss
  const void* products;       // [rows, cols] loss
  void* delta;                // [rows, cols]; may be products where the types agree
};

// log_likelihood[r] = sum_c log N(x[r mod x_rows, c]; mean[r, c], exp(logvar)); logvar has the shape of mean, or is one
// value for everything (logvar_scalar)
struct GaussianForward {
  DType dtype;    // of mean and logvar
  DType x_dtype;  // dtype, f32, or u8
  int64_t rows, x_rows, cols;
  bool logvar_scalar;
  const void* mean;      // [rows, cols]
  const void* logvar;    // [rows, cols] or [1]
  const void* x;         // [x_rows, cols]
  void* log_likelihood;  // [rows] loss
};

// grad_mean = grad s, grad_logvar = grad (d s - 1) / 2, with d and s of math/gaussian.h
struct GaussianBackward {
  DType dtype, x_dtype;
  int64_t rows, x_rows, cols;
  bool logvar_scalar;
  const void* grad;    // [rows] loss
  const void* mean;    // [rows, cols]
  const void* logvar;  // [rows, cols] or [1]
  const void* x;       // [x_rows, cols]
  void* grad_mean;     // [rows, cols] or null
  void* grad_logvar;   // [rows, cols]; with logvar_scalar [rows] loss, the sum over the row; or null
};

// The gradient of <ggrad_mean, grad_mean> + <ggrad_logvar, grad_logvar> above, in grad, mean and logvar.
struct GaussianDoubleBackward {
  DType dtype, x_dtype;
  int64_t rows, x_rows, cols;
  bool logvar_scalar;
  const void* ggrad_mean;    // [rows, cols]
  const void* ggrad_logvar;  // [rows, cols]; with logvar_scalar [rows] loss
  const void* grad;          // [rows] loss
  const void* mean;          // [rows, cols]
  const void* logvar;        // [rows, cols] or [1]
  const void* x;             // [x_rows, cols]
  void* ggrad;               // [rows] loss
  void* grad_mean;           // [rows, cols]
  void* grad_logvar;         // [rows, cols]; with logvar_scalar [rows] loss, the sum over the row
};

#define VAE_FAST_FOR_EACH_KERNEL(DO) \
  DO(GaussianKLForward)              \
  DO(GaussianKLBackward)             \
  DO(GaussianKLDoubleBackward)       \
  DO(ReparameterizeForward)          \
  DO(ReparameterizeBackward)         \
  DO(ReparameterizeDoubleBackward)   \
  DO(PhiloxNormal)                   \
  DO(BernoulliForward)               \
  DO(BernoulliBackward)              \
  DO(BernoulliDoubleBackward)        \
  DO(BernoulliTile)                  \
  DO(GaussianForward)                \
  DO(GaussianBackward)               \
  DO(GaussianDoubleBackward)

namespace cpu {
#define VAE_FAST_DECLARE(Args) void launch(const Args& args);
VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_DECLARE)
#undef VAE_FAST_DECLARE
const char* capability();  // the instruction set in use: "avx512", "avx2" or "plain"
}  // namespace cpu

namespace cuda {
// Gives memory of the current device that stays until the launched work on its stream is done. Asked for at most once
// in a launch, and only where rows are so wide that several blocks sum one (csrc/cuda/rows.cuh).
using Workspace = std::function<void*(size_t bytes)>;

// Launches on `stream` (a cudaStream_t) of the current device; returns a cudaError_t, 0 for success.
#define VAE_FAST_DECLARE(Args) int launch(const Args& args, void* stream, const Workspace& workspace);
VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_DECLARE)
#undef VAE_FAST_DECLARE
const char* error_string(int error);
}  // namespace cuda

}  // namespace vae_fast
