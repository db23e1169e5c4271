"""A rematerialization policy that knows adapted products.

    block = nn.remat(Block, policy=lora_jax.products_saveable)

`jax.checkpoint_policies.dots_with_no_batch_dims_saveable` keeps what every linear layer returns and
recomputes what lies between. Of an adapted layer it would keep three products: x W, the rank-sized
h = x A, and h B, whose sum alone is needed. This policy keeps the sum.
"""

import jax

from lora_jax.weights.low_rank import PRODUCT


def products_saveable(primitive, *args, **params) -> bool:
  """Keeps what linear layers return, adapted or not; for `jax.checkpoint(..., policy=...)`."""
  policies = jax.checkpoint_policies
  keep = policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCT)
  )
  return keep(primitive, *args, **params)
