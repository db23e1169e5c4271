"""Runs whose files were damaged: by a disk, by hand, or by someone who sends them.

What reads a run's folder is `experiments.train` that goes on, and evaluate, generate and export.
Each damage is refused in words that name the file, or what is read is what the file now says.
"""

import json
import os
import random
import shutil
import subprocess
import sys

import mutations
import pytest
import tiny_experiment
from main_programs import imported

from experiments import inputs, methods, parts
from lora_jax import exchange
from lora_jax.models import llama
from lora_jax.run import metrics, report, workdir

train = imported("experiments.train")

REFUSED = (ValueError, FileNotFoundError, PermissionError)
LONGEST = 25_000  # characters of a message: a hundred lines about fields
READ_AGAIN = ("config.json", "eval.json", "metrics.jsonl", "lock")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, smollm2):
  """A run that has come to its end, and its config."""
  folder = tmp_path_factory.mktemp("tiny")
  path = tiny_experiment.write(
    folder, smollm2.tokenizer, train={"steps": 4}, evaluation={"samples": 2}
  )
  module = {}
  exec(path.read_text(), module)
  config = module["get_config"]("")
  with workdir.open_workdir(folder / "run", config.to_dict()) as run:
    train.train(config, run)
  return folder / "run", config


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of the run, and its config."""
  run, config = finished
  shutil.copytree(run, tmp_path / "run")
  return tmp_path / "run", config


def go_on(path, config):
  """What `experiments.train` reads of a folder when it goes on; returns it."""
  with workdir.open_workdir(path, config.to_dict()) as run:
    workdir.settle_inputs(run, workdir.read_inputs(path))
    results = report.read_results(run.evaluation)
    task = parts.make_task(config)
    task.line(results["before"])
    logged = metrics.read_metrics(run.metrics)
    with metrics.MetricsWriter(run.metrics, run.tensorboard, step=4):
      report.write_report(run, targets="", command="", lines=task.lines)
    return workdir.read_config(path), results, logged


def use(path):
  """What evaluate, generate and export read of a folder, less the model."""
  run, config = parts.open_run(str(path))
  workdir.read_inputs(run.path)
  methods.merge_format(config)
  return config.to_dict()


def load(path):
  """All that they read, with the data and the model."""
  run, config = parts.open_run(str(path))
  inputs.warn_of_changes(run, config, ["model.source", "data.source"])
  records = parts.load_records(config.data, parts.make_task(config))
  found = methods.load_base(config)
  axes = parts.trace_axes(llama.Llama(found.config), found.params)
  adapters = exchange.load(run.adapter, found.params, axes, table=found.table)
  methods.finish(config, found.params, adapters, axes)
  return len(records)


def refused(read, name=None):
  """What a reader refuses, in words of bounded length; None where it reads."""
  try:
    read()
  except REFUSED as error:
    message = str(error)
    assert not isinstance(error, UnicodeError | json.JSONDecodeError), message
    assert len(message) < LONGEST
    if name:
      assert name in message, message
    return message
  return None


def fifo(path):
  path.unlink()
  os.mkfifo(path)


def folder(path):
  path.unlink()
  path.mkdir()


def link(path):
  path.unlink()
  path.symlink_to(path.name)


def written(content):
  return lambda path: path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[:-40])


BY_HAND = {
  "empty": written(b""),
  "cut": cut,
  "not UTF-8": written(b'{"step": 1, "a": "\xff"}\n'),
  "no object": written(b"[1, 2]\n"),
  "another object": written(b'{"steep": 1}\n'),
  "a number": written(b"7\n"),
  "null": written(b"null\n"),
  "deep": written(b"[" * 100_000 + b"\n"),
  "a long integer": written(b'{"step": ' + b"9" * 5000 + b"}\n"),
  "NaN": written(b'{"step": NaN}\n'),
  "a step that is a text": written(b'{"step": "1", "loss": 1, "tokens_per_second": 1}\n'),
  "a step below 1": written(b'{"step": 0, "loss": 1, "tokens_per_second": 1}\n'),
  "a step twice": written(b'{"step": 1, "loss": 1, "tokens_per_second": 1}\n' * 2),
  "a loss that is a text": written(b'{"step": 1, "loss": "x", "tokens_per_second": 1}\n'),
  "no loss": written(b'{"step": 1}\n'),
  "a pipe": fifo,
  "a folder": folder,
  "a link to itself": link,
}
# What is not damage: a log of which nothing, or half a line, was written; and no log at all.
WHOLE = {
  ("metrics.jsonl", "empty"),
  ("metrics.jsonl", "cut"),
  ("metrics.jsonl", "a link to itself"),
  ("eval.json", "a link to itself"),
}


@pytest.mark.parametrize("damage", BY_HAND)
@pytest.mark.parametrize("name", ["config.json", "eval.json", "metrics.jsonl"])
def test_a_file_of_a_run_that_was_damaged_by_hand_is_named_with_a_remedy(name, damage, copied):
  path, config = copied
  BY_HAND[damage](path / name)
  message = refused(lambda: go_on(path, config), str(path))
  if (name, damage) in WHOLE:
    return
  assert message, "it was read"
  remedies = ("restore", "delete", "se another", "name a file", "change its permissions")
  assert any(word in message for word in remedies), message


READ = """
import pathlib, sys
from lora_jax.run import metrics, report, workdir
run = pathlib.Path(sys.argv[1])
for read, path in (
  (workdir.read_config, run),
  (report.read_results, run / "eval.json"),
  (metrics.read_metrics, run / "metrics.jsonl"),
):
  try:
    read(path)
  except PermissionError as error:
    print(error)
"""


def test_files_of_a_run_that_may_not_be_read_are_named_with_a_remedy(copied):
  path, _ = copied
  names = ("config.json", "eval.json", "metrics.jsonl")
  command = [sys.executable, "-c", READ, str(path)]
  if os.geteuid() == 0:  # who may read everything, unless this is taken away
    if shutil.which("setpriv") is None:
      pytest.skip("root may read everything, and there is no setpriv to change that")
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
  for name in names:
    (path / name).chmod(0)
  done = subprocess.run(command, capture_output=True, text=True, timeout=100)
  wanted = [f"{path / name}: may not be read; change its permissions" for name in names]
  assert done.stdout.splitlines() == wanted, done.stderr


@pytest.mark.parametrize("damage", ["empty", "cut", "not UTF-8", "no object", "deep", "a folder"])
def test_programs_that_use_a_run_name_its_damaged_config(damage, copied):
  path, _ = copied
  BY_HAND[damage](path / "config.json")
  assert refused(lambda: use(path), "config.json")


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("model.source", None, "model.source is None; it must be a text"),
    ("model.dtype", 5, "model.dtype is 5; it must be one of float32"),
    ("model", 3, "model.source is missing"),
    ("adapter", "lora", "adapter.method is missing"),
    ("task", {"name of it": "completion"}, "task.name is missing"),
    ("data.buckets", [], "data.buckets is []; it must be a tuple"),
    ("data.max_length", 2**64, "data.max_length is 18446744073709551616; it must be 2 or more"),
    ("evaluation.batch_size", True, "evaluation.batch_size is True; it must be 1 or more"),
    ("train.loss_chunk", -1, "train.loss_chunk is -1; it must be 0 or more"),
    ("inputs", {"model.source": 3}, "inputs are not fingerprints"),
  ],
)
def test_a_field_of_a_finished_run_s_config_is_held_to_what_it_may_be(field, value, words, copied):
  path, _ = copied
  content = json.loads((path / "config.json").read_text())
  *sections, name = field.split(".")
  holder = content
  for section in sections:
    holder = holder[section]
  holder[name] = value
  (path / "config.json").write_text(json.dumps(content))
  assert words in refused(lambda: use(path), "config.json")


def mutated(name, content, rng):
  """A damage; of metrics.jsonl, that of a line, or of its bytes."""
  if name == "metrics.jsonl" and rng.random() < 0.7:
    lines = content.splitlines(keepends=True)
    n = rng.randrange(len(lines))
    damage = mutations.mutate("line.json", lines[n], rng)
    lines[n] = damage.content + rng.choice([b"\n", b"\n", b"\n", b""])
    return damage._replace(content=b"".join(lines))
  if name.endswith(".json"):
    return mutations.mutate(name, content, rng)
  return mutations._bytes(content, rng)


def damage_and_read(copied, seeds, full=False):
  """Damages one file at a time; how many were refused, and how many were read."""
  path, config = copied
  original = {name: (path / name).read_bytes() for name in READ_AGAIN}
  counts = {"refused": 0, "read": 0}
  for seed in seeds:
    rng = random.Random(seed)
    name = rng.choice(READ_AGAIN[:3])
    damage = mutated(name, original[name], rng)
    for read in (lambda: go_on(path, config), lambda: use(path), *[lambda: load(path)] * full):
      for each in READ_AGAIN:
        (path / each).write_bytes(original[each])
      (path / name).write_bytes(damage.content)
      try:
        message = refused(read)
      except BaseException as error:
        raise AssertionError(f"seed {seed}: {name}, {damage.words}: {error!r:.500}") from error
      counts["refused" if message else "read"] += 1
      if not message and name == "config.json" and read.__code__.co_names[0] == "go_on":
        # What goes on has the very config that it was started with.
        assert workdir.read_config(path) == json.loads(json.dumps(config.to_dict()))
  for each in READ_AGAIN:
    (path / each).write_bytes(original[each])
  return counts


def test_whatever_is_done_to_a_run_s_files_is_refused_in_words_or_read(copied):
  counts = damage_and_read(copied, range(120))
  assert counts["refused"] > 60 and counts["read"] > 20, counts


def test_whatever_is_done_to_them_the_model_and_the_data_are_loaded_or_it_is_said_why(copied):
  damage_and_read(copied, range(1000, 1012), full=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_thousands_of_damages_to_a_run_s_files_are_refused_in_words_or_read(copied):
  damage_and_read(copied, range(2000, 5000))
  damage_and_read(copied, range(5000, 5300), full=True)


# ---- the lock


def test_a_lock_that_is_a_link_is_refused_and_what_it_points_to_stays(copied, tmp_path):
  path, config = copied
  (tmp_path / "mine").write_text("mine")
  for make in (os.symlink, os.link):
    (path / "lock").unlink()
    make(tmp_path / "mine", path / "lock")
    assert "is not the lock of a run" in refused(lambda: go_on(path, config), "lock")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("content", [b"mine", b"\xff", b"1234\nand more", b"4711 4712"])
def test_a_file_that_is_called_lock_and_is_none_stays(content, copied):
  path, config = copied
  (path / "lock").write_bytes(content)
  assert "a file of another kind" in refused(lambda: go_on(path, config), "lock")
  assert (path / "lock").read_bytes() == content


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_lock_that_is_no_file_is_refused(make, copied):
  path, config = copied
  (path / "lock").unlink()
  make(path / "lock")
  assert "is not the lock of a run" in refused(lambda: go_on(path, config), "lock")


def test_links_in_the_place_of_a_run_s_files_are_not_written_through(copied, tmp_path):
  path, config = copied
  for name in ("metrics.jsonl", "README.md", "loss.png"):
    (tmp_path / name).write_bytes((path / name).read_bytes())
    (path / name).unlink()
    (path / name).symlink_to(tmp_path / name)
  before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "README.md")}
  go_on(path, config)
  assert before == {name: (tmp_path / name).read_bytes() for name in before}
  assert not any((path / name).is_symlink() for name in before)
