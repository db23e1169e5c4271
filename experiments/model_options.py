"""How a model computes its attention and its depthwise convolutions, by its config and the device.

found = with_attention(found, config.model, mesh)
print(attention_line(found.config, config.data))
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lora_jax import families
from lora_jax.io import pretrained
from lora_jax.models import attention_kernels, encoder_attention
from lora_jax.models.low_rank_attention import Linformer, Nystrom, segment_means

AUTO = "auto"
"""A setting that is left to the program."""


def with_attention(
  found: pretrained.Pretrained, model: ConfigDict, mesh: Mesh | None = None
) -> pretrained.Pretrained:
  """The model with the attention that its section names, and the leaves that this adds.

  Raises:
    ValueError: for settings that do not fit each other, or the model.
  """
  name, rank, iterations = _settings(model)
  is_low_rank = name in encoder_attention.LOW_RANK
  if is_low_rank and found.family.kind == families.DECODER:
    raise ValueError(
      f"model.attention {name}: in it every token sees every other one, and a "
      f"{found.config.family!r} is a decoder, whose tokens see only those before them; set it to "
      "auto"
    )
  if not hasattr(found.config, "attention"):
    if name not in (AUTO, "plain"):
      raise ValueError(
        f"model.attention {name}: attention of the family {found.config.family!r} has one "
        "implementation; set it to auto"
      )
    return found
  match name:
    case "nystrom":
      how = Nystrom(landmarks=rank, iterations=iterations)
    case "linformer":
      how = Linformer(rank=rank)
    case _:
      how = attention_kernels.Choice(name, mesh=mesh)
  config = dataclasses.replace(found.config, attention=how)
  if not encoder_attention.adds_leaves(config):
    return dataclasses.replace(found, config=config)
  return dataclasses.replace(found, config=config, params=_with_new_leaves(found, config))


def _settings(model: ConfigDict) -> tuple[str, int, int]:
  """The fields for attention; runs from before there were any had exact attention."""
  name = model.attention if "attention" in model else AUTO
  counts = {field: model.get(field, 0) for field in ("attention_rank", "attention_iterations")}
  needed = {
    "attention_rank": name in encoder_attention.LOW_RANK,
    "attention_iterations": name == "nystrom",
  }
  for field, count in counts.items():
    if bool(count) != needed[field]:
      said = "needs 1 or more" if needed[field] else "has none; set it to 0"
      raise ValueError(f"model.{field} {count}: attention {name} {said}")
  return name, *counts.values()


def _with_new_leaves(found: pretrained.Pretrained, config: families.Config) -> Any:
  """The parameters of a model, and those that only the new config has, at their start."""
  known = {config.family: found.family}
  before, after = (families.param_shapes(x, known) for x in (found.config, config))
  leaves = traverse_util.flatten_dict(found.params, sep="/")
  is_shape = isinstance(jax.tree.leaves(found.params)[0], jax.ShapeDtypeStruct)
  for path in after.keys() - before.keys():
    shape = jax.ShapeDtypeStruct(after[path], config.param_dtype)
    leaves[path] = shape if is_shape else segment_means(None, shape.shape, shape.dtype)
  return traverse_util.unflatten_dict(leaves, sep="/")


def for_device(found: pretrained.Pretrained) -> pretrained.Pretrained:
  """The model whose depthwise convolutions suit JAX's default backend."""
  config = _with_depthwise(found.config, _depthwise_on(jax.default_backend()))
  return dataclasses.replace(found, config=config)


def for_dropout(
  found: pretrained.Pretrained, specs: Iterable[Mapping[str, Any]]
) -> pretrained.Pretrained:
  """The model whose depthwise convolutions have their input as an operand, if an adapter of one
  drops inputs."""
  drops = any(
    getattr(spec, "dropout", 0)
    for each in specs
    for path, spec in each.items()
    if "/depthwise/" in path
  )
  return dataclasses.replace(found, config=traceable(found.config)) if drops else found


def traceable(model: families.Config) -> families.Config:
  """The model whose convolutions are all `lax.conv_general_dilated`, which shows their groups."""
  return _with_depthwise(model, "convolution")


def _depthwise_on(platform: str) -> str:
  return "shifts" if platform == "cpu" else "convolution"


def _with_depthwise(model: families.Config, how: str) -> families.Config:
  return dataclasses.replace(model, depthwise=how) if hasattr(model, "depthwise") else model


def on_mesh(model: families.Config, mesh: Mesh) -> families.Config:
  """The model whose attention knows over which devices its rows and heads lie."""
  return _with_choice(model, mesh=mesh)


def for_platform(model: families.Config, platform: str) -> families.Config:
  """The model that is computed as on a "cpu", "gpu" or "tpu", on any machine."""
  return _with_choice(_with_depthwise(model, _depthwise_on(platform)), platform=platform)


def for_export(model: families.Config, platforms: Sequence[str] = ()) -> families.Config:
  """The model whose attention is computed by no device's own kernel, and whose depthwise
  convolutions suit the platforms of a program; (): a program that JAX does not run."""
  how = _depthwise_on("cpu") if set(platforms) == {"cpu"} else "convolution"
  return _with_choice(_with_depthwise(model, how), name=AUTO, platform="cpu", mesh=None)


def _with_choice(model: families.Config, **changes: Any) -> families.Config:
  if not isinstance(getattr(model, "attention", None), attention_kernels.Choice):
    return model
  return dataclasses.replace(model, attention=dataclasses.replace(model.attention, **changes))


def exact_elsewhere(model: families.Config) -> str:
  """A line on a model whose attention other programs compute in another way; "" of others."""
  how = getattr(model, "attention", None)
  if how is None or isinstance(how, attention_kernels.Choice):
    return ""
  return f"attention: trained as {how}; other programs compute it exactly, so their results differ"


def attention_line(model: families.Config, data: ConfigDict) -> str:
  """Which implementation of attention a run's training uses, for people; "" of a model without.

  Raises:
    ValueError: when the one that the config names cannot compute it, with the reason.
  """
  how = getattr(model, "attention", None)
  if how is None:
    return ""
  if not isinstance(how, attention_kernels.Choice):
    return f"attention: of low rank, {how}"
  if "buckets" not in data:  # of one size, such as images
    return f"attention: {how.name} (model.attention)"
  kind = families.family_of(model).kind
  packed = data.packed_length if "packed_length" in data else 0
  used: dict[str, list[int]] = {}
  for length in (packed,) if packed else data.buckets:
    call = attention_kernels.call_of(
      model, length, segments=bool(packed), is_causal=kind == families.DECODER
    )
    try:
      used.setdefault(attention_kernels.chosen(how, call), []).append(length)
    except ValueError as error:
      raise ValueError(f"model.attention: {error}") from None
  each = [f"{name} for rows of {', '.join(map(str, used[name]))} tokens" for name in used]
  return f"attention: {'; '.join(each)} (model.attention {how.name})"
