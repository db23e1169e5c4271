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
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.checks import shown
from lora_jax.data import log_mel, standardized
from lora_jax.family import DECODER as DECODER
from lora_jax.family import ENCODER as ENCODER
from lora_jax.family import IMAGES as IMAGES
from lora_jax.family import SOUND as SOUND
from lora_jax.family import SPEECH as SPEECH
from lora_jax.family import Config as Config
from lora_jax.family import Family as Family
from lora_jax.family import Rules as Rules
from lora_jax.family import traced_shapes
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
  speech_configs,
  speech_names,
  ssdlite_configs,
  whisper_files,
)
from lora_jax.models import (
  bert,
  convolutions,
  encoder_attention,
  gemma4,
  gpt2,
  llama,
  mobilenet,
  resnet,
  ssdlite,
  vit,
  wav2vec2,
  whisper,
)

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


def _of_images(
  name: str, files: Mapping[str, names.Table] | None = None, prefix: str = "", **how: Any
) -> Family:
  """A family whose inputs are images.

  files: the names for further file formats.
  prefix: as in `Family`; "" for the family's name with a dot.
  """
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
    prefix=prefix or f"{name}.",
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


SPEECH_SHARDING = (
  (r"(.*/)?(attn|cross_attn)/(query|key|value)/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?(attn|cross_attn)/out/kernel", jax.P("tensor", "fsdp")),
  (r"(.*/)?mlp/up/kernel", jax.P("fsdp", "tensor")),
  (r"(.*/)?mlp/down/kernel", jax.P("tensor", "fsdp")),
  ("decoder/embed/embedding", jax.P("tensor", None)),
  (".*", jax.P()),
)
"""Of models of speech."""


def _whisper_inputs(config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Two encoder frames and, for a model with a decoder, two tokens."""
  mels = jax.ShapeDtypeStruct((1, 4, config.mels), jnp.float32)
  return (mels,) if config.classes else (mels, *_tokens(config))


def _mels(config: Config, rows: int, length: int | None) -> jax.ShapeDtypeStruct:
  """Features of the whole window, of a Whisper with a head on its frames."""
  if not config.classes:
    raise ValueError(
      "a Whisper with a decoder is no program of one input, for it reads its own tokens one after "
      "another; export it as merged"
    )
  return jax.ShapeDtypeStruct((rows, length or 2 * config.max_frames, config.mels), jnp.float32)


def _samples(config: Config, rows: int, length: int | None) -> jax.ShapeDtypeStruct:
  """Samples, by default as many as give two frames."""
  return jax.ShapeDtypeStruct((rows, length or config.samples_of(2)), jnp.float32)


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
  ssdlite.FAMILY: _of_images(
    ssdlite.FAMILY,
    prefix="mobilenet_v2.",
    parse_config=ssdlite_configs.from_json,
    write_config=ssdlite_configs.to_json,
    make_model=ssdlite.SSDLite,
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
  "whisper": Family(
    parse_config=speech_configs.whisper,
    write_config=speech_configs.write_whisper,
    make_model=whisper.Whisper,
    init_cache=None,  # its cache is of a clip, `Whisper.start`
    names=speech_names.WHISPER_FORMATS,
    example_inputs=_whisper_inputs,
    inputs=_mels,
    sharding=SPEECH_SHARDING,
    prefix="model.",
    layers_alike=False,
    kind=SPEECH,
    class_head=speech_names.CTC_HEAD,
    peft_task=None,
    class_task=None,
    with_classes=speech_configs.with_classes,
    of_tensors={"ctranslate2": whisper_files.from_ctranslate2},
    end_token="<|endoftext|>",
    listen=lambda config, samples, window: log_mel.features(samples, config.mels, window),
  ),
  "wav2vec2": Family(
    parse_config=speech_configs.wav2vec2,
    write_config=speech_configs.write_wav2vec2,
    make_model=wav2vec2.Wav2Vec2,
    init_cache=None,
    names={"safetensors": speech_names.WAV2VEC2},
    example_inputs=lambda config: (_samples(config, 1, None),),
    inputs=_samples,
    sharding=SPEECH_SHARDING,
    prefix="wav2vec2.",
    layers_alike=False,
    kind=SOUND,
    class_head={},
    peft_task=None,
    class_task=None,
    with_classes=speech_configs.with_classes,
    bare=True,
    listen=lambda config, samples, window: standardized.features(samples, window),
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
  return dict(traced_shapes(family_of(config, families), config))


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
