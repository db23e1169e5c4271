"""NNX modules as pure functions of a tree of parameters, so that `adapt` can take them.

    f, params = split(module)                       # f(params, x) == module(x)
    specs = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=8, alpha=16.0))])
    weights = lora_jax.attach(params, lora_jax.init(key, params, specs))
    y = lora_jax.adapt(f)(weights, x)
    update(module, lora_jax.materialize(weights))   # the module with the adapters merged in

Not imported by `lora_jax` itself: `from lora_jax import nnx`.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

PyTree = Any


def split(module: nnx.Module) -> tuple[Callable, dict[str, Any]]:
  """Returns `(f, params)` with `f(params, *args, **kwargs) == module(*args, **kwargs)`.

  `params` is a plain nested dict of the module's `nnx.Param`s, addressed by the same slash paths as
  a Linen model's. Whatever else the module holds (batch statistics, random streams) stays in `f` as
  it is now: `f` is pure, and what a call would change in it is dropped.

  Args:
    module: any NNX module; it is not changed.
  """
  graph, state, rest = nnx.split(module, nnx.Param, ...)

  def f(params, *args, **kwargs):
    return nnx.merge(graph, _with_values(state, params), rest)(*args, **kwargs)

  return f, nnx.to_pure_dict(state)


def update(module: nnx.Module, params: PyTree) -> None:
  """Writes plain parameters, as `split` names them, into the module.

  Raises:
    ValueError: when the tree has a leaf that the module does not have.
  """
  nnx.update(module, _with_values(nnx.state(module, nnx.Param), params))


def _with_values(state: nnx.State, params: PyTree) -> nnx.State:
  state = jax.tree.map(lambda leaf: leaf, state)  # a copy: what follows writes into it
  nnx.replace_by_pure_dict(state, params)
  return state
