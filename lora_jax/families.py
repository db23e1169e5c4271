"""FAMILIES: everything that the rest of the library needs to know about a family of models.

    family = families.family_of(config)              # by config.family, the `model_type` of files
    model = family.make_model(config)
    shapes = families.param_shapes(config)           # {"embed/embedding": (49152, 576), ...}
    layout = sharding.lay_out(params, mesh, family.sharding)

To add a family, extend the dict:

    mine = {**families.FAMILIES, "mine": families.Family(...)}
    found = pretrained.load("folder", families=mine)
    model = found.family.make_model(found.config)
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

from lora_jax.checks import shown
from lora_jax.io import (
  bert_configs,
  bert_names,
  configs,
  dinov2_onnx,
  gemma4_configs,
  gpt2_configs,
  image_configs,
  image_names,
  names,
)
from lora_jax.models import (
  bert,
  convolutions,
  encoder_attention,
  gemma4,
  gpt2,
  layers,
  llama,
  mobilenet,
  resnet,
  vit,
)

Rules = Sequence[tuple[str, jax.P]]
Config = Any
"""A frozen dataclass. Every family's has `family`, `num_layers`, `scan_layers`, `remat_policy`,
`constrain`, `dtype`, `param_dtype` and `classes`, the names of the outputs of its head where that
is no vocabulary; that of a model of texts `vocab_size` and `max_length`, that of one of images
`channels` and `image_size`, too."""

Reader = Callable[[Any], tuple[Config, Mapping[str, Any]] | None]
DECODER, ENCODER, IMAGES = "decoder", "encoder", "images"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A family of models, described by plain functions and literal tables.

  parse_config: the fields of a config.json to the model's config. Raises ValueError for an unknown
    field or value.
  write_config: the inverse.
  make_model: config to the Linen module.
  init_cache: (config, rows, slots, dtype) to an empty cache; None for a family that does not
    generate.
  names: {file format: {tensor name: path}}, for "safetensors" and, if the family has such files,
    "gguf", "torch" and "onnx"; also for "modules" if PEFT's module names differ from those in
    files. See `lora_jax.io.names`.
  prefix: what the names of "safetensors" begin with, the head's excepted, and files that hold no
    head may leave out; "" where they leave out nothing.
  example_inputs: config to the argument shapes of the smallest call that uses every parameter, for
    tracing.
  inputs: (config, rows, length) to the shape of the argument of a plain call: tokens, by default
    128 per text, or images of `length` pixels a side, by default the config's image size.
  sharding: (pattern, PartitionSpec) pairs, as `lora_jax.sharding.lay_out` takes them.
  layers_alike: whether the parameters of all layers have the same shapes, so that they can be
    stacked and scanned.
  kind: DECODER, causal attention: it generates text, and its last token represents a text.
    ENCODER, bidirectional attention: the first token or all of them represent a text. IMAGES, which
    takes no text and has no tokenizer.
  class_head: {tensor name: path} of a classification head if `names` does not have it.
  peft_task, class_task: PEFT's `task_type` for adapters of a model without and with a
    classification head; None if PEFT has no name for it.
  with_classes: (config, names) to the config of the model with a new head of these classes.
  bare: whether transformers stores a model without classes as the body alone, so that its tensor
    names lack `prefix`.
  options: config to the {name: dtype} of further per-token arguments, such as the padding mask; a
    decoder has none.
  as_stored: (config, names of the tensors) to the config of these tensors, for a family whose
    config.json does not list the parts that are present; None for others.
  of_tensors: {file format: reader}, for files without a configuration. A reader takes the parsed
    file from the format's module in `lora_jax.io` and returns (config, tensors), or None if the
    file belongs to another family.
  statistics: a pattern of leaves that are measured rather than learned; they never train.
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
  layers_alike: bool = True
  kind: str = DECODER
  class_head: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {"score.weight": "head/kernel"}
  )
  peft_task: str | None = "CAUSAL_LM"
  class_task: str | None = "SEQ_CLS"
  with_classes: Callable[[Config, tuple[str, ...]], Config] = lambda config, classes: (
    dataclasses.replace(config, classes=classes)
  )
  bare: bool = False
  options: Callable[[Config], dict[str, DTypeLike]] = lambda config: {}
  as_stored: Callable[[Config, Collection[str]], Config] | None = None
  of_tensors: Mapping[str, Reader] = dataclasses.field(default_factory=dict)
  statistics: str | None = None

  @property
  def has_tokenizer(self) -> bool:
    """Whether the family's folders have one."""
    return self.kind != IMAGES


DECODER_SHARDING = (
  (r"(.*/)?attn/(query|key|value|qkv)/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?attn/out/kernel", jax.P("tensor", "fsdp")),
  # Each expert is sharded over all devices, rather than placed on one: the number of tokens of an
  # expert is known only after routing.
  (r"(.*/)?mlp/(gate|up|gate_up|experts/gate_up)/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?mlp/(experts/)?down/kernel", jax.P("tensor", "fsdp")),
  ("head/kernel", jax.P("fsdp", "tensor")),
  # Not over fsdp: looking up rows for a batch that is also sharded over fsdp would gather the
  # whole table, over tensor too.
  ("embed/embedding", jax.P("tensor", None)),
  (".*", jax.P()),
)
"""Of decoders, layers stacked or not. Biases and norms stay whole.

Where the devices of `tensor` do not divide the heads of queries and of keys, the result is the
same, but attention's activations are gathered in each layer.
"""


ENCODER_SHARDING = (
  *(rule for rule in DECODER_SHARDING if rule[0] not in ("head/kernel", ".*")),
  (".*", jax.P()),
)
"""Of encoders, as of decoders. The pooler and the head of classes are small and stay whole."""


def _tokens(config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
  """One row of two tokens, since a single token has no product over positions."""
  del config
  return (jax.ShapeDtypeStruct((1, 2), jnp.int32),)


def _decoder(name: str) -> Family:
  """A relative of Llama, which differs by switches of its config."""
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


def _masks(config: Config) -> dict[str, DTypeLike]:
  return {"mask_BT": jnp.bool_} | ({"types_BT": jnp.int32} if config.token_types > 1 else {})


def _with_stored_pooler(config: Config, stored: Collection[str]) -> Config:
  """BERT's files may have a pooler for any architecture in their config.json; a model with a
  classification head always has one."""
  if config.classes:
    return config
  suffix = "pooler.dense.weight"
  return dataclasses.replace(config, pooler=any(name.endswith(suffix) for name in stored))


def _encoder(name: str) -> Family:
  """BERT or a relative of it, which differs by switches of its config."""
  return Family(
    parse_config=bert_configs.from_hugging_face,
    write_config=bert_configs.to_hugging_face,
    make_model=bert.Bert,
    init_cache=None,
    names={"safetensors": bert_names.HUGGING_FACE[name]},
    example_inputs=_tokens,
    sharding=ENCODER_SHARDING,
    prefix=f"{name}.",
    kind=ENCODER,
    class_head={},
    peft_task="FEATURE_EXTRACTION",
    bare=True,
    options=_masks,
    as_stored=_with_stored_pooler if bert_configs.STYLES[name].pooled else None,
  )


IMAGE_SHARDING = (
  (r"(.*/)?attn/(query|key|value)/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?attn/out/kernel", jax.P("tensor", "fsdp")),
  (r"(.*/)?mlp/up/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?mlp/down/kernel", jax.P("tensor", "fsdp")),
  # A convolution's kernel is small compared with its input.
  (".*", jax.P()),
)
"""Of models of images."""


def _images(config: Config, rows: int, side: int | None) -> jax.ShapeDtypeStruct:
  """Images, by default of the model's own size."""
  side = side or config.image_size
  return jax.ShapeDtypeStruct((rows, side, side, config.channels), jnp.float32)


def _of_images(name: str, files: Mapping[str, names.Table] | None = None, **how: Any) -> Family:
  """A family whose inputs are images; `files` has the names for further file formats."""
  return Family(
    init_cache=None,
    names={
      "safetensors": image_names.FILES[name],
      "modules": image_names.MODULES[name],
      **(files or {}),
    },
    example_inputs=lambda config: (_images(config, 1, None),),
    inputs=_images,
    sharding=IMAGE_SHARDING,
    prefix=f"{name}.",
    kind=IMAGES,
    class_head={},
    peft_task=None,
    class_task=None,
    bare=True,
    **how,
  )


def _vit(name: str, **how: Any) -> Family:
  return _of_images(
    name, parse_config=image_configs.vit, write_config=image_configs.write_vit,
    make_model=vit.ViT, with_classes=image_configs.with_classes, **how,
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
  "gemma4_text": Family(
    parse_config=gemma4_configs.from_hugging_face,
    write_config=gemma4_configs.to_hugging_face,
    make_model=gemma4.Gemma4,
    init_cache=gemma4.init_cache,
    names={"safetensors": names.GEMMA4_HF},
    example_inputs=_tokens,
    sharding=(
      ("embed_per_layer/embedding", jax.P("tensor", None)),
      # These are small, and their outputs are added to activations that every device has in full.
      (r"per_layer_model/kernel|block_\d+/per_layer_gate/kernel", jax.P("fsdp", None)),
      (r"block_\d+/per_layer_out/kernel", jax.P(None, "fsdp")),
      *DECODER_SHARDING,
    ),
    layers_alike=False,
  ),
  **{name: _encoder(name) for name in bert_configs.STYLES},
  "vit": _vit("vit"),
  "deit": _vit("deit"),
  "dinov2": _vit(
    "dinov2", files={"onnx": image_names.DINO_ONNX}, of_tensors={"onnx": dinov2_onnx.backbone}
  ),
  "mobilenet_v2": _of_images(
    "mobilenet_v2",
    files={"torch": image_names.TORCHVISION_MOBILENET},
    parse_config=image_configs.mobilenet_v2,
    write_config=image_configs.write_mobilenet_v2,
    make_model=mobilenet.MobileNetV2,
    of_tensors={"torch": image_configs.torchvision_mobilenet},
    layers_alike=False,
    statistics=convolutions.STATISTICS,
  ),
  "resnet": _of_images(
    "resnet",
    parse_config=image_configs.resnet,
    write_config=image_configs.write_resnet,
    make_model=resnet.ResNet,
    layers_alike=False,
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
  if family.layers_alike:  # then one layer is traced, and not each
    model = family.make_model(dataclasses.replace(config, scan_layers=True))
  else:
    model = family.make_model(config)
  variables = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(config))
  leaves: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  if family.layers_alike and not config.scan_layers:
    each = [(path, layers.layer_paths(path, config.num_layers)) for path in shapes]
    shapes = {x: shapes[path][x != path :] for path, xs in each for x in xs}
  return dict(sorted(shapes.items(), key=lambda item: item[0].split("/")))


def stored_names(
  config: Config, families: Mapping[str, Family] = FAMILIES, where: str = "safetensors"
) -> names.Table:
  """The names of a model's tensors in safetensors files that have its family's prefix; `where` is
  "modules" for the names by which PEFT knows them."""
  family = family_of(config, families)
  table, head = family.names.get(where, family.names["safetensors"]), family.class_head
  if not config.classes or not head:
    return table
  return {name: path for name, path in table.items() if path not in head.values()} | dict(head)


def tensor_names(
  config: Config, families: Mapping[str, Family] = FAMILIES, where: str = "safetensors"
) -> names.Table:
  """The names of a model's tensors in the safetensors files that are written of it, a decoder's
  head of classes as `score`; `where` is "modules" for those in adapters."""
  family, table = family_of(config, families), stored_names(config, families, where)
  if encoder_attention.adds_leaves(config):
    table = {**table, **encoder_attention.NAMES}
  if not family.bare or config.classes:
    return table
  return {name.removeprefix(family.prefix): path for name, path in table.items()}


def _find(name: Any, families: Mapping[str, Family]) -> Family:
  if not isinstance(name, str) or name not in families:
    supported = ", ".join(map(repr, families))
    raise ValueError(f"model_type {shown(name)} is not supported; supported: {supported}")
  return families[name]
