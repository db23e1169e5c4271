"""Family: what a family of models says of itself; `lora_jax.families` has one for each."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike

from lora_jax.io import names
from lora_jax.models import layers

Rules = Sequence[tuple[str, jax.P]]
Config = Any
"""A frozen dataclass. Every family's has `family`, `num_layers`, `scan_layers`, `remat_policy`,
`constrain`, `dtype`, `param_dtype` and `classes`, the names of the outputs of its head where that
is no vocabulary; that of a model of texts `vocab_size` and `max_length`, that of one of images
`channels` and `image_size`, that of one of audio `max_samples` and the function `frames_of`,
too."""

Reader = Callable[[Any], tuple[Config, Mapping[str, Any]] | None]
DECODER, ENCODER, IMAGES, SPEECH, SOUND = "decoder", "encoder", "images", "speech", "sound"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Family:
  """A family of models, described by plain functions and literal tables.

  parse_config: the fields of a config.json to the model's config. Raises ValueError for an unknown
    field or value.
  write_config: the inverse.
  make_model: config to the Linen module.
  init_cache: (config, rows, slots, dtype) to an empty cache; None for a family that does not
    generate.
  names: {file format: {tensor name: path}}, for "safetensors" and, if the family has such files,
    "gguf", "torch", "onnx" and "ctranslate2"; also for "modules" if PEFT's module names differ from
    those in files. See `lora_jax.io.names`.
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
    takes no text and has no tokenizer. SPEECH, which takes audio and has a
    tokenizer for its decoder. SOUND, which takes audio and has no tokenizer. `listen` makes the
    input of both.
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
  end_token: the text of the token that ends a text in folders whose files name none.
  listen: (config, samples at 16 kHz, samples of the window) to the model's input of a clip; None
    for a model that takes no audio.
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
  end_token: str | None = None
  listen: Callable[[Config, np.ndarray, int], np.ndarray] | None = None

  @property
  def has_tokenizer(self) -> bool:
    """Whether the family's folders have one."""
    return self.kind not in (IMAGES, SOUND)


@functools.lru_cache(maxsize=64)  # a program asks several times, and must not wait for each trace
def traced_shapes(family: Family, config: Config) -> dict[str, tuple[int, ...]]:
  """{slash path: shape} of the parameters of a family's model; not to be changed."""
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
