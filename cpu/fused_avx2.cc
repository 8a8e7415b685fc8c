#define JAX_NA_VECTOR_BYTES 32
#include "fused_tile.h"

namespace jax_na::cpu {

extern const FusedKernels kFusedAvx2 = fused_kernels("avx2");

}  // namespace jax_na::cpu
