// The CPU kernels for processors with AVX-512 (F, DQ, BW, VL): vectors of 64 bytes; and with AMX, where matrix_unit()
// says so.
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
#ifdef VAE_FAST_EMULATE_AVX512
#pragma GCC target("avx2,fma,f16c")
#pragma GCC diagnostic ignored "-Wpsabi"
#include "../tests/avx512_emulation.h"
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")
#endif

#define VAE_FAST_CAPABILITY avx512
#define VAE_FAST_VECTOR_BYTES 64
#include "kernels.inl"
#include "training.inl"
#endif
