#define JAX_NA_VECTOR_BYTES 64
#include "fused_tile.h"

namespace jax_na::cpu {

extern const FusedKernels kFusedAvx512 = fused_kernels("avx512");

}  // namespace jax_na::cpu
