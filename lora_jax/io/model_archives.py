"""Unpacks a model folder from a zip archive, as in some packages.

    folder_of(Path("model.zip"))        # a folder of the cache with config.json and the rest
    folder_of(Path("model.gguf"))       # the path itself

Archives are untrusted, as in `lora_jax.io.archives`: only the known files of a model's folder are
unpacked, from the folder of its config.json. They are cached under the archive's SHA-256. At every
use their sizes and checksums are compared with the archive's directory.
"""

import zipfile
import zlib
from pathlib import Path, PurePosixPath

from lora_jax.io import archives, assets, outputs, steady_files, torch_files

_NAMES = (
  "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
  "special_tokens_map.json", "added_tokens.json", "vocab.txt", "chat_template.jinja",
  "model.safetensors.index.json",
)  # fmt: skip
_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_CHUNK = 1 << 20


def folder_of(path: Path) -> Path:
  """Returns the unpacked model folder of a zip archive. Other paths are returned unchanged,
  including those of PyTorch's files, which are zip archives too.

  Raises ValueError for an archive that is damaged or does not have exactly one model, and as
  `archives.extract` does.
  """
  if path.is_dir() or not _is_zip(path) or torch_files.is_zip_of_tensors(path):
    return path
  members = _members(path)
  folder = assets.cache_folder() / "unpacked" / assets.sha256(path)
  if all(_is_whole(folder / name, info) for name, info in members.items()):
    return folder
  folder.parent.mkdir(parents=True, exist_ok=True)
  with outputs.whole_folder(folder) as partial:
    for name, info in members.items():
      parts = PurePosixPath(info.filename).parts
      if not archives.extract(path, [parts], partial / name):
        raise ValueError(f"{path}: {info.filename[:200]}: is not in the archive any more")
  return folder


def _is_zip(path: Path) -> bool:
  with steady_files.opened(path) as file:
    return file.read(4) in _MAGIC


def _members(path: Path) -> dict[str, zipfile.ZipInfo]:
  """The files of the model's folder by their names in it."""
  listed = archives.list_zip(path)
  folders = {
    name.rpartition("/")[0] for name in listed if name.rpartition("/")[2].endswith(".safetensors")
  }
  folders &= {name.rpartition("/")[0] for name in listed if name.rpartition("/")[2] == _NAMES[0]}
  if len(folders) != 1:
    found = "no model" if not folders else f"{len(folders)} models"
    raise ValueError(
      f"{path}: holds {found}; an archive must have one folder with config.json and safetensors"
    )
  (folder,) = folders
  found = {}
  for name, info in listed.items():
    parent, _, last = name.rpartition("/")
    if parent == folder and (last in _NAMES or last.endswith(".safetensors")):
      found[last] = info
  return found


def _is_whole(path: Path, info: zipfile.ZipInfo) -> bool:
  """Whether a file exists with the size and checksum in the archive."""
  if not path.is_file() or path.stat().st_size != info.file_size:
    return False
  checksum = 0
  with steady_files.opened(path) as file:
    while chunk := file.read(_CHUNK):
      checksum = zlib.crc32(chunk, checksum)
  return checksum == info.CRC
