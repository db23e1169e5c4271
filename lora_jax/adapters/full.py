"""Full training of a leaf, beside adapters or alone: BitFit, LayerNorm tuning, heads, embeddings.

    before    {"norm": {"scale": W}}
    after     {"norm": {"scale": Full(w=W, dw=0)}}

    match(params, [("bias", Full())])                         # BitFit
    match(params, [("norm", Full()), ("all-linear", LoRA(rank=8, alpha=16.0))])

The change dW starts at zero and is trained in float32 whatever the base's dtype is; the base itself
stays as it is, so that what was learned can be taken out, scaled and combined as any adapter's.
Weight decay pulls dW to zero, that is, the leaf to its base.

Defined for every leaf of floats, with any number of axes. Sources: Ben Zaken et al. 2022, BitFit,
arXiv 2106.10199, for biases alone; Zhao et al. 2023, arXiv 2312.11420, for LayerNorm alone.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lora_jax import weights
from lora_jax.adapters.base import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method):
  """The spec of a leaf that trains in full; it has no settings."""

  NEEDS_ROLES: ClassVar = False

  def init(self, key, path, w, roles):
    """As in `Method`; the key and the roles are not used."""
    return weights.Full(w=None, dw=jnp.zeros(w.shape, jnp.float32))

  def unfit(self, leaf):
    if not hasattr(leaf, "shape"):
      return f"it is no array but {leaf!r}"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return f"its dtype {leaf.dtype} is not a float"
    return None
