"""Tiny random models of speech as transformers writes them, with a tokenizer; and tones to hear."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import tiny_tokenizers
import tokenizers
from peers import torch, transformers
from tokenizers import decoders, models, pre_tokenizers, processors

END, START, PLAIN = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"
PROMPT = START + PLAIN
WORDS = ("latte", "mocha", "small", "large")
_SIZES = {
  "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
  "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 80,
  "max_source_positions": 100, "max_target_positions": 64,
}  # fmt: skip


_SAMPLES = {
  "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
  "conv_dim": [16, 16, 24], "conv_kernel": [10, 4, 4], "conv_stride": [8, 8, 5],
  "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "vocab_size": 9,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
  """A shape of config: the family, and what its config says."""

  family: str
  fields: dict[str, Any]


KINDS = {
  "Whisper": Kind("whisper", _SIZES),
  "Whisper of one decoder layer, as distilled": Kind("whisper", _SIZES | {"decoder_layers": 1}),
  "Whisper of 128 bands, relu": Kind(
    "whisper", _SIZES | {"num_mel_bins": 128, "activation_function": "relu"}
  ),
  "wav2vec2, a norm over time": Kind("wav2vec2", _SAMPLES),
  "wav2vec2, norms of channels, before": Kind(
    "wav2vec2",
    _SAMPLES
    | {
      "feat_extract_norm": "layer",
      "conv_bias": True,
      "do_stable_layer_norm": True,
      "num_conv_pos_embeddings": 7,
    },
  ),
}
"""What the tests claim of each."""

WHISPERS = [name for name, kind in KINDS.items() if kind.family == "whisper"]
WAV2VEC2S = [name for name, kind in KINDS.items() if kind.family == "wav2vec2"]


def words() -> tokenizers.Tokenizer:
  """Byte-level BPE with Whisper's special tokens, which its post-processor puts around a text."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  found = tokenizers.Tokenizer(models.BPE(vocab={x: n for n, x in enumerate(alphabet)}, merges=[]))
  found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.decoder = decoders.ByteLevel()
  found.add_special_tokens([END, START, PLAIN])
  ids = [(token, found.token_to_id(token)) for token in (START, PLAIN, END)]
  found.post_processor = processors.TemplateProcessing(
    single=[START, PLAIN, "$A", END], special_tokens=ids
  )
  return found


def make(name: str = "Whisper", size: dict[str, Any] | None = None) -> "torch.nn.Module":
  """A random model, with the same values each time; `size` changes what its config says."""
  torch.manual_seed(0)
  if name in WAV2VEC2S:
    config = transformers.Wav2Vec2Config(**KINDS[name].fields)
    return _random(transformers.Wav2Vec2ForCTC(config))
  own = words()
  end = own.token_to_id(END)
  special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end}
  special |= {"decoder_start_token_id": end + 1, "begin_suppress_tokens": None}
  sizes = KINDS[name].fields | {"vocab_size": own.get_vocab_size()} | (size or {})
  config = transformers.WhisperConfig(**sizes, **special, suppress_tokens=None)
  return _random(transformers.WhisperForConditionalGeneration(config))


def _random(model: "torch.nn.Module") -> "torch.nn.Module":
  for path, values in model.named_parameters():
    if ("norm" in path and path.endswith("weight")) or path.endswith("original0"):
      torch.nn.init.uniform_(values, 0.5, 1.5)
    else:
      torch.nn.init.normal_(values, std=0.25 if values.ndim > 1 else 0.1)
  return model.eval()


def write(
  folder: pathlib.Path, name: str = "Whisper", size: dict[str, Any] | None = None
) -> "torch.nn.Module":
  """Saves a model with its tokenizer; returns it."""
  model = make(name, size)
  model.save_pretrained(folder)
  if name in WAV2VEC2S:
    return model
  words().save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(
    json.dumps(
      tiny_tokenizers.SETTINGS
      | {
        "bos_token": END,
        "eos_token": END,
      }
    )
  )
  return model


def mels(name: str = "Whisper", frames: int = 200, rows: int = 2) -> np.ndarray:
  """Random features [rows, frames, bands]."""
  shape = (rows, frames, KINDS[name].fields["num_mel_bins"])
  return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def samples(rows: int = 2, length: int = 4000) -> np.ndarray:
  """Random samples [rows, length]."""
  return np.random.default_rng(4).normal(size=(rows, length)).astype(np.float32)


def tone(word: int, seconds: float = 0.5, rate: int = 16_000, seed: int = 0) -> np.ndarray:
  """A clip that stands for one of a few words: a tone of its own pitch, with some noise."""
  rng = np.random.default_rng([word, seed])
  at = np.arange(round(seconds * rate)) / rate
  pitch = 300 * 2 ** (word + rng.uniform(-0.1, 0.1))
  return (0.4 * np.sin(2 * np.pi * pitch * at) + 0.01 * rng.normal(size=len(at))).astype(np.float32)


def write_clips(folder: pathlib.Path, count: int, seed: int) -> None:
  """Writes `count` clips and clips.jsonl with their files, texts and slots."""
  import soundfile

  rows = []
  folder.mkdir(parents=True, exist_ok=True)
  for n in range(count):
    said = [n % 4, (n // 4 + seed) % 4]
    samples = np.concatenate([tone(word, 0.4, seed=1000 * seed + n) for word in said])
    name = f"{seed}-{n}.flac"
    soundfile.write(folder / name, samples, 16_000)
    text = " ".join(WORDS[word] for word in said)
    slots = {"first": WORDS[said[0]], "second": WORDS[said[1]]}
    rows.append({"file": name, "text": text, "slots": slots})
  (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
