"""Full training of a leaf, with or without adapters: BitFit, LayerNorm tuning, heads, embeddings.

    before    {"norm": {"scale": W}}
    after     {"norm": {"scale": Full(w=W, dw=0)}}

    match(params, [("bias", Full())])                         # BitFit
    match(params, [("norm", Full()), ("all-linear", LoRA(rank=8, alpha=16.0))])

The change dW starts at zero and is trained in float32 for any dtype of the base. The base itself
stays unchanged, so the change can be extracted, scaled and combined like any adapter. Weight decay
pulls dW to zero, that is, the leaf to its base.

Defined for every float leaf, with any number of axes. Sources: Ben Zaken et al. 2022, BitFit, arXiv
2106.10199, for biases alone; Zhao et al. 2023, arXiv 2312.11420, for LayerNorm alone.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from lora_jax import weights
from lora_jax.adapters.base import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method):
  """The spec of a leaf that trains in full, without settings."""

  NEEDS_ROLES: ClassVar = False

  def init(self, key, path, w, roles):
    """As in `Method`; the key and the roles are not used."""
    return weights.Full(w=None, dw=jnp.zeros(w.shape, jnp.float32))

  def unfit(self, leaf):
    if not hasattr(leaf, "shape"):
      return f"it is {leaf!r} and not an array"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return f"its dtype {leaf.dtype} is not a float"
    return None
