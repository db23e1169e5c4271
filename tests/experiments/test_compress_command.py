"""experiments.compress from end to end on a tiny model, and the healing of what comes out."""

import importlib.util
import json

import jax
import numpy as np
import pytest
import tiny_experiment
from main_programs import imported

import lora_jax
from configs import compress as compress_config
from configs import heal
from experiments import compression
from lora_jax.compress import storage
from lora_jax.io import pretrained
from lora_jax.models import llama
from lora_jax.train import workdir
from lora_jax.weights import Factored, Pruned
from lora_jax.weights.quantized import Quantized

STEPS = "channels+value_heads+factorize+prune+quantize"


@pytest.fixture(scope="module")
def program():
  return imported("experiments.compress")


@pytest.fixture(scope="module")
def tokenizer():
  return pretrained.inspect(pretrained.DEFAULT).tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
  """A folder with a tiny model and a text, and the section `data` of a task."""
  folder = tmp_path_factory.mktemp("compress")
  path = tiny_experiment.write(folder, tokenizer)
  spec = importlib.util.spec_from_file_location("tiny_config", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  words = np.random.default_rng(0).choice(["fine", "dull", "film", "joy", "plot", "old"], 4000)
  rows = [{"text": " ".join(words[n : n + 20])} for n in range(0, 4000, 20)]
  (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return folder, module.get_config().data


def tiny_config(tiny, text: str):
  folder, data = tiny
  config = compress_config.get_config(text)
  config.model.source = str(folder / "model")
  source = config.text
  source.source, source.format, source.columns = str(folder / "text.jsonl"), "jsonl", ()
  source.length, source.calibration, source.held_out = 32, 8, 4
  config.channels.mlp_width, config.value_heads.value_dim = 48, 6
  config.factorize.targets = ("mlp",)
  config.task.data, config.task.examples = data, 8
  config.report.prompt = 8
  return config


@pytest.fixture(scope="module")
def run(tiny, program):
  """The workdir of a tiny model that every step has gone over."""
  folder, _ = tiny
  config = tiny_config(tiny, f"steps={STEPS},smoke")
  with workdir.open_workdir(folder / "run", config.to_dict()) as run:
    program.compress(config, run.path)
  return folder, config


def test_every_step_is_done_recorded_and_stored(run):
  folder, _ = run
  found = json.loads((folder / "run/report.json").read_text())
  assert [row["step"] for row in found["steps"]] == ["dense", *STEPS.split("+")]
  for name in ("parameters", "memory", "disk"):
    sizes = [row[name] for row in found["steps"]]
    assert sizes[-1] < sizes[0]
  assert all(
    np.isfinite(row["perplexity"]) and row["accuracy"] is not None for row in found["steps"]
  )
  assert "| quantize |" in (folder / "run/report.md").read_text()
  assert (folder / "run/pareto.png").stat().st_size > 1000
  small = storage.load(folder / "run/model")
  assert (small.config.mlp_width, small.config.value_dim) == (48, 6)
  leaves = jax.tree.leaves(small.params, is_leaf=lora_jax.is_weight)
  kinds = {type(x) for x in leaves if lora_jax.is_weight(x)}
  assert kinds == {Factored, Pruned}
  assert all(isinstance(x.w, Quantized) for x in leaves if isinstance(x, Pruned))


def test_the_stored_model_computes_what_was_measured(run, program):
  folder, config = run
  small = storage.load(folder / "run/model")
  _, held_out, _ = program.read_windows(config.text, small.tokenizer)
  apply = lora_jax.adapt(llama.Llama(small.config).apply)
  last = json.loads((folder / "run/report.json").read_text())["steps"][-1]
  assert program.perplexity(apply, small.params, held_out) == pytest.approx(last["perplexity"])


@pytest.mark.slow
def test_it_is_healed_and_the_healed_one_is_measured(run, program):
  folder, config = run
  healing = heal.get_config(f"compressed={folder / 'run'},rank=2,smoke")
  healing.data.max_length, healing.data.buckets = 48, (48,)
  train = imported("experiments.train")
  with workdir.open_workdir(folder / "healed", healing.to_dict()) as healed:
    train.train(healing, healed)
  evaluated = json.loads((folder / "healed/eval.json").read_text())
  assert np.isfinite(evaluated["after"]["loss"])
  program.add_healed(config, folder / "run", str(folder / "healed"))
  steps = json.loads((folder / "run/report.json").read_text())["steps"]
  assert [row["step"] for row in steps][-2:] == ["quantize", "heal"]
  assert steps[-1]["parameters"] > steps[-2]["parameters"]


@pytest.mark.parametrize(
  ("steps", "words"),
  [
    ("quantize+factorize", "factorize after quantize makes no sense: the factors"),
    ("prune+factorize", "factorize after prune makes no sense"),
    ("quantize+prune", "prune after quantize makes no sense"),
    ("factorize+channels", "channels after factorize makes no sense"),
    ("factorize+factorize", "factorize is there twice"),
    ("melt", "'melt' is unknown; choose from channels"),
  ],
)
def test_steps_that_make_no_sense_are_refused_with_the_reason(steps, words):
  with pytest.raises(ValueError, match=words):
    compression.check_steps(compress_config.get_config(f"steps={steps}").steps)


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("factorize.budget", 0.0, "give either a budget or an energy"),
    ("factorize.budget", 1.5, "must be a share below 1"),
    ("factorize.method", "magic", "'magic' is unknown"),
    ("text.calibration", 500, "asks for 500 for calibration"),
    ("channels.mlp_width", 64, "mlp_width is 64 and is to be 64"),
  ],
)
def test_settings_that_cannot_be_met_are_refused_before_the_work(
  tmp_path, tiny, program, field, value, words
):
  config = tiny_config(tiny, "steps=channels+factorize,smoke")
  config.update_from_flattened_dict({field: value})
  with pytest.raises(ValueError, match=words):
    program.compress(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_budget_is_of_numbers_of_operations_or_of_measured_time():
  assert compression.UNITS["parameters"](8, 4, rows=3).at(2) == 24
  assert compression.UNITS["flops"](8, 4, rows=3).dense == 2 * 3 * 32
  assert compression.UNITS["milliseconds"](8, 4, rows=3).dense > 0
