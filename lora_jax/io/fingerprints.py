"""Fingerprints of files, to detect a changed file under the same path; cheap for large files.

    of("data.jsonl")          # {"data.jsonl": "5120 bytes, sha256 5d7c06e0..."}
    of("models/SmolLM2")      # {"config.json": ..., "model.safetensors": ..., ...}
    of("photographs")         # {"photographs/": "12 files, sha256 ..."}, class folders of pictures
    of("pypi://package==1.0/table.csv")      # {}: its content never changes

A file of up to 64 MiB is hashed as a whole. The fingerprint of a larger file is its size and the
hash of 64 evenly spaced pieces of 1 MiB, including the first and the last MiB. It distinguishes
models, also after a single training step, but misses a manual change of a few bytes.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from lora_jax.io import assets, safetensors, steady_files

_WHOLE = 1 << 26
_PIECE = 1 << 20
_PIECES = 64
_DEPTH = 4  # of files in a folder

# The files of a model's folder that are read, except its tensors.
_TEXTS = ("config.json", "compressed.json", "tokenizer.json", "tokenizer_config.json",
          "tokenizer.model", "vocab.txt", "chat_template.jinja", "adapter_config.json")  # fmt: skip
_TENSORS = ("compressed.safetensors", "adapter_model.safetensors", "model.bin")


def of(source: str | Path) -> dict[str, str]:
  """Returns `{name of a file: fingerprint}` for the files of a source.

  source: an argument of `assets.resolve`. In a model's or an adapter's folder only the files that
    are read are included; in other folders all files, in subfolders up to four levels deep. A
    release on PyPI never changes, so its files are not read.

  Raises as `assets.resolve` does, and ValueError for a damaged index of tensors and for a file that
  changes while it is read.
  """
  if str(source).startswith("pypi://"):
    return {}
  path = assets.resolve(source)
  if not path.is_dir():
    return {path.name: _of_file(path)}
  names = [name for name in (*_TEXTS, *_TENSORS) if (path / name).is_file()]
  names += safetensors.files_of(path)
  return {name: _of_file(path / name) for name in names} if names else _of_folder(path)


def _of_folder(path: Path) -> dict[str, str]:
  digest, count = hashlib.sha256(), 0
  patterns = ["/".join("*" * depth) for depth in range(1, _DEPTH + 1)]
  for file in sorted(x for pattern in patterns for x in path.glob(pattern) if x.is_file()):
    line = f"{file.relative_to(path).as_posix()}\0{_of_file(file)}\n"
    digest.update(line.encode("utf-8", "surrogateescape"))
    count += 1
  return {f"{path.name}/": f"{count} files, sha256 {digest.hexdigest()}"}


def _of_file(path: Path) -> str:
  with steady_files.opened(path) as file:
    size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()
    if size <= _WHOLE:
      starts: Iterable[int] = range(0, size, _PIECE)
    else:
      starts = (n * (size - _PIECE) // (_PIECES - 1) for n in range(_PIECES))
    for start in starts:
      file.seek(start)
      digest.update(file.read(_PIECE))
  return f"{size} bytes, sha256 {digest.hexdigest()}"
