"""Structured pruning of a decoder: removes whole MLP channels and heads; the result is dense.

    params, config = structured_pruning.prune_channels(params, config, mlp_width, moments)
    params, config = structured_pruning.prune_heads(params, config, num_kv_heads, moments)

A channel of an MLP is a column of gate and up and a row of down. A head is its columns of query,
key and value and its rows of out, together with the heads that share its keys. The groups with the
least effect on the next kernel are removed, and that kernel is refitted to the remaining inputs:

    score of a group of inputs G of W:   E‖x_G W_G‖²
    W' = argmin E‖x W - x_K W'‖²  =  C_KK⁻¹ C_K: W,     K the remaining inputs, C = E[x xᵀ]

Every layer keeps the same number. The fit is that of optimal brain compression (Frantar et al.
2022, arXiv 2208.11580, section 4) for all removed inputs at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lora_jax import tree
from lora_jax.compress.factorization import check_rows
from lora_jax.families import Config, family_of
from lora_jax.models.llama_config import value_features
from lora_jax.weights import is_weight
from lora_jax.weights.probe import Moments

PyTree = Any


def prune_channels(
  params: PyTree,
  config: Config,
  mlp_width: int,
  moments: Mapping[str, Moments],
  *,
  damping: float = 1e-3,
) -> tuple[PyTree, Config]:
  """Returns a decoder with fewer MLP channels in every layer, and its configuration.

  Args:
    params: the model's parameters, with unstacked layers.
    config: the model's configuration.
    mlp_width: the number of channels to keep.
    moments: of the inputs of `block_{i}/mlp/down/kernel`, whole matrices.
    damping: added to the moments' diagonal, as a fraction of its mean.

  Raises:
    ValueError: if the layers are stacked or a kernel is compressed already, if no channel is
      removed or none is kept, or if there are too few calibration data.
  """
  if getattr(config, "experts", None) is not None:
    raise ValueError(
      "mlp_width: the MLPs are of experts, each with channels of its own, and no channel can be "
      "taken from all of them alike; leave mlp_width out"
    )
  _check(config, params, "channels", "mlp_width", mlp_width)
  found, flat = {}, tree.flatten(params, is_leaf=is_weight)
  for i in range(config.num_layers):
    block = f"block_{i}/mlp"
    into = [x for x in ("gate", "up") if f"{block}/{x}/kernel" in flat]  # GPT-2 has no gate
    leaves = _kernels(params, block, (*into, "down"))
    down = f"{block}/down/kernel"
    kept, fitted = _fewer_inputs(down, leaves["down"], mlp_width, 1, moments, damping)
    found[down] = fitted
    for name in into:
      found[f"{block}/{name}/kernel"] = leaves[name][:, kept]
      if (bias := flat.get(f"{block}/{name}/bias")) is not None:
        found[f"{block}/{name}/bias"] = bias[kept]
  return _replaced(params, found), dataclasses.replace(config, mlp_width=mlp_width)


def prune_heads(
  params: PyTree,
  config: Config,
  num_kv_heads: int,
  moments: Mapping[str, Moments],
  *,
  damping: float = 1e-3,
) -> tuple[PyTree, Config]:
  """Returns a decoder with fewer key/value heads, and their query heads, in every layer.

  Args:
    num_kv_heads: the number of key/value heads to keep.
    moments: of the inputs of `block_{i}/attn/out/kernel`, whole matrices.
    params: as in `prune_channels`.
    config: as in `prune_channels`.
    damping: as in `prune_channels`.

  Raises:
    ValueError: as in `prune_channels`.
  """
  _check(config, params, "heads", "num_kv_heads", num_kv_heads)
  groups, found = config.num_heads // config.num_kv_heads, {}
  flat = tree.flatten(params, is_leaf=is_weight)
  sizes = {
    "query": groups * config.head_dim,
    "key": config.head_dim,
    "value": value_features(config),
  }
  for i in range(config.num_layers):
    block = f"block_{i}/attn"
    leaves = _kernels(params, block, (*sizes, "out"))
    out, size = f"{block}/out/kernel", groups * sizes["value"]
    kept, fitted = _fewer_inputs(out, leaves["out"], num_kv_heads, size, moments, damping)
    found[out] = fitted
    heads = kept[::size] // size
    for name, features in sizes.items():
      columns = (heads[:, None] * features + np.arange(features)).ravel()
      found[f"{block}/{name}/kernel"] = leaves[name][:, columns]
      if (bias := flat.get(f"{block}/{name}/bias")) is not None:
        found[f"{block}/{name}/bias"] = bias[columns]
    if (sinks := flat.get(f"{block}/sinks")) is not None:
      found[f"{block}/sinks"] = sinks.reshape(-1, groups)[heads].ravel()
  config = dataclasses.replace(config, num_kv_heads=num_kv_heads, num_heads=num_kv_heads * groups)
  return _replaced(params, found), config


def _fewer_inputs(path, leaf, count: int, size: int, moments, damping: float):
  """The inputs of a kernel to keep, `count` groups of `size`, and the kernel refitted to them."""
  if path not in moments:
    raise ValueError(f"{path}: has no moments of its inputs; add it to second_moments' paths")
  w = np.asarray(leaf, np.float64)
  check_rows(path, moments[path], len(w))
  c = np.asarray(moments[path].mean, np.float64)
  if c.shape != (len(w), len(w)):
    raise ValueError(f"{path}: its moments are {c.shape}, and its inputs {len(w)}")
  groups = np.arange(len(w)).reshape(-1, size)
  scores = [np.sum((c[np.ix_(group, group)] @ w[group]) * w[group]) for group in groups]
  kept = np.sort(groups[np.argsort(scores)[len(groups) - count :]].ravel())
  square = c[np.ix_(kept, kept)]
  square += damping * np.trace(square) / len(kept) * np.eye(len(kept))
  # Damping pulls the fit to the original kernel, not to zero.
  change = c[kept] @ w - c[np.ix_(kept, kept)] @ w[kept]
  fitted = w[kept] + scipy.linalg.solve(square, change, assume_a="pos")
  return kept, jnp.asarray(fitted, leaf.dtype)


SEPARATE = {"channels": "mlp/up", "heads": "attn/query", "value_heads": "attn/value"}
"""For each of these, the kernel that a layer must have as a separate one."""


def check_alike(config: Config, field: str) -> None:
  """Raises ValueError for a model whose layers have different shapes."""
  if not family_of(config).layers_alike:
    raise ValueError(
      f"{field}: the layers of a {config.family!r} differ in their shapes, and here each keeps as "
      f"much as the others; factorize or quantize it, and leave {field} out"
    )


def check_separate(params: PyTree, what: str) -> None:
  """Raises ValueError for a model in which the kernel of SEPARATE is fused with others."""
  path = f"block_0/{SEPARATE[what]}/kernel"
  if path not in tree.flatten(params, is_leaf=is_weight):
    raise ValueError(
      f"{what}: this model has no kernel {path}, since it is fused with others; factorize or "
      "quantize it, and leave this step out"
    )


def _check(config: Config, params: PyTree, what: str, field: str, count: int) -> None:
  if config.scan_layers:
    raise ValueError("the layers are stacked; load the model with scan_layers=False")
  check_alike(config, field)
  check_separate(params, what)
  if field == "num_kv_heads" and config.whole_qk_norm:
    raise ValueError(
      "num_kv_heads: the norms of queries and keys are over all heads, and with fewer of them are "
      "other functions; prune channels alone"
    )
  if not 0 < count < getattr(config, field):
    raise ValueError(
      f"{field} is {getattr(config, field)} and is to be {count}; choose a number from 1 to "
      f"{getattr(config, field) - 1}"
    )


def _kernels(params: PyTree, block: str, names) -> dict[str, Any]:
  leaves = tree.flatten(params, is_leaf=is_weight)
  found = {name: leaves[f"{block}/{name}/kernel"] for name in names}
  for name, leaf in found.items():
    if is_weight(leaf):
      raise ValueError(
        f"{block}/{name}/kernel: is compressed already, a {type(leaf).__name__}; prune channels "
        "and heads first"
      )
  return found


def _replaced(params: PyTree, found: Mapping[str, Any]) -> PyTree:
  return tree.map_with_path(lambda path, leaf: found.get(path, leaf), params, is_leaf=is_weight)
