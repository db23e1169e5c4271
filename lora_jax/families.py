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
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

from lora_jax.checks import shown
from lora_jax.io import bert_configs, bert_names, configs, gpt2_configs, names
from lora_jax.models import bert, gpt2, layers, llama

Rules = Sequence[tuple[str, jax.P]]
Config = Any
"""A frozen dataclass. Every family's has `family`, `num_layers`, `scan_layers`, `remat_policy`,
`constrain`, `dtype` and `param_dtype`; that of a model of texts `vocab_size`, `max_length` and
`classes`, the names of the outputs of its head where that is no vocabulary, too."""

DECODER, ENCODER = "decoder", "encoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """A family of models, as plain functions and literal tables.

  parse_config: the fields of a config.json to the model's config. Raises ValueError for a field or
    a value that it does not know.
  write_config: the inverse.
  make_model: config to the Linen module.
  init_cache: (config, rows, slots, dtype) to an empty cache; None for a family that generates
    nothing.
  names: {file format: {tensor name: path}}, of "safetensors" and, where the family has GGUF files,
    "gguf". See `lora_jax.io.names`.
  prefix: what the names of "safetensors" begin with, the head's excepted, and files that hold no
    head may leave out; "" where they leave out nothing.
  example_inputs: config to the shapes of the arguments of the smallest call that uses every
    parameter, for tracing.
  sharding: (pattern, PartitionSpec) pairs, as `lora_jax.sharding.lay_out` takes them.
  kind: DECODER, whose tokens see those before them, so that a text can be written or read at its
    last token, or ENCODER, whose tokens see the whole text, so that it is read at its first token
    or at all of them.
  class_head: {tensor name: path} of a head of classes where `names` does not have it.
  peft_task: what PEFT calls the use of a model without classes, `task_type` of its adapters.
  bare: whether a model without classes is the body alone in transformers, so that the names of its
    tensors lack `prefix`.
  options: config to the {name: dtype} of what a model takes of each token besides its id, as where
    padding is, which a decoder does not see.
  as_stored: (config, names of the tensors) to the config of these tensors, of a family whose
    config.json does not say which parts there are; None for others.
  """

  parse_config: Callable[[Mapping[str, Any]], Config]
  write_config: Callable[[Config], dict[str, Any]]
  make_model: Callable[[Config], nn.Module]
  init_cache: Callable[..., Any] | None
  names: Mapping[str, names.Table]
  example_inputs: Callable[[Config], tuple[jax.ShapeDtypeStruct, ...]]
  sharding: Rules
  prefix: str = ""
  kind: str = DECODER
  class_head: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {"score.weight": "head/kernel"}
  )
  peft_task: str = "CAUSAL_LM"
  bare: bool = False
  options: Callable[[Config], dict[str, DTypeLike]] = lambda config: {}
  as_stored: Callable[[Config, Collection[str]], Config] | None = None


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


ENCODER_SHARDING = (
  *(rule for rule in DECODER_SHARDING if rule[0] not in ("head/kernel", ".*")),
  (".*", jax.P()),
)
"""Of encoders, as of decoders. The pooler and the head of classes are small and stay whole."""


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


def _masks(config: Config) -> dict[str, DTypeLike]:
  return {"mask_BT": jnp.bool_} | ({"types_BT": jnp.int32} if config.token_types > 1 else {})


def _with_stored_pooler(config: Config, stored: Collection[str]) -> Config:
  """BERT's files have a pooler or not, whatever their config.json says of their architecture; one
  with a head of classes always has it."""
  if config.classes:
    return config
  suffix = "pooler.dense.weight"
  return dataclasses.replace(config, pooler=any(name.endswith(suffix) for name in stored))


def _encoder(name: str) -> Family:
  """BERT or a relative of it, told apart by switches of its config."""
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
  **{name: _encoder(name) for name in bert_configs.STYLES},
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
  # One layer is traced, and not each.
  model = family.make_model(dataclasses.replace(config, scan_layers=True))
  variables = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(config))
  leaves = traverse_util.flatten_dict(variables["params"], sep="/")
  shapes = {path: leaf.shape for path, leaf in leaves.items()}
  if not config.scan_layers:
    each = [(path, layers.layer_paths(path, config.num_layers)) for path in shapes]
    shapes = {x: shapes[path][x != path :] for path, xs in each for x in xs}
  return dict(sorted(shapes.items(), key=lambda item: item[0].split("/")))


def stored_names(config: Config, families: Mapping[str, Family] = FAMILIES) -> names.Table:
  """The names of a model's tensors in safetensors files that have its family's prefix."""
  family = family_of(config, families)
  table, head = family.names["safetensors"], family.class_head
  if not config.classes or not head:
    return table
  return {name: path for name, path in table.items() if path not in head.values()} | dict(head)


def tensor_names(config: Config, families: Mapping[str, Family] = FAMILIES) -> names.Table:
  """The names of a model's tensors in the safetensors files and adapters that are written of it, a
  decoder's head of classes as `score`."""
  family, table = family_of(config, families), stored_names(config, families)
  if not family.bare or config.classes:
    return table
  return {name.removeprefix(family.prefix): path for name, path in table.items()}


def _find(name: Any, families: Mapping[str, Family]) -> Family:
  if not isinstance(name, str) or name not in families:
    supported = ", ".join(map(repr, families))
    raise ValueError(f"model_type {shown(name)} is not supported; supported: {supported}")
  return families[name]
