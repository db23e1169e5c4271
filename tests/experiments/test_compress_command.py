"""experiments.compress from end to end on a tiny model, and the healing of what comes out."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_compression
from main_programs import imported

import lora_jax
from configs import heal
from experiments import compression, compression_data, parts
from lora_jax import exchange, tree
from lora_jax.compress import perplexity, storage
from lora_jax.io import names, pretrained, safetensors
from lora_jax.run import workdir
from lora_jax.weights import Factored, Pruned, is_weight
from lora_jax.weights.quantized import INT8, Quantized, quantized

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
  return folder, tiny_compression.write(folder, tokenizer)


def compressed(program, tiny, name: str, text: str, **fields):
  """A workdir that a tiny model was compressed into, and its config."""
  config = tiny_compression.config(*tiny, text, **fields)
  with workdir.open_workdir(tiny[0] / name, config.to_dict()) as run:
    program.compress(config, run.path)
  return run.path, config


def steps_of(folder):
  return json.loads((folder / "report.json").read_text())["steps"]


@pytest.fixture(scope="module")
def run(tiny, program):
  """The workdir of a tiny model that every step has gone over."""
  return compressed(program, tiny, "run", f"steps={STEPS}")


def test_every_step_is_done_recorded_and_stored(run):
  folder, _ = run
  steps = steps_of(folder)
  assert [row["step"] for row in steps] == ["dense", *STEPS.split("+")]
  for name in ("parameters", "memory", "disk"):
    assert steps[-1][name] < steps[0][name]
  for row in steps:
    assert set(row["figures"]) == {"perplexity", "accuracy"}
    assert np.isfinite(row["figures"]["perplexity"])
    assert row["unit"] == "token" and set(row["times"]) == {"prefill", "token"}
  assert not steps[0]["ratios"] and set(steps[-1]["ratios"]) == {"prefill", "token"}
  assert "| quantize |" in (folder / "report.md").read_text()
  assert (folder / "pareto.png").stat().st_size > 1000
  assert storage.steps_of(folder / "model") == tuple(STEPS.split("+"))
  small = storage.load(folder / "model")
  assert (small.config.mlp_width, small.config.value_dim) == (48, 6)
  leaves = jax.tree.leaves(small.params, is_leaf=lora_jax.is_weight)
  kinds = {type(x) for x in leaves if lora_jax.is_weight(x)}
  assert kinds == {Factored, Pruned}
  assert all(isinstance(x.w, Quantized) for x in leaves if isinstance(x, Pruned))


def perplexity_said(folder):
  return steps_of(folder)[-1]["figures"]["perplexity"]


def perplexity_of(folder, config):
  """Of what is stored in a workdir, model and adapter, on what was held out."""
  small = storage.load(folder / "model")
  model = compression.Model(small.config, small.params, adapters={})
  if (folder / "adapter").exists():
    adapters = exchange.load(folder / "adapter", model.params, model.axes, table=names.LLAMA_HF)
    model = model._replace(adapters=adapters)
  _, held_out, _ = compression_data.read_windows(config.text, small.tokenizer)
  return perplexity(model.apply, model.weights, held_out)


def test_the_stored_model_computes_what_was_measured(run):
  folder, config = run
  last = steps_of(folder)[-1]
  assert perplexity_of(folder, config) == pytest.approx(last["figures"]["perplexity"])


@pytest.mark.slow
def test_it_is_healed_and_the_healed_one_is_measured(run, program):
  folder, config = run
  healing = heal.get_config(f"compressed={folder},rank=2,smoke")
  healing.data.max_length, healing.data.buckets = 48, (48,)
  train = imported("experiments.train")
  with workdir.open_workdir(folder / "healed", healing.to_dict()) as healed:
    train.train(healing, healed)
  evaluated = json.loads((folder / "healed/eval.json").read_text())
  assert np.isfinite(evaluated["after"]["loss"])
  program.add_healed(config, folder, str(folder / "healed"))
  steps = steps_of(folder)
  assert [row["step"] for row in steps][-2:] == ["quantize", "heal"]
  assert steps[-1]["parameters"] > steps[-2]["parameters"]


def test_a_run_that_heals_another_model_is_refused_and_so_is_the_folder_as_a_run(
  program, tiny, run, adapted
):
  folder, config = run
  with pytest.raises(ValueError, match=r"was trained on .*, and not on .*/run/model"):
    program.add_healed(config, folder, str(adapted))
  (tiny[0] / "beside").mkdir()
  (tiny[0] / "beside/config.json").write_text(json.dumps(config.to_dict()))
  with pytest.raises(ValueError, match=r"holds a compression and no run; its model is .*/model"):
    parts.open_run(tiny[0] / "beside")


def test_a_teacher_is_the_model_before_its_compression(run, tiny):
  folder, config = run
  assert heal.get_config(f"compressed={folder},distill").distill.teacher == config.model.source
  told = config.to_dict() | {"adapter": "runs/x"}
  (tiny[0] / "merged").mkdir()
  (tiny[0] / "merged/config.json").write_text(json.dumps(told))
  with pytest.raises(ValueError, match="adapter of runs/x was part of the model"):
    heal.get_config(f"compressed={tiny[0] / 'merged'},distill")


@pytest.mark.slow
def test_a_compression_that_is_refused_leaves_the_workdir_free(tiny, tmp_path):
  def call(*arguments):
    done = subprocess.run(
      [
        sys.executable, "-m", "experiments.compress", "--config=configs/compress.py:steps=prune",
        f"--workdir={tmp_path / 'run'}", f"--config.model.source={tiny[0] / 'nowhere'}", *arguments,
      ],
      capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode
    return done.stderr

  assert "5 of 3 is no pattern" in call("--config.prune.of=3", "--config.prune.n=5")
  assert "nowhere: no such file" in call()


@pytest.fixture(scope="module")
def factorised(program, tiny):
  fields = {"factorize.method": "svd", "task.examples": 0}
  return compressed(program, tiny, "factorised", "steps=factorize", **fields)[0]


@pytest.mark.slow
def test_factors_whose_ranks_are_fours_are_pruned_two_of_four(program, tiny):
  fields = {
    "factorize.method": "svd",
    "factorize.multiple": 4,
    "prune.targets": ("mlp",),
    "prune.of": 4,
    "task.examples": 0,
  }
  folder, _ = compressed(program, tiny, "fours", "steps=factorize+prune", **fields)
  leaves = tree.flatten(storage.load(folder / "model").params, is_leaf=is_weight)
  factored = [leaf for leaf in leaves.values() if isinstance(leaf, Factored)]
  assert factored and all(leaf.rank % 4 == 0 for leaf in factored)
  for factor in (x for leaf in factored for x in (leaf.a, leaf.b)):
    d, k = factor.shape
    np.testing.assert_array_equal(np.asarray(factor.mask).reshape(d // 4, 4, k).sum(1), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("levels", "block", "double", "method"),
  [("nf4", 16, True, "gptq"), ("int4", 8, False, "nearest")],
)
def test_a_compressed_model_goes_through_a_further_step_in_a_run_of_its_own(
  program, tiny, factorised, capsys, levels, block, double, method
):
  fields = {"levels": levels, "block": block, "double": double, "method": method}
  folder, config = compressed(
    program,
    tiny,
    f"{levels}",
    "steps=quantize",
    **{f"quantize.{name}": x for name, x in fields.items()},
    **{"model.source": str(factorised / "model"), "task.examples": 0},
  )
  printed = capsys.readouterr().out
  assert [row["step"] for row in steps_of(folder)] == ["factorize", "quantize"]
  assert storage.steps_of(folder / "model") == ("factorize", "quantize")
  small = tree.flatten(storage.load(folder / "model").params, is_leaf=lora_jax.is_weight)
  pairs = [(x.a, x.b) for x in small.values() if isinstance(x, Factored)]
  for codes in (small["block_0/attn/query/kernel"], *pairs[0]):
    assert codes.levels == levels and isinstance(codes.scale, Quantized) == double
  dense = 14 - len(pairs) if method == "gptq" else 0
  assert f"to {levels}, {dense} kernels by GPTQ, {14 + len(pairs) - dense} matrices to" in printed
  assert perplexity_of(folder, config) == pytest.approx(perplexity_said(folder))


def test_gptq_changes_what_the_kernels_compute_less_than_the_nearest_levels(tiny):
  """On the text that it was calibrated by, the outputs of a first layer's kernel."""
  config = tiny_compression.config(*tiny, "steps=quantize")
  config.quantize.levels, config.quantize.block = "int4", 8
  config.quantize.targets = ("block_0/attn/query/kernel",)
  found = pretrained.load(config.model.source)
  windows, _, _ = compression_data.read_windows(config.text, found.tokenizer)
  model = compression.Model(found.config, found.params, adapters={})
  data = compression.Windows(windows, 4)
  (path,) = config.quantize.targets
  moments = np.asarray(data.inputs(model, [path])[path].total, np.float64)
  losses = {}
  for config.quantize.method in ("nearest", "gptq"):
    small = compression.quantize_step(config.quantize, model, data).params
    off = np.asarray(lora_jax.materialize(small)["block_0"]["attn"]["query"]["kernel"], np.float64)
    off -= np.asarray(found.params["block_0"]["attn"]["query"]["kernel"])
    losses[config.quantize.method] = np.sum(off * (moments @ off))
  assert losses["gptq"] < 0.7 * losses["nearest"]


# ---- an adapter kept apart


@pytest.fixture(scope="module")
def adapted(tiny):
  return tiny_compression.write_run(
    tiny[0] / "adapted", tiny[0] / "model", lora_jax.LoRA(rank=2, alpha=2.0, dropout=0.1)
  )


@pytest.fixture(scope="module")
def kept(program, tiny, adapted):
  fields = {"adapter": str(adapted), "keep_adapter": True, "prune.targets": ("mlp",)}
  return compressed(program, tiny, "kept", "steps=prune+quantize", **fields)


@pytest.mark.slow
def test_an_adapter_that_is_kept_stays_as_it_is_on_a_smaller_base(program, tiny, adapted, kept):
  folder, config = kept
  before, after = (
    safetensors.load_file(run / "adapter/adapter_model.safetensors") for run in (adapted, folder)
  )
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_allclose(after[name], x, rtol=1e-6)
  small = storage.load(folder / "model").params
  assert isinstance(small["block_0"]["mlp"]["up"]["kernel"], Pruned)
  assert perplexity_of(folder, config) == pytest.approx(perplexity_said(folder))
  found = pretrained.load(config.model.source)
  config = tiny_compression.config(*tiny, "steps=quantize", adapter=str(adapted))
  bare = compression.Model(found.config, found.params, adapters={})
  merged = program.with_adapter(config, bare)
  assert not merged.adapters
  _, held_out, _ = compression_data.read_windows(config.text, found.tokenizer)
  expected = perplexity(merged.apply, merged.weights, held_out)
  assert steps_of(folder)[0]["figures"]["perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_calibration_sees_the_inputs_that_kernels_have_under_the_adapter(program, tiny, adapted):
  config = tiny_compression.config(*tiny, "steps=prune", adapter=str(adapted), keep_adapter=True)
  found = pretrained.load(config.model.source)
  bare = compression.Model(found.config, found.params, adapters={})
  apart = program.with_adapter(config, bare)
  merged = program.absorb(apart)
  assert not merged.adapters
  data = compression.Windows(np.arange(64).reshape(2, 32), 2)
  path = "block_1/mlp/down/kernel"
  for moments in (data.inputs, data.gradients):
    bare_one, apart_one, merged_one = (
      np.asarray(jax.tree.leaves(moments(model, [path])[path])[0])
      for model in (bare, apart, merged)
    )
    np.testing.assert_allclose(apart_one, merged_one, rtol=1e-3, atol=1e-4 * abs(merged_one).max())
    assert np.abs(bare_one - merged_one).max() > 1e-2 * abs(merged_one).max()


def test_adapters_go_into_arrays_masks_and_factors_and_stay_beside_codes(program, tiny, adapted):
  found = pretrained.load(str(tiny[0] / "model"))
  bare = compression.Model(found.config, found.params, adapters={})
  loaded = exchange.load(adapted / "adapter", bare.params, bare.axes, table=found.table)
  adapters = {path: dataclasses.replace(x, dropout=0.0) for path, x in loaded.items()}
  dense, masked, factored, coded = list(adapters)[:4]
  leaves = tree.flatten(bare.params)
  mask = leaves[masked] > 0
  params = tree.replace(
    bare.params,
    {
      masked: Pruned.of(leaves[masked], mask, masked),
      factored: Factored(leaves[factored][:, :2], leaves[factored][:2], path=factored),
      coded: quantized(leaves[coded], INT8, (-2,)),
    },
  )
  model = bare._replace(params=params, adapters=adapters)
  smaller = program.absorb(model)
  assert set(smaller.adapters) == {coded}
  kept = tree.flatten(smaller.params, is_leaf=lora_jax.is_weight)
  assert kept[coded] is tree.flatten(params, is_leaf=lora_jax.is_weight)[coded]
  assert not lora_jax.is_weight(kept[dense])
  assert isinstance(kept[masked], Pruned) and not np.asarray(kept[masked].w)[~mask].any()
  assert isinstance(kept[factored], Factored) and kept[factored].rank == 4
  expected = tree.flatten(lora_jax.materialize(model.weights))
  for path, x in tree.flatten(lora_jax.materialize(smaller.weights)).items():
    np.testing.assert_allclose(x, expected[path], atol=1e-6, err_msg=path)
  with pytest.raises(ValueError, match=f"{coded}: is compressed, a Quantized, which this adapter"):
    program.with_adapter(tiny_compression.config(*tiny, "steps=prune", adapter=str(adapted)), model)


@pytest.mark.slow
def test_the_adapter_beside_the_model_becomes_a_run_that_evaluates_as_the_report_says(tiny, kept):
  folder, _ = kept

  def run(program, *arguments):
    command = [sys.executable, "-m", f"experiments.{program}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout

  run(
    "import_adapter",
    f"--adapter={folder / 'adapter'}",
    f"--workdir={tiny[0] / 'imported'}",
    f"--config={tiny[0] / 'config.py'}",
    f"--config.model.source={folder / 'model'}",
    "--config.model.scan_layers=False",
  )
  run("evaluate", f"--workdir={tiny[0] / 'imported'}", "--examples=8", "--nobase")
  found = json.loads((tiny[0] / "imported/eval_test.json").read_text())
  assert found["adapter"]["accuracy"] == steps_of(folder)[-1]["figures"]["accuracy"]


def test_a_budget_is_of_numbers_of_operations_or_of_measured_time():
  of = {"rows": 3, "dtype": np.dtype("float32")}
  assert compression.UNITS["parameters"](8, 4, **of).at(2) == 24
  assert compression.UNITS["flops"](8, 4, **of).dense == 2 * 3 * 32
  assert compression.UNITS["milliseconds"](8, 4, **of).dense > 0
