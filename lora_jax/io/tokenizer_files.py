"""Reads and writes the files of a tokenizer other than `tokenizer.json`.

The tokens that begin, end and pad a text may be in any of four files: tokenizer_config.json and
special_tokens_map.json name a token by its text, config.json and generation_config.json by its id.
Models have one of them, or several that may differ.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.checks import shown
from lora_jax.io import files as files_lib
from lora_jax.io import json_files

MAX_BYTES = 40 << 20
"""The largest size of one of its files; Gemma's tokenizer.json has 33 MB."""

_SETTINGS, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_ADDED = "added_tokens.json"
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# The files of a tokenizer, which are written again as they were read.
_FILES = (
  "tokenizer.json", _SETTINGS, _MAP, _TEMPLATE, _ADDED, "chat_template.json",
  "merges.txt", "tokenizer.model", "vocab.json",
)  # fmt: skip
_KINDS = ("bos", "eos", "pad")
_MAX_GROWTH, _PRECOMPILED = 10_000, 32  # by how much texts may grow; by a table of characters
_ANY_TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast"}


class Special(NamedTuple):
  """The tokens that begin, end and pad a text.

  bos_id, eos_id, pad_id: from the first file that names one, or None.
  stop_ids: every token that one of the files calls EOS, `eos_id` first. Each ends a text.
  """

  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  stop_ids: tuple[int, ...]


class Files(NamedTuple):
  """The files that are copied when a tokenizer or its model is saved.

  contents: the tokenizer's files by name.
  config: the fields of config.json, special tokens among them; what describes the model's shape and
    arithmetic there is written from its own configuration.
  generation: the fields of generation_config.json; None without that file.
  """

  contents: Mapping[str, bytes]
  config: Mapping[str, Any]
  generation: Mapping[str, Any] | None


def read_special(folder: Path, token_to_id: Callable[[str], int | None]) -> Special:
  """Returns the special tokens of a folder, from those of the four files that are there.

  token_to_id: of the tokenizer.json.

  Raises ValueError for a file that is not a JSON object, a token that is not in tokenizer.json, and
  an invalid id.
  """
  found: dict[str, list[int]] = {kind: [] for kind in _KINDS}
  for name in (_SETTINGS, _MAP):
    fields = _fields(folder / name)
    for kind in _KINDS:
      token = fields.get(f"{kind}_token")
      if token is None:
        continue
      text = token.get("content") if isinstance(token, dict) else token
      if not isinstance(text, str):
        raise ValueError(
          f"{folder / name}: {kind}_token {shown(token)} is neither a token nor an "
          "object with its content"
        )
      token_id = token_to_id(text)
      if token_id is None:
        raise ValueError(f"{folder / name}: {kind}_token {shown(text)} is not in tokenizer.json")
      found[kind].append(token_id)
  for name in (_CONFIG, _GENERATION):
    fields = _fields(folder / name)
    for kind in _KINDS:
      found[kind] += _ids(folder / name, f"{kind}_token_id", fields.get(f"{kind}_token_id"))
  first = {f"{kind}_id": next(iter(ids), None) for kind, ids in found.items()}
  return Special(**first, stop_ids=tuple(dict.fromkeys(found["eos"])))


def named_tokens(contents: Mapping[str, bytes]) -> dict[str, str]:
  """Returns the tokens that the files name: `{"bos_token": "<s>", "image_token": "<image>"}`.

  contents: as `Files` has them.
  """
  found: dict[str, str] = {}
  for name in (_MAP, _SETTINGS):  # the latter has precedence
    fields = json_files.parse(contents[name]) if name in contents else {}
    extra = fields.get("extra_special_tokens")
    fields |= extra if isinstance(extra, dict) else {}
    for field, token in fields.items():
      text = token.get("content") if isinstance(token, dict) else token
      if field.endswith("_token") and isinstance(text, str):
        found[field] = text
  return found


def check_growth(fields: Mapping[str, Any]) -> None:
  """Raises ValueError for a `tokenizer.json` whose replacements, one after another, may make a text
  thousands of times as long; a few dozen of them would take all memory for one word."""
  growth, level = 1, [fields.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
  while level:
    for step in level:
      if isinstance(step, dict):
        content = step.get("content")
        growth *= max(1, len(content)) if isinstance(content, str) else 1
        growth *= _PRECOMPILED if step.get("type") == "Precompiled" else 1
    if growth > _MAX_GROWTH:
      raise ValueError(f"its replacements may make a text {_MAX_GROWTH} times as long, or longer")
    inside = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
    level = [x for each in inside for x in each]


def read_templates(folder: Path) -> dict[str, str]:
  """Returns the chat templates of a folder by name; the one without a name is "default".

  As in `transformers`, files of their own take the place of those in tokenizer_config.json.

  Raises ValueError for what is no text.
  """
  files = {"default": folder / _TEMPLATE} if (folder / _TEMPLATE).exists() else {}
  files |= {path.stem: path for path in _named_templates(folder)}
  if files:
    return {name: files_lib.read_text(path, MAX_BYTES) for name, path in files.items()}
  given = _fields(folder / _SETTINGS).get("chat_template")
  if given is None:
    return {}
  named = given if isinstance(given, list) else [{"name": "default", "template": given}]
  found = {}
  for each in named:
    name, text = (each.get(x) if isinstance(each, dict) else None for x in ("name", "template"))
    if not isinstance(name, str) or not isinstance(text, str) or name in found:
      raise ValueError(
        f"{folder / _SETTINGS}: chat_template {shown(each)} is neither a text nor one of "
        "a list of names and texts"
      )
    found[name] = text
  return found


def read_files(folder: Path, tokenizer_json: bytes) -> Files:
  """Returns what is written again of a folder; raises ValueError for a file larger than any.

  tokenizer_json: what the folder's tokenizer.json holds, or would hold.
  """
  paths = [folder / name for name in _FILES if (folder / name).exists()]
  has_generation = (folder / _GENERATION).exists()
  contents = {
    path.relative_to(folder).as_posix(): files_lib.read_bytes(path, MAX_BYTES)
    for path in (*paths, *_named_templates(folder))
  } | {"tokenizer.json": tokenizer_json}
  # Some readers look for it; it names no token that the folder does not name.
  contents.setdefault(_SETTINGS, _as_json(_ANY_TOKENIZER))
  return Files(
    contents=contents,
    config=_fields(folder / _CONFIG),
    generation=_fields(folder / _GENERATION) if has_generation else None,
  )


def make_files(
  tokenizer_json: str,
  special: Special,
  templates: Mapping[str, str],
  id_to_token: Callable[[int], str | None],
) -> Files:
  """Returns the files of a tokenizer that did not come from a folder."""
  ids = (special.bos_id, special.eos_id, special.pad_id)
  settings: dict[str, Any] = dict(_ANY_TOKENIZER)
  for kind, token_id in zip(_KINDS, ids, strict=True):
    if token_id is not None:
      settings[f"{kind}_token"] = id_to_token(token_id)
  if templates:
    named = [{"name": name, "template": text} for name, text in templates.items()]
    settings["chat_template"] = named if set(templates) != {"default"} else templates["default"]
  stops = list(special.stop_ids)
  fields = {
    "bos_token_id": special.bos_id,
    "eos_token_id": stops if len(stops) > 1 else special.eos_id,
    "pad_token_id": special.pad_id,
  }
  return Files(
    contents={"tokenizer.json": tokenizer_json.encode(), _SETTINGS: _as_json(settings)},
    config=fields,
    generation=fields,
  )


def with_tokens(files: Files, tokenizer_json: str, ids: Mapping[str, int]) -> Files:
  """Returns the files with more tokens, in each of those that list what was added.

  tokenizer_json: the text of the tokenizer.json with them.
  ids: of the new tokens by their texts.
  """
  contents = dict(files.contents) | {"tokenizer.json": tokenizer_json.encode()}
  if _ADDED in contents:
    contents[_ADDED] = _as_json(json_files.parse(contents[_ADDED]) | dict(ids))
  settings = json_files.parse(contents[_SETTINGS])
  if isinstance(settings.get("added_tokens_decoder"), dict):
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    settings["added_tokens_decoder"] |= {
      str(token_id): {"content": token} | plain for token, token_id in ids.items()
    }
    contents[_SETTINGS] = _as_json(settings)
  return files._replace(contents=contents)


def _fields(path: Path) -> dict[str, Any]:
  """The fields of a file, or none where there is no such file."""
  return json_files.read_json(path) if path.exists() else {}


def _as_json(fields: Mapping[str, Any]) -> bytes:
  return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _named_templates(folder: Path) -> list[Path]:
  return sorted((folder / _TEMPLATES).glob("*.jinja"))


def _ids(path: Path, field: str, value: Any) -> list[int]:
  """The ids of a field, which holds one or a list; one below 0 stands for no token."""
  values = value if isinstance(value, list) else [value]
  for each in values:
    if each is not None and not (type(each) is int and each < 1 << 31):
      raise ValueError(f"{path}: {field} {shown(value)} is neither a token's id nor a list of ids")
  return [each for each in values if each is not None and each >= 0]
