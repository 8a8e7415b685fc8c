"""NAT and DiNAT: vision models of neighborhood attention, as Flax NNX modules.

The models of "Neighborhood Attention Transformer" (Hassani et al., arXiv 2204.07143)
and "Dilated Neighborhood Attention Transformer" (Hassani and Shi, arXiv 2209.15001).
Their published checkpoints load, and can be written back.

Example::

    from flax import nnx
    from jax_na import models

    model = models.Classifier("dinat_mini", num_classes=10, rngs=nnx.Rngs(0))
    logits = model(images)  # [*batch, height, width, 3] -> [*batch, 10]
    model = models.from_pretrained("folder/of/dinat-mini-in1k-224")
"""

try:
    from flax import nnx as _nnx  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"jax_na.models needs Flax, run: pip install flax ({error})"
    ) from error

from jax_na.models._checkpoint import CheckpointError as CheckpointError
from jax_na.models._checkpoint import from_pretrained as from_pretrained
from jax_na.models._checkpoint import to_hf_state_dict as to_hf_state_dict
from jax_na.models._checkpoint import to_original_state_dict as to_original_state_dict
from jax_na.models._configs import CONFIGS as CONFIGS
from jax_na.models._configs import Config as Config
from jax_na.models._cost import flops as flops
from jax_na.models._cost import parameter_count as parameter_count
from jax_na.models._models import Backbone as Backbone
from jax_na.models._models import Classifier as Classifier
from jax_na.models._models import Numerics as Numerics
