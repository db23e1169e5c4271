"""The correspondence of the PyTorch model's tensors and the leaves of the tree, axis by axis.

In PyTorch a linear layer's weight is (out, in), a convolution's (out, channels, *window), an
embedding's (tokens, width), for any axes of the leaf. So the axes of a part are given in letters,
once for the tree and once for the file: `b` of a LowRank is "ro" here and "or" there. In the file
the axes of a letter are joined into one (the heads of a projection), and the channels of a
convolution come before its window.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax import tree
from lora_jax.axes import Axes
from lora_jax.io import names
from lora_jax.weights import is_weight, materialize

LAYER = "{i}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
  """A leaf and its tensor in the PyTorch model: one tensor per layer if the layers are stacked.

  Attributes:
    path: the leaf's path.
    name: the tensor's name, with `{i}` in place of a stacked layer's index.
    shape, roles: of the leaf; no roles if it is not contracted (norms, biases).
    uses: the primitives that contract it, as in `lora_jax.Axes`.
    tied: the name of a second tensor for the same leaf: a head that is tied to the embedding.
    fan_in_fan_out: True if the tensor is (in, out), as in transformers' Conv1D.
    parameter: the tensor's name if it belongs to no linear layer, such as a stack of experts, so
      that PEFT adapts it as one of `target_parameters`. `name` is then the one that it would have
      as the weight of a separate module; see `lora_jax.exchange.parameters`.
    place: the tensor's position in the table.
    groups: the groups of a convolution, as in `lora_jax.Axes`.
  """

  path: str
  name: str
  shape: tuple[int, ...]
  roles: str
  uses: tuple[str, ...]
  tied: str | None
  fan_in_fan_out: bool
  parameter: str | None = None
  place: int = 0
  groups: int = 1

  @property
  def is_conv(self) -> bool:
    return "conv_general_dilated" in self.uses

  @property
  def is_embedding(self) -> bool:
    return "gather" in self.uses

  @property
  def is_head_too(self) -> bool:
    return self.is_embedding and len(self.uses) > 1

  @property
  def layers(self) -> int | None:
    """The number of layers stacked in the leaf; None for a single layer."""
    return self.shape[self._stack] if LAYER in self.name else None

  @property
  def has_experts(self) -> bool:
    """True if the leaf is a parameter with one kernel per expert."""
    return self.parameter is not None and _stacks(self.name, self.roles) == 1

  @property
  def inputs(self) -> int:
    return math.prod(self._sizes("i"))

  @property
  def outputs(self) -> int:
    return math.prod(self._sizes("o"))

  @property
  def stacks_oddly(self) -> bool:
    """True if the leaf is a stack of neither layers nor the experts of a parameter."""
    return bool(self.roles) and _stacks(self.name, self.roles) != int(self.has_experts)

  def by_layer(self) -> dict[int | None, str]:
    """The tensor's name in each layer; {None: name} without stacked layers."""
    if self.layers is None:
      return {None: self.name}
    return {n: self.name.replace(LAYER, str(n)) for n in range(self.layers)}

  def key(self, layer: int | None) -> str:
    """The name that PEFT matches patterns against in a layer: the module's, or the parameter's."""
    return (self.parameter or module_of(self.name)).replace(LAYER, str(layer))

  # ---- a part of an adapter in one layer

  def tensor_shape(self, letters: str, rank: int, window: bool = False) -> tuple[int, ...]:
    """The shape in the file of a part with these axes.

    window: True if a convolution's part has axes for the window there, not one for all inputs.
    """
    sizes = {"i": (self.inputs,), "o": (self.outputs,), "r": (rank,), "1": (1,)}
    sizes |= {"R": (rank * math.prod(self._sizes("s")),)}
    letters = letters.replace("sr", "R").replace("rs", "R")  # all experts in one axis
    if not (window and self.is_conv):
      return sum((sizes[letter] for letter in letters), ())
    channels, *rest = (self._sizes("i")[n] for n in self.channels_first())
    shape = sum(((channels,) if letter == "i" else sizes[letter] for letter in letters), ())
    rest = rest if "i" in letters else [1] * len(rest)
    return (1,) * (2 - len(shape)) + shape + tuple(rest)

  def to_tensor(self, part: np.ndarray, layout: str, letters: str) -> np.ndarray:
    """A part with axes `layout` in the order of the file."""
    groups = self._groups(layout)
    order = [n for letter in letters for n in groups.get(letter, ())]
    sizes = [math.prod(part.shape[n] for n in groups.get(letter, ())) for letter in letters]
    return part.transpose(order).reshape(sizes)

  def to_part(self, tensor: np.ndarray, letters: str, layout: str, rank: int = 1) -> np.ndarray:
    """The inverse of `to_tensor`; the tensor may have separate axes for its window."""
    groups = self._groups(layout)
    order = [n for letter in letters for n in groups.get(letter, ())]
    own = [n for x in layout for n in ([rank] if x == "r" else self._sizes(x))]
    return tensor.reshape([own[n] for n in order]).transpose(np.argsort(order))

  def rank_axis(self, layout: str) -> int | None:
    """The rank axis of a part with axes `layout`."""
    groups = self._groups(layout)
    return groups["r"][0] if "r" in groups else None

  # ---- the leaf

  @property
  def weight_letters(self) -> str:
    """The axes of the weight in the file."""
    return "io" if self.fan_in_fan_out or self.is_embedding else "oi"

  def values(self, leaf: Any) -> np.ndarray:
    """The values of the leaf in float32, dense.

    Raises:
      ValueError: if it is only a shape.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise ValueError(f"{self.path}: its values are needed, but it is only a shape")
    return np.asarray(materialize(leaf), np.float32)

  def weights(self, leaf: np.ndarray) -> dict[int | None, np.ndarray]:
    """The tensors of a leaf, by layer."""
    if self.layers is None:
      return {None: self._weight(leaf)}
    return dict(enumerate(map(self._weight, np.moveaxis(leaf, self._stack, 0))))

  def layer(self, leaf: Any, layer: int | None) -> Any:
    """One layer of a leaf; the leaf itself without stacked layers."""
    return leaf if layer is None else leaf.take(layer, axis=self._stack)

  @property
  def layer_roles(self) -> str:
    return self.roles.replace("s", "", LAYER in self.name)

  def leaf(self, weights: Mapping[int | None, np.ndarray]) -> np.ndarray:
    """The inverse of `weights`."""
    if self.layers is None:
      return self._of_weight(weights[None])
    return np.stack([self._of_weight(weights[n]) for n in range(self.layers)], self._stack)

  def weight_shape(self) -> tuple[int, ...]:
    """The shape of one layer's tensor."""
    if not self.roles:
      shape = self.shape[LAYER in self.name :]
      return (math.prod(shape),) if self.name.endswith(".bias") else shape
    return self.tensor_shape(self.weight_letters, 1, window=True)

  def rows_of_outputs(self, weight: np.ndarray) -> np.ndarray:
    """A tensor of `weights` as a matrix with one row per output."""
    if self.weight_letters == "io":
      return weight.reshape(self.inputs, self.outputs).T
    return weight.reshape(self.outputs, self.inputs)

  def _weight(self, layer: np.ndarray) -> np.ndarray:
    if not self.roles:
      return layer.reshape(self.weight_shape())
    inputs_first = layer.transpose([n for x in "io" for n in self._layer_axes(x)])
    return self.to_tensor(inputs_first, "io", self.weight_letters).reshape(self.weight_shape())

  def _of_weight(self, weight: np.ndarray) -> np.ndarray:
    if not self.roles:
      return weight.reshape(self.shape[LAYER in self.name :])
    order = [n for x in "io" for n in self._layer_axes(x)]
    return self.to_part(weight, self.weight_letters, "io").transpose(np.argsort(order))

  # ---- axes

  @property
  def _stack(self) -> int:
    return self.roles.index("s") if self.roles else 0

  def _sizes(self, role: str) -> list[int]:
    """The sizes of the axes of a role in one layer."""
    sizes = [size for size, x in zip(self.shape, self.roles, strict=True) if x == role]
    return sizes[LAYER in self.name :] if role == "s" else sizes

  def _layer_axes(self, role: str) -> list[int]:
    """The axes of a role in a leaf of one layer."""
    return [n for n, x in enumerate(self.layer_roles) if x == role]

  def window(self) -> tuple[int, ...]:
    """The sizes of a convolution's window."""
    sizes = self._sizes("i")
    return tuple(sizes[n] for n in self.channels_first()[1:]) if self.is_conv else ()

  def channels_first(self) -> list[int]:
    """A convolution's inputs in the file's order, with the channels next to the outputs."""
    window = range(len(self._sizes("i")) - 1)
    return [len(window), *window] if self.roles.endswith("o") else [0, *(n + 1 for n in window)]

  def _groups(self, layout: str) -> dict[str, list[int]]:
    """The axes of each letter of a layout, in the file's order."""
    groups, start = {}, 0
    for letter in layout:
      count = 1 if letter == "r" else len(self._sizes(letter))
      inner = self.channels_first() if letter == "i" and self.is_conv else range(count)
      groups[letter] = [start + n for n in inner]
      start += count
    return groups


def modules(params: Any, axes: Mapping[str, Axes], table: names.Table) -> dict[str, Module]:
  """Returns `{path: module}` for the leaves in the table.

  Args:
    params: as in `lora_jax.exchange.load`.
    axes: as in `lora_jax.exchange.load`.
    table: as in `lora_jax.exchange.load`.

  Raises:
    ValueError: if the axes are those of other parameters.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  # A name without a leaf is computed from another leaf: a head tied to the embedding.
  absent = [x for x, path in table.items() if path and LAYER not in x and path not in leaves]
  found = {}
  for path, leaf in leaves.items():
    if path not in axes:
      raise ValueError(f"{path}: has no axes; trace them with these parameters")
    name, *others = names.names_of(path, table) or [None]
    if name is not None:
      module = Module(
        path=path,
        name=name,
        shape=tuple(leaf.shape),
        roles=axes[path].roles,
        uses=axes[path].uses,
        tied=None,
        fan_in_fan_out=names.is_in_out(name, table),
        groups=axes[path].groups,
      )
      module = _as_parameter(module, table)
      if module.is_head_too:
        module = dataclasses.replace(module, tied=(*others, *absent, None)[0])
      found[path] = module
  return found


def _as_parameter(module: Module, table: names.Table) -> Module:
  """The module as a parameter of another one if PyTorch has no linear layer for it."""
  template = names.template_of(module.name, table)
  assert template is not None  # its name comes from the table
  is_bare = not module.name.endswith(".weight")
  if template not in names.ROUTERS and not (is_bare and _stacks(module.name, module.roles) == 1):
    return module
  return dataclasses.replace(
    module,
    name=f"{module.name}.weight" if is_bare else module.name,
    parameter=module.name,
    place=list(table).index(template),
  )


def _stacks(name: str, roles: str) -> int:
  """The number of a leaf's axes that are stacks of anything but layers."""
  return roles.count("s") - (LAYER in name)


def module_of(name: str) -> str:
  """The name of the module that a parameter belongs to."""
  return name.rpartition(".")[0]
