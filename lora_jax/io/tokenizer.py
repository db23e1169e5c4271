"""Tokenizers, from `tokenizer.json` or from the vocabulary that a GGUF file carries.

tokenizer = from_folder("SmolLM2-135M-Instruct")
tokenizer.encode("Hello world")       # [19556, 905]
tokenizer.decode([19556, 905])        # "Hello world"
"""

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import processors

from lora_jax.checks import shown
from lora_jax.io import files, gguf_words, json_files, outputs, panics, tokenizer_files, wordpiece
from lora_jax.io.special_text import Pieces, SpecialText
from lora_jax.models import limits


class Pair(NamedTuple):
  """The tokens of a prompt and its completion, encoded as one text.

  ids: without what stands before every text, such as BOS.
  boundary: how many of them are the prompt's.
  shared: whether the first token of the completion begins within the prompt.
  """

  ids: list[int]
  boundary: int
  shared: bool


class Whole(NamedTuple):
  """The tokens of a text, or of a pair, with all that a model's settings put around them.

  ids: of the tokens.
  types: which text of the pair each belongs to, as the settings say.
  spans: where the tokens of each text itself begin and end.
  cut: how many tokens of the texts were left out to keep to a length.
  """

  ids: list[int]
  types: list[int]
  spans: list[tuple[int, int]]
  cut: int


class Tokenizer:
  """Text to token ids and back.

  bos_id, eos_id: the tokens that begin and end a text, or None where the model has none.
  stop_ids: the tokens that end a generated text: `eos_id`, and other tokens that one of the model's
    files calls EOS.
  pad_id: the padding token; `eos_id` or 0 if the model has none.
  special: the special tokens of the model's files, without defaults.
  chat_templates: the Jinja templates of a conversation by name; the unnamed one is "default".
  files: the files that `save` and the writers of models copy.

  backend: the `tokenizers` object that does the work; it is changed.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    *,
    special: tokenizer_files.Special,
    chat_templates: Mapping[str, str],
    files: tokenizer_files.Files,
  ):
    backend.no_truncation()
    backend.no_padding()
    # The library makes room for every id up to the largest.
    ids = backend.get_vocab(with_added_tokens=True).values()
    if not 0 <= max(ids, default=-1) < limits.LARGEST["vocab_size"]:
      raise ValueError(
        f"the largest id of its {len(ids)} tokens must be from 0 to "
        f"{limits.LARGEST['vocab_size'] - 1:,}"
      )
    if len(set(ids)) < len(ids):
      raise ValueError("two of its tokens have one id")
    self._before, self._after = _around(backend)
    if max(*self._before, *self._after, 0, 0) > max(ids):
      raise ValueError(f"it puts tokens around a text that it has not: {self._before[:8]}")
    self._around_texts = backend.post_processor
    # `encode` adds the tokens around a text. The post-processor may also trim token offsets, which
    # are needed to find the end of a prompt.
    backend.post_processor = processors.Sequence([])
    self._backend = backend
    self._special_ids = {i for i, x in backend.get_added_tokens_decoder().items() if x.special}
    self.special, self.chat_templates, self.files = special, dict(chat_templates), files
    self.bos_id, self.eos_id, self.stop_ids = special.bos_id, special.eos_id, special.stop_ids
    self.pad_id = special.pad_id if special.pad_id is not None else special.eos_id or 0

  @property
  def vocabulary(self) -> dict[str, int]:
    """The id of every token, by the token as the model's files spell it."""
    return self._backend.get_vocab(with_added_tokens=True)

  @property
  def vocab_size(self) -> int:
    """The largest token id plus one."""
    return max(self.vocabulary.values()) + 1

  @property
  def chat_template(self) -> str | None:
    """The template without a name."""
    return self.chat_templates.get("default")

  @property
  def special_tokens(self) -> dict[str, int]:
    """The id of every special token, by its text."""
    added = self._backend.get_added_tokens_decoder()
    return {added[i].content: i for i in sorted(self._special_ids)}

  @property
  def named_tokens(self) -> dict[str, str]:
    """The tokens that its files name, as a chat template reads them: `{"eos_token": "</s>"}`."""
    return tokenizer_files.named_tokens(self.files.contents)

  def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
    """Returns the tokenizer with more tokens, each of which is one token wherever a text has it.

    tokens: their texts; their ids follow the largest that there is. They are no special tokens, and
      `decode` writes them.

    Raises ValueError for a text that is empty or is a token already, and one that is there twice.
    """
    fields = json.loads(self.to_json())
    ids = {}
    for token in tokens:
      if not isinstance(token, str) or not token:
        raise ValueError(f"the new token {shown(token)} is no text, or an empty one")
      if token in self.vocabulary or token in ids:
        found = self.vocabulary.get(token)
        what = "named twice" if found is None else f"a token already, with the id {found}"
        raise ValueError(f"the new token {shown(token)} is {what}; leave it out")
      ids[token] = self.vocab_size + len(ids)
    plain = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": token_id, "content": token} | plain for token, token_id in ids.items()]
    fields["added_tokens"] = [*(fields.get("added_tokens") or ()), *added]
    text = json.dumps(fields, ensure_ascii=False)
    with panics.as_value_errors("the tokenizer takes no new tokens"):
      backend = tokenizers.Tokenizer.from_str(text)
      got = {token: backend.token_to_id(token) for token in ids}
    if got != ids:
      raise ValueError(
        f"the new tokens {list(ids)[:8]} would have the ids {list(got.values())[:8]}, and "
        f"{list(ids.values())[:8]} are the next: ids are missing among the tokenizer's own"
      )
    files = tokenizer_files.with_tokens(self.files, text, ids)
    return Tokenizer(backend, special=self.special, chat_templates=self.chat_templates, files=files)

  def encode(
    self, text: str, *, add_special_tokens: bool = True, special_tokens: bool = True
  ) -> list[int]:
    """Returns the ids of `text`, which may be continued: EOS is never added.

    add_special_tokens: whether what the model's own settings put before a text (a BOS in Llama 3,
      nothing in SmolLM2) is added, unless the text begins with it; False for a text without it.
    special_tokens: whether special tokens written out in the text count as one token each; False
      takes them for plain characters.

    Raises ValueError for half of a surrogate pair, which is no text.
    """
    ids, _ = self._encode([(text, special_tokens)])
    if add_special_tokens and ids[: len(self._before)] != self._before:
      return self._before + ids
    return ids

  def encode_pair(self, prompt: Pieces, completion: Pieces) -> Pair:
    """Returns the tokens of a prompt and its completion as one text.

    So a completion has the tokens that it has in running text: encoded alone, it would begin a text
    for tokenizers in the manner of SentencePiece. A token with characters of both is the
    completion's.

    prompt, completion: their parts in order.

    Raises ValueError for half of a surrogate pair, which is no text.
    """
    ids, offsets = self._encode([*prompt, *completion])
    start = sum(len(piece) for piece, _ in prompt)
    ends_after = (n for n, (_, end) in enumerate(offsets) if end > start)
    boundary = next(ends_after, len(ids)) if start else 0
    shared = boundary < len(ids) and offsets[boundary][0] < start
    written = len(self._before)
    if written and boundary >= written and ids[:written] == self._before:
      return Pair(ids[written:], boundary - written, shared)
    return Pair(ids, boundary, shared)

  def encode_whole(self, text: str, second: str | None = None, *, max_length: int) -> Whole:
    """Returns the tokens of a text, or of a pair, as an encoder reads them: with the special tokens
    that begin, separate and end them.

    Long texts are truncated at the end; of a pair, the longer text first, as with the strategy
    `longest_first` of `transformers`.

    text, second: the texts; special tokens written out in them count as one token each.
    max_length: the most tokens, special ones included.

    Raises ValueError for half of a surrogate pair, which is no text, for a text without tokens, for
    a pair where the model's settings do not say how one is joined, and for a length that leaves no
    token of a text.
    """
    texts = [text] if second is None else [text, second]
    encodings = [self._encoding(each) for each in texts]
    for each, encoding in zip(texts, encodings, strict=True):
      if not encoding.ids:
        raise ValueError(f"the text {each[:40]!r} has no tokens; add some text")
    around = self._around_texts
    if around is None and second is not None:
      raise ValueError("the tokenizer has no post-processor, which says how two texts are joined")
    room = max_length - (around.num_special_tokens_to_add(second is not None) if around else 0)
    if room < len(texts):
      raise ValueError(f"{max_length} tokens leave no room for {len(texts)} texts; use more")
    lengths = [len(encoding.ids) for encoding in encodings]
    kept = _longest_first(lengths, room)
    for encoding, length in zip(encodings, kept, strict=True):
      encoding.truncate(length)
    with panics.as_value_errors("the tokenizer cannot join texts"):
      whole = around.process(*encodings) if around else encodings[0]
    own = [n for n, added in enumerate(whole.special_tokens_mask) if not added]
    starts = own[0], own[-1] + 1 - kept[-1]
    spans = [(start, start + length) for start, length in zip(starts, kept, strict=False)]
    return Whole(whole.ids, whole.type_ids, spans, sum(lengths) - sum(kept))

  def encode_pieces(self, pieces: Pieces) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the tokens of the pieces as one text, and where each lies in it: `(start, end)`.

    Nothing is put before the text, such as BOS.

    Raises ValueError for half of a surrogate pair, which is no text.
    """
    return self._encode(pieces)

  def decode(
    self, ids: Sequence[int], *, skip_special_tokens: bool = True, after: Sequence[int] = ()
  ) -> str:
    """Returns the text of `ids`, without special tokens unless they are asked for.

    after: the ids that `ids` continue, whose own text is left out. Without them `ids` begin a text,
      and tokenizers in the manner of SentencePiece leave out the first space.
    """

    def text_of(ids: Sequence[int]) -> str:
      with panics.as_value_errors("the tokenizer cannot decode"):
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special_tokens)

    if not after:
      return text_of(ids)
    before, whole = text_of(after), text_of([*after, *ids])
    # Not all of `before` where the first of `ids` completes a character.
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return whole[len(list(same)) :]

  def to_json(self) -> str:
    """The text of its `tokenizer.json`."""
    return self.files.contents["tokenizer.json"].decode()

  def save(self, folder: str | Path) -> None:
    """Writes its files, which `transformers` loads, as they came from a model's folder.

    For a tokenizer from a GGUF file these are `tokenizer.json` and `tokenizer_config.json`.
    """
    for name, content in self.files.contents.items():
      outputs.write_bytes(Path(folder) / name, content)

  def to_gguf(self) -> dict[str, Any]:
    """The metadata of all but its vocabulary, see the function `to_gguf`."""
    return gguf_words.describe_special(
      self.special, self._before, self._after
    ) | gguf_words.describe_templates(self.chat_templates)

  def _encode(self, pieces: Pieces) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of one text, and where each of them lies in it."""
    encoding = self._encoding("".join(piece for piece, _ in pieces))
    as_meant = all(meant for _, meant in pieces)
    if as_meant or self._special_ids.isdisjoint(encoding.ids):
      return encoding.ids, encoding.offsets
    return self._special_text.encode(pieces)

  def _encoding(self, text: str) -> tokenizers.Encoding:
    """The tokens of a text, and no others."""
    try:
      with panics.as_value_errors(f"the tokenizer cannot encode {text[:40]!r}"):
        return self._backend.encode(text, add_special_tokens=False)
    except TypeError:
      raise ValueError(f"{_lone_surrogate(text)}; mend the text where it was cut") from None

  @functools.cached_property
  def _special_text(self) -> SpecialText:
    with panics.as_value_errors("the tokenizer cannot take special tokens for plain text"):
      return SpecialText(self._backend.to_str())

  def describe(self) -> dict[str, Any]:
    """The fields of its `tokenizer.json` as the library writes them, each of them there."""
    return json.loads(self._backend.to_str())


def from_folder(folder: str | Path, *, end: str | None = None) -> Tokenizer:
  """Reads the `tokenizer.json` of a model's folder, or BERT's `vocab.txt` where there is none, and
  what other files say of special tokens.

  These are `tokenizer_config.json`, `special_tokens_map.json`, `config.json` and
  `generation_config.json`, where they are there.

  end: the token that ends a text where none of these files names one, if the tokenizer has it.

  Raises FileNotFoundError without either, ValueError for a file that cannot be read or
  is no tokenizer.
  """
  folder = Path(folder)
  path = folder / "tokenizer.json"
  if path.exists():
    content = files.read_bytes(path, tokenizer_files.MAX_BYTES)
  elif (folder / wordpiece.VOCABULARY).exists():
    content = wordpiece.from_vocabulary(folder).to_str().encode()
  else:
    raise FileNotFoundError(
      f"{path}: no such file; a SentencePiece `tokenizer.model` is not read: save the tokenizer "
      "with transformers' `save_pretrained` to make a tokenizer.json"
    )
  with panics.as_value_errors(f"{path}: not a tokenizer"):
    # The library takes the last of two equal tokens.
    fields = json_files.parse(content)
    tokenizer_files.check_growth(fields)
    backend = tokenizers.Tokenizer.from_str(content.decode())
    for token in fields.get("added_tokens") or ():  # whose form the library has checked
      if backend.token_to_id(token["content"]) != token["id"]:
        raise ValueError(
          f"the added token {shown(token['content'])} has the id {token['id']} there, and "
          f"{backend.token_to_id(token['content'])} by the vocabulary"
        )
  special = tokenizer_files.read_special(folder, backend.token_to_id)
  templates = tokenizer_files.read_templates(folder)
  written = tokenizer_files.read_files(folder, content)
  if end is not None and not special.stop_ids and (end_id := backend.token_to_id(end)) is not None:
    special = special._replace(eos_id=end_id, stop_ids=(end_id,))
    written = written._replace(config={**written.config, "eos_token_id": end_id})
  with panics.as_value_errors(f"{path}: not a tokenizer"):
    return Tokenizer(backend, special=special, chat_templates=templates, files=written)


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
  """Builds the tokenizer that a GGUF file's metadata describes: byte-level BPE, or pieces.

  Raises ValueError for another kind of tokenizer, an unknown way to split text, or a vocabulary
  which contradicts itself.
  """
  backend = gguf_words.read_tokenizer(metadata)
  special = gguf_words.read_special(metadata)
  templates = gguf_words.read_templates(metadata)
  files = tokenizer_files.make_files(backend.to_str(), special, templates, backend.id_to_token)
  return Tokenizer(backend, special=special, chat_templates=templates, files=files)


def to_gguf(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
  """Returns the metadata that describes a tokenizer in a GGUF file, the inverse of `from_gguf`.

  size: how many tokens the model has; ids without a token are written as unused.

  Raises ValueError for a tokenizer that is neither byte-level BPE nor one of SentencePiece's, or
  has steps that the format cannot express.
  """
  if tokenizer.vocab_size > size:
    raise ValueError(
      f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model {size} rows"
    )
  vocabulary = gguf_words.describe_vocabulary(tokenizer.describe(), size)
  return vocabulary | tokenizer.to_gguf()


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
  """The ids that a tokenizer puts before every text, and those after it."""
  with panics.as_value_errors("the tokenizer cannot encode"):
    encoding = backend.encode("a 1 .")
  own = [n for n, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
  if not own:
    return encoding.ids, []
  return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]


def _longest_first(lengths: Sequence[int], room: int) -> list[int]:
  """How many tokens of one or two texts are kept, the longer text losing its end first."""
  if sum(lengths) <= room:
    return list(lengths)
  if len(lengths) == 1:
    return [room]
  shorter = int(lengths[0] > lengths[1])
  kept = min(lengths[shorter], room // 2)
  return [kept, room - kept] if shorter == 0 else [room - kept, kept]


def _lone_surrogate(text: str) -> str:
  character = next(x for x in text if "\ud800" <= x <= "\udfff")
  return f"U+{ord(character):04X}, half of a surrogate pair, is in the text {text[:40]!r}"
