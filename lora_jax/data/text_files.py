"""Reads the lines of a text file, gzipped or not, as a stream.

with lines("reviews.jsonl.gz", "utf-8-sig", newline="\n") as (found, size):
  for line in found: ...
"""

import codecs
import contextlib
import difflib
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lora_jax.io import steady_files

_CHUNK = 1 << 20
# Text compresses tenfold, and thirtyfold if every record has the same long prompt.
_RATIO = 50
_FREE = 1 << 26  # bytes that a compressed file of any size may expand to
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)
_BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_COMPARED = 1000


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
  """Opens a data file for reading bytes; raises as `lines` does for the file itself."""
  if not os.path.lexists(path):
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileNotFoundError(f"{path}: no such data file{nearest(path.name, there)}")
  with steady_files.opened(path) as file:
    yield file


def most_unpacked(size: int) -> int:
  """Returns the bytes that a compressed file of this size may expand to."""
  return max(_FREE, _RATIO * size)


@contextlib.contextmanager
def lines(path: Path, encoding: str, newline: str | None) -> Iterator[tuple[Iterator[str], int]]:
  """Yields the lines of a file and their size in bytes; a byte-order mark is skipped.

  gzip is recognized by its content. A compressed file is read twice, first to measure its size.

  Args:
    path: of the file.
    encoding: of its text.
    newline: the line end, as in `io.TextIOWrapper`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for anything but a regular file, a file that changes while it is read, text in
      another encoding, and gzip that is damaged or expands to more than 64 MiB and fifty times its
      size.
  """
  with opened(path) as file:
    packed = file.read(2) == _GZIP
    size = _unpacked_size(path, file) if packed else os.fstat(file.fileno()).st_size
    try:
      content = _content(file, packed)
      text = io.TextIOWrapper(content, encoding=encoding, newline=newline)
    except (LookupError, ValueError) as error:
      reason = str(error)[:200]
      raise ValueError(f"{path}: {reason}; give encoding= a name such as 'utf-16'") from error
    try:
      yield _lines(path, text, size), size
    except UnicodeError as error:
      raise ValueError(_misread(path, file, packed, encoding, error)) from error
    except _DAMAGE as error:
      raise ValueError(f"{path}: damaged gzip ({error}); fetch the file again") from error
    except MemoryError:
      raise ValueError(f"{path}: its records do not fit into memory; take a part of it") from None
    finally:
      text.detach()  # otherwise it would close the file


def nearest(name: str, names: Iterable[str]) -> str:
  """Returns a question whether another name was meant, or ""."""
  near = [other for other, _ in zip(names, range(_COMPARED), strict=False) if len(other) < 200]
  close = difflib.get_close_matches(name[:200], near, n=1, cutoff=0.4)
  return f" (did you mean {close[0]!r}?)" if close else ""


def _content(file: BinaryIO, packed: bool) -> BinaryIO | gzip.GzipFile:
  file.seek(0)
  return gzip.GzipFile(fileobj=file) if packed else file


def _unpacked_size(path: Path, file: BinaryIO) -> int:
  size, limit = 0, most_unpacked(os.fstat(file.fileno()).st_size)
  content = _content(file, packed=True)
  try:
    while chunk := content.read(_CHUNK):
      size += len(chunk)
      if size > limit:
        raise ValueError(
          f"{path}: its gzip holds more than {limit:,} bytes, {_RATIO} times its own size; if you "
          "trust it, unpack it with gunzip and name the file that comes out"
        )
  except _DAMAGE as error:
    raise ValueError(f"{path}: damaged gzip ({error}); fetch the file again") from error
  return size


def _lines(path: Path, text: io.TextIOWrapper, size: int) -> Iterator[str]:
  left = size
  for number, line in enumerate(text):
    left -= len(line)  # a character has at least one byte
    if left < 0:
      raise ValueError(f"{path}: grew while it was read; wait until its writer is done")
    yield line if number else line.removeprefix("\ufeff")


def _misread(path: Path, file: BinaryIO, packed: bool, encoding: str, error: UnicodeError) -> str:
  """Returns the message for a file in another encoding; rereads it to find the first bad byte."""
  content = _content(file, packed)
  start = content.read(2)
  likely = _BYTE_ORDER_MARKS.get(start, "latin-1")
  remedy = f"give the file's own encoding= (data.encoding in a config), here perhaps {likely!r}"
  decoder = codecs.getincrementaldecoder(encoding)()
  chunk, line, at = start + content.read(_CHUNK), 1, 0
  if chunk.startswith(_PARQUET):
    return f"{path}: is a Parquet file; give format= (data.format in a config) 'parquet'"
  while True:
    before = len(decoder.getstate()[0])
    try:
      decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as found:
      line += found.object[before : found.start].count(b"\n")
      return (
        f"{path}: line {line} is not {encoding}: byte {found.object[found.start]:#04x} at "
        f"{at - before + found.start} ({found.reason}); {remedy}"
      )
    except UnicodeError:
      chunk = b""
    if not chunk:
      return f"{path}: is not {encoding}: {str(error)[:200]}; {remedy}"
    line, at = line + chunk.count(b"\n"), at + len(chunk)
    chunk = content.read(_CHUNK)
