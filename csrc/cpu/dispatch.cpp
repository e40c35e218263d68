// Chooses the instruction set once per process and shares a launch among torch's threads.
#include <ATen/Parallel.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "instruction_sets.h"
#include "training.h"

namespace vae_fast {
namespace cpu {

#define VAE_FAST_DECLARE(Args) void run(const Args& args, int64_t begin, int64_t end);
#define VAE_FAST_DECLARE_ALL                 \
  VAE_FAST_FOR_EACH_KERNEL(VAE_FAST_DECLARE) \
  VAE_FAST_FOR_EACH_PART(VAE_FAST_DECLARE)   \
  TileShape tile_shape();
namespace plain {
VAE_FAST_DECLARE_ALL
}
#if VAE_FAST_X86_BUILDS
namespace avx2 {
VAE_FAST_DECLARE_ALL
}
namespace avx512 {
VAE_FAST_DECLARE_ALL
}
#endif
#undef VAE_FAST_DECLARE_ALL
#undef VAE_FAST_DECLARE

namespace {

// In the order of preference; the last two are the kernels of avx512, some of which use more.
enum class Capability { plain, avx2, avx512, avx512_bf16, amx };
constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};

#if VAE_FAST_X86_BUILDS
// Whether the processor has AMX's tiles and bfloat16 products, and Linux lets this process use them: it must be asked.
// Source: the kernel's Documentation/arch/x86/xstate.rst; Intel's Software Developer's Manual, volume 2: CPUID, leaf 7.
bool has_amx() {
#if defined(VAE_FAST_EMULATE_AVX512)
  return true;
#elif defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kBfloat16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Whether this processor and build have it
bool has(Capability wanted) {
#if VAE_FAST_X86_BUILDS
  __builtin_cpu_init();
#ifdef VAE_FAST_EMULATE_AVX512
  const bool avx512 = true, pairs = true;
#else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool pairs = __builtin_cpu_supports("avx512bf16");
#endif
  switch (wanted) {
    case Capability::plain:
      return true;
    case Capability::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Capability::avx512:
      return has(Capability::avx2) && avx512;
    case Capability::avx512_bf16:
      return has(Capability::avx512) && pairs;
    case Capability::amx:
      return has(Capability::avx512) && has_amx();
  }
#endif
  return wanted == Capability::plain;
}

// VAE_FAST_CPU_CAPABILITY asks for a lesser instruction set than the processor has, for tests and comparisons.
Capability chosen_capability() {
  const char* asked = std::getenv("VAE_FAST_CPU_CAPABILITY");
  const std::string name(asked ? asked : "");
  for (int i = static_cast<int>(std::size(kNames)) - 1; i >= 0; --i)
    if ((name.empty() || name == kNames[i]) && has(static_cast<Capability>(i))) return static_cast<Capability>(i);
  throw std::runtime_error("VAE_FAST_CPU_CAPABILITY: got \"" + name +
                           "\", wanted \"plain\", \"avx2\", \"avx512\", \"avx512_bf16\" or \"amx\", and one that "
                           "this processor and build have");
}

Capability current() {
  static const Capability value = chosen_capability();
  return value;
}

template <class Args>
auto runner() {
  void (*run)(const Args&, int64_t, int64_t) = plain::run;
#if VAE_FAST_X86_BUILDS
  if (current() == Capability::avx2) run = avx2::run;
  if (current() >= Capability::avx512) run = avx512::run;
#endif
  return run;
}

template <class Args>
void share(const Args& args, int64_t items, int64_t item_size) {
  const auto run = runner<Args>();
  constexpr int64_t kGrain = 8192;  // elements: some microseconds of work, what a thread's wake-up costs
  const int64_t grain = item_size >= kGrain ? 1 : kGrain / (item_size > 0 ? item_size : 1);
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

}  // namespace

const char* capability() { return kNames[static_cast<int>(current())]; }

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

MatrixUnit matrix_unit() {
  return current() == Capability::amx           ? MatrixUnit::tiles
         : current() == Capability::avx512_bf16 ? MatrixUnit::pairs
                                                : MatrixUnit::none;
}

bool on_matrix_unit(bool fast, int64_t rows) {
  constexpr int64_t kExactRows = 32;  // splitting weights in three pays from some 23 rows on (predicted)
  return fast ? matrix_unit() != MatrixUnit::none : matrix_unit() == MatrixUnit::tiles && rows >= kExactRows;
}

TileShape tile() {
#if VAE_FAST_X86_BUILDS
  if (current() == Capability::avx2) return avx2::tile_shape();
  if (current() >= Capability::avx512) return avx512::tile_shape();
#endif
  return plain::tile_shape();
}

namespace {

// What a product of so many rows and inputs costs in one panel, in elements of an operator
int64_t panel_cost(int64_t rows, int64_t inputs) { return rows * inputs * tile().panel / 64; }
int64_t panels_of(int64_t columns) { return TileLine::parts(columns, tile().panel); }

TileLine tile_line(int64_t rows, int64_t block, int64_t columns, bool matrix_unit) {
  constexpr int64_t kMatrixUnitRows = 32;  // kAmxRows of amx.inl
  return {rows, block, matrix_unit ? kMatrixUnitRows : tile().rows, TileLine::parts(columns, tile().lanes)};
}

}  // namespace

TileLine tiles_of(const Forward& a) {
  return tile_line(a.rows, tile().block, a.outputs, on_matrix_unit(a.fast, a.rows));
}
TileLine tiles_of(const InputGradient& a) {
  return tile_line(a.rows, tile().block, a.inputs, on_matrix_unit(a.fast, a.rows));
}
TileLine tiles_of(const WeightGradient& a) {
  return tile_line(a.inputs, a.inputs, a.outputs, on_matrix_unit(a.operand, a.rows));
}

namespace {

// The tiles of a product, each element a sum of so many terms
template <class Product>
void share_tiles(const Product& a, int64_t terms) {
  const TileLine tiles = tiles_of(a);
  share(a, tiles.length(), panel_cost(tiles.tile_rows, terms) / 2);
}

}  // namespace

void launch(const Gather& a) { share(a, a.batch, a.dynamic ? 8 * a.cols : a.cols); }
void launch(const NonzerosOfRows& a) { share(a, a.nonzeros.rows, a.nonzeros.cols); }
void launch(const NonzerosOfColumns& a) {
  constexpr int64_t kPairs = NonzerosOfColumns::kPairs;
  share(a, TileLine::parts(a.nonzeros.column_pairs(), kPairs), kPairs * a.nonzeros.rows);
}
void launch(const Forward& a) {
  if (a.nonzeros) {
    const int64_t row_blocks = TileLine::parts(a.rows, tile().sparse_rows);
    const int64_t groups = TileLine::parts(panels_of(a.outputs), tile().sparse_panels);
    return share(a, row_blocks * groups, panel_cost(a.rows, a.inputs));
  }
  share_tiles(a, a.inputs);
}
void launch(const Exchange& a) {
  const int64_t lanes = tile().lanes, first = a.column / lanes;
  share(a, TileLine::parts(a.column + a.outputs, lanes) - first, a.inputs * lanes);
}
void launch(const AdagradUpdate& a) { share(a, a.count, 1); }
void launch(const GaussianLoss& a) { share(a, a.rows, 4 * a.cols); }
void launch(const Dream& a) { share(a, a.rows, 8 * a.cols); }
void launch(const LatentForward& a) { share(a, a.batch, 2 * a.samples * a.latent); }
void launch(const LatentBackward& a) { share(a, a.batch, 2 * a.samples * a.latent); }
void launch(const InputGradient& a) { share_tiles(a, a.outputs); }

// A thread takes its share of every layer: the same tiles in every step, and those of the forward product, whose
// weights are then in the caches of its core. Of a layer with lists the items are panels.
void launch(const WeightGradient* parts, int count) {
  const auto run = runner<WeightGradient>();
  const auto items = [](const WeightGradient& a) { return a.nonzeros ? panels_of(a.outputs) : tiles_of(a).length(); };
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += panel_cost(parts[i].rows, parts[i].inputs) * panels_of(parts[i].outputs);
  const int64_t threads =
      at::in_parallel_region() ? 1 : std::min<int64_t>(at::get_num_threads(), 1 + total / (4 * 8192));
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int i = 0; i < count; ++i) {
      const int64_t size = items(parts[i]), begin = size * first / threads, end = size * last / threads;
      if (begin < end) run(parts[i], begin, end);
    }
  });
}

}  // namespace cpu
}  // namespace vae_fast
