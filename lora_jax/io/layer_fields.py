"""The fields of a `config.json` for each layer: its window and its rotation."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io.rope_fields import FULL, LOCAL

Fields = Mapping[str, Any]

PATTERN, UPPER = "sliding_window_pattern", "max_window_layers"
ROTATED, INTERVAL = "no_rope_layers", "no_rope_layer_interval"


def windows(
  fields: Fields,
  num_layers: int,
  is_local: Callable[[Fields, int], bool] | None,
  defaults: Fields,
) -> tuple[int | None, tuple[bool, ...]]:
  """Returns the window, and for each layer whether it has it; () if all layers are alike.

  fields: of the file, with the family's defaults.
  defaults: of the family; their keys are the fields that it has.
  is_local: (fields, layer) -> whether the layer has the window if `layer_types` is absent; None if
    the family has no window.
  """
  if is_local is None:
    return None, ()
  used = fields.get("use_sliding_window", True)
  if type(used) is not bool:
    raise ValueError(f"use_sliding_window must be true or false, not {shown(used)}")
  window, kinds = fields["sliding_window"] if used else None, fields.get("layer_types")
  if kinds is None:
    _check_integers(fields, defaults)
    local = window is not None and tuple(is_local(fields, layer) for layer in range(num_layers))
  elif not isinstance(kinds, list) or len(kinds) != num_layers:
    raise ValueError(f"layer_types must be a list of {num_layers} layers, not {shown(kinds)}")
  else:
    if unknown := [kind for kind in kinds if kind not in (LOCAL, FULL)]:
      raise ValueError(
        f"layer_types: {shown(unknown[0])} is not supported; supported: {LOCAL!r}, {FULL!r}"
      )
    local = tuple(kind == LOCAL for kind in kinds)
    if window is None and any(local):
      raise ValueError(f"layer_types has {LOCAL!r}, and no sliding_window is given or used")
  if not local or not any(local):
    return None, ()
  return window, () if all(local) else local


def _check_integers(fields: Fields, defaults: Fields) -> None:
  for field, least in ((UPPER, 0), (PATTERN, 1)):
    if field in defaults and not (type(fields[field]) is int and fields[field] >= least):
      raise ValueError(f"{field} must be an integer from {least}, not {shown(fields[field])}")


def rotated(fields: Fields, num_layers: int, defaults: Fields) -> tuple[bool, ...]:
  """Returns for each layer whether its queries and keys are rotated; () if all are.

  fields, defaults: as in `windows`.
  """
  if ROTATED not in defaults:
    return ()
  flags, interval = fields[ROTATED], fields[INTERVAL]
  if flags is None:
    if type(interval) is not int or interval < 1:
      raise ValueError(f"{INTERVAL} must be an integer from 1, not {shown(interval)}")
    flags = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
  if not (
    isinstance(flags, list)
    and len(flags) == num_layers
    and all(type(x) is int and x in (0, 1) for x in flags)
  ):
    raise ValueError(
      f"{ROTATED} must be a list of 0 or 1 for {num_layers} layers, not {shown(flags)}"
    )
  return () if all(flags) else tuple(map(bool, flags))
