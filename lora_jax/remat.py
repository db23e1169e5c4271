"""A rematerialization policy for adapted products.

    block = nn.remat(Block, policy=lora_jax.products_saveable)

`jax.checkpoint_policies.dots_with_no_batch_dims_saveable` saves the results of linear layers and
recomputes the operations between them. In an adapted layer it would save three products: x W, the
rank-sized h = x A, and h B, although only their sum is needed. This policy saves the sum.
"""

from typing import Any

import jax
import jax.extend.core as jex

from lora_jax.weights.low_rank import PRODUCT


def products_saveable(primitive: jex.Primitive, *args: Any, **params: Any) -> bool:
  """Saves the results of linear layers, adapted or not; for `jax.checkpoint(..., policy=...)`."""
  policies = jax.checkpoint_policies
  keep = policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
  )
  return keep(primitive, *args, **params)
