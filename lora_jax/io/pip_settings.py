"""Reads pip's configuration of package indexes.

    read().places          # ("file:///opt/packages/", "https://pypi.org/simple/")

`pip config list` says so, from its files and from PIP_INDEX_URL and the like. It runs nothing of a
package's.
"""

import ast
import dataclasses
import importlib.util
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pypi_simple

_TRUE, _FALSE = ("1", "true", "yes", "on", "y", "t"), ("0", "false", "no", "off", "n", "f", "")


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of pip for finding and downloading packages.

  Attributes:
    places: addresses of indexes and of pages or folders with links, the nearest first.
    links: those among them that are no index.
    trusted: hosts that may be asked without TLS.
    cert, client_cert, proxy: as pip has them; empty for none.
    timeout: in seconds.
    retries: of a request that fails.
  """

  places: tuple[str, ...]
  links: frozenset[str]
  trusted: frozenset[str]
  cert: str
  client_cert: str
  proxy: str
  timeout: float
  retries: int


def read() -> Settings:
  """Raises ValueError when pip cannot read its configuration, or a value makes no sense."""
  values = _pip_values()
  links = [_as_url(place) for place in values.get("find-links", "").split()]
  indexes = []
  if not _flag("no-index", values.get("no-index", "")):
    index = values.get("index-url") or pypi_simple.PYPI_SIMPLE_ENDPOINT
    indexes = [*index.split(), *values.get("extra-index-url", "").split()]
  places = [*links, *map(_as_url, indexes)]
  if not places:
    raise ValueError("pip is configured for no index (no-index) and no find-links; set either")
  for place in places:
    _check_address(place)
  places.sort(key=lambda place: not place.startswith("file:"))
  return Settings(
    places=tuple(dict.fromkeys(places)),
    links=frozenset(links),
    trusted=frozenset(values.get("trusted-host", "").split()),
    cert=values.get("cert", ""),
    client_cert=values.get("client-cert", ""),
    proxy=values.get("proxy", ""),
    timeout=_number("timeout", values.get("timeout") or values.get("default-timeout") or "15"),
    retries=int(_number("retries", values.get("retries") or "2")),
  )


def _pip_values() -> dict[str, str]:
  """`{option: value}`: the environment goes before the command's section, that before the rest."""
  if importlib.util.find_spec("pip") is None:  # its environment variables may be set all the same
    names = [name for name in os.environ if name.startswith("PIP_")]
    return {name[4:].lower().replace("_", "-"): os.environ[name] for name in names}
  command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "config", "list"]
  try:
    done = subprocess.run(command, capture_output=True, timeout=120, stdin=subprocess.DEVNULL)
  except subprocess.TimeoutExpired:
    raise ValueError("`pip config list` does not come to an end; mend pip or its files") from None
  lines = done.stdout.decode(errors="replace").splitlines()
  if done.returncode:
    said = done.stderr.decode(errors="replace").strip() or "\n".join(lines)
    raise ValueError(
      f"pip cannot read its configuration, which says where packages are: {said[-600:]}\n"
      "Mend it; `pip config debug` says which files there are"
    )
  sections: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
  for line in lines:
    key, _, value = line.partition("=")
    section, _, option = key.rpartition(".")
    if section in sections:
      sections[section][option] = ast.literal_eval(value)  # pip writes the repr of a string
  found: dict[str, str] = {}
  for values in sections.values():
    found |= {option: value for option, value in values.items() if value.strip()}
  return found


def _check_address(place: str) -> None:
  try:
    kind = urllib.parse.urlsplit(place).scheme
  except ValueError:
    kind = ""
  if kind not in ("file", "http", "https"):
    raise ValueError(
      f"pip is configured for the index {place.rpartition('@')[2][:200]!r}, which is no address of "
      "kind https, http or file; mend it (`pip config debug` says where it stands)"
    )


def _flag(name: str, value: str) -> bool:
  if value.strip().lower() not in (*_TRUE, *_FALSE):
    raise ValueError(
      f"pip is configured for {name} {value[:80]!r}, which is neither true nor false"
    )
  return value.strip().lower() in _TRUE


def _number(name: str, value: str) -> float:
  try:
    number = float(value)
  except ValueError:
    number = -1
  if not 0 <= number < 1e6:
    raise ValueError(f"pip is configured for {name} {value[:80]!r}, which is no number of its kind")
  return number


def _as_url(place: str) -> str:
  if "://" in place or place.startswith("file:"):
    return place
  return Path(place).expanduser().absolute().as_uri()


def shown(url: str) -> str:
  """An address for people: without a password, and not too long."""
  parts = urllib.parse.urlsplit(url)
  netloc = parts.netloc.rpartition("@")[2]
  return urllib.parse.urlunsplit(parts._replace(netloc=netloc))[:200]
