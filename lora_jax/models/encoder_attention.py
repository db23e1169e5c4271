"""Attention of encoders, in which every token sees every other one: exact, or of low rank.

    out_BTNH = self_attention(self, c.attention, query_BTNH, key_BTNH, value_BTNH,
                              seen_BT=mask_BT, rows=c.max_length, param_dtype=c.param_dtype)

`how` is a `Choice` of the implementation of exact attention, `Nystrom` or `Linformer`. Linformer
adds the leaves LEAVES to the module.
"""

from typing import Any

import flax.linen as nn
import jax

from lora_jax.models.attention import attend
from lora_jax.models.attention_kernels import Choice
from lora_jax.models.low_rank_attention import (
  Linformer,
  Nystrom,
  linformer,
  nystrom,
  segment_means,
)

How = Choice | Nystrom | Linformer
LOW_RANK = {"nystrom": Nystrom, "linformer": Linformer}
"""The kinds of low rank by `model.attention` of a config."""

LEAVES = ("keys_along", "values_along")
"""The leaves of Linformer in a layer's attention: the projections of keys and of values, [P, M]."""
PATTERN = rf"(.*/)?({'|'.join(LEAVES)})"

NAMES = {f"linformer.{{i}}.{name}.weight": f"block_{{i}}/attn/{name}" for name in LEAVES}
"""The names of the leaves in the files of adapters, as of embeddings. No other library has them."""


def check(where: str, how: Any) -> None:
  """Raises ValueError for a setting of a config that is no `How`."""
  if not isinstance(how, How):
    raise ValueError(f"{where}: attention {how!r:.80} is no Choice, Nystrom or Linformer")


def adds_leaves(config: Any) -> bool:
  """Whether attention adds leaves to a model of this config."""
  return isinstance(getattr(config, "attention", None), Linformer)


def check_storable(config: Any) -> None:
  """Raises ValueError for a model with leaves that no folder of a whole model has a place for."""
  if adds_leaves(config):
    raise ValueError(
      f"a {config.family!r} with attention of Linformer: {', '.join(LEAVES)} of its layers have no "
      "place in the folder of a whole model, whose attention is exact; they are stored in a run's "
      "adapter, and the run itself can be evaluated"
    )


def self_attention(
  module: nn.Module,
  how: How,
  query_BTNH: jax.Array,
  key_BTNH: jax.Array,
  value_BTNH: jax.Array,
  *,
  seen_BT: jax.Array | None,
  rows: int,
  param_dtype: Any,
) -> jax.Array:
  """Returns the attention of a layer, [B, T, N, H].

  Args:
    module: the layer's, whose leaves Linformer's are.
    how: exact or of low rank.
    query_BTNH, key_BTNH, value_BTNH: as in `lora_jax.models.attention.attend`.
    seen_BT: True for a token, False for padding; None: no padding.
    rows: P of Linformer.
    param_dtype: of Linformer's leaves.
  """
  arrays = query_BTNH, key_BTNH, value_BTNH
  match how:
    case Nystrom():
      return nystrom(*arrays, seen_BT, how)
    case Linformer():
      shape = (rows, how.rank)
      keys_PM, values_PM = (
        module.param(name, segment_means, shape, param_dtype) for name in LEAVES
      )
      return linformer(*arrays, keys_PM, values_PM, seen_BT)
  mask = None if seen_BT is None else seen_BT[:, None, None]
  return attend(*arrays, mask=mask, choice=how)
