// Which builds of the CPU kernels exist beside the plain one.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VAE_FAST_X86_BUILDS 1
#else
#define VAE_FAST_X86_BUILDS 0
#endif
