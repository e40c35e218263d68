// The Python module vae_fast._C. Importing it registers the operators of ops.cpp; what it holds itself is what is no
// operator: facts about the build.
#include <pybind11/pybind11.h>

#include "kernels.h"

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", &vae_fast::cpu::capability,
        "The instruction set of the CPU kernels in use: \"avx512\", \"avx2\" or \"plain\".");
}
