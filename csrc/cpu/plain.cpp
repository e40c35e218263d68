// The CPU kernels for any processor: vectors of 16 bytes.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define VAE_FAST_CAPABILITY plain
#define VAE_FAST_VECTOR_BYTES 16
#include "kernels.inl"
#include "training.inl"
