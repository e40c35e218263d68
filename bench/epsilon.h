// The two other ways to have eps in the backward of z = mu + sigma eps: to store it, and to read it off z - mu. As
// ../csrc/kernels.h: one struct per kernel, launched on the CPU by epsilon.cpp and on the GPU by epsilon.cu. Tensors
// are [rows, cols] of `dtype` but for eps.
#pragma once

#include "../csrc/kernels.h"

namespace vae_fast {

struct StoreForward {
  DType dtype, eps_dtype;
  int64_t rows, cols;
  const void *mu, *logvar;
  const int64_t* seed;
  void *z, *eps;
};

// grad_mu = grad_z, grad_logvar = grad_z sigma eps / 2
struct StoreBackward {
  DType dtype, eps_dtype;
  int64_t rows, cols;
  const void *grad_z, *logvar, *eps;
  void *grad_mu, *grad_logvar;
};

// sigma eps = z - mu: no exponential, but the digits that z lost to mu are gone
struct DifferenceBackward {
  DType dtype;
  int64_t rows, cols;
  const void *grad_z, *mu, *z;
  void *grad_mu, *grad_logvar;
};

namespace cuda {
int launch(const StoreForward& a, void* stream);
int launch(const StoreBackward& a, void* stream);
int launch(const DifferenceBackward& a, void* stream);
}  // namespace cuda

}  // namespace vae_fast
