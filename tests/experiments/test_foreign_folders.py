"""Runs and adapters of strangers: what their files name is not fetched unasked, and never run."""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile

import pytest

from configs import quickstart
from experiments import inputs
from lora_jax.io import assets, package_index

ROOT = pathlib.Path(__file__).parents[2]
ADDRESS = "pypi://evil==1.0/m.gguf"


@pytest.fixture
def evil(tmp_path):
  """A package whose build script leaves a file, and the environment in which pip would find it."""
  proof = tmp_path / "proof"
  script = f"import pathlib; pathlib.Path({str(proof)!r}).write_text('run')\n".encode()
  (tmp_path / "packages").mkdir()
  with tarfile.open(tmp_path / "packages/evil-1.0.tar.gz", "w:gz") as file:
    for name, data in {"setup.py": script, "m.gguf": b"GGUF"}.items():
      info = tarfile.TarInfo(f"evil-1.0/{name}")
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  environment = os.environ | {
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": str(tmp_path / "packages"),
    "JAX_PLATFORMS": "cpu",
    "LORA_JAX_CACHE": str(tmp_path / "cache"),
    "HF_HOME": str(tmp_path / "hub"),
  }
  yield environment
  assert not proof.exists()


@pytest.fixture
def foreign(tmp_path):
  """A run and an adapter that name the package."""
  run = tmp_path / "run"
  (run / "adapter").mkdir(parents=True)
  config = quickstart.get_config()
  config.model.source = config.data.source = ADDRESS
  (run / "config.json").write_text(json.dumps(config.to_dict()))
  config = {"peft_type": "LORA", "base_model_name_or_path": ADDRESS, "target_modules": ["q_proj"]}
  (run / "adapter/adapter_config.json").write_text(json.dumps(config))
  header = b"{}" + b" " * 6
  tensors = len(header).to_bytes(8, "little") + header
  (run / "adapter/adapter_model.safetensors").write_bytes(tensors)
  return run


def command(foreign, name: str) -> list[str]:
  output = f"--output={foreign.parent / 'output'}"
  return {
    "evaluate": ["evaluate", f"--workdir={foreign}"],
    "generate": ["generate", f"--workdir={foreign}", "--prompt=x"],
    "chat": ["chat", f"--workdir={foreign}"],
    "export": ["export", f"--workdir={foreign}", "--to=merged", output],
    "combine": [
      "combine",
      f"--adapters={foreign}/adapter,{foreign}/adapter",
      "--weights=1,1",
      "--method=cat",
      output,
    ],
  }[name]


def run(environment, name: str, *arguments: str) -> str:
  """Runs a program that fails; returns what it printed."""
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{name}", *arguments],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode not in (0, -11), done.stdout + done.stderr
  return done.stdout + done.stderr


@pytest.mark.parametrize(
  "name",
  [
    "evaluate",
    *(pytest.param(x, marks=pytest.mark.slow) for x in ("generate", "chat", "export")),
    "combine",
  ],
)
def test_what_a_strangers_file_names_is_not_fetched_unasked(evil, foreign, tmp_path, name):
  said = run(evil, *command(foreign, name))
  assert f"{ADDRESS}: is not in the cache" in said
  assert "to fetch it is to download the package evil 1.0" in said and "give --fetch" in said
  assert ("--base=" in said) == (name == "combine")
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["generate", "combine"])
def test_what_a_strangers_file_names_is_fetched_and_not_run_where_that_is_asked_for(
  evil, foreign, tmp_path, name
):
  said = run(evil, *command(foreign, name), "--fetch")
  assert "m.gguf: " in said and "give --fetch" not in said  # it is no model
  found = [path for path in (tmp_path / "cache").rglob("*.gguf") if path.is_file()]
  assert [path.read_bytes() for path in found] == [b"GGUF"]


def test_a_run_whose_files_are_on_this_machine_is_opened_without_a_question(
  evil, tmp_path, monkeypatch
):
  for name, value in evil.items():
    monkeypatch.setenv(name, value)
  path = assets.resolve(ADDRESS)
  (tmp_path / "data.jsonl").write_text("{}")
  monkeypatch.setattr(package_index, "download", None)  # nobody is asked
  sources = {"model.source": ADDRESS, "data.source": str(tmp_path / "data.jsonl"), "x.y": ""}
  inputs.require(tmp_path / "config.json", sources, fetch=False)
  path.write_bytes(b"damaged")
  with pytest.raises(FileNotFoundError, match=r"config.json: its model.source is .* --fetch"):
    inputs.require(tmp_path / "config.json", sources, fetch=False)


def test_a_path_that_is_gone_is_named_with_the_field_that_names_it(tmp_path):
  words = r"config.json: its data.source is .*gone.jsonl: no such file"
  with pytest.raises(FileNotFoundError, match=words):
    sources = {"data.source": str(tmp_path / "gone.jsonl")}
    inputs.require(tmp_path / "config.json", sources, fetch=False)
