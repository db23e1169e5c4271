"""Checks output paths, and writes files and folders atomically.

    folder = new_folder("runs/merged")              # raises before the work is done
    with whole_folder(folder) as partial:
      write_text(partial / "config.json", ...)      # runs/merged appears when the block ends
    with whole_file(path) as partial:
      figure.savefig(partial)                       # path has its new content when the block ends

Paths are interpreted as in a shell: `~` is the home folder, `.` and `..` are followed, and a
trailing slash is ignored.

If the process is killed, the path has either the old content or the new, never a part of it. A
writer works in a sibling folder, `.<name>.partial-<hex digits>`, and keeps it locked. The next
writer of the same path removes those that are no longer locked.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

# Names in a partial folder: the new content, and the old content that must not be lost.
_NEW, _COMPLETE, _OLD = "new", "complete", "old"


def absolute(path: str | Path) -> Path:
  """Returns the absolute path of an output.

  Raises:
    ValueError: for an empty path, one with a null character, and for the root.
    NotADirectoryError: for a path below a file.
  """
  if not str(path).strip():
    raise ValueError("the path to write to is empty; name a file or a folder")
  if "\0" in str(path):
    raise ValueError(f"{str(path)[:200]!r} holds a null character; name a file or a folder")
  found = Path(os.path.abspath(Path(path).expanduser()))  # unlike resolve it keeps links
  if found == Path(found.anchor):
    raise ValueError(f"{path}: is the root of the file system; name a file or a folder in it")
  for parent in found.parents:
    if parent.exists() and not parent.is_dir():
      raise NotADirectoryError(
        f"{path}: {parent} is a file, and nothing can lie below it; name another path"
      )
  return found


def new_folder(path: str | Path) -> Path:
  """Returns the absolute path of a missing or empty folder.

  Raises:
    ValueError, NotADirectoryError: as `absolute` does.
    FileExistsError: for a file, and for a folder that is not empty.
  """
  folder, found = _look(path, "name a new or an empty folder")
  if found:
    raise FileExistsError(f"{path}: holds something already; name a new or an empty folder")
  return folder


def replaceable_folder(path: str | Path, marker: str, own: Collection[str], whose: str) -> Path:
  """Returns the absolute path of a folder that is missing, empty, or replaceable.

  Args:
    path: of the folder.
    marker: the name of a file that every replaceable folder has.
    own: the names of all files that a replaceable folder may have.
    whose: for errors, as "adapter's".

  Raises:
    ValueError, NotADirectoryError: as `absolute` does.
    FileExistsError: for a file, and for a folder with other content.
  """
  folder, found = _look(path, "name another folder")
  others = sorted(found - set(own) if marker in found else found)
  if others:
    raise FileExistsError(
      f"{path}: holds {', '.join(others[:4])}, which is no {whose}; name another folder"
    )
  return folder


def _look(path: str | Path, remedy: str) -> tuple[Path, set[str]]:
  """Returns the absolute path of a folder, and the names in it after clearing leftovers."""
  folder = absolute(path)
  target = folder.resolve() if folder.is_symlink() else folder
  clear(target.parent, target.name)
  if os.path.lexists(folder) and not folder.is_dir():
    raise FileExistsError(f"{path}: is a file; {remedy}")
  if not folder.exists():
    return folder, set()
  clear(target, target.name)
  return folder, {x.name for x in folder.iterdir()}


def new_file(path: str | Path) -> Path:
  """Returns the absolute path of a missing file.

  Raises:
    ValueError, NotADirectoryError: as `absolute` does.
    FileExistsError: for a file or a folder.
  """
  file = replaceable_file(path)
  if os.path.lexists(file):
    raise FileExistsError(f"{path}: is there already; name a file that is not")
  return file


def replaceable_file(path: str | Path) -> Path:
  """Returns the absolute path of a file, which may exist.

  Raises:
    ValueError, NotADirectoryError: as `absolute` does.
    FileExistsError: for a folder.
  """
  file = absolute(path)
  if file.is_dir() or str(path).endswith(os.sep):
    raise FileExistsError(f"{path}: is a folder, and a file is written; name a file, in it perhaps")
  return file


def as_json(
  value: Any, *, not_finite: Callable[[float], Any] = lambda _: None, indent: int | None = None
) -> str:
  """Returns JSON text with null for NaN and infinity, which JSON lacks.

  Args:
    value: a JSON value, possibly with numbers that are not finite.
    not_finite: maps such a number to its replacement.
    indent: as in `json.dumps`.

  Raises:
    TypeError: for a value that JSON cannot represent.
  """

  def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {key: plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
      return [plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
      return not_finite(value)
    return value

  return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_text(path: str | Path, text: str) -> None:
  """Writes a file in UTF-8, as with `whole_file`."""
  write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes | bytearray) -> None:
  """Writes a file, as with `whole_file`."""
  with whole_file(Path(path)) as partial, open(partial, "xb") as file:
    file.write(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
  """Yields a path to write to; its file replaces `path` when the block succeeds.

  Args:
    path: of the file, created with its parents; a link itself is replaced, not its target.
  """
  with _partial(path.parent, path.name) as folder:
    written = folder / path.name
    yield written
    _sync(written)
    os.replace(written, path)
    _sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
  """Yields a folder to write to, which replaces `folder` when the block succeeds.

  Args:
    folder: absolute, and not there, empty or to be replaced. A link stays, and what it points to is
      replaced. Where the folder itself must stay, as the current or a mounted one, what was written
      is moved into it file by file, after the files of the same names are removed: a kill in
      between leaves it incomplete, never mixed, and the next writer completes it.
  """
  target = folder.resolve() if folder.is_symlink() else folder
  stays = target.exists() and (
    target.samefile(Path.cwd()) or target.is_mount() or not os.access(target.parent, os.W_OK)
  )
  with _partial(target if stays else target.parent, target.name) as partial:
    written = partial / _NEW
    written.mkdir()
    yield written
    for path in (*written.rglob("*"), written):
      _sync(path)
    if stays:
      written.replace(partial / _COMPLETE)
      _complete(partial, target)
    elif os.path.lexists(target):
      _exchange(written, target, partial / _OLD)
    else:
      written.replace(target)
    _sync(target.parent)


def clear(parent: Path, name: str | None = None) -> None:
  """Removes the leftovers of killed writers in a folder.

  Content that one of them had moved aside is restored first, and an unfinished move is completed.

  Args:
    parent: the folder.
    name: of their output; None for any.
  """
  prefix = ".*.partial-" if name is None else glob.escape(_prefix(name))
  for partial in parent.glob(f"{prefix}{'[0-9a-f]' * 8}"):
    try:
      held = _hold(partial)
    except OSError:
      continue  # its writer is at work, or it is no folder
    try:
      _settle(partial)
      shutil.rmtree(partial, ignore_errors=True)
    finally:
      os.close(held)


def remove(path: Path) -> None:
  """Removes a file, a folder with its content, or a link, if it exists."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def _partial(parent: Path, name: str) -> Iterator[Path]:
  """Yields a new folder in `parent`, locked during the block and then removed."""
  parent.mkdir(parents=True, exist_ok=True)
  clear(parent, name)
  while True:
    partial = parent / f"{_prefix(name)}{secrets.token_hex(4)}"
    partial.mkdir()
    try:
      held = _hold(partial)
    except (BlockingIOError, FileNotFoundError):
      continue  # another process has just taken it for a leftover
    except OSError:
      held = None  # a file system without locks, where leftovers stay
    break
  try:
    yield partial
  finally:
    _settle(partial)
    shutil.rmtree(partial, ignore_errors=True)
    if held is not None:
      os.close(held)


def _prefix(name: str) -> str:
  return f".{name[:50]}.partial-"  # a name has at most 255 bytes


def _hold(partial: Path) -> int:
  """Locks a folder; returns its open descriptor.

  Raises:
    BlockingIOError: when another process holds it.
    FileNotFoundError: when it is gone.
    OSError: where there are no such locks.
  """
  held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not os.path.samestat(os.fstat(held), os.stat(partial)):
      raise FileNotFoundError(errno.ENOENT, "is another one now", str(partial))
  except BaseException:
    os.close(held)
    raise
  return held


def _settle(partial: Path) -> None:
  """Restores the content that must not be removed with a partial folder."""
  if (partial / _COMPLETE).is_dir():
    _complete(partial, partial.parent)
  if (partial / _OLD).is_dir():
    for old in (partial / _OLD).iterdir():
      if not os.path.lexists(partial.parent / old.name):
        old.replace(partial.parent / old.name)


def _complete(partial: Path, target: Path) -> None:
  written = sorted((partial / _COMPLETE).iterdir())
  for path in written:
    remove(target / path.name)
  for path in written:
    path.replace(target / path.name)


def _exchange(written: Path, target: Path, aside: Path) -> None:
  """Replaces a folder by another, atomically if the system supports it."""
  renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
  at_cwd, exchange = -100, 2  # <fcntl.h>, <linux/fs.h>
  if renameat2 and not renameat2(
    at_cwd, os.fsencode(written), at_cwd, os.fsencode(target), exchange
  ):
    return
  aside.mkdir()
  target.replace(aside / target.name)
  written.replace(target)


def _sync(path: Path) -> None:
  """Has the content of a file, or the names in a folder, written to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError:
    if not path.is_dir():  # of folders not every file system does it
      raise
  finally:
    os.close(descriptor)
