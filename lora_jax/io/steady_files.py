"""Opens files and detects changes while they are read.

    with opened("data.jsonl") as file:
      content = file.read()

Reading a file while it is written could mix old and new content.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lora_jax.io import files


def check(path: str | Path) -> None:
  """Checks that a path is that of a regular file; raises as `files.open_regular` does."""
  files.open_regular(path).close()


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[io.BufferedReader]:
  """Opens a regular file for reading bytes.

  Raises:
    FileNotFoundError, PermissionError, ValueError: as `files.open_regular` does.
    ValueError: when the block ends, if the file has changed since it was opened.
  """
  with files.open_regular(path) as file:
    before = os.fstat(file.fileno())
    try:
      yield file
    except ValueError as error:
      _check_unchanged(path, file, before, error)  # the likelier reason
      raise
    _check_unchanged(path, file, before)


def _check_unchanged(
  path: str | Path, file: BinaryIO, before: os.stat_result, cause: BaseException | None = None
) -> None:
  after = os.fstat(file.fileno())
  if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
    raise ValueError(
      f"{path}: changed while it was read, from {before.st_size:,} to {after.st_size:,} bytes; "
      "wait until its writer is done, or copy it first"
    ) from cause
