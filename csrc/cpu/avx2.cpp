// The CPU kernels for processors with AVX2, FMA and F16C: vectors of 32 bytes.
#include "instruction_sets.h"
#if VAE_FAST_X86_BUILDS
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

// In the source, not on the command line: every build system then compiles it alike. To the end of the file, because
// templates are instantiated there; the standard headers stand above, outside of it.
#pragma GCC target("avx2,fma,f16c")
// Order instructions before registers are given out, which GCC leaves to the processor on x86: the long chains of the
// noise then overlap more (normals in 0.88 of the time; nothing else changed).
#pragma GCC optimize("schedule-insns", "sched-pressure")

#define VAE_FAST_CAPABILITY avx2
#define VAE_FAST_VECTOR_BYTES 32
#include "kernels.inl"
// Matrix products fill all registers as they are: scheduling would spill some (the listed terms took 1.4 times as
// long).
#pragma GCC optimize("no-schedule-insns")
#include "training.inl"
#endif
