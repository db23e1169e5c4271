"""Damages to files, by a random number generator: of bytes, and of the fields that a format has.

    damaged = mutate("config.json", content, random.Random(0))
    damaged.content, damaged.words, damaged.edits

`edits` is in how many places the file was changed: no more things than that may be read otherwise.
"""

import json
import random
import struct
from typing import Any, NamedTuple

_VALUES: list[Any] = [
  None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**32 - 1, 2**63, 2**64, 10**39, -(2**63),
  0.0, -0.5, 0.5, 1.5, 1e-300, 1e30, 1e300, -1e300, "", "1", "false", "a" * 300, "../x",
  "/etc/passwd", "\0", ".*", "(((", "\ufdd0", "Ünï", [], {}, [1], ["a", 1], {"a": 1},
  {"content": None}, [[[]]],
]  # fmt: skip
# What `json.dumps` would not write.
_RAW = [
  "NaN", "Infinity", "-Infinity", "1e400", "-1e999", "9" * 5000, "1" * 45, '"\\ud800"',
  "[" * 100_000, "[" * 70 + "]" * 70, '{"a":' * 5000, "0x10", "01", "'a'", "{}{}", "",
  '{"a": 1, "a": 2}', "1E5",
]  # fmt: skip
_MARK = "@@RAW@@"


class Damage(NamedTuple):
  """What became of a file, what was done to it in words, and in how many places."""

  content: bytes
  words: str
  edits: int


def mutate(name: str, content: bytes, rng: random.Random) -> Damage:
  """Damages a file; its name says what fields it has."""
  if rng.random() < 0.25:
    return _bytes(content, rng)
  if name.endswith(".json"):
    return _json(content, rng)
  if name.endswith(".txt"):
    return _bytes(content, rng)
  if name.endswith(".safetensors"):
    return _safetensors(content, rng)
  return _gguf(content, rng)


# ---- bytes


def _bytes(content: bytes, rng: random.Random, most: int | None = None) -> Damage:
  data, end = bytearray(content), most or len(content)
  # Headers come first, and most of what can go wrong is there.
  limit = rng.choice([64, 1024, 8192, end])
  at = rng.randrange(max(1, min(limit, end)))
  kind = rng.choice(["set", "set", "set", "flip", "cut", "insert", "remove", "append", "repeat"])
  if kind == "set":
    count = rng.randint(1, 3)
    for _ in range(count):
      at = rng.randrange(max(1, min(limit, end)))
      data[at : at + 1] = bytes([rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])])
    return Damage(bytes(data), f"{count} bytes set up to {limit}", count)
  size = rng.randint(1, 16)
  if kind == "flip":
    data[at] ^= 1 << rng.randrange(8)
    size = 1
  elif kind == "cut":
    del data[at:]
  elif kind == "insert":
    data[at:at] = rng.randbytes(size)
  elif kind == "remove":
    del data[at : at + size]
  elif kind == "append":
    data += rng.randbytes(size)
  elif kind == "repeat":
    data[at:at] = data[at : at + size]
  return Damage(bytes(data), f"{kind} of {size} at {at}", size)


# ---- JSON


def _json(content: bytes, rng: random.Random) -> Damage:
  fields = json.loads(content)
  places = list(_places(fields))
  if not places:
    return _bytes(content, rng)
  holder, key = rng.choice(places)
  kind = rng.choice(
    ["set", "set", "set", "raw", "raw", "delete", "twice", "rename", "copy", "scale"]
  )
  raw, edits, words = None, 1, f"{kind} {str(key)[:40]}"
  if kind == "set":
    holder[key] = rng.choice(_VALUES)
    words += f" = {holder[key]!r:.60}"
  elif kind == "raw":
    holder[key], raw = _MARK, rng.choice(_RAW)
    words += f" = {raw:.60}"
  elif kind == "delete":
    del holder[key]
  elif kind == "twice" and isinstance(holder, dict):
    holder[_MARK] = rng.choice([holder[key], *_VALUES])
    text = json.dumps(fields).replace(json.dumps(_MARK), json.dumps(key))
    return Damage(text.encode("utf-8", "surrogatepass"), words, 1)
  elif kind == "rename" and isinstance(holder, dict):
    holder[rng.choice([key + "x", "", "a" * 300, "model_type", key.upper()])] = holder.pop(key)
  elif kind == "scale" and type(holder[key]) in (int, float):
    holder[key] = holder[key] * rng.choice([-1, 2, 3, 0.5, 1000]) + rng.choice([0, 1])
    words += f" = {holder[key]!r:.60}"
  else:
    other, name = rng.choice(places)
    holder[key] = other[name] if name in other or isinstance(other, list) else None
    words += f" from {str(name)[:40]}"
  try:
    text = json.dumps(fields)
  except (ValueError, RecursionError):  # a copy of what holds it
    return _bytes(content, rng)
  if raw is not None:
    text = text.replace(json.dumps(_MARK), raw)
  return Damage(text.encode("utf-8", "surrogatepass"), words, edits)


def _places(value: Any, depth: int = 0):
  keys = list(value) if isinstance(value, dict) else range(len(value))
  for key in list(keys)[:400]:
    yield value, key
    if isinstance(value[key], dict | list) and value[key] and depth < 6:
      yield from _places(value[key], depth + 1)


# ---- safetensors

_DTYPES = [
  "F64", "F32", "F16", "BF16", "I64", "I32", "U32", "I16", "I8", "U8", "BOOL", "F8_E4M3",
  "F8_E5M2", "F8_E8M0", "F4", "x",
]  # fmt: skip


def _safetensors(content: bytes, rng: random.Random) -> Damage:
  size = int.from_bytes(content[:8], "little")
  header, data = content[8 : 8 + size], content[8 + size :]
  kind = rng.choice(["header", "header", "dtype", "length", "data", "shape"])
  if kind == "data":
    damage = _bytes(data, rng)
    return damage._replace(
      content=content[: 8 + size] + damage.content, words=f"data: {damage.words}"
    )
  if kind == "length":
    value = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**40, 2**63, 2**64 - 1])
    return Damage(struct.pack("<Q", value) + content[8:], f"header of {value} bytes", 1)
  if kind == "header":
    damage = _json(header, rng)
  else:
    fields = json.loads(header)
    name = rng.choice([x for x in fields if x != "__metadata__"])
    if kind == "dtype":
      fields[name]["dtype"] = rng.choice(_DTYPES)
    else:
      fields[name]["shape"] = rng.choice(
        [fields[name]["shape"][::-1], [], [2**40], [0], [-1], [1, *fields[name]["shape"]]]
      )
    words = f"{name} {kind}: {fields[name]}"
    damage = Damage(json.dumps(fields).encode(), words, 1)
  return damage._replace(content=struct.pack("<Q", len(damage.content)) + damage.content + data)


# ---- GGUF

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class Gguf:
  """A GGUF file in its parts, which can be written together again whatever they say.

  entries: [key, type, bytes of the value]. tensors: [name, sizes, type, offset].
  """

  def __init__(self, content: bytes):
    self._content, self._at = content, 8
    tensors, entries = self._number("<Q"), self._number("<Q")
    self.counts = [tensors, entries]
    self.entries = [self._entry() for _ in range(entries)]
    self.tensors = []
    for _ in range(tensors):
      name, axes = self._string(), self._number("<I")
      sizes = [self._number("<Q") for _ in range(axes)]
      self.tensors.append([name, sizes, self._number("<I"), self._number("<Q")])
    self.data = content[-(-self._at // 32) * 32 :]

  def _number(self, layout: str) -> int:
    self._at += struct.calcsize(layout)
    return struct.unpack_from(layout, self._content, self._at - struct.calcsize(layout))[0]

  def _string(self) -> bytes:
    size = self._number("<Q")
    self._at += size
    return self._content[self._at - size : self._at]

  def _entry(self) -> list[Any]:
    key, kind, start = self._string(), self._number("<I"), self._at
    self._skip(kind)
    return [key, kind, self._content[start : self._at]]

  def _skip(self, kind: int) -> None:
    if kind == 8:
      self._string()
    elif kind == 9:
      item, count = self._number("<I"), self._number("<Q")
      for _ in range(count):
        self._skip(item)
    else:
      self._at += _SIZES[kind]

  def written(self) -> bytes:
    """The file, with zeros up to its data as its alignment of 32 asks."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, *self.counts)]
    for key, kind, value in self.entries:
      parts += [struct.pack("<Q", len(key)), key, struct.pack("<I", kind), value]
    for name, sizes, kind, offset in self.tensors:
      parts += [struct.pack("<Q", len(name)), name, struct.pack("<I", len(sizes))]
      parts += [struct.pack("<Q", n) for n in sizes] + [struct.pack("<IQ", kind, offset)]
    header = b"".join(parts)
    return header + bytes(-len(header) % 32) + self.data


_GGUF_VALUES = (
  [
    (kind, value)
    for kind, size in _SIZES.items()
    for value in (
      bytes(size),
      b"\xff" * size,
      (b"\x01" + bytes(size - 1)),
      bytes(size - 1) + b"\x7f",
    )
  ]
  + [(10, struct.pack("<Q", n)) for n in (8, 10**9, 2**31, 2**40)]
  + [(4, struct.pack("<I", n)) for n in (2, 8, 16, 64, 10**9, 2**31)]
  + [(6, struct.pack("<f", x)) for x in (float("nan"), float("inf"), 1e30, 1e-40, 0.5, -1.0)]
  + [(12, struct.pack("<d", x)) for x in (float("nan"), float("inf"), 1e300, 1e-300, 1e-5, 0.0)]
  + [
    (8, struct.pack("<Q", len(x)) + x)
    for x in (b"", b"llama", b"gpt-2", b"\xff", b"a" * 99, b"linear")
  ]
  + [
    (9, struct.pack("<IQ", kind, n) + rest)
    for kind, n, rest in (
      (8, 0, b""),
      (4, 2, bytes(8)),
      (8, 2**40, b""),
      (0, 2**62, b""),
      (9, 1, b""),
    )
  ]
)
_KEYS = [
  b"general.alignment", b"llama.attention.key_length", b"llama.attention.value_length",
  b"llama.vocab_size", b"llama.rope.scaling.type", b"llama.rope.scaling.factor",
  b"llama.rope.freq_base", b"llama.rope.dimension_count", b"llama.expert_count",
  b"llama.attention.head_count", b"llama.attention.head_count_kv", b"llama.block_count",
  b"llama.embedding_length", b"llama.feed_forward_length", b"llama.context_length",
  b"llama.attention.layer_norm_rms_epsilon", b"tokenizer.ggml.pre", b"tokenizer.ggml.tokens",
  b"tokenizer.ggml.merges", b"tokenizer.ggml.token_type", b"tokenizer.ggml.bos_token_id",
  b"tokenizer.ggml.add_bos_token", b"tokenizer.chat_template", b"tokenizer.chat_templates",
]  # fmt: skip


def _gguf(content: bytes, rng: random.Random) -> Damage:
  file = Gguf(content)
  kind = rng.choice(
    ["set", "set", "set", "set", "delete", "retype", "twice", "sizes", "type", "offset", "offsets",
     "name", "count", "data", "order"]
  )  # fmt: skip
  entry, tensor = rng.choice(file.entries), rng.choice(file.tensors)
  words, edits = kind, 1
  if kind == "set":
    key = rng.choice([entry[0], *_KEYS])
    value = rng.choice(_GGUF_VALUES)
    file.entries = [x for x in file.entries if x[0] != key] + [[key, *value]]
    file.counts[1] = len(file.entries)
    words = f"{key!r} = {value[0]}:{value[1][:24]!r}"
  elif kind == "delete":
    file.entries.remove(entry)
    file.counts[1] -= 1
    words = f"delete {entry[0]!r}"
  elif kind == "retype":
    entry[1] = rng.choice([*_SIZES, 8, 9, 13, 2**32 - 1])
    words = f"{entry[0]!r} of type {entry[1]}"
  elif kind == "twice":
    file.entries.append([entry[0], *rng.choice(_GGUF_VALUES)])
    file.counts[1] += 1
    words = f"twice {entry[0]!r}"
  elif kind == "sizes":
    tensor[1] = rng.choice(
      [tensor[1][::-1], [], [2**60, 2**62], [0], [1, *tensor[1]], [*tensor[1], 1], [2**31]]
    )
    words = f"{tensor[0]!r} of {tensor[1]}"
  elif kind == "type":
    tensor[2] = rng.choice([*range(31), 39, 40, 99])
    words = f"{tensor[0]!r} of type {tensor[2]}"
  elif kind == "offset":
    tensor[3] = rng.choice([0, 1, tensor[3] + 1, tensor[3] + 32, max(0, tensor[3] - 32), 2**63, 31])
    words = f"{tensor[0]!r} at {tensor[3]}"
  elif kind == "offsets":
    other = rng.choice(file.tensors)
    tensor[3], other[3], edits = other[3], tensor[3], 2
    words = f"offsets of {tensor[0]!r} and {other[0]!r}"
  elif kind == "name":
    tensor[0] = rng.choice([b"", b"x" * 70, b"\xff", rng.choice(file.tensors)[0], b"a" * 10**5])
    words = f"name {tensor[0][:40]!r}"
  elif kind == "count":
    at = rng.randrange(2)
    file.counts[at] = rng.choice([0, file.counts[at] - 1, file.counts[at] + 1, 2**40, 2**64 - 1])
    words = f"counts {file.counts}"
  elif kind == "order":
    rng.shuffle(file.entries)
    edits = 0
  else:
    damage = _bytes(file.data, rng)
    file.data, words, edits = damage.content, f"data: {damage.words}", damage.edits
  return Damage(file.written(), words, edits)
