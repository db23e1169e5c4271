"""Smaller attention heads: pairs of projections factored together, head by head.

A head adds softmax(x Wq Wkᵀ xᵀ) x Wv Wo. Only the products of the pairs matter. The rank of each is
at most the number of features of the head, so its truncation is the best that any smaller head can
do:

    Wq Wkᵀ ≈ Wq' Wk'ᵀ      [D, D], with fewer features of queries and keys
    Wv Wo  ≈ Wv' Wo'       [D, D], with fewer features of values

Heads become smaller, and so do FLOPs and the cache of keys and values. The second line applies to
every model. The first is for models without rotary positions. With them, a rotation is between Wq
and Wkᵀ, a different one for each distance, and a truncation shared by all distances does not keep
the pairs of features that are rotated. Such models support only `shrink_values`; `refuse_rotary`
raises an error with the reason.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lora_jax import tree
from lora_jax.compress.factorization import check_rows, factor_root
from lora_jax.compress.structured_pruning import check_alike, check_separate
from lora_jax.families import Config
from lora_jax.models.llama_config import value_features
from lora_jax.weights import is_weight
from lora_jax.weights.probe import Moments

PyTree = Any
Matrix = np.ndarray


def value_output(
  value: Matrix, out: Matrix, features: int, root: Matrix | None = None
) -> tuple[Matrix, Matrix]:
  """Shrinks the values of one key/value head, and the output projections of its query heads.

      minimize Σ_n ‖Sᵀ (Wv Wo_n - Wv' Wo'_n)‖²

  Exact if the rank of all the products together is at most `features`.

  Args:
    value: Wv, [D, H].
    out: Wo of the query heads that attend to it, [N, H, D].
    features: the number of features of the smaller head.
    root: the S of S Sᵀ = E[x xᵀ], for the inputs of Wv; None weighs all directions alike.

  Returns:
    Wv' [D, features] and Wo' [N, features, D].

  Raises:
    ValueError: if `features` is below 1, or above the head's features.
  """
  _check_features(features, value.shape[-1])
  wide = out.transpose(1, 0, 2).reshape(out.shape[1], -1)  # [H, N D]
  new, wide = _truncated(value, wide, features, root)
  return new, wide.reshape(features, out.shape[0], -1).transpose(1, 0, 2)


def query_key(
  query: Matrix, key: Matrix, features: int, root: Matrix | None = None
) -> tuple[Matrix, Matrix]:
  """Shrinks the keys of one head, and the queries that attend to it; not for rotary positions.

      minimize Σ_n ‖Sᵀ (Wq_n Wkᵀ - Wq'_n Wk'ᵀ)ᵀ‖²

  The scores must still be divided by the root of the original number of features. If the model
  divides by the root of the new number, multiply by the root of new over old.

  Args:
    query: Wq of the query heads, [N, D, H].
    key: Wk, [D, H].
    features: as in `value_output`.
    root: as in `value_output`, for the inputs of Wk.

  Returns:
    Wq' [N, D, features] and Wk' [D, features].

  Raises:
    ValueError: as in `value_output`.
  """
  _check_features(features, key.shape[-1])
  wide = query.transpose(2, 0, 1).reshape(query.shape[2], -1)  # [H, N D]
  new, wide = _truncated(key, wide, features, root)
  return wide.reshape(features, query.shape[0], -1).transpose(1, 2, 0), new


def _truncated(first: Matrix, second: Matrix, features: int, root: Matrix | None):
  """The first features of `first @ second`, [D, H] @ [H, M], which is not materialized."""
  whitened = first if root is None else root.T @ first
  q_first, r_first = _qr(whitened)
  q_second, r_second = _qr(second.T)
  u, s, vt = scipy.linalg.svd(r_first @ r_second.T, full_matrices=False)
  scale = np.sqrt(s[:features])
  a, b = q_first @ u[:, :features] * scale, scale[:, None] * (vt[:features] @ q_second.T)
  if root is not None:
    a = scipy.linalg.solve_triangular(root, a, lower=True, trans=1)
  return a, b


def _qr(matrix: Matrix) -> tuple[Matrix, Matrix]:
  # scipy declares no types, and what it returns depends on the mode.
  return cast(tuple[Matrix, Matrix], scipy.linalg.qr(matrix, mode="economic"))


def _check_features(features: int, most: int) -> None:
  if not 1 <= features <= most:
    raise ValueError(f"a head of {most} features can be shrunk to 1 to {most}, not {features}")


# ---- a decoder


def shrink_values(
  params: PyTree,
  config: Config,
  value_dim: int,
  moments: Mapping[str, Moments] | None = None,
  *,
  damping: float = 1e-3,
) -> tuple[PyTree, Config]:
  """Returns a decoder whose value heads have fewer features, and its configuration.

  Args:
    params: the model's parameters, with unstacked layers and dense attention.
    config: the model's configuration.
    value_dim: the features of a value head, the same in every layer.
    moments: of the inputs of `block_{i}/attn/value/kernel`, whole matrices; None weighs all
      directions of the residual stream alike.
    damping: as in `compress.factorization.Whitened`.

  Raises:
    ValueError: if the layers are stacked or a kernel is compressed already, if `value_dim` is below
      1 or above the model's, or if there are too few calibration data.
  """
  if config.scan_layers:
    raise ValueError("the layers are stacked; load the model with scan_layers=False")
  check_alike(config, "value_dim")
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
  """Raises the error for a request to shrink queries and keys of a decoder."""
  raise ValueError(
    "queries and keys have rotary positions: a rotation is between Wq and Wkᵀ, another for each "
    "distance, so no truncation of their product is right for all of them; shrink the values "
    "(value_dim), or factorize the two kernels separately"
  )
