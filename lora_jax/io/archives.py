"""Extracts files from a zip or tar archive, or one file from an archive within an archive.

    extract(Path("package-1.0.tar.gz"), [("data", "tables.zip", "a.csv")], Path("a.csv"))

Archives are untrusted. Only members requested by name are read, and they are written where the
caller says: a name inside an archive is never used as a path, so it cannot lead outside; of a
folder only files with plain names are written. Limits on
the expansion ratio, the size of headers and the number of members refuse an archive bomb within
seconds, in little memory.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_MAX_BYTES = 1 << 36  # 64 GiB: larger than any intended file
_RATIO = 100  # text compresses tenfold, tables thirtyfold
_FREE = 1 << 26  # bytes that an archive of any size may expand to
_MAX_MEMBERS = 1 << 17
_MAX_ATTRIBUTES = 1 << 10
_MAX_HEADER = 1 << 16  # of a tar member with its extensions; a path has some 4,000 bytes
_MAX_DIRECTORY = 1 << 24  # of a zip, which is read at once
_CHUNK = 1 << 16
_MAX_FILES = 64  # of a folder
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")

_PACKED = {
  b"\x1f\x8b": gzip.open,
  b"BZh": bz2.open,
  b"\xfd7zXZ\x00": lzma.open,
  b"]\x00\x00": lzma.open,
}
# With other methods, zipfile reads its whole input rather than the requested bytes.
_PIECEMEAL = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SMALLEST = 1 << 12


class _Refused(ValueError):
  """A refusal by this module, rather than by the library that reads an archive."""


def extract(archive: Path, members: Sequence[tuple[str, ...]], target: Path) -> bool:
  """Copies the first of `members` in the archive to `target`; returns False if there is none.

  members: paths as tuples of their parts; a path may lead through nested archives.

  Raises ValueError for an archive that is damaged, encrypted or of an unknown kind; for a member
  that is a link, or larger than 64 GiB; and for an archive that expands to more than 64 MiB and a
  hundred times its size, has more than 131,072 members, or a header of more than 64 KiB.
  """
  limit = min(_MAX_BYTES, max(_FREE, _RATIO * archive.stat().st_size))
  return _extract(archive, members, target, limit)


def extract_folder(archive: Path, parts: tuple[str, ...], target: Path) -> bool:
  """Copies the files of a folder in a zip archive to the new folder `target`, without the folders
  within; returns False if there are none.

  parts: of the folder's path. The names of its files must be plain, as "model.bin".

  Raises ValueError as `extract` does, for another name, and for more than 64 files.
  """
  start = "/".join(parts) + "/"
  names = [name.removeprefix(start) for name in list_zip(archive) if name.startswith(start)]
  names = [name for name in names if "/" not in name]
  if len(names) > _MAX_FILES:
    raise _Refused(f"{start[:200]}: holds {len(names)} files, over the limit of {_MAX_FILES}")
  target.mkdir()
  for name in names:
    if not _PLAIN_NAME.fullmatch(name):
      raise _Refused(f"{start[:200]}: holds a file {name[:80]!r}, whose name is not plain; refused")
    extract(archive, [(*parts, name)], target / name)
  return bool(names)


def list_zip(archive: Path) -> dict[str, zipfile.ZipInfo]:
  """Returns the files of a zip archive by their names in it.

  Raises ValueError for an archive that is damaged, and for one with more than 131,072 members.
  """
  with _reading(archive.name), Capped(archive.open("rb", buffering=0)) as file:
    with zipfile.ZipFile(file) as packed:
      infos = packed.infolist()
    if len(infos) > _MAX_MEMBERS:
      raise _Refused(f"its archive has more than {_MAX_MEMBERS:,} members")
  # Not `is_dir`, which raises IndexError for an empty name on Python 3.11.
  return {info.filename: info for info in infos if not info.filename.endswith("/")}


def _extract(archive: Path, members: Sequence[tuple[str, ...]], target: Path, limit: int) -> bool:
  wanted = {"/".join(parts[:end]) for parts in members for end in range(1, len(parts) + 1)}
  with _reading("/".join(members[0])):
    kind = _kind(archive)
    found = kind.list(archive, wanted, limit)
  for parts in members:
    ends = [end for end in range(len(parts), 0, -1) if "/".join(parts[:end]) in found]
    if not ends:
      continue
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
      copy, name = Path(folder) / "copy", "/".join(parts[: ends[0]])
      _check(name, found[name], limit)
      with copy.open("wb") as file:
        for chunk in _read(kind, archive, name, found[name], limit):
          file.write(chunk)
      if ends[0] == len(parts):
        copy.replace(target)
        return True
      if _extract(copy, [parts[ends[0] :]], target, limit):
        return True
  return False


def _read(kind: type, archive: Path, name: str, info, limit: int) -> Iterator[bytes]:
  """Yields the content of a member; errors of the caller in writing it are not the archive's."""
  chunks = kind.read(archive, info, limit)
  while True:
    with _reading(name):
      chunk = next(chunks, b"")
    if not chunk:
      return
    yield chunk


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
  try:
    yield
  except _Refused as error:
    raise _Refused(f"{name[:200]}: {error}") from None
  except Exception as error:  # the libraries do not document their exceptions
    reason = str(error)[:200] or type(error).__name__
    raise ValueError(f"{name[:200]}: cannot be read from its archive: {reason}") from error


def _check(name: str, info: zipfile.ZipInfo | tarfile.TarInfo, limit: int) -> None:
  if isinstance(info, zipfile.ZipInfo):
    is_link, size = stat.S_ISLNK(info.external_attr >> 16), info.file_size
  else:
    is_link, size = not info.isreg() or info.issparse(), info.size
  if is_link:
    raise _Refused(f"{name[:200]}: is a link and not a regular file in its archive; refused")
  if not 0 <= size <= limit:
    raise _Refused(f"{name[:200]}: {_claims(size, limit)}")


def _claims(size: int, limit: int) -> str:
  return f"claims {size} bytes in its archive, over the limit of {limit}; {_REMEDY}"


_REMEDY = "if you trust it, unpack it yourself and give the file's path"


def _kind(archive: Path) -> "type[_Zip] | type[_Tar]":
  with archive.open("rb") as file:  # zipfile.is_zipfile accepts a tar that ends in a zip
    return _Zip if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06") else _Tar


class _Zip:
  @staticmethod
  def list(archive: Path, wanted: Collection[str], limit: int) -> dict[str, zipfile.ZipInfo]:
    with Capped(archive.open("rb", buffering=0)) as file, zipfile.ZipFile(file) as packed:
      return {name: packed.NameToInfo[name] for name in wanted if name in packed.NameToInfo}

  @staticmethod
  def read(archive: Path, info: zipfile.ZipInfo, limit: int) -> Iterator[bytes]:
    size = _CHUNK if info.compress_type in _PIECEMEAL else _SMALLEST
    with (
      Capped(archive.open("rb", buffering=0)) as file,
      zipfile.ZipFile(file) as packed,
      packed.open(info) as member,
    ):
      while chunk := member.read(size):
        yield chunk


class Capped(io.BufferedReader):
  """A zip file that refuses any single read larger than the limit of a zip's directory."""

  def read(self, size: int | None = -1) -> bytes:
    if size is not None and size > _MAX_DIRECTORY:
      raise _Refused(f"its directory of {size:,} bytes is over the limit of {_MAX_DIRECTORY:,}")
    return super().read(size)


class _Tar:
  @staticmethod
  def list(archive: Path, wanted: Collection[str], limit: int) -> dict[str, tarfile.TarInfo]:
    found, count = {}, 0
    with _unpacked(archive) as file:
      stream = _Onwards(file, limit)
      # typeshed asks for `write` and `close`, which reading does not need.
      with tarfile.open(fileobj=stream, mode="r:") as packed:  # pyright: ignore[reportCallIssue, reportArgumentType]
        while info := packed.next():
          if info.name in wanted and not info.isdir():
            if info.size > limit:
              raise _Refused(_claims(info.size, limit))
            found[info.name] = info  # the last of several, as in tar itself
          count += 1
          if count > _MAX_MEMBERS:
            raise _Refused(f"its archive has more than {_MAX_MEMBERS:,} members")
          if len(packed.pax_headers) > _MAX_ATTRIBUTES:
            raise _Refused(f"its archive has more than {_MAX_ATTRIBUTES:,} attributes of its own")
          packed.members = []  # otherwise they would accumulate
          stream.start_header()
      while stream.take(_CHUNK):  # a compressed stream has its checksum at the end
        pass
    return found

  @staticmethod
  def read(archive: Path, info: tarfile.TarInfo, limit: int) -> Iterator[bytes]:
    with _unpacked(archive) as file:
      stream, left = _Onwards(file, limit), info.size
      stream.seek(info.offset_data)
      while left:
        chunk = stream.take(min(left, _CHUNK))
        if not chunk:
          raise EOFError("it ends within the member")
        left -= len(chunk)
        yield chunk


def _unpacked(archive: Path) -> BinaryIO:
  with archive.open("rb") as file:
    start = file.read(512)
  if start[257:262] != b"ustar":
    for magic, unpack in _PACKED.items():
      if start.startswith(magic):
        return unpack(archive)
  return archive.open("rb")


class _Onwards:
  """A forward-only stream with limits on the total bytes and on the bytes of a header.

  A library might otherwise read as many bytes as a header claims, chain headers without end, or
  seek back.
  """

  def __init__(self, file: BinaryIO, limit: int):
    self._file, self._limit, self._at = file, limit, 0
    self.start_header()

  def start_header(self) -> None:
    self._header = _MAX_HEADER

  def read(self, size: int) -> bytes:
    """Reads bytes of a header."""
    if not 0 <= size <= self._header:
      raise _Refused(f"a header in its archive is over the limit of {_MAX_HEADER:,} bytes")
    self._header -= size
    return self.take(size)

  def take(self, size: int) -> bytes:
    """Reads bytes of any kind."""
    data = self._file.read(size)
    self._at += len(data)
    if self._at > self._limit:
      raise _Refused(f"its archive holds more than the limit of {self._limit} bytes; {_REMEDY}")
    return data

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int) -> int:
    if offset < self._at:
      raise _Refused("a header in its archive claims a negative size")
    while self._at < offset and self.take(min(offset - self._at, _CHUNK)):
      pass
    return self._at
