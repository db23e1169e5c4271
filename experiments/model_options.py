"""How a model computes, as a config's `model` section says: nothing that its weights depend on.

found = with_attention(found, config.model, mesh)
print(attention_line(found.config, config.data))
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_jax import families
from lora_jax.io import pretrained
from lora_jax.models import attention_kernels

AUTO = "auto"
"""A setting that is left to the program."""


def with_attention(
  found: pretrained.Pretrained, model: ConfigDict, mesh: Mesh | None = None
) -> pretrained.Pretrained:
  """The model with the implementation of attention that its section names."""
  name = model.attention if "attention" in model else AUTO
  if not hasattr(found.config, "attention"):
    if name not in (AUTO, "plain"):
      raise ValueError(
        f"model.attention {name}: attention of the family {found.config.family!r} has one "
        "implementation; set it to auto"
      )
    return found
  choice = attention_kernels.Choice(name, mesh=mesh)
  return dataclasses.replace(found, config=dataclasses.replace(found.config, attention=choice))


def on_mesh(model: families.Config, mesh: Mesh) -> families.Config:
  """The model whose attention knows over which devices its rows and heads lie."""
  return _with_choice(model, mesh=mesh)


def for_platform(model: families.Config, platform: str) -> families.Config:
  """The model whose attention is computed as on a "cpu", "gpu" or "tpu", on any machine."""
  return _with_choice(model, platform=platform)


def for_any_platform(model: families.Config) -> families.Config:
  """The model whose attention is computed by no device's own kernel."""
  return _with_choice(model, name=AUTO, platform="cpu", mesh=None)


def _with_choice(model: families.Config, **changes: Any) -> families.Config:
  if not hasattr(model, "attention"):
    return model
  return dataclasses.replace(model, attention=dataclasses.replace(model.attention, **changes))


def attention_line(model: families.Config, data: ConfigDict) -> str:
  """Which implementation of attention a run's training uses, for people; "" of a model without, and
  of data that are no texts, whose task refuses such a model.

  Raises:
    ValueError: when the one that the config names cannot compute it, with the reason.
  """
  if not hasattr(model, "attention") or "buckets" not in data:
    return ""
  packed = data.packed_length if "packed_length" in data else 0
  used: dict[str, list[int]] = {}
  for length in (packed,) if packed else data.buckets:
    call = attention_kernels.call_of(model, length, segments=bool(packed))
    try:
      used.setdefault(attention_kernels.chosen(model.attention, call), []).append(length)
    except ValueError as error:
      raise ValueError(f"model.attention: {error}") from None
  each = [f"{name} for rows of {', '.join(map(str, used[name]))} tokens" for name in used]
  return f"attention: {'; '.join(each)} (model.attention {model.attention.name})"
