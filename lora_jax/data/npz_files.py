"""Reads arrays of numbers from untrusted `.npz` files of numpy, by name.

    images, labels = read("train.npz", ("images", "labels"))

Object arrays are refused, since their pickles may call any function. A header is compared with the
size of its member before the array is allocated.
"""

import io
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.checks import shown
from lora_jax.io import archives, files

_MOST_BYTES = 1 << 32
_RATIO, _FREE = 100, 1 << 26  # as of any archive
_MAX_HEADER = 10_000
_MAX_NAMES = 8
_ENDING = ".npy"
# zipfile raises these; OSError for an offset before the start of the file.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)
_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


def read(path: str | Path, names: Sequence[str]) -> list[np.ndarray]:
  """Returns arrays of a file.

  Args:
    path: of the file.
    names: of the arrays.

  Raises:
    FileNotFoundError, PermissionError: as `files.open_regular` does.
    ValueError: for a file that is not a complete `.npz`, and for an array that is missing, is not
      numeric, has the wrong size, is over 4 GiB, or is over 64 MiB and a hundred times the file.
  """
  path = Path(path)
  with files.open_regular(path) as file:
    limit = min(_MOST_BYTES, max(_FREE, _RATIO * os.fstat(file.fileno()).st_size))
    try:
      with (
        archives.Capped(io.FileIO(os.dup(file.fileno()))) as capped,
        zipfile.ZipFile(capped) as packed,
      ):
        return [_array(packed, name, limit) for name in names]
    except ValueError as error:
      raise ValueError(f"{path}: {str(error)[:500]}") from None
    except _DAMAGED as error:
      raise ValueError(f"{path}: not a whole .npz file ({str(error)[:200]})") from None


def _array(packed: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
  info = packed.NameToInfo.get(name + _ENDING)
  if info is None:
    there = [x.removesuffix(_ENDING)[:40] for x in packed.namelist()[:_MAX_NAMES]]
    raise ValueError(f"has no array {shown(name)}; it has {', '.join(there) or 'none'}")
  if info.file_size > limit:
    raise ValueError(f"{shown(name)} has {info.file_size:,} bytes, over the limit of {limit:,}")
  with packed.open(info) as member:
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
      raise ValueError(f"{shown(name)} is of version {version}; read are 1.0 and 2.0")
    shape, by_columns, dtype = _HEADERS[version](member, max_header_size=_MAX_HEADER)
    if dtype.kind not in "uif":
      raise ValueError(f"{shown(name)} holds {dtype}, and not numbers")
    # The header of a member with a known name cannot be longer than that.
    size = math.prod(shape) * dtype.itemsize
    content = member.read(min(size, limit) + 1)
  if len(content) != size or any(side < 0 for side in shape):
    raise ValueError(f"{shown(name)}: {dtype} {shown(shape)} is not of its bytes")
  return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C")
