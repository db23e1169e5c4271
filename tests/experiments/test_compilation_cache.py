"""The cache of compiled programs: what is kept, what is removed, and when there is none."""

import importlib.util
import os
import re
import subprocess
import sys
import zlib

import jax
import pytest
import tiny_experiment
from main_programs import run

from experiments import compilation_cache


def entry(folder, name, content, used):
  path = folder / "processor" / f"{name}-cache"
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content)
  os.utime(path, (used, used))
  return path


def names(folder):
  return sorted(path.name for path in (folder / "processor").iterdir())


def test_what_a_killed_writer_left_is_removed_and_what_is_whole_stays(tmp_path):
  whole = zlib.compress(bytes(1000))
  entry(tmp_path, "whole", whole, 1)
  for n, content in enumerate((whole[:-1], whole[:5], b"", b"x", whole[:3] + b"?" + whole[4:])):
    entry(tmp_path, f"half{n}", content, 2)
  (tmp_path / "processor" / "half0-atime").write_bytes(bytes(8))
  compilation_cache.clean(tmp_path)
  assert names(tmp_path) == ["whole-cache"]


@pytest.mark.skipif(not importlib.util.find_spec("zstandard"), reason="needs zstandard")
def test_entries_of_the_other_compression_are_checked_too(tmp_path):
  import zstandard

  whole = zstandard.compress(bytes(range(256)) * 9)
  entry(tmp_path, "whole", whole, 1)
  entry(tmp_path, "half", whole[:-1], 1)
  compilation_cache.clean(tmp_path)
  assert names(tmp_path) == ["whole-cache"]


def test_an_entry_is_looked_at_once_and_again_when_it_changed(tmp_path, monkeypatch):
  path, looked = entry(tmp_path, "one", zlib.compress(b"program"), 1), []
  is_whole = compilation_cache._is_whole
  monkeypatch.setattr(
    compilation_cache, "_is_whole", lambda path: looked.append(path) or is_whole(path)
  )
  compilation_cache.clean(tmp_path)
  compilation_cache.clean(tmp_path)
  assert looked == [path]
  entry(tmp_path, "one", path.read_bytes()[:-1], 3)
  compilation_cache.clean(tmp_path)
  assert looked == [path, path] and names(tmp_path) == []


@pytest.mark.parametrize("known", ["", "{", '{"processor/b-cache": 7}', '["whole"]'])
def test_a_damaged_list_is_made_anew(tmp_path, known):
  entry(tmp_path, "b", zlib.compress(b"program"), 1)
  (tmp_path / "whole.json").write_text(known)
  compilation_cache.clean(tmp_path)
  assert "processor/b-cache" in (tmp_path / "whole.json").read_text()
  assert names(tmp_path) == ["b-cache"]


def test_the_entries_used_longest_ago_make_room(tmp_path):
  sizes = {}
  for used, name in enumerate("dbca", start=1):
    sizes[name] = entry(tmp_path, name, zlib.compress(os.urandom(500)), used).stat().st_size
  compilation_cache.clean(tmp_path, most=sizes["c"] + sizes["a"])
  assert names(tmp_path) == ["a-cache", "c-cache"]


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("JAX_COMPILATION_CACHE_DIR", "elsewhere"),
    ("JAX_ENABLE_COMPILATION_CACHE", "0"),
    ("XLA_FLAGS", "--xla_force_host_platform_device_count=2"),
  ],
)
def test_it_stays_off_where_jax_was_told_otherwise_and_for_several_cpus(
  name, value, monkeypatch, tmp_path
):
  for each in compilation_cache._OWN_SETTINGS:
    monkeypatch.delenv(each, raising=False)
  monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
  monkeypatch.setenv(name, value)
  before = jax.config.jax_compilation_cache_dir
  assert not compilation_cache.begin()
  assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())


MISS = r"PERSISTENT COMPILATION CACHE MISS for '([^']*)'"
PROGRAM = """
from experiments import compilation_cache
assert compilation_cache.begin()
import jax

@jax.jit
def triple(x):
  return 3 * x

print(triple(2.0))
"""


def entries(folder):
  return sorted(folder.glob("compiled/*/*-cache"))


def test_a_second_start_compiles_nothing_but_what_a_killed_writer_left(tmp_path):
  environment = {x: y for x, y in os.environ.items() if x not in compilation_cache._OWN_SETTINGS}
  environment |= {"LORA_JAX_CACHE": str(tmp_path), "JAX_LOGGING_LEVEL": "DEBUG"}
  environment |= {"JAX_PLATFORMS": "cpu"}

  def start():
    done = subprocess.run(
      [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "6.0\n", done.stderr
    return set(re.findall(MISS, done.stderr))

  assert "jit_triple" in start()
  made = entries(tmp_path)
  path = next(path for path in made if path.name.startswith("jit_triple"))
  path.write_bytes(path.read_bytes()[:-9])
  assert start() == {"jit_triple"}
  assert start() == set() and entries(tmp_path) == made


@pytest.mark.slow
def test_a_main_program_compiles_nothing_when_it_starts_again(tmp_path, smollm2_tokenizer):
  config = tiny_experiment.write(tmp_path, smollm2_tokenizer)
  environment = dict.fromkeys(compilation_cache._OWN_SETTINGS) | {
    "LORA_JAX_CACHE": str(tmp_path / "cache"),
    "JAX_LOGGING_LEVEL": "DEBUG",
  }

  def start(*more):
    printed = run("plan", f"--config={config}", "--topology=here", *more, **environment)
    return set(re.findall(MISS, printed)), entries(tmp_path / "cache")

  _, made = start("--nocompilation_cache")
  assert made == []
  missed, made = start()
  assert "jit_step" in missed
  assert start() == (set(), made)
