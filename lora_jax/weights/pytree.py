"""A Weight as a pytree: its leaves, its static fields, and what a comparison of trees looks at.

`register` does for a frozen dataclass what `jax.tree_util.register_dataclass` does, and adds:

- A field with `compare=False` does not take part in comparisons of structure. Thus `path`, which
  only error messages read, does not keep `jax.tree.map(jnp.stack, *layers)` or a compiled function
  from accepting the weight of another layer. A mapped tree has the fields of the first tree.
- The parts named by `apart` are arrays but not leaves, so optimizers and gradients do not see them.
  They belong to the structure and are compared by value; under `jit` they are constants.
- `jax.export` can serialize the structure, and `flax.serialization` the arrays.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.export
import numpy as np

T = TypeVar("T", bound=type)


def register(cls: T) -> T:
  """Registers a frozen dataclass as a pytree; a decorator.

  A field is static if its metadata says `{"static": True}`, and otherwise a child.
  """
  fields = dataclasses.fields(cls)
  children = tuple(f.name for f in fields if not f.metadata.get("static", False))
  static = tuple(f.name for f in fields if f.metadata.get("static", False) and f.compare)
  notes = tuple(f.name for f in fields if f.metadata.get("static", False) and not f.compare)

  children_of, static_of, notes_of = map(_getter, (children, static, notes))

  # Every call of a compiled function runs these for every weight, so they are short.
  def flatten(weight):
    apart = weight.apart
    if not apart:
      return children_of(weight), _Structure(static_of(weight), None, notes_of(weight))
    leaves = tuple(getattr(weight, name) for name in children if name not in apart)
    held = _Held({name: getattr(weight, name) for name in apart})
    return leaves, _Structure(static_of(weight), held, notes_of(weight))

  def flatten_with_keys(weight):
    leaves, structure = flatten(weight)
    names = [name for name in children if name not in weight.apart]
    keys = map(_KeyOfSealed if weight.apart else jax.tree_util.GetAttrKey, names)
    return tuple(zip(keys, leaves, strict=True)), structure

  def unflatten(structure, leaves):
    names, held = children, structure.held
    weight = object.__new__(cls)  # JAX also unflattens placeholders, so nothing is checked
    if held is not None:
      names = [name for name in children if name not in held.parts]
      weight.__dict__.update(held.parts)
    weight.__dict__.update(zip(names, leaves, strict=True))
    weight.__dict__.update(zip(static, structure.values, strict=True))
    weight.__dict__.update(zip(notes, structure.notes, strict=True))
    return weight

  def to_bytes(structure) -> bytes:
    values = dict(zip(static + notes, structure.values + structure.notes, strict=True))
    held = {} if structure.held is None else structure.held.parts
    arrays = {name: _array_to_json(part) for name, part in held.items()}
    return json.dumps({"static": _to_json(values), "held": arrays}).encode()

  def from_bytes(data: bytes) -> _Structure:
    read = json.loads(data)
    hints = typing.get_type_hints(cls)
    values = {name: _from_json(value, hints[name]) for name, value in read["static"].items()}
    held = {name: _array_from_json(part) for name, part in read["held"].items()}
    return _Structure(
      tuple(values[name] for name in static),
      _Held(held) if held else None,
      tuple(values[name] for name in notes),
    )

  jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
  # After a reload of the module the name is taken by the old class, and this raises.
  with contextlib.suppress(ValueError):
    jax.export.register_pytree_node_serialization(
      cls,
      serialized_name=f"{cls.__module__}.{cls.__qualname__}",
      serialize_auxdata=to_bytes,
      deserialize_auxdata=from_bytes,
      from_children=lambda aux_data, children: unflatten(aux_data, children),
    )
  return cls


def _getter(names: Sequence[str]) -> Callable[[Any], tuple]:
  """Returns a function that returns the fields of these names as a tuple."""
  if len(names) > 1:
    return operator.attrgetter(*names)
  return lambda weight: tuple(getattr(weight, name) for name in names)


def let_flax_serialize(cls: type) -> None:
  """Registers weights of a kind with `flax.serialization`, if the program has imported it.

  Flax looks types up in a table of its own. Flax is not imported just for this, since its import
  takes longer than that of this library.
  """
  flax = sys.modules.get("flax.serialization")
  if flax is None or not hasattr(flax, "is_serializable") or flax.is_serializable(cls):
    return

  def arrays(weight) -> dict[str, Any]:
    fields = [f.name for f in dataclasses.fields(weight) if not f.metadata.get("static", False)]
    return {name: x for name in fields if (x := getattr(weight, name)) is not None}

  def to_state(weight) -> dict[str, Any]:
    return {name: flax.to_state_dict(x) for name, x in arrays(weight).items()}

  def from_state(weight, state: Mapping[str, Any]):
    like = arrays(weight)
    where = weight.path or cls.__name__
    if like.keys() != state.keys():
      raise ValueError(
        f"{where}: the saved parts are {', '.join(state)}, and those of the tree to restore into "
        f"are {', '.join(like)}; make it with the specs that the saved tree was made with"
      )
    parts = {name: flax.from_state_dict(x, state[name], name=name) for name, x in like.items()}
    for name, part in parts.items():
      shape, wanted = (getattr(x, "shape", None) for x in (part, like[name]))
      if shape != wanted:
        raise ValueError(
          f"{where}: {name} was saved with the shape {shape}, and the tree to restore into has "
          f"{wanted}; make it with the specs and for the model that the saved tree was made for"
        )
    return dataclasses.replace(weight, **parts)

  flax.register_serialization_state(cls, to_state, from_state)


@dataclasses.dataclass(frozen=True)
class _KeyOfSealed:
  """The key of a leaf whose weight has more arrays than leaves.

  It is not a `GetAttrKey`, so Orbax refuses the tree. Otherwise Orbax would save only the leaves
  and restore them into a tree with other sealed arrays, without an error. Its message has the key.
  """

  name: str

  def __str__(self) -> str:
    return self.name

  def __format__(self, spec: str) -> str:
    return (
      f"{self.name}, of an adapter with sealed parts, which would not be saved; save "
      "lora_jax.unseal(adapters), and apply lora_jax.seal to the restored adapters"
    )


class _Structure:
  """The static part of a weight. The notes are not compared."""

  __slots__ = ("held", "notes", "values")

  def __init__(self, values: tuple, held: "_Held | None", notes: tuple):
    self.values, self.held, self.notes = values, held, notes

  def __eq__(self, other: Any) -> bool:
    if not isinstance(other, _Structure):
      return NotImplemented
    return self.values == other.values and self.held == other.held

  def __hash__(self) -> int:
    return hash((self.values, self.held))

  def __repr__(self) -> str:
    return f"{self.values}" if self.held is None else f"{self.values}, {self.held}"


class _Held:
  """Arrays that are part of a structure; equal if they hold the same bits."""

  __slots__ = ("__dict__", "parts")

  def __init__(self, parts: dict[str, Any]):
    self.parts = parts

  @functools.cached_property
  def digest(self) -> bytes:
    return b"".join(_digest(part) for part in self.parts.values())

  def __eq__(self, other: Any) -> bool:
    if not isinstance(other, _Held):
      return NotImplemented
    if self.parts.keys() != other.parts.keys():
      return False
    same = all(x is y for x, y in zip(self.parts.values(), other.parts.values(), strict=True))
    return same or self.digest == other.digest

  def __hash__(self) -> int:
    return hash(tuple((name, part.shape) for name, part in self.parts.items()))

  def __repr__(self) -> str:
    parts = ", ".join(f"{name} {tuple(part.shape)}" for name, part in self.parts.items())
    return f"with {parts} sealed, which is not a leaf (lora_jax.unseal makes it one)"


def _digest(array: Any) -> bytes:
  array = np.ascontiguousarray(array)
  kind = f"{array.dtype} {array.shape}".encode()
  return hashlib.sha256(kind + array.tobytes()).digest()


# ---- static values as JSON


def _to_json(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, dict):
    return {name: _to_json(x) for name, x in value.items()}
  if isinstance(value, tuple):
    return [_to_json(x) for x in value]
  return value


def _from_json(value: Any, hint: Any) -> Any:
  if isinstance(hint, type) and dataclasses.is_dataclass(hint):
    return hint(**value)
  return tuple(_from_json(x, None) for x in value) if isinstance(value, list) else value


def _array_to_json(array: Any) -> dict[str, Any]:
  array = np.asarray(array)
  data = base64.b64encode(array.tobytes()).decode()
  return {"dtype": array.dtype.name, "shape": array.shape, "data": data}


def _array_from_json(read: Mapping[str, Any]) -> np.ndarray:
  array = np.frombuffer(base64.b64decode(read["data"]), np.dtype(read["dtype"]))
  return array.reshape(read["shape"])
