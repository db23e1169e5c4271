"""One file out of a zip or tar archive, or out of an archive within an archive.

    extract(Path("package-1.0.tar.gz"), [("data", "tables.zip", "a.csv")], Path("a.csv"))

Only members asked for by name are read, and they are written where the caller says: a name inside
an archive is never turned into a path, so none can lead outside.
"""

import gzip
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

_DAMAGE = (
  zipfile.BadZipFile,
  tarfile.TarError,
  gzip.BadGzipFile,
  lzma.LZMAError,
  zlib.error,
  EOFError,
)
_MAX_BYTES = 1 << 36  # 64 GiB: more than any file that is meant, less than a bomb may claim


def extract(archive: Path, members: Iterable[tuple[str, ...]], target: Path) -> bool:
  """Copies the first of `members` that is in the archive to `target`; False where none is.

  members: paths as tuples of their parts; one may lead through archives.

  Raises ValueError for a damaged archive, and for a member that is a link or larger than 64 GiB.
  """
  return any(_extract(archive, member, target) for member in members)


def _extract(archive: Path, parts: tuple[str, ...], target: Path) -> bool:
  for end in range(len(parts), 0, -1):
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
      copy = Path(folder) / "copy"
      if _copy_member(archive, "/".join(parts[:end]), copy):
        if end < len(parts):
          return _extract(copy, parts[end:], target)
        copy.replace(target)
        return True
  return False


def _copy_member(archive: Path, name: str, target: Path) -> bool:
  with archive.open("rb") as file:  # zipfile.is_zipfile takes a tar that ends in a zip for one
    copy = _copy_from_zip if file.read(2) == b"PK" else _copy_from_tar
  try:
    return copy(archive, name, target)
  except _DAMAGE as error:
    raise ValueError(f"{name}: cannot be read from its archive: {error}") from error


def _copy_from_zip(archive: Path, name: str, target: Path) -> bool:
  with zipfile.ZipFile(archive) as file:
    if name not in file.NameToInfo:
      return False
    info = file.getinfo(name)
    _check(name, is_link=stat.S_ISLNK(info.external_attr >> 16), size=info.file_size)
    with file.open(info) as member:
      _copy(member, target)
  return True


def _copy_from_tar(archive: Path, name: str, target: Path) -> bool:
  with tarfile.open(archive) as file:
    try:
      info = file.getmember(name)
    except KeyError:
      return False
    if info.isdir():
      return False
    _check(name, is_link=not info.isreg(), size=info.size)
    with file.extractfile(info) as member:
      _copy(member, target)
    while file.fileobj.read(1 << 20):  # a compressed stream says at its end whether it was sound
      pass
  return True


def _check(name: str, *, is_link: bool, size: int) -> None:
  if is_link:
    raise ValueError(f"{name}: is a link and not a regular file in its archive; refused")
  if size > _MAX_BYTES:
    raise ValueError(f"{name}: claims {size} bytes in its archive, over the limit of {_MAX_BYTES}")


def _copy(member: IO[bytes], target: Path) -> None:
  with target.open("wb") as file:
    shutil.copyfileobj(member, file, 1 << 20)
