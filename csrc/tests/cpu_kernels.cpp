// The CPU kernels against the formulas of csrc/math in double: the test of the CUDA kernels with those of the CPU in
// their place, at further widths and every offset of a misaligned tensor. What is read ends where its memory ends, so
// that the address sanitizer sees one element too much; what is written lies between guards.
//
//   cpu_kernels [KERNEL ...]   the kernels to test, by the name of their struct in kernels.h; all without names
//
// VAE_FAST_CPU_CAPABILITY picks the instruction set; exit status 77 says that this processor lacks it.
#define main cuda_main
#include "../../tests/cuda_emulation/kernels_test.cpp"
#undef main

#include <stdexcept>

namespace vae_fast {
namespace cuda {
#define VAE_FAST_ON_THE_CPU(Args)                         \
  int launch(const Args& args, void*, const Workspace&) { \
    cpu::launch(args);                                    \
    return 0;                                             \
  }
VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_ON_THE_CPU)
#undef VAE_FAST_ON_THE_CPU
const char* error_string(int) { return "no error"; }
}  // namespace cuda
}  // namespace vae_fast

int main(int argc, char** argv) {
  try {
    std::printf("instruction set: %s\n", cpu::capability());
  } catch (const std::runtime_error& missing) {
    std::printf("%s\n", missing.what());
    return 77;
  }
  const auto run_all = [&] {
#define VAE_FAST_RUN(Args) \
  if (argc < 2 || std::find(argv + 1, argv + argc, std::string(#Args)) != argv + argc) run<Args>(#Args);
    VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_RUN)
#undef VAE_FAST_RUN
  };
  all_cols = {0, 1, 7, 8, 9, 31, 784, 20000};
  run_all();
  all_cols = {9, 37};  // less and more than a vector
  for (shift = 2; shift < 16; ++shift) run_all();
  return 0;
}
