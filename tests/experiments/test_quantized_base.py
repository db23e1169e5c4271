"""QLoRA by the main programs: a base that is quantised as it is loaded, on a tiny Llama."""

import json
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_experiment
from main_programs import imported

import lora_jax
from experiments import methods, parts
from lora_jax import exchange, tree
from lora_jax.models import llama
from lora_jax.run import workdir as workdir_lib
from lora_jax.train import evaluation
from lora_jax.weights import Factored, Pruned, Quantized, is_weight

train = imported("experiments.train")


@pytest.fixture(scope="module")
def config(tmp_path_factory, smollm2):
  folder = tmp_path_factory.mktemp("tiny")
  path = tiny_experiment.write(folder, smollm2.tokenizer, model={"quantize": "nf4"})
  return runpy.run_path(str(path))["get_config"]()


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "qlora"
  with workdir_lib.open_workdir(path, config.to_dict()) as run:
    train.train(config, run)
  return path


@pytest.mark.slow
def test_the_chosen_kernels_are_quantised_and_nothing_else(config):
  leaves = tree.flatten(parts.load_model(config.model).params, is_leaf=is_weight)
  quantised = [path for path, leaf in leaves.items() if isinstance(leaf, Quantized)]
  assert len(quantised) == 7 and all(path.endswith("/kernel") for path in quantised)
  assert {leaves[path].levels for path in quantised} == {"nf4"}


def test_an_adapter_is_trained_and_saved_beside_a_quantised_base(config, workdir):
  result = json.loads((workdir / "eval.json").read_text())
  assert result["after"]["loss"] < result["before"]["loss"]
  base = parts.load_model(config.model)
  tokens = np.arange(12, dtype=np.int32)[None]
  axes = parts.trace_axes(llama.Llama(base.config), base.params)
  adapters = exchange.load(workdir / "adapter", base.params, axes, table=base.table)
  apply = lora_jax.adapt(llama.Llama(base.config).apply, strict=True)
  adapted = jax.jit(apply)({"params": lora_jax.attach(base.params, adapters)}, tokens)
  merged = lora_jax.merge(base.params, adapters)
  assert not any(map(is_weight, jax.tree.leaves(merged, is_leaf=is_weight)))
  np.testing.assert_allclose(adapted, jax.jit(apply)({"params": merged}, tokens), atol=1e-4)


@pytest.mark.slow
def test_a_run_of_loftq_is_evaluated_on_the_base_that_it_made(tmp_path, smollm2):
  path = tiny_experiment.write(tmp_path, smollm2.tokenizer)
  config = runpy.run_path(str(path))["get_config"]("method=loftq")
  with workdir_lib.open_workdir(tmp_path / "run", config.to_dict()) as run:
    train.train(config, run)
  recorded = json.loads((tmp_path / "run" / "eval.json").read_text())
  assert recorded["after"]["loss"] < recorded["before"]["loss"]

  def call(program, *arguments):
    return subprocess.run(
      [sys.executable, "-m", f"experiments.{program}", f"--workdir={tmp_path / 'run'}", *arguments],
      cwd=pathlib.Path(__file__).parents[2],
      capture_output=True,
      text=True,
      timeout=600,
    )

  done = call("evaluate", "--nobase", "--examples=16")
  assert done.returncode == 0, done.stderr
  found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
  assert found["adapter"]["loss"] == pytest.approx(recorded["after"]["loss"], rel=1e-4)

  done = call("export", "--to=peft", f"--output={tmp_path / 'adapter'}")
  assert "LoftQ's adapter belongs to the quantized base" in done.stderr
  assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"quantize": "nf5"}, "model.quantize 'nf5' is unknown; use none, nf4, int4, int8, fp8, gguf"),
    ({"quantize": "gguf"}, "holds no quantized blocks to keep"),
    ({"quantize_targets": ("nothing",)}, "the pattern 'nothing' matches no leaf"),
  ],
)
def test_a_base_that_cannot_be_quantised_so_is_refused(config, settings, words):
  model = config.model.copy_and_resolve_references()
  model.update(settings)
  with pytest.raises(ValueError, match=words):
    parts.load_model(model)


@pytest.mark.slow
def test_a_run_that_was_trained_for_its_quantised_merge_loses_nothing_by_it(tmp_path, smollm2):
  """What the run's end measures, rounding as it goes, is what the quantised merge then has."""
  train_section = {"quantize_merge": "nf4", "steps": 12}
  path = tiny_experiment.write(tmp_path, smollm2.tokenizer, train=train_section)
  config = runpy.run_path(str(path))["get_config"]()
  with workdir_lib.open_workdir(tmp_path / "run", config.to_dict()) as run:
    train.train(config, run)
  recorded = json.loads(run.evaluation.read_text())
  assert recorded["after"]["loss"] < recorded["before"]["loss"]

  base = parts.load_model(config.model)
  model = llama.Llama(base.config)
  axes = parts.trace_axes(model, base.params)
  adapters = exchange.load(run.adapter, base.params, axes, table=base.table)
  weights = methods.finish(config, base.params, adapters, axes)
  leaves = tree.flatten(weights, is_leaf=is_weight)
  assert [path for path, x in leaves.items() if isinstance(x, Quantized)] == list(adapters)
  task = parts.make_task(config)
  records = parts.pick(parts.load_records(config.data, task), "test", "")
  task = task.of_model(base)
  data = task.eval_batches(task.examples(records)[:16], 8)
  plain = lora_jax.adapt(model.apply)
  found = evaluation.evaluate(evaluation.make_eval_step(plain, ()), weights, data)
  assert found["loss"] == pytest.approx(recorded["after"]["loss"], rel=1e-5)
  unrounded = lora_jax.attach(base.params, adapters)
  other = evaluation.evaluate(evaluation.make_eval_step(plain, ()), unrounded, data)
  assert abs(other["loss"] - found["loss"]) > 1e-4 * found["loss"]


@pytest.mark.parametrize(
  ("text", "fields", "words"),
  [
    ("", {"train.quantize_merge": "int3"}, "'int3' is unknown; use none, nf4"),
    ("", {"train.quantize_merge": "nf4", "model.quantize": "nf4"}, "quantized already"),
    ("method=loftq", {"train.quantize_merge": "nf4"}, "quantized already"),
  ],
)
def test_a_merge_that_cannot_be_quantised_is_refused_before_the_model_is_loaded(
  tmp_path, smollm2, text, fields, words
):
  path = tiny_experiment.write(tmp_path, smollm2.tokenizer)
  config = runpy.run_path(str(path))["get_config"](text)
  config.update_from_flattened_dict(fields)
  config.model.source = "nowhere"
  with pytest.raises(ValueError, match=words):
    train.train(config, run=None)


def test_a_merge_that_would_undo_a_compression_is_refused(tmp_path, smollm2):
  path = tiny_experiment.write(tmp_path, smollm2.tokenizer, train={"quantize_merge": "nf4"})
  config = runpy.run_path(str(path))["get_config"]()
  base = parts.load_model(config.model)
  leaves = tree.flatten(base.params)
  kernel = "blocks/mlp/up/kernel"
  kept = Pruned.of(leaves[kernel], leaves[kernel] > 0, kernel)
  pruned = tree.replace(base.params, {kernel: kept})
  axes = parts.trace_axes(llama.Llama(base.config), base.params)
  assert kernel in methods.merge_formats(config, pruned, axes)
  a, b = leaves[kernel][..., :2], leaves[kernel][:, :2]
  factored = tree.replace(base.params, {kernel: Factored(a, b, path=kernel)})
  with pytest.raises(ValueError, match=f"{kernel} is compressed already, and its merge is dense"):
    methods.merge_formats(config, factored, axes)
