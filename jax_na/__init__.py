"""Neighborhood attention for JAX.

Every token of a 1-D, 2-D or 3-D grid attends to the tokens nearest to it, at a cost that
is linear in the number of tokens. Implements "Faster Neighborhood Attention" (Hassani et
al., arXiv 2403.04690) as native CUDA and CPU kernels behind JAX primitives. The Flax
layers are in ``jax_na.nnx`` and ``jax_na.linen``.
"""

from jax_na._explain import Explanation as Explanation
from jax_na._explain import explain as explain
from jax_na._ffi import export_safety_checks as export_safety_checks
from jax_na._frame import Frame as Frame
from jax_na._mask import window_mask as window_mask
from jax_na._ops import merge_attentions as merge_attentions
from jax_na._ops import na1d as na1d
from jax_na._ops import na2d as na2d
from jax_na._ops import na3d as na3d
from jax_na._ops import na_av as na_av
from jax_na._ops import na_qk as na_qk
from jax_na._ops import neighborhood_attention as neighborhood_attention
from jax_na._support import Support as Support
from jax_na._support import support as support

__version__ = "0.1.0"
