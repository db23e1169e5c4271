"""Opens and reads untrusted files, without blocking and with a limit on the size.

    with open_regular("model.gguf") as file:       # refuses a pipe or a device without blocking
      header = file.read(8)
    content = read_bytes("config.json", most=1 << 24)

The size reported by the file system is not trusted: a file may grow or shrink while it is read.
Files are not memory-mapped, since a mapped file that shrinks ends the process by SIGBUS.
"""

import errno
import io
import math
import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

# The errors of a cyclic link, a name that is too long, and a socket.
_NO_FILE = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)


def open_regular(path: str | Path) -> io.BufferedReader:
  """Opens a regular file for reading bytes.

  Raises:
    FileNotFoundError: if there is no such file.
    PermissionError: if it may not be read.
    ValueError: for a folder, a pipe, a socket, a device, and an invalid path.
  """
  try:
    # Without O_NONBLOCK, opening a pipe blocks until there is a writer.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(f"{path}: no such file") from None
  except PermissionError:
    raise PermissionError(f"{path}: may not be read; change its permissions") from None
  except ValueError:
    raise ValueError(f"{str(path)!r}: is no path of a file") from None
  except OSError as error:
    if error.errno not in _NO_FILE:
      raise
    raise ValueError(f"{path}: is no file that can be read ({error.strerror})") from None
  mode = os.fstat(number).st_mode
  if not stat.S_ISREG(mode):
    os.close(number)
    found = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    raise ValueError(f"{path}: is {found} and not a regular file; name a file")
  return os.fdopen(number, "rb")


def read_bytes(path: str | Path, most: int) -> bytes:
  """Returns the content of a regular file.

  Args:
    path: of the file.
    most: the most bytes that it may have.

  Raises:
    FileNotFoundError, PermissionError, ValueError: as `open_regular` does, and ValueError for a
      larger file.
  """
  with open_regular(path) as file:
    content = file.read(most + 1)
  if len(content) > most:
    raise ValueError(f"{path}: is larger than the {most:,} bytes that such a file may have")
  return content


def read_text(path: str | Path, most: int) -> str:
  """Returns the UTF-8 text of a regular file; raises as `read_bytes` does, and ValueError for other
  encodings."""
  try:
    return read_bytes(path, most).decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: byte {error.start} is not UTF-8; write the file again") from None


def read_array(
  path: str | Path, offset: int, shape: tuple[int, ...], dtype: DTypeLike
) -> np.ndarray:
  """Returns an array stored in a regular file.

  Args:
    path: of the file.
    offset: of the array's first byte.
    shape, dtype: of the array; the caller has checked them against the size of the file.

  Raises:
    FileNotFoundError, PermissionError, ValueError: as `open_regular` does, and ValueError if the
      file ends before the array does.
  """
  with open_regular(path) as file:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if offset + size > os.fstat(file.fileno()).st_size:
      raise ValueError(f"{path}: ends before byte {offset + size}; it was cut; write it again")
    array = np.empty(shape, dtype)
    file.seek(offset)
    if file.readinto(array.reshape(-1).view(np.uint8).data) != size:
      raise ValueError(f"{path}: was cut while it was read; write it again")
  return array
