#define JAX_NA_VECTOR_BYTES 16
#include "fused_tile.h"

namespace jax_na::cpu {

extern const FusedKernels kFusedBaseline = fused_kernels("baseline");

}  // namespace jax_na::cpu
