"""The readers that `hostile_worker` runs, with files of their own making and ways to damage them.

A reader's `damage(chance)` leaves a damaged file and says how. Its `outcome()` reads it and says
whether what came is "same" as before the damage, or "other" and right; it raises AssertionError
where it is neither.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import pathlib
import random
import shutil
import tarfile
import zipfile
from types import MappingProxyType

import bombs
import pyarrow as pa
from bombs import with_sum, zipped
from pyarrow import parquet

from lora_jax.data import labels, records, splits, templates
from lora_jax.io import archives, assets, model_archives, package_index, pip_settings

SMALL = [0, 1, 2, 127, 128, 255]
NUMBERS = [-1, 0, 1, 511, 513, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 33) - 1, 1 << 62, 10**30]


def damaged(data: bytes, chance: random.Random) -> tuple[bytes, str]:
  """Bytes with one to four of them changed, a part taken out, put in, doubled or cut off."""
  found, what = bytearray(data), chance.choice(["flip", "set", "cut", "drop", "double", "insert"])
  at = chance.randrange(len(found))
  size = min(chance.choice([1, 2, 4, 16, 512, 4096]), len(found) - at)
  if what == "flip":
    for _ in range(chance.randint(1, 4)):
      found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
  elif what == "set":
    found[at : at + size] = bytes([chance.choice(SMALL)]) * size
  elif what == "cut":
    del found[at:]
  elif what == "drop":
    del found[at : at + size]
  elif what == "double":
    found[at:at] = found[at : at + size]
  else:
    found[at:at] = chance.randbytes(size)
  return bytes(found), f"{what} {size} at {at} of {len(data)}"


MEMBER = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(100)) + b"text " * 500
OTHERS = {"data/": b"", "data/other.txt": b"other", "a" * 120 + "/deep.txt": b"deep"}


def tar(files: dict[str, bytes], mode: str = "w", **options) -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode, **options) as file:
    for name, data in files.items():
      info = tarfile.TarInfo(name.rstrip("/"))
      info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
      info.size = len(data)
      info.pax_headers = (
        {"comment": "c" * 200} if options.get("format") == tarfile.PAX_FORMAT else {}
      )
      file.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


class Archives:
  """Tars of three formats, packed in four ways, and zips of four methods; one within another."""

  PACKERS = (bytes, gzip.compress, bz2.compress, lzma.compress)

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    files = OTHERS | {"data/member.bin": MEMBER}
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    self.zips = [zipped(files, method) for method in methods]
    formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    self.tars = [tar(files, format=format) for format in formats]
    inner = {"data/member.bin": tar({"in.txt": MEMBER}, "w:gz")}
    self.nested = [zipped(inner, zipfile.ZIP_DEFLATED), tar(inner, "w:xz")]

  def damage(self, chance: random.Random) -> str:
    self.checked, self.parts = True, ("data", "member.bin")
    kind = chance.choice(["zip", "tar", "packed", "header", "nested"])
    if kind == "nested":
      self.parts = ("data", "member.bin", "in.txt")
      self.data, how = damaged(chance.choice(self.nested), chance)
    elif kind == "zip":
      self.data, how = damaged(chance.choice(self.zips), chance)
    elif kind == "packed":
      self.data, how = damaged(chance.choice(self.PACKERS[1:])(chance.choice(self.tars)), chance)
    else:
      self.checked = False
      data = chance.choice(self.tars)
      plain, how = damaged(data, chance) if kind == "tar" else self.other_header(data, chance)
      self.plain, pack = plain, chance.choice(self.PACKERS)
      self.data = pack(plain)
    (self.folder / "archive").write_bytes(self.data)
    return f"{kind}: {how}"

  @staticmethod
  def other_header(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A tar with one field of a header changed and the header's sum put right again."""
    found = bytearray(data)
    heads = [n for n in range(0, len(data), 512) if data[n + 257 : n + 262] == b"ustar"]
    head = chance.choice(heads)
    start, length = chance.choice([(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (345, 155)])
    if start == 124 and chance.random() < 0.7:
      number = chance.choice(NUMBERS)
      field = number.to_bytes(12, "big", signed=number < 0) if abs(number) < 1 << 90 else b"7" * 12
      found[head + start : head + start + 12] = bytes([field[0] | 0x80]) + field[1:]
    else:
      field = bytes(chance.choice(b"0123456789LKxgSVD\x80\xff\x00 ") for _ in range(length))
      found[head + start : head + start + length] = field
    found[head : head + 512] = with_sum(bytes(found[head : head + 512]))
    return bytes(found), f"header at {head}, field at {start}: {field[:12]!r}"

  def outcome(self) -> str:
    target = self.folder / "target"
    target.unlink(missing_ok=True)
    before = set(os.listdir(self.folder))
    try:
      found = archives.extract(self.folder / "archive", [self.parts], target)
    finally:
      assert set(os.listdir(self.folder)) - before <= {"target"}
    if not found:
      assert not target.exists()
      raise FileNotFoundError("no such member")
    content = target.read_bytes()
    if content == MEMBER:
      return "same"
    # Only a tar has no sum of a member's content; what comes lies in it, or is padding.
    assert not self.checked and content in self.plain, f"{len(content)} other bytes"
    return "other"


ROWS = [
  {
    "text": f"sentence {n}, of é and 日本",
    "rating": str(n - 4.5),
    "label": "positive",
    "id": str(n),
  }
  for n in range(9)
]
VALUES = [
  None, True, [], {}, [[1]], {"a": {"b": 1}}, "", " ", "\ud800", "\udfff x", "nan", "1e400", -0.0,
  float("nan"), float("inf"), 10**400, 1 << 64, "0x1", "９", "\0", "x" * 70_000,
]  # fmt: skip
TEXTS = [
  "1" * 5000, "-" + "9" * 4300, "[" * 100_000, '{"a":' * 3000, '{"text":1,"text":2}', "1e400",
  "NaN", "[" * 70 + "]" * 70, "tru", '"\\ud83d"', "'x'", "1_000", "", "\ufeff", "0" * 50,
]  # fmt: skip


class Records:
  """JSONL, JSON, CSV, TSV and Parquet, the texts plain and packed, in two encodings, and what is
  made of their records."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  def damage(self, chance: random.Random) -> str:
    self.format = chance.choice(["jsonl", "json", "csv", "tsv", "parquet"])
    self.encoding = chance.choice(["utf-8-sig", "utf-8-sig", "utf-16"])
    packed, how = chance.random() < 0.3, "whole"
    rows = [dict(row) for row in ROWS]
    self.path = self.folder / f"data.{self.format}"
    if self.format == "parquet":
      return self.damage_parquet(rows, chance)
    if self.format.startswith("json") and chance.random() < 0.6:
      text, how = self.other_json(rows, chance)
    else:
      text = self.written(rows)
    data = text.encode(self.encoding, "surrogatepass")
    if how == "whole" and not (packed and chance.random() < 0.5):
      data, how = damaged(data, chance)
    if packed:
      data = gzip.compress(data)
      if how == "whole":
        data, how = damaged(data, chance)
    self.path.write_bytes(data)
    return f"{self.format} {self.encoding} {'packed ' if packed else ''}{how}"

  def damage_parquet(self, rows: list[dict], chance: random.Random) -> str:
    self.encoding, options = "utf-8-sig", {"write_page_checksum": True}
    if chance.random() < 0.7:  # else texts alone
      for row in rows:
        row["messages"] = [{"role": "user", "content": "a"}, {"role": "tool", "n": [[1], []]}]
    table = pa.Table.from_pylist(rows)
    if chance.random() < 0.5:  # else columns as Arrow keeps them in the file, which has no sum
      table, options["store_schema"] = table.replace_schema_metadata(None), False
    buffer = io.BytesIO()
    compression = chance.choice(["none", "snappy", "zstd", "gzip"])
    parquet.write_table(table, buffer, compression=compression, row_group_size=4, **options)
    data, how = buffer.getvalue(), "whole"
    if chance.random() < 0.9:
      data, how = damaged(data, chance)
    self.path.write_bytes(data)
    return f"parquet {compression} {how}"

  def other_json(self, rows: list[dict], chance: random.Random) -> tuple[str, str]:
    row, name = chance.choice(rows), chance.choice(list(ROWS[0]))
    if chance.random() < 0.5:
      row[name] = chance.choice(VALUES)
      return self.written(rows), f"{name}={row[name]!r:.60}"
    text = chance.choice(TEXTS)
    row[name] = "@@"
    return self.written(rows).replace('"@@"', text), f"{name}={text[:60]}"

  def written(self, rows: list[dict]) -> str:
    if self.format == "jsonl":
      return "".join(json.dumps(row) + "\n" for row in rows)
    if self.format == "json":
      return json.dumps(rows)
    text = io.StringIO()
    if self.format == "csv":
      writer = csv.DictWriter(text, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)
      return text.getvalue()
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    return "\n".join(lines)

  def outcome(self) -> str:
    found = records.read(self.path, encoding=self.encoding)
    self.check(found)
    prompt, completion = "Review: {text}\nSentiment:", " {label}"
    for name, template in (("prompt", prompt), ("completion", completion)):
      templates.check(template, found, name)
    filled = [templates.fill(prompt, row) + templates.fill(completion, row) for row in found]
    for text in filled:
      text.encode()  # as a tokenizer does
    rated = labels.sign_label([{"r": x["rating"]} for x in found if "rating" in x], "r")
    assert all(row["label"] in ("positive", "negative") for row in rated)
    parts = splits.split(found, "id", {"train": 0.5, "test": 0.5})
    assert sum(map(len, parts.values())) == len(found)
    return "same" if found == ROWS else "other"

  def check(self, found: list[dict]) -> None:
    """Holds records against what the file as it now is says to another reader."""
    data = self.path.read_bytes()
    if self.format == "parquet":
      expected = parquet.read_table(io.BytesIO(data), use_threads=False).to_pylist()
      assert repr(found) == repr(expected), "other records"
      return
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode(self.encoding)
    if self.format.startswith("json"):
      # NaN differs from itself, so what is compared is written again.
      lines = [line for line in text.split("\n") if line.strip()]
      expected = [json.loads(x) for x in lines] if self.format == "jsonl" else json.loads(text)
      assert json.dumps(found) == json.dumps(expected), "other records"
      return
    rows = csv.reader(
      io.StringIO(text.removeprefix("\ufeff"), newline=""),
      delimiter="," if self.format == "csv" else "\t",
      quoting=csv.QUOTE_MINIMAL if self.format == "csv" else csv.QUOTE_NONE,
    )
    rows = [row for row in rows if row]
    assert [list(row) for row in found] == [rows[0]] * (len(rows) - 1), "other columns"
    assert [list(row.values()) for row in found] == rows[1:], "other fields"


class Caches:
  """Addresses, and what lies in the cache for one: files, sums, folders, pipes."""

  ADDRESS = "pypi://demo-pack==1.0/demo/model.bin"

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    os.environ |= {"LORA_JAX_CACHE": str(folder / "cache"), "HF_HUB_CACHE": str(folder / "hub")}
    self.place = folder / "cache/pypi/demo-pack/1.0/demo%2Fmodel.bin"

  def damage(self, chance: random.Random) -> str:
    shutil.rmtree(self.folder / "cache", ignore_errors=True)
    self.place.mkdir(parents=True)
    self.file, self.record = self.place / "model.bin", self.place / "model.bin.sha256"
    self.file.write_bytes(b"weights")
    self.record.write_text(hashlib.sha256(b"weights").hexdigest() + "\n")
    self.address = self.ADDRESS
    kind = chance.choice(["address", "sum", "file", "kind", "above"])
    if kind == "address":
      scheme = chance.choice(["pypi", "hf"])
      address = self.ADDRESS if scheme == "pypi" else "hf://owner/name@main"
      data, how = damaged(address.encode(), chance)
      self.address = data.decode("utf-8", "replace") * chance.choice([1, 1, 1, 50])
    elif kind in ("sum", "file"):
      path = self.record if kind == "sum" else self.file
      data, how = damaged(path.read_bytes(), chance)
      path.write_bytes(data)
    elif kind == "kind":
      path, how = chance.choice([self.file, self.record]), chance.choice(["fifo", "folder", "gone"])
      path.unlink()
      if how == "fifo":
        os.mkfifo(path)
      elif how == "folder":
        path.mkdir()
    else:
      above, how = chance.choice(list(self.place.parents)[:3]), "a file"
      shutil.rmtree(above)
      above.write_text("")
    return f"{kind} {how} {self.address[:60]!r}"

  def outcome(self) -> str:
    path = assets.resolve(self.address, fetch=False)
    assert path == self.file and path.read_bytes() == b"weights", f"{path}"
    return "same"


class Pages:
  """Pages of an index on this machine, and the package that they name."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.index, files = folder / "simple/demo-pack", folder / "files"
    self.index.mkdir(parents=True)
    files.mkdir()
    name = "demo_pack-1.0-py3-none-any.whl"
    self.content = zipped({"demo/model.bin": b"weights"}, zipfile.ZIP_DEFLATED)
    (files / name).write_bytes(self.content)
    digest = hashlib.sha256(self.content).hexdigest()
    self.page = f'<html><body><a href="../../files/{name}#sha256={digest}">{name}</a></body></html>'
    place = (folder / "simple").as_uri()
    settings = pip_settings.Settings((place,), frozenset(), frozenset(), "", "", "", 1.0, 0)
    pip_settings.read = lambda: settings  # this process has no other use for it

  def damage(self, chance: random.Random) -> str:
    data, how = damaged(self.page.encode(), chance)
    (self.index / "index.html").write_bytes(data)
    return f"{how}: {data[:200]!r}"

  def outcome(self) -> str:
    for found in package_index.download("demo-pack", "1.0", self.folder):
      if found.path:
        assert found.path.read_bytes() == self.content
        return "same"
    raise FileNotFoundError("none found")


class Bombs:
  """Small files that unpack to much, one after the other."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.left = folder, list(bombs.BOMBS)

  def damage(self, chance: random.Random) -> str:
    self.name = self.left.pop()
    is_data = self.name.endswith(("json", "jsonl", "csv"))
    self.path = self.folder / (self.name if is_data else "archive")
    self.path.write_bytes(bombs.BOMBS[self.name]())
    return self.name

  def outcome(self) -> str:
    if self.path.name != "archive":
      return f"{len(records.read(self.path))}"
    parts = ("data", "member.bin")
    parts = (*parts, "in.txt") if "in an archive" in self.name else parts
    if not archives.extract(self.path, [parts], self.folder / "target"):
      return "not found"
    return "same"


class Faulty:
  """A reader that does what no reader may, by turns."""

  def __init__(self, folder: pathlib.Path):
    self.count = 0

  def damage(self, chance: random.Random) -> str:
    self.count += 1
    return f"{self.count}"

  def outcome(self) -> str:
    match self.count:
      case 1:
        return {}["key"]
      case 2:
        return str(len(bytearray(1 << 30)))
      case 3:
        while True:
          pass
      case 4:
        raise ValueError("x" * 5000)
      case 5:
        return "same"
    raise ValueError("refused")


class ModelArchives:
  """A model's folder in a zip archive, which has a sum of every member's content."""

  FILES = MappingProxyType(
    {"config.json": b'{"model_type": "bert"}', "model.safetensors": MEMBER, "vocab.txt": b"[UNK]\n"}
  )

  def __init__(self, folder: pathlib.Path):
    self.path = folder / "model.zip"
    self.files = dict(self.FILES) | {"x/other.bin": MEMBER}
    os.environ["LORA_JAX_CACHE"] = str(folder / "cache")

  def damage(self, chance: random.Random) -> str:
    data, what = damaged(zipped(self.files, zipfile.ZIP_DEFLATED), chance)
    self.path.write_bytes(data)
    return what

  def outcome(self) -> str:
    found = model_archives.folder_of(self.path)
    if found == self.path:
      raise ValueError("it is no zip archive any more")
    files = {path.name: path.read_bytes() for path in found.iterdir()}
    shutil.rmtree(found)
    assert {"config.json", "model.safetensors"} <= files.keys()
    # A name in the archive's directory has no sum.
    known = {name: content for name, content in files.items() if name in self.FILES}
    assert all(content == self.FILES[name] for name, content in known.items())
    return "same" if files == dict(self.FILES) else "other"


READERS = {
  "faulty": Faulty,
  "bombs": Bombs,
  "archives": Archives,
  "records": Records,
  "caches": Caches,
  "pages": Pages,
  "model archives": ModelArchives,
}
