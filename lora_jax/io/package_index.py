"""Finds and downloads files of packages like pip, without building or installing them.

    for archive in download("vaderSentiment", "3.3.2", folder): ...

The index is the one that pip is configured for. pip itself runs a source distribution's own build
script to learn its metadata, so it is asked for nothing but its configuration: the simple index
names a release's files and their sums.
"""

import dataclasses
import hashlib
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pypi_simple
import requests
from packaging.specifiers import SpecifierSet
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import InvalidVersion
from pypi_simple import DistributionPackage, ProjectPage
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from lora_jax.io import pip_settings, steady_files

_SUMS = ("sha512", "sha384", "sha256")
_MAX_BYTES = 1 << 36  # 64 GiB
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class Found(NamedTuple):
  """A file of a release, or the reason why there is none.

  Attributes:
    kind: "wheel" or "sdist".
    name: of the file; empty without a file.
    path: of the file; None without a file.
    reason: why there is no file.
  """

  kind: str
  name: str
  path: Path | None
  reason: str = ""


def download(name: str, version: str, folder: Path) -> Iterator[Found]:
  """Downloads the files of a release one by one, as they are requested.

  The wheel comes first, the best one for this machine if there are several, then the source
  distribution. A file from the network must have a checksum in the index (SHA-256 or better), which
  is verified.

  Args:
    name: of the package.
    version: of the release, as PEP 440 has it.
    folder: to download to.

  Raises:
    ValueError: when pip's configuration cannot be read or names no index that can be asked, or a
      file is not the one that the index has.
  """
  settings = pip_settings.read()
  pages: dict[str, list[DistributionPackage] | str] = {}
  rank = _rank()
  with _session(settings) as session:
    for kind in ("wheel", "sdist"):
      reasons = []
      for place in settings.places:
        if place not in pages:
          pages[place] = _list(place, name, version, settings, session)
        found = pages[place]
        if not isinstance(found, str):
          files = [file for file in found if file.package_type == kind]
          found = f"{pip_settings.shown(place)} has none of {version}"
          if files:
            found = _fetch(place, min(files, key=rank), folder / kind, settings, session)
        if isinstance(found, Found):
          yield found
          break
        reasons.append(found)
      else:
        yield Found(kind, "", None, "; ".join(reasons)[:2000])


def _session(settings: pip_settings.Settings) -> requests.Session:
  session = requests.Session()
  session.headers["User-Agent"] = "lora_jax (pypi-simple)"
  if settings.cert:
    session.verify = settings.cert
  if settings.client_cert:
    session.cert = settings.client_cert
  if settings.proxy:
    session.proxies = {"http": settings.proxy, "https": settings.proxy}
  retry = Retry(total=settings.retries, backoff_factor=0.25, status_forcelist=(500, 502, 503, 504))
  session.mount("https://", HTTPAdapter(max_retries=retry))
  session.mount("http://", HTTPAdapter(max_retries=retry))
  return session


def _list(
  place: str, name: str, version: str, settings: pip_settings.Settings, session: requests.Session
) -> list[DistributionPackage] | str:
  """The files of a release at an index, or the reason why there are none."""
  try:
    page = _page(place, name, settings, session)
  except pypi_simple.NoSuchProjectError:
    return f"{pip_settings.shown(place)} has no package {name}"
  except (
    requests.RequestException,
    OSError,
    ValueError,
    pypi_simple.UnsupportedContentTypeError,
    pypi_simple.UnsupportedRepoVersionError,
  ) as error:
    return f"{pip_settings.shown(place)} cannot be asked: {_first_words(error)}"
  wanted = SpecifierSet(f"=={version}")
  return [file for file in page if _is_of(file, name, wanted)]


def _page(
  place: str, name: str, settings: pip_settings.Settings, session: requests.Session
) -> list[DistributionPackage]:
  is_links, url = place in settings.links, place
  if not is_links:
    url = f"{place.rstrip('/')}/{canonicalize_name(name)}/"
  if not place.startswith("file:"):
    _check_transport(place, settings)
    if not is_links:
      index = pypi_simple.PyPISimple(place, session=session)
      return index.get_project_page(name, timeout=settings.timeout).packages
    response = session.get(url, timeout=settings.timeout)
    response.raise_for_status()
    return ProjectPage.from_response(response, name).packages
  path = _local_path(url)
  if is_links and path.is_dir():
    return [_of_file(file, name) for file in sorted(path.iterdir()) if file.is_file()]
  page = path if is_links else path / "index.html"
  if not is_links and not page.is_file() and _local_path(place).is_dir():
    raise pypi_simple.NoSuchProjectError(name, url)
  steady_files.check(page)
  return ProjectPage.from_html(name, page.read_bytes(), url).packages


def _of_file(file: Path, name: str) -> DistributionPackage:
  link = pypi_simple.Link(text=file.name, url=file.absolute().as_uri(), attrs={})
  return DistributionPackage.from_link(link, name)


def _is_of(file: DistributionPackage, name: str, wanted: SpecifierSet) -> bool:
  if not file.project or not file.version:
    return False
  try:
    same = wanted.contains(file.version, prereleases=True)
  except InvalidVersion:
    return False
  return same and canonicalize_name(file.project) == canonicalize_name(name)


def _rank() -> Callable[[DistributionPackage], tuple[int, str]]:
  """Which of several files is taken: this machine's best wheel, or any, for none is installed."""
  order = {tag: n for n, tag in enumerate(sys_tags())}

  def rank(file: DistributionPackage) -> tuple[int, str]:
    try:
      tags = parse_wheel_filename(file.filename)[3]
    except InvalidWheelFilename:
      tags = frozenset()
    return min((order.get(tag, len(order)) for tag in tags), default=0), file.filename

  return rank


def _fetch(
  place: str,
  file: DistributionPackage,
  path: Path,
  settings: pip_settings.Settings,
  session: requests.Session,
) -> Found | str:
  """The downloaded file, or the reason for the failure."""
  sums = {kind: file.digests[kind].lower() for kind in _SUMS if kind in file.digests}
  shown, what = file.filename[:200], file.package_type
  assert what is not None  # `download` has chosen it by that
  try:
    if file.url.startswith("file:"):
      if not place.startswith("file:"):
        return f"{pip_settings.shown(place)} names a file of this machine, {shown}; refused"
      local = _local_path(file.url)
      with steady_files.opened(local) as content:
        found = {kind: hashlib.file_digest(content, kind).hexdigest() for kind in list(sums)[:1]}
      for kind, digest in found.items():
        _check_sum(shown, place, kind, sums[kind], digest)
      return Found(what, shown, local)
    _check_transport(file.url, settings)
    if not sums:
      return (
        f"{pip_settings.shown(place)} has no SHA-256 of {shown}, without which nothing is fetched"
      )
    index = pypi_simple.PyPISimple(place, session=session)
    index.download_package(
      dataclasses.replace(file, digests=sums),
      path,
      progress=lambda size: _Progress(shown, size),
      timeout=settings.timeout,
    )
  except pypi_simple.DigestMismatchError as error:
    _check_sum(shown, place, error.algorithm, error.expected_digest, error.actual_digest)
  except (requests.RequestException, OSError) as error:
    return f"{shown} of {pip_settings.shown(place)} cannot be fetched: {_first_words(error)}"
  return Found(what, shown, path)


def _check_sum(name: str, place: str, kind: str, expected: str, found: str) -> None:
  if expected != found:
    raise ValueError(
      f"{name}: {pip_settings.shown(place)} gives its {kind} as {expected[:128]}, and what came "
      f"has {found}; it was damaged or replaced on its way, and is not used"
    )


def _check_transport(url: str, settings: pip_settings.Settings) -> None:
  parts = urllib.parse.urlsplit(url)
  known = {*_LOCAL_HOSTS, *settings.trusted}
  if parts.scheme == "http" and not {parts.hostname, parts.netloc.rpartition("@")[2]} & known:
    raise OSError(
      "it is asked by plain http, where anyone on the way can answer; use https, or name the host "
      "in pip's trusted-host"
    )
  if parts.scheme not in ("http", "https"):
    raise OSError(f"{parts.scheme[:20]!r} is no kind of address that is fetched")


def _local_path(url: str) -> Path:
  return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))


def _first_words(error: Exception) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__


class _Progress:
  """A bar, which also sees that a file comes to an end."""

  def __init__(self, name: str, size: int | None):
    self._name, self._received = name, 0
    self._bar = tqdm(
      desc=f"downloading {name}", total=size, unit="B", unit_scale=True, mininterval=0.5
    )

  def __enter__(self) -> "_Progress":
    return self

  def __exit__(self, exc_type: object, exc_val: object, exc_tb: object) -> None:
    self._bar.close()

  def update(self, increment: int) -> None:
    self._received += increment
    self._bar.update(increment)
    if self._received > _MAX_BYTES:
      raise ValueError(f"{self._name}: is larger than {_MAX_BYTES:,} bytes, which no package is")
