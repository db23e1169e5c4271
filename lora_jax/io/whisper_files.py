"""A Whisper in CTranslate2's format: its configuration and tensors from `model.bin`.

    config, tensors = from_ctranslate2(ctranslate2.open_file("model/model.bin"))
    tensors["encoder/layer_0/self_attention/query/weight"]      # a third of the fused projection

Queries, keys and values of self attention are the thirds of one projection in the file, and keys
and values of cross attention the halves of another one. They are apart here, so that each is
adapted and read by `peft` as in files of `transformers`.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from lora_jax.io.ctranslate2 import File
from lora_jax.io.safetensors import StoredTensor
from lora_jax.models.whisper import WhisperConfig

SPEC = "WhisperSpec"
_EMBEDDING, _PROJECTION = "decoder/embeddings/weight", "decoder/projection/weight"
_FUSED = {
  r"(encoder|decoder)/layer_\d+/self_attention/linear_0": ("query", "key", "value"),
  r"decoder/layer_\d+/attention/linear_1": ("key", "value"),
}
_ACTIVATIONS = {1: "gelu_tanh", 3: "gelu", 0: "relu"}  # as CTranslate2 numbers them
# A Whisper's settings among the scalars of the file; a file may lack those of other models.
_FIXED = {
  "decoder/pre_norm": 1,
  "decoder/alibi": 0,
  "decoder/start_from_zero_embedding": 0,
  "decoder/scale_embeddings": 0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
  """A part of the rows of a fused tensor, with the attributes of a `StoredTensor`."""

  whole: StoredTensor
  name: str
  number: int
  shape: tuple[int, ...]
  dtype: str

  def load(self) -> np.ndarray:
    start = self.number * self.shape[0]
    return self.whole.load()[start : start + self.shape[0]]


def from_ctranslate2(file: File) -> tuple[WhisperConfig, dict[str, Any]]:
  """Returns the configuration of a file, and its tensors with the fused ones split.

  Raises ValueError for a file of another model, quantized weights, a scalar of another value, an
  embedding that is not tied, a fused projection that does not split, and a bias of keys, which
  Whisper does not have.
  """
  if file.spec != SPEC:
    raise ValueError(f"holds a {file.spec[:80]!r}; only a {SPEC!r} is read")
  for name, value in _FIXED.items():
    if file.scalars.get(name, value) != value:
      raise ValueError(f"{name} is {file.scalars[name]}; read is {value}")
  # Written as aliases or twice, always the embedding.
  if file.aliases.get(_PROJECTION) != _EMBEDDING:
    raise ValueError(f"{_PROJECTION} is not {_EMBEDDING}; read is a model that ties them")
  tensors = {}
  for name, tensor in file.variables.items():
    if tensor.dtype.startswith("I"):
      if re.search(r"/(weight|bias|gamma|beta|encodings)(_scale|_zero)?$", name):
        raise ValueError(
          f"{name} is quantized ({tensor.dtype}); convert the model with --quantization float16"
        )
      continue  # the heads that align words with the audio
    tensors |= _split(tensor)
  return _config(file, tensors), tensors


def _split(tensor: StoredTensor) -> dict[str, Any]:
  module, _, kind = tensor.name.rpartition("/")
  parts = next((x for pattern, x in _FUSED.items() if re.fullmatch(pattern, module)), None)
  if parts is None:
    return {tensor.name: tensor}
  rows, left = divmod(tensor.shape[0], len(parts))
  if left or not rows:
    raise ValueError(f"{tensor.name}: {tensor.shape[0]} rows are not {' and '.join(parts)}")
  above = module.rpartition("/")[0]
  found = {}
  for number, part in enumerate(parts):
    name = f"{above}/{part}/{kind}"
    shape = (rows, *tensor.shape[1:])
    each = _Part(whole=tensor, name=name, number=number, shape=shape, dtype=tensor.dtype)
    if (part, kind) == ("key", "bias"):
      if np.any(each.load()):
        raise ValueError(f"{tensor.name}: keys have a bias there, and a Whisper's have none")
    else:
      found[name] = each
  return found


def _config(file: File, tensors: dict[str, Any]) -> WhisperConfig:
  def shape(name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != ndim:
      raise ValueError(f"has no {name} of {ndim} axes")
    return tensors[name].shape

  def scalar(name: str) -> int:
    if name not in file.scalars:
      raise ValueError(f"has no {name}")
    return file.scalars[name]

  layers = {"encoder": set(), "decoder": set()}
  for name in tensors:
    if match := re.match(r"(encoder|decoder)/layer_(\d{1,4})/", name):
      layers[match[1]].add(int(match[2]))
  vocab_size, width = shape(_EMBEDDING, 2)
  heads = scalar("encoder/num_heads")
  if heads != scalar("decoder/num_heads") or heads < 1 or width % heads:
    raise ValueError(f"{heads} heads of the encoder do not fit the decoder's or a width of {width}")
  activation = scalar("decoder/activation")
  if activation not in _ACTIVATIONS:
    raise ValueError(f"decoder/activation {activation} is not one of {[*_ACTIVATIONS]}")
  return WhisperConfig(
    vocab_size=vocab_size,
    width=width,
    mlp_width=shape("encoder/layer_0/ffn/linear_0/weight", 2)[0],
    num_layers=len(layers["encoder"]),
    decoder_layers=len(layers["decoder"]),
    num_heads=heads,
    head_dim=width // heads,
    max_length=shape("decoder/position_encodings/encodings", 2)[0],
    max_frames=shape("encoder/position_encodings/encodings", 2)[0],
    mels=shape("encoder/conv1/weight", 3)[1],
    activation=_ACTIVATIONS[activation],
  )
