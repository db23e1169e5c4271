"""Full: `w + dw`, a leaf that is trained in full, alongside adapters of other leaves.

    before    {"norm": {"scale": w}}
    after     {"norm": {"scale": Full(w=w, dw=0)}}

The sum is materialized before the function runs: full fine-tuning multiplies by it, so factoring
would save nothing. `dw` is float32, so that small updates are not lost on a bfloat16 base.
"""

import dataclasses
from typing import ClassVar

import jax

from lora_jax.weights import promotion
from lora_jax.weights.adapted import Adapted
from lora_jax.weights.pytree import register


@register
@dataclasses.dataclass(frozen=True)
class Full(Adapted):
  """`w + dw`, an array of w's shape and dtype.

  Attributes:
    w: the base, an array of any number of axes or another Weight; None in an adapter.
    dw: the change, of w's shape.
    roles: empty, since all axes are treated alike.
    frozen, path: as in `Adapted`.
  """

  LAYOUTS: ClassVar = {"dw": "s"}
  TRAINED: ClassVar = ("dw",)
  LINEAR: ClassVar = "dw"
  IS_DENSE: ClassVar = True

  dw: jax.Array
  roles: str = dataclasses.field(default="", kw_only=True, metadata={"static": True})

  def delta(self) -> jax.Array:
    """The change, in at least float32."""
    return self.dw.astype(promotion.at_least_float32(self.dtype))

  def applied(self) -> jax.Array:
    return self.materialize()
