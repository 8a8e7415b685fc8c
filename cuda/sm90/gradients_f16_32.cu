#include "gradients.cuh"

namespace jax_na::cuda::sm90 {

template cudaError_t launch_gradients<__half, 32>(
    const GradientsPlan&, const HopperTiling&, cudaStream_t);

}  // namespace jax_na::cuda::sm90
