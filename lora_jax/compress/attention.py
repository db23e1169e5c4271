"""The attention matrix itself: pairs of projections factored together, head by head.

A head adds softmax(x Wq Wkᵀ xᵀ) x Wv Wo. Only the products of the pairs matter, each of the rank of
a head's features at most, so their truncation is the best that any smaller head can do:

    Wq Wkᵀ ≈ Wq' Wk'ᵀ      [D, D], of fewer features for queries and keys
    Wv Wo  ≈ Wv' Wo'       [D, D], of fewer features for values

Heads become smaller, and so do FLOPs and the cache of keys and values. The second is exact for
every model. The first is for models without rotary positions: rotations stand between Wq and Wkᵀ,
another one for each distance, and a feature that is dropped from all of them at once is no pair of
the rotations any more. So `shrink_values` is all that they take; `refuse_rotary` says why.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lora_jax import tree
from lora_jax.compress.factorize import check_rows, factor_root
from lora_jax.compress.structured import check_separate
from lora_jax.families import Config
from lora_jax.models.llama_config import value_features
from lora_jax.weights import is_weight
from lora_jax.weights.probe import Moments

PyTree = Any
Matrix = np.ndarray


def value_output(
  value: Matrix, out: Matrix, features: int, root: Matrix | None = None
) -> tuple[Matrix, Matrix]:
  """Smaller values of one key/value head, and the output projections of the heads that it serves.

      minimize Σ_n ‖Sᵀ (Wv Wo_n - Wv' Wo'_n)‖²

  Exact where the products have no more than this rank together.

  Args:
    value: Wv, [D, H].
    out: Wo of the query heads that attend to it, [N, H, D].
    features: of the smaller head.
    root: the S of S Sᵀ = E[x xᵀ], the inputs of Wv; None weighs all alike.

  Returns:
    Wv' [D, features] and Wo' [N, features, D].

  Raises:
    ValueError: when the features are none, or more than the head has.
  """
  _check_features(features, value.shape[-1])
  wide = out.transpose(1, 0, 2).reshape(out.shape[1], -1)  # [H, N D]
  new, wide = _truncated(value, wide, features, root)
  return new, wide.reshape(features, out.shape[0], -1).transpose(1, 0, 2)


def query_key(
  query: Matrix, key: Matrix, features: int, root: Matrix | None = None
) -> tuple[Matrix, Matrix]:
  """Smaller keys of one head, and the queries of the heads that attend to it; no rotary positions.

      minimize Σ_n ‖Sᵀ (Wq_n Wkᵀ - Wq'_n Wk'ᵀ)ᵀ‖²

  The scores keep their division by the root of the features that the head had: multiply by the
  root of new over old where the model divides by that of the new ones.

  Args:
    query: Wq of the query heads, [N, D, H].
    key: Wk, [D, H].
    features: as in `value_output`, of the inputs of Wk.
    root: as there.

  Returns:
    Wq' [N, D, features] and Wk' [D, features].

  Raises:
    ValueError: as `value_output`.
  """
  _check_features(features, key.shape[-1])
  wide = query.transpose(2, 0, 1).reshape(query.shape[2], -1)  # [H, N D]
  new, wide = _truncated(key, wide, features, root)
  return wide.reshape(features, query.shape[0], -1).transpose(1, 2, 0), new


def _truncated(first: Matrix, second: Matrix, features: int, root: Matrix | None):
  """The first features of `first @ second`, [D, H] @ [H, M], which is not formed."""
  whitened = first if root is None else root.T @ first
  q_first, r_first = scipy.linalg.qr(whitened, mode="economic")
  q_second, r_second = scipy.linalg.qr(second.T, mode="economic")
  u, s, vt = scipy.linalg.svd(r_first @ r_second.T, full_matrices=False)
  scale = np.sqrt(s[:features])
  a, b = q_first @ u[:, :features] * scale, scale[:, None] * (vt[:features] @ q_second.T)
  if root is not None:
    a = scipy.linalg.solve_triangular(root, a, lower=True, trans="T")
  return a, b


def _check_features(features: int, most: int) -> None:
  if not 1 <= features <= most:
    raise ValueError(f"a head of {most} features is shrunk to 1 to {most} of them, not {features}")


# ---- a decoder


def shrink_values(
  params: PyTree,
  config: Config,
  value_dim: int,
  moments: Mapping[str, Moments] | None = None,
  *,
  damping: float = 1e-3,
) -> tuple[PyTree, Config]:
  """A decoder whose value heads have fewer features, and its configuration.

  Args:
    params: of the model, layers unstacked, its attention dense.
    config: of the model.
    value_dim: features of a value head, the same in every layer.
    moments: of the inputs of `block_{i}/attn/value/kernel`, whole matrices; None weighs all
      directions of the residual stream alike.
    damping: as in `compress.factorize.Whitened`.

  Raises:
    ValueError: when the layers are stacked or a kernel is compressed already, when the features are
      none or more than there are, and when the calibration data are too short.
  """
  if config.scan_layers:
    raise ValueError("the layers are stacked; load the model with scan_layers=False")
  check_separate(params, "value_heads")
  if config.qkv_bias:
    raise ValueError("value_dim: values that have a bias cannot be shrunk; leave value_dim out")
  features = value_features(config)
  _check_features(value_dim, features)
  leaves, found = tree.flatten(params, is_leaf=is_weight), {}
  groups = config.num_heads // config.num_kv_heads
  for i in range(config.num_layers):
    path, out_path = (f"block_{i}/attn/{name}/kernel" for name in ("value", "out"))
    for each in (path, out_path):
      if is_weight(leaves[each]):
        raise ValueError(f"{each}: is compressed already; shrink its heads first")
    root = None
    if moments is not None:
      check_rows(path, moments[path], config.width)
      root = factor_root(path, np.asarray(moments[path].mean), config.width, "inputs", damping)
    value = np.asarray(leaves[path], np.float64).reshape(config.width, -1, features)
    out = np.asarray(leaves[out_path], np.float64).reshape(-1, groups, features, config.width)
    pairs = [
      value_output(value[:, head], out[head], value_dim, root)
      for head in range(config.num_kv_heads)
    ]
    new_value = np.stack([pair[0] for pair in pairs], axis=1).reshape(config.width, -1)
    new_out = np.concatenate([pair[1] for pair in pairs]).reshape(-1, config.width)
    found[path] = jnp.asarray(new_value, leaves[path].dtype)
    found[out_path] = jnp.asarray(new_out, leaves[out_path].dtype)
  params = tree.map_with_path(lambda path, x: found.get(path, x), params, is_leaf=is_weight)
  return params, dataclasses.replace(config, value_dim=value_dim)


def refuse_rotary() -> NoReturn:
  """Raises what asking for smaller queries and keys of a decoder does."""
  raise ValueError(
    "queries and keys have rotary positions: a rotation stands between Wq and Wkᵀ, another for "
    "each distance, so no truncation of their product is right for all of them; shrink the values "
    "(value_dim), or factorize the two kernels each for itself"
  )
