"""FAMILIES: everything that the rest of the library needs to know of a family of models.

    family = families.family_of(config)              # by config.family, the `model_type` of files
    model = family.make_model(config)
    shapes = families.param_shapes(config)           # {"embed/embedding": (49152, 576), ...}
    layout = sharding.lay_out(params, mesh, family.sharding)

A family of your own is a row in a dict of your own:

    mine = {**families.FAMILIES, "mine": families.Family(...)}
    found = pretrained.load("folder", families=mine)
    model = found.family.make_model(found.config)
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from lora_jax.checks import shown
from lora_jax.io import configs, dinov2_onnx, gpt2_configs, image_configs, image_names, names
from lora_jax.models import convolutions, gpt2, layers, llama, mobilenet, resnet, vit

Rules = Sequence[tuple[str, jax.P]]
Config = Any
"""A frozen dataclass. Every family's has `family`, `num_layers`, `scan_layers`, `remat_policy`,
`constrain`, `dtype`, `param_dtype` and `classes`, the names of the outputs of its head where that
is no vocabulary; a decoder's `vocab_size` and `max_length`, one of images `channels`, too."""

Reader = Callable[[Any], tuple[Config, Mapping[str, Any]] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A family of models, as plain functions and literal tables.

  parse_config: the fields of a config.json to the model's config. Raises ValueError for a field or
    a value that it does not know.
  write_config: the inverse.
  make_model: config to the Linen module.
  init_cache: (config, rows, slots, dtype) to an empty cache; None for a family that generates
    nothing.
  names: {file format: {tensor name: path}}, of "safetensors" and, where the family has such files,
    "gguf", "torch" and "onnx"; of "modules" where PEFT knows the modules by other names than those
    in files. See `lora_jax.io.names`.
  prefix: what the names of "safetensors" begin with, the head's excepted, and files that hold no
    head may leave out; "" where they leave out nothing.
  example_inputs: config to the shapes of the arguments of the smallest call that uses every
    parameter, for tracing.
  inputs: (config, rows, length) to the shape of the one argument of a plain call: tokens, by
    default 128 of a text, or images of `length` pixels a side, by default those of the config.
  sharding: (pattern, PartitionSpec) pairs, as `lora_jax.sharding.lay_out` takes them.
  class_head: config to the names of the tensors of a head of classes.
  with_classes: (config, names) to the config of the model with a head of these classes.
  class_task: what PEFT calls a model with such a head, `task_type` of its adapters; None: nothing.
  of_tensors: {file format: reader}, of files that hold no configuration: from what the format's
    module in `lora_jax.io` makes of a file to (config, tensors), or None where it is of another
    family.
  has_tokenizer: whether the family's folders have one.
  has_like_layers: whether its layers have one shape, so that `scan_layers` can stack them.
  statistics: a pattern of the leaves that are measured and not learned, which never train.
  """

  parse_config: Callable[[Mapping[str, Any]], Config]
  write_config: Callable[[Config], dict[str, Any]]
  make_model: Callable[[Config], nn.Module]
  init_cache: Callable[..., Any] | None
  names: Mapping[str, names.Table]
  example_inputs: Callable[[Config], tuple[jax.ShapeDtypeStruct, ...]]
  sharding: Rules
  prefix: str = ""
  inputs: Callable[[Config, int, int | None], jax.ShapeDtypeStruct] = lambda config, rows, length: (
    jax.ShapeDtypeStruct((rows, length or 128), jnp.int32)
  )
  class_head: Callable[[Config], names.Table] = lambda config: {"score.weight": "head/kernel"}
  with_classes: Callable[[Config, tuple[str, ...]], Config] = lambda config, classes: (
    dataclasses.replace(config, classes=classes)
  )
  class_task: str | None = "SEQ_CLS"
  of_tensors: Mapping[str, Callable[[Any], tuple[Config, Mapping[str, Any]] | None]] = (
    dataclasses.field(default_factory=dict)
  )
  has_tokenizer: bool = True
  has_like_layers: bool = True
  statistics: str | None = None


DECODER_SHARDING = (
  (r"(.*/)?attn/(query|key|value|qkv)/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?attn/out/kernel", jax.P("tensor", "fsdp")),
  # Every device has a part of each expert, and not some of the experts: how many tokens an expert
  # gets is known only when they are routed.
  (r"(.*/)?mlp/(gate|up|gate_up|experts/gate_up)/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?mlp/(experts/)?down/kernel", jax.P("tensor", "fsdp")),
  ("head/kernel", jax.P("fsdp", "tensor")),
  # Not over fsdp: a table that is cut so is gathered whole, over tensor too, where rows are
  # looked up for a batch that is itself shared out over fsdp.
  ("embed/embedding", jax.P("tensor", None)),
  (".*", jax.P()),
)
"""Of decoders, layers stacked or not. Biases and norms stay whole.

Where the devices of `tensor` do not divide the heads of queries and of keys, the result is the
same, but attention's activations are gathered in each layer.
"""


def _tokens(config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
  """One row of two tokens: a shorter one has no product over positions."""
  del config
  return (jax.ShapeDtypeStruct((1, 2), jnp.int32),)


def _decoder(name: str) -> Family:
  """A relative of Llama, told apart by switches of its config."""
  tables = {"safetensors": names.HUGGING_FACE[name]}
  if name in names.GGUF:
    tables["gguf"] = names.GGUF[name]
  return Family(
    parse_config=configs.from_hugging_face,
    write_config=configs.to_hugging_face,
    make_model=llama.Llama,
    init_cache=llama.init_cache,
    names=tables,
    example_inputs=_tokens,
    sharding=DECODER_SHARDING,
  )


IMAGE_SHARDING = (
  (r"(.*/)?attn/(query|key|value)/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?attn/out/kernel", jax.P("tensor", "fsdp")),
  (r"(.*/)?mlp/up/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?mlp/down/kernel", jax.P("tensor", "fsdp")),
  # A convolution's kernel is small beside what it is applied to.
  (".*", jax.P()),
)
"""Of models of images."""


def _images(config: Config, rows: int, side: int | None) -> jax.ShapeDtypeStruct:
  """Images, by default of the size that the model was made for."""
  side = side or config.image_size
  return jax.ShapeDtypeStruct((rows, side, side, config.channels), jnp.float32)


def _of_images(name: str, **how: Any) -> Family:
  """A family whose inputs are images."""
  return Family(
    init_cache=None,
    names={
      "safetensors": image_names.FILES[name],
      "modules": image_names.MODULES[name],
      **how.pop("others", {}),
    },
    example_inputs=lambda config: (_images(config, 1, None),),
    inputs=_images,
    sharding=IMAGE_SHARDING,
    class_head=image_configs.head_names,
    class_task=None,
    has_tokenizer=False,
    **how,
  )


def _vit(name: str, **how: Any) -> Family:
  return _of_images(
    name, parse_config=image_configs.vit, write_config=image_configs.write_vit,
    make_model=vit.ViT, prefix=f"{name}.", with_classes=image_configs.with_classes, **how,
  )  # fmt: skip


FAMILIES: Mapping[str, Family] = {
  **{name: _decoder(name) for name in configs.FAMILIES},
  "gpt2": Family(
    parse_config=gpt2_configs.from_hugging_face,
    write_config=gpt2_configs.to_hugging_face,
    make_model=gpt2.GPT2,
    init_cache=gpt2.init_cache,
    names={"safetensors": names.GPT2_HF, "gguf": names.GPT2_GGUF},
    example_inputs=_tokens,
    sharding=DECODER_SHARDING,
    prefix="transformer.",
  ),
  "vit": _vit("vit"),
  "deit": _vit("deit"),
  "dinov2": _vit(
    "dinov2", others={"onnx": image_names.DINO_ONNX}, of_tensors={"onnx": dinov2_onnx.backbone}
  ),
  "mobilenet_v2": _of_images(
    "mobilenet_v2",
    parse_config=image_configs.mobilenet_v2,
    write_config=image_configs.write_mobilenet_v2,
    make_model=mobilenet.MobileNetV2,
    prefix="mobilenet_v2.",
    others={"torch": image_names.TORCHVISION_MOBILENET},
    of_tensors={"torch": image_configs.torchvision_mobilenet},
    has_like_layers=False,
    statistics=convolutions.STATISTICS,
  ),
  "resnet": _of_images(
    "resnet",
    parse_config=image_configs.resnet,
    write_config=image_configs.write_resnet,
    make_model=resnet.ResNet,
    prefix="resnet.",
    has_like_layers=False,
    statistics=convolutions.STATISTICS,
  ),
}
"""By `model_type`, the name that a config.json has for the family."""


def family_of(config: Config, families: Mapping[str, Family] = FAMILIES) -> Family:
  """The family of a model's config.

  Raises:
    ValueError: when it is not among the families.
  """
  return _find(config.family, families)


def parse_config(fields: Mapping[str, Any], families: Mapping[str, Family] = FAMILIES) -> Config:
  """The model's config that a parsed config.json describes.

  Raises:
    ValueError: for another `model_type`, and as the family's `parse_config` does.
  """
  return _find(fields.get("model_type"), families).parse_config(fields)


def param_shapes(
  config: Config, families: Mapping[str, Family] = FAMILIES
) -> dict[str, tuple[int, ...]]:
  """Returns {slash path: shape} of the model's parameters, without making any."""
  family = family_of(config, families)
  traced = config
  if family.has_like_layers:  # one of them is traced, and not each
    traced = dataclasses.replace(config, scan_layers=True)
  model = family.make_model(traced)
  variables = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(config))
  leaves = traverse_util.flatten_dict(variables["params"], sep="/")
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  if traced.scan_layers and not config.scan_layers:
    each = [(path, layers.layer_paths(path, config.num_layers)) for path in shapes]
    shapes = {x: shapes[path][x != path :] for path, xs in each for x in xs}
  return dict(sorted(shapes.items(), key=lambda item: item[0].split("/")))


def tensor_names(
  config: Config, families: Mapping[str, Family] = FAMILIES, kind: str = "safetensors"
) -> names.Table:
  """The names of a model's tensors in safetensors files, those of a head of classes with them.

  kind: "modules" for the names by which PEFT knows them.
  """
  family = family_of(config, families)
  table = family.names.get(kind, family.names["safetensors"])
  if not config.classes:
    return table
  head = family.class_head(config)
  return {name: path for name, path in table.items() if path not in head.values()} | head


def _find(name: Any, families: Mapping[str, Family]) -> Family:
  if not isinstance(name, str) or name not in families:
    supported = ", ".join(map(repr, families))
    raise ValueError(f"model_type {shown(name)} is not supported; supported: {supported}")
  return families[name]
