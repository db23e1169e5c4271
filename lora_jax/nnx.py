"""NNX modules as pure functions of a tree of parameters, so that `adapt` can take them.

    f, params = split(module)                       # f(params, x) == module(x)
    specs = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=8, alpha=16.0))])
    weights = lora_jax.attach(params, lora_jax.init(key, params, specs))
    y = lora_jax.adapt(f)(weights, x)
    update(module, lora_jax.materialize(weights))   # the module with the adapters merged in

`f` is pure: called twice with the same arguments it returns the same values, and it never changes
the module. So it works with `jit`, `grad`, `vmap`, `scan` and `trace_axes` for any module. A module
that changes its own state, as Dropout advances its random stream and BatchNorm its mean, is called
with the state as an argument and returns the new state:

    y, state = f.with_state(params, f.state, x)     # f.state: the state when the module was split
    y, state = lora_jax.adapt(f.with_state)(weights, state, x)
    update(module, lora_jax.materialize(weights), state)

Not imported by `lora_jax` itself: `from lora_jax import nnx`.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class PureModule:
  """A module as a pure function: `f(params, *args, **kwargs) == module(*args, **kwargs)`.

  A call sees the state from the time of the split and drops its changes to it; see `with_state`.
  Both drop values that a call sows (`nnx.Intermediate`) and changes of parameters. An `nnx.Rngs` or
  another module among the arguments is copied, so the caller's does not change either.

  Attributes:
    state: all variables of the module that are not parameters: batch statistics, random streams,
      caches. A nested dict of arrays, with paths like the parameters'.
  """

  state: dict[str, Any]
  _graph: nnx.GraphDef
  _params: nnx.State
  _rest: nnx.State

  def __call__(self, params: PyTree, *args: Any, **kwargs: Any) -> Any:
    return self.with_state(params, self.state, *args, **kwargs)[0]

  def with_state(self, params: PyTree, state: PyTree, *args: Any, **kwargs: Any) -> Any:
    """Returns `(module(*args, **kwargs), the new state)`.

    Args:
      params: as `split` returns them.
      state: `f.state`, or the state that the previous call returned. The new state has the same
        structure, shapes and dtypes, so that `jax.lax.scan` can carry it.
      *args: the module's arguments.
      **kwargs: the module's keyword arguments.

    Raises:
      ValueError: if either tree has a leaf that the module does not have.
    """
    module = nnx.merge(
      self._graph, _with_values(self._params, params), _with_values(self._rest, state)
    )
    args, kwargs = _copied((args, kwargs))
    y = module(*args, **kwargs)
    after = dict(nnx.to_flat_state(nnx.state(module)))
    kept = [(path, after[path]) for path, _ in nnx.to_flat_state(self._rest)]
    return y, nnx.to_pure_dict(nnx.from_flat_state(kept))


def split(module: nnx.Module) -> tuple[PureModule, dict[str, Any]]:
  """Returns `(f, params)` with `f(params, *args, **kwargs) == module(*args, **kwargs)`.

  `params` is a plain nested dict of the module's `nnx.Param`s, with the same slash paths as a Linen
  model's. All other variables of the module are in `f.state`.

  Args:
    module: any NNX module. It is not changed, and later changes of it do not change `f`.
  """
  graph, params, rest = nnx.split(module, nnx.Param, ...)
  # The variables of a split may be the module's own, so they are copied.
  f = PureModule(nnx.to_pure_dict(rest), graph, _copied(params), _copied(rest))
  return f, nnx.to_pure_dict(params)


def update(module: nnx.Module, params: PyTree, state: PyTree | None = None) -> None:
  """Writes plain parameters, with the paths of `split`, into the module.

  Args:
    module: the module to change.
    params: all parameters, or some of them.
    state: the state that `PureModule.with_state` returned; None leaves the module's unchanged.

  Raises:
    ValueError: if a tree has a leaf that the module does not have.
  """
  _, of_params, rest = nnx.split(module, nnx.Param, ...)
  nnx.update(module, _with_values(of_params, params))
  if state is not None:
    nnx.update(module, _with_values(rest, state))


def _with_values(variables: nnx.State, values: PyTree) -> nnx.State:
  variables = _copied(variables)  # the code below writes into it
  nnx.replace_by_pure_dict(variables, values)
  return variables


def _copied(tree: PyTree) -> PyTree:
  """The tree with new variables and modules, which the current trace may change."""
  return jax.tree.map(lambda leaf: leaf, tree)
