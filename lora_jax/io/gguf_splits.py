"""The pre-tokenizers of byte-level BPE, by their names in GGUF files.

`tokenizer.ggml.pre` names one of llama.cpp's pre-tokenizers. The patterns are those of the models'
own tokenizer.json; llama.cpp has them rewritten for its regular expressions
(github.com/ggml-org/llama.cpp, src/llama-vocab.cpp).
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from lora_jax.checks import shown


class Split(NamedTuple):
  """A pre-tokenizer, and the settings that belong to it.

  ignore_merges: a piece that is a token is not split further.
  add_bos: the default for adding the beginning-of-sequence token.
  normalizer: applied to the text first.
  """

  pre_tokenizer: pre_tokenizers.PreTokenizer
  ignore_merges: bool = False
  add_bos: bool = False
  normalizer: normalizers.Normalizer | None = None


def _byte_level(use_regex: bool = True) -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _by(*patterns: str) -> pre_tokenizers.PreTokenizer:
  """Splits by each pattern in turn; the text between matches is a piece as well."""
  cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
  return pre_tokenizers.Sequence([*cuts, _byte_level(use_regex=False)])


_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS_AND_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-4's: digits in threes. Qwen 2 has each digit apart.
_GPT_4 = _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _MARKS_AND_SPACES
_QWEN_2 = _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _MARKS_AND_SPACES
# Words that begin with a capital, those of capitals alone, and slashes after punctuation.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKS_AND_SLASHES = _MARKS_AND_SPACES.replace(r"[\r\n]*", r"[\r\n/]*", 1)


def _cased(after: str, digits: str) -> str:
  start = r"[^\r\n\p{L}\p{N}]?"
  words = rf"{start}{_UPPER}*{_LOWER}+{after}|{start}{_UPPER}+{_LOWER}*{after}"
  return f"{words}|{digits}{_MARKS_AND_SLASHES}"


_AS_GPT_2 = Split(_byte_level())
_DIGITS_APART = Split(
  pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])
)
_AS_GPT_4 = Split(_by(_GPT_4))
_AS_LLAMA_3 = Split(_by(_GPT_4), ignore_merges=True, add_bos=True)
_AS_GPT_4O = Split(_by(_cased(_SHORT_FORMS + "?", r"\p{N}{1,3}")))
# llama.cpp's default for older files without a name.
_DEFAULT = Split(
  _by(
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
  )
)

SPLITS = {
  "gpt-2": _AS_GPT_2,
  "phi-2": _AS_GPT_2,
  "olmo": _AS_GPT_2,
  "smollm": _DIGITS_APART,
  "starcoder": _DIGITS_APART,  # Granite code models
  "refact": _DIGITS_APART,  # Granite 3
  "llama-bpe": _AS_LLAMA_3,
  "llama3": _AS_LLAMA_3,
  "llama-v3": _AS_LLAMA_3,
  "dbrx": _AS_GPT_4,  # OLMo 2, Phi-4
  "smaug-bpe": _AS_GPT_4,  # SmolLM3
  # Qwen's tokenizer.json composes characters first, which llama.cpp does not.
  "qwen2": Split(_by(_QWEN_2), normalizer=normalizers.NFC()),
  "tekken": Split(_by(_cased("", r"\p{N}")), ignore_merges=True, add_bos=True),  # Mistral Nemo
  "gpt-4o": _AS_GPT_4O,  # Phi-4-mini
  "llama4": _AS_GPT_4O,
  "default": _DEFAULT,
}
"""By `tokenizer.ggml.pre`; of several names for one way the first is written."""


def named(name: Any) -> Split:
  """Returns the pre-tokenizer of a name; raises ValueError for an unknown one."""
  if not isinstance(name, str) or name not in SPLITS:
    raise ValueError(
      f"tokenizer.ggml.pre {shown(name)} is not supported; supported: {', '.join(SPLITS)}"
    )
  return SPLITS[name]


def name_of(fields: Mapping[str, Any], remedy: str) -> str:
  """Returns the name of the pre-tokenizer of a `tokenizer.json`.

  fields: of the file.
  remedy: the end of the error.

  Raises ValueError for a pre-tokenizer without a name.
  """
  found = (fields["normalizer"], _that_matters(fields["pre_tokenizer"]))
  for name, split in SPLITS.items():
    known = tokenizers.Tokenizer(models.BPE())
    known.pre_tokenizer = split.pre_tokenizer
    if split.normalizer is not None:
      known.normalizer = split.normalizer
    theirs = json.loads(known.to_str())
    ways = (theirs["normalizer"], _that_matters(theirs["pre_tokenizer"]))
    if ways == found and split.ignore_merges == fields["model"]["ignore_merges"]:
      return name
  raise ValueError(
    f"the tokenizer changes or cuts text in a way of its own before its merges, and a GGUF file "
    f"names one of {', '.join(SPLITS)}; {remedy}"
  )


def _that_matters(pre_tokenizer: Any) -> Any:
  """The settings of a pre-tokenizer that affect the ids."""
  if isinstance(pre_tokenizer, dict):
    return {k: _that_matters(x) for k, x in pre_tokenizer.items() if k != "trim_offsets"}
  if isinstance(pre_tokenizer, list):
    return [_that_matters(x) for x in pre_tokenizer]
  return pre_tokenizer
