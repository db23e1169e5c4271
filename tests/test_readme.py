"""The code and the commands of the README and the docs."""

import configparser
import importlib.util
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
from importlib import metadata

import jax
import numpy as np
import pytest
from jaxprs import equations
from readme_commands import (
  DOCS,
  README,
  ROOT,
  blocks,
  commands,
  exported_program,
  pages,
  short,
)

import lora_jax
from configs import arguments


def test_the_flow_runs_as_printed_in_fifteen_lines_learns_and_is_saved(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  code, save_and_load, with_nnx = blocks("python")
  scope = {}
  exec(code, scope)
  lines = [line for line in code.splitlines() if line.strip() and not line.startswith("import")]
  assert len(lines) == 15
  model, params, x, y = (scope[name] for name in ("model", "params", "x", "y"))
  start = scope["lora_jax"].init(jax.random.key(2), params, scope["specs"])
  assert scope["loss"](scope["adapters"]) < 0.2 * scope["loss"](start)
  assert (model.apply({"params": scope["merged"]}, x).argmax(-1) == y).mean() > 0.9
  trained = scope["adapters"]
  exec(save_and_load, scope)
  assert scope["adapters"] is not trained
  jax.tree.map(np.testing.assert_array_equal, scope["adapters"], trained)
  exec(with_nnx, scope)
  np.testing.assert_allclose(scope["module"](x), scope["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
  code = blocks("python", page.read_text())
  if not code:
    assert "```python\n" not in page.read_text()
    return
  monkeypatch.chdir(tmp_path)
  scope = {"__name__": page.stem}
  for block in code:
    exec(block, scope)
  if page.stem == "checkpoint":
    first, *_, last = scope["losses"]
    assert last < 0.5 * first
    jax.tree.map(np.testing.assert_array_equal, scope["again"], dict(scope["adapters"]))


def test_a_page_before_and_after_the_transform_is_what_the_docs_say():
  page = (ROOT / "docs" / "guide" / "how_it_works.md").read_text()
  scope = {}
  for block in blocks("python", page):
    exec(block, scope)
  before, after = (
    [e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    for jaxpr in (
      jax.make_jaxpr(scope["f"])(scope["w"], scope["x"]),
      jax.make_jaxpr(lora_jax.adapt(scope["f"]))(scope["weight"], scope["x"]),
    )
  )
  assert before == [(4, 256)]
  assert sorted(after) == [(4, 8), (4, 256), (4, 256)]


def test_every_page_of_the_docs_is_tried():
  found = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
  tried = {path.relative_to(ROOT / "docs") for path in DOCS}
  left = {str(path) for path in found - tried if path.parts[0] != "api"}
  assert left == {"index.md", "coverage.md", "results.md", "changelog.md"}


def test_the_picture_is_what_its_script_draws():
  drawn = runpy.run_path(ROOT / "docs" / "draw.py")["draw"]()
  (axes,) = drawn.axes
  said = {text.get_text() for text in axes.texts}
  assert {"W", "A", "B", "adapt(f)", "x @ W + s·(x @ A) @ B"} <= said
  assert (ROOT / "docs" / "images" / "adapt.svg").read_text().count("<path") > len(said)


def test_the_set_up_is_two_commands():
  setup = blocks("bash")[0].splitlines()
  assert len(setup) == 2
  assert setup[1] == 'pip install -e ".[test]" && pytest'


def test_every_program_and_file_that_is_named_exists_and_links_lead_somewhere():
  root = pathlib.Path(__file__).parents[1]
  for page in pages():
    for name in re.findall(r"python -m (\w+)\.(\w+)", page):
      assert (root / name[0] / f"{name[1]}.py").is_file(), name
    for path in re.findall(r"(?:configs|notebooks|lora_jax)/[\w/]+\.(?:py|ipynb)", page):
      assert (root / path).is_file(), path
  for folder, page in [(root, README), *((path.parent, path.read_text()) for path in DOCS)]:
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
      assert (folder / link).is_file(), link


PARSE = """
import json, runpy, sys
from absl import flags
import experiments.processes  # whose flags are several programs' own
for name, arguments in json.load(sys.stdin):
  before = set(flags.FLAGS)
  runpy.run_module(name, run_name="readme")
  flags.FLAGS.unparse_flags()
  sys.argv = [name, *arguments]  # where a config looks for its fields
  left = flags.FLAGS(sys.argv)
  assert len(left) == 1 or name == "experiments.launch", (name, left)
  for flag in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, flag)
"""


def test_every_command_has_flags_and_a_config_that_its_program_knows(tmp_path):
  for label in ("cat", "dog"):  # a config of images takes its classes from the folder
    (tmp_path / label).mkdir()
  (tmp_path / "annotations.json").write_text('{"categories": [{"name": "cell"}]}')
  # And a config of CTC its alphabet from the texts.
  (tmp_path / "clips.jsonl").write_text('{"file": "a.flac", "text": "a latte"}\n')
  own = dict.fromkeys(("data=photographs", "data=smears"), f"data={tmp_path}")
  own["data=clips"] = f"data={tmp_path / 'clips'}"
  given = []
  for words in commands():
    for old, new in own.items():
      words = [words[0], *(word.replace(old, new) for word in words[1:])]
    given.append([words[0], words[1:]])
  assert len(given) >= 27
  done = subprocess.run(
    [sys.executable, "-c", PARSE],
    input=json.dumps(given),
    text=True,
    capture_output=True,
    cwd=ROOT,
    timeout=600,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr


def test_what_the_first_command_installs_is_all_that_the_main_programs_import():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  extra = setup["options.extras_require"]["experiments"]
  # jax.export, by which artifacts are written, imports it when it serialises.
  assert "flatbuffers" in extra.split()


# A chip or a cluster of them is wanted, the machine's own hours, or a file of one's own.
_NOT_HERE = ("--distributed", "--config.mesh.tensor=4", "benchmarks.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A tiny model's folder, and beside it the same as a GGUF file and some conversations."""
  # Not installed everywhere that the flow above is tried.
  import boxed_sets
  import speech_models
  import tiny_experiment
  from PIL import Image

  from lora_jax.io import gguf_model, pretrained

  folder = tmp_path_factory.mktemp("readme")
  words = pretrained.inspect(pretrained.DEFAULT).tokenizer
  tiny_experiment.write(folder, words, max_length=512)
  chats = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
    for n in range(40)
  ]
  for name, part in (("mine", chats), ("more", chats[:5])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in part))
  for place in ("photographs/red", "photographs/blue", "more_photographs"):
    (folder / place).mkdir(parents=True)
    for n in range(12):
      color = (20 * n, 0, 200) if "blue" in place else (200, 20 * n, 0)
      Image.new("RGB", (40, 30), color).save(folder / place / f"{n}.png")
  speech_models.write_clips(folder, 28, seed=0)
  (folder / "clip.flac").write_bytes((folder / "0-0.flac").read_bytes())
  boxed_sets.write(folder / "smears", counts=(20, 4))
  (folder / "smears" / "train.json").rename(folder / "smears" / "annotations.json")
  (folder / "more_smears").symlink_to(folder / "smears" / "images" / "test")
  model = pretrained.load(folder / "model")
  gguf_model.save(
    f"{folder / 'model'}.gguf", model.params, model.config, model.tokenizer, dtype="q8_0"
  )
  return folder / "model"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_runs_to_its_end_in_the_order_of_the_page(tiny, tmp_path):
  not_here = _NOT_HERE if (arguments.data_folder() / "glue").is_dir() else (*_NOT_HERE, "sst2")
  if importlib.util.find_spec("libtpu") is None:
    not_here = (*not_here, "--topology=v5e")
  run = [words for words in commands() if not any(x in " ".join(words) for x in not_here)]
  run = [words for n, words in enumerate(run) if words not in run[:n]]  # two pages have the same
  assert len(run) >= 22
  failed = []  # all of them, for each run of this test takes long
  for words in run:
    done = subprocess.run(
      [sys.executable, "-m", *short(words, tmp_path, tiny)],
      cwd=ROOT,
      text=True,
      capture_output=True,
      timeout=600,
      input="Hello!\n",
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
      failed.append(f"{words}\n{done.stdout}\n{done.stderr}")
    elif words[0] == "experiments.generate":
      (text,) = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
      # An answer that is chosen, and not the same one sixty times.
      assert "messages" in text or len(text["completion"].split()) <= 3
    elif words[0] == "experiments.chat":
      assert "\n> Hello!\n" in done.stdout
  assert not failed, "\n\n".join(failed)
  code = exported_program("runs without lora_jax").replace("runs/", f"{tmp_path}/")
  scope = {}
  exec(code, scope)
  assert scope["logits"].shape == (49152,)


def test_the_table_of_versions_is_written_between_its_marks(tmp_path):
  """By a script that .ci/run calls at its end."""
  script, file, page = (
    ROOT / ".ci" / "versions.py",
    tmp_path / "versions.json",
    tmp_path / "page.md",
  )
  page.write_text(README)
  for name in ("one", "two"):
    subprocess.run([sys.executable, script, "record", file, name, f"part {name}"], check=True)
  subprocess.run([sys.executable, script, "write", file, page], check=True)
  (before, after), (old, new) = (
    re.split("<!-- (?:versions|end).*-->\n", text)[::2] for text in (README, page.read_text())
  )
  assert (before, after) == (old, new)
  rows = [line for line in page.read_text().splitlines() if "| part " in line]
  assert len(rows) == 2 and all(f"| {metadata.version('jax')} |" in row for row in rows)
