// Chooses the instruction set once per process and shares a launch among torch's threads.
#include <ATen/Parallel.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "instruction_sets.h"

namespace vae_fast {
namespace cpu {

#define VAE_FAST_DECLARE(Args) void run(const Args& args, int64_t begin, int64_t end);
namespace plain {
VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_DECLARE)
}
#if VAE_FAST_X86_BUILDS
namespace avx2 {
VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_DECLARE)
}
namespace avx512 {
VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_DECLARE)
}
#endif
#undef VAE_FAST_DECLARE

namespace {

enum class Capability { plain, avx2, avx512 };

Capability best_capability() {
#if VAE_FAST_X86_BUILDS
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::plain;
#else
  return Capability::plain;
#endif
}

// VAE_FAST_CPU_CAPABILITY asks for a lesser instruction set than the processor has, for tests and comparisons.
Capability chosen_capability() {
  const Capability best = best_capability();
  const char* asked = std::getenv("VAE_FAST_CPU_CAPABILITY");
  if (!asked || !*asked) return best;
  const std::string name(asked);
  const Capability wanted = name == "avx512" ? Capability::avx512
                            : name == "avx2" ? Capability::avx2
                                             : Capability::plain;
  if ((wanted == Capability::plain && name != "plain") || wanted > best)
    throw std::runtime_error(
        "VAE_FAST_CPU_CAPABILITY: got \"" + name +
        "\", wanted \"plain\", \"avx2\" or \"avx512\", and one that this processor and build have");
  return wanted;
}

Capability current() {
  static const Capability value = chosen_capability();
  return value;
}

template <class Args>
void share(const Args& args, int64_t items, int64_t item_size) {
  void (*run)(const Args&, int64_t, int64_t) = plain::run;
#if VAE_FAST_X86_BUILDS
  if (current() == Capability::avx2) run = avx2::run;
  if (current() == Capability::avx512) run = avx512::run;
#endif
  constexpr int64_t kGrain = 8192;  // elements: some microseconds of work, what a thread's wake-up costs
  const int64_t grain = item_size >= kGrain ? 1 : kGrain / (item_size > 0 ? item_size : 1);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace

const char* capability() {
  switch (current()) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "plain";
  }
}

#define VAE_FAST_SHARE_ROWS(Args) \
  void launch(const Args& a) { share(a, a.rows, a.cols); }
VAE_FAST_SHARE_ROWS(GaussianKLForward)
VAE_FAST_SHARE_ROWS(GaussianKLDoubleBackward)
VAE_FAST_SHARE_ROWS(ReparameterizeForward)
VAE_FAST_SHARE_ROWS(BernoulliForward)
VAE_FAST_SHARE_ROWS(BernoulliDoubleBackward)
VAE_FAST_SHARE_ROWS(BernoulliTile)
VAE_FAST_SHARE_ROWS(GaussianForward)
VAE_FAST_SHARE_ROWS(GaussianBackward)
VAE_FAST_SHARE_ROWS(GaussianDoubleBackward)

#define VAE_FAST_SHARE_ELEMENTS(Args) \
  void launch(const Args& a) { share(a, a.rows * a.cols, 1); }
VAE_FAST_SHARE_ELEMENTS(GaussianKLBackward)
VAE_FAST_SHARE_ELEMENTS(ReparameterizeBackward)
VAE_FAST_SHARE_ELEMENTS(ReparameterizeDoubleBackward)
VAE_FAST_SHARE_ELEMENTS(BernoulliBackward)

void launch(const PhiloxNormal& a) { share(a, a.count, 1); }

}  // namespace cpu
}  // namespace vae_fast
