"""NNX modules as pure functions of a tree of parameters, so that `adapt` can take them.

    f, params = split(module)                       # f(params, x) == module(x)
    specs = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=8, alpha=16.0))])
    weights = lora_jax.attach(params, lora_jax.init(key, params, specs))
    y = lora_jax.adapt(f)(weights, x)
    update(module, lora_jax.materialize(weights))   # the module with the adapters merged in

`f` is pure: called twice with the same arguments it returns the same values, and the module that it
was made of never changes. So it goes through `jit`, `grad`, `vmap`, `scan` and `trace_axes`
whatever the module holds. A module that changes its own state, as Dropout advances its random
stream and BatchNorm its mean, is called with the state as an argument and returns the new one:

    y, state = f.with_state(params, f.state, x)     # f.state: as it was when the module was split
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

  A call sees the state as it was when the module was split, and drops what it changes in it; see
  `with_state`. What is sown in a call (`nnx.Intermediate`) and changes of parameters are dropped by
  both. An `nnx.Rngs` or another module among the arguments is copied, so the caller's does not
  change either.

  Attributes:
    state: all that the module holds beside its parameters: batch statistics, random streams,
      caches. A nested dict of arrays, addressed as the parameters are.
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
      state: `f.state`, or what the call before this one returned. The new state has the structure,
        shapes and dtypes of this one, so that `jax.lax.scan` can carry it.
      *args: of the module.
      **kwargs: of the module.

    Raises:
      ValueError: when either tree has a leaf that the module does not have.
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

  `params` is a plain nested dict of the module's `nnx.Param`s, addressed by the same slash paths as
  a Linen model's. Whatever else the module holds is `f.state`.

  Args:
    module: any NNX module; it is not changed, and later changes of it do not change `f`.
  """
  graph, params, rest = nnx.split(module, nnx.Param, ...)
  # The variables of a split may be the module's own, so copies of them are kept.
  f = PureModule(nnx.to_pure_dict(rest), graph, _copied(params), _copied(rest))
  return f, nnx.to_pure_dict(params)


def update(module: nnx.Module, params: PyTree, state: PyTree | None = None) -> None:
  """Writes plain parameters, as `split` names them, into the module.

  Args:
    module: what is changed.
    params: the parameters, or some of them.
    state: the state, as `PureModule.with_state` returns it; None leaves the module's as it is.

  Raises:
    ValueError: when a tree has a leaf that the module does not have.
  """
  _, of_params, rest = nnx.split(module, nnx.Param, ...)
  nnx.update(module, _with_values(of_params, params))
  if state is not None:
    nnx.update(module, _with_values(rest, state))


def _with_values(variables: nnx.State, values: PyTree) -> nnx.State:
  variables = _copied(variables)  # what follows writes into it
  nnx.replace_by_pure_dict(variables, values)
  return variables


def _copied(tree: PyTree) -> PyTree:
  """The same tree with new variables and modules, which the trace that makes them may change."""
  return jax.tree.map(lambda leaf: leaf, tree)
