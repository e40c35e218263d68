// What a launch's error code means.
#include <cuda_runtime.h>

#include "../kernels.h"

namespace vae_fast {
namespace cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace vae_fast
