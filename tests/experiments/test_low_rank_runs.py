"""Runs with attention of low rank: what trains, what is stored, and what is refused."""

import json

import numpy as np
import pytest
import tiny_encoder
from main_programs import imported

import lora_jax
from configs import glue, images, quickstart
from experiments import config_checks, methods, model_options, parts
from lora_jax import exchange
from lora_jax.io import export, safetensors
from lora_jax.models import encoder_attention
from lora_jax.models.low_rank_attention import Linformer, Nystrom
from lora_jax.run import workdir
from lora_jax.train import evaluation

train = imported("experiments.train")
FIELDS = ("attention", "attention_rank", "attention_iterations")


def asked(model, *values):
  for field, value in zip(FIELDS, values, strict=True):
    model[field] = value


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A finished run with Linformer, and its config."""
  folder = tmp_path_factory.mktemp("linformer")
  tiny_encoder.write(folder)
  config = tiny_encoder.config_of(folder, "classification", "attention=linformer,landmarks=4")
  config.train.steps, config.evaluation.samples = 8, 0
  with workdir.open_workdir(folder / "run", config.to_dict()) as opened:
    train.train(config, opened)
  return opened, config


@pytest.mark.slow
def test_linformers_leaves_train_in_full_and_are_stored_in_the_adapter(run):
  opened, config = run
  base = methods.load_base(config)
  assert base.config.attention == Linformer(rank=4)
  start = np.asarray(base.params["blocks"]["attn"]["keys_along"])  # the layers are scanned
  assert start.shape == (2, 64, 4) and np.allclose(start.sum(1), 1)
  tensors = safetensors.load_file(opened.adapter / "adapter_model.safetensors")
  stored = [name for name in tensors if "linformer" in name]
  assert len(stored) == 2 * base.config.num_layers
  settings = json.loads((opened.adapter / "adapter_config.json").read_text())
  assert {"linformer.0.keys_along", "classifier"} <= set(settings["modules_to_save"])

  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  adapters = exchange.load(opened.adapter, base.params, axes, table=base.table)
  own = {path: x for path, x in adapters.items() if "_along" in path}
  assert len(own) == 2 and all(isinstance(x, lora_jax.weights.Full) for x in own.values())
  assert all(np.abs(x.dw).max() > 0 for x in own.values())
  task = parts.make_task(config)
  rows = parts.load_records(config.data, task)["test"]
  task = task.of_model(base)
  step = task.make_eval_step(lora_jax.adapt(task.forward(parts.make_model(base.config))))
  weights = lora_jax.attach(base.params, adapters)
  found = evaluation.evaluate(
    step, weights, task.eval_batches(task.examples(rows), 8), task.metrics
  )
  after = json.loads(opened.evaluation.read_text())["after"]
  assert found == pytest.approx(after, rel=1e-4)


@pytest.mark.slow
def test_the_folder_of_a_whole_model_has_no_place_for_them(run, tmp_path):
  base = methods.load_base(run[1])
  with pytest.raises(ValueError, match="a 'bert' with attention of Linformer: keys_along, values_"):
    export.save(tmp_path / "merged", base.params, base.config, base.tokenizer)
  assert model_options.exact_elsewhere(base.config).startswith("attention: trained as Linformer")


@pytest.mark.parametrize(
  ("values", "words"),
  [
    (("nystrom", 0, 6), r"model\.attention_rank 0: attention nystrom needs 1 or more"),
    (("nystrom", 4, 0), r"model\.attention_iterations 0: attention nystrom needs 1 or more"),
    (("linformer", 4, 6), r"model\.attention_iterations 6: attention linformer has none"),
    (("auto", 4, 0), r"model\.attention_rank 4: attention auto has none; set it to 0"),
    (("nystrom", 1 << 17, 6), "landmarks must be a whole number from 1 to 65,536"),
  ],
)
def test_settings_that_do_not_fit_are_refused_before_the_model_is_loaded(
  run, values, words, monkeypatch
):
  config = run[1].copy_and_resolve_references()
  asked(config.model, *values)
  monkeypatch.setattr(parts, "load_model", None)
  with pytest.raises(ValueError, match=words):
    parts.read_shapes(config.model)


def test_decoders_and_convolutions_refuse_them_by_name():
  config = quickstart.get_config()
  asked(config.model, "nystrom", 16, 6)
  with pytest.raises(ValueError, match="nystrom: in it every token sees every other one, and a 'l"):
    parts.read_shapes(config.model)
  config = images.get_config("cifar,model=mobilenet,attention=linformer,landmarks=4")
  with pytest.raises(ValueError, match="linformer: attention of the family 'mobilenet_v2' has one"):
    parts.read_shapes(config.model)
  config.model.attention = "flash"
  with pytest.raises(ValueError, match=r"model\.attention is 'flash'; it must be one of .*nystrom"):
    config_checks.check_run(config)


def test_the_configs_choose_them_and_runs_from_before_are_exact(run):
  config = glue.get_config("sst2,attention=nystrom,landmarks=16")
  assert [config.model[field] for field in FIELDS] == ["nystrom", 16, 6]
  config_checks.check_run(config)
  shapes = parts.read_shapes(config.model)
  assert shapes.config.attention == Nystrom(landmarks=16, iterations=6)
  assert "of low rank, Nystrom(" in model_options.attention_line(shapes.config, config.data)
  assert not encoder_attention.adds_leaves(shapes.config)

  old = run[1].copy_and_resolve_references()
  with old.unlocked():
    for field in FIELDS:
      del old.model[field]
  config_checks.check(old, config_checks.FINISHED, config_checks.ADDED_LATER)
  found = parts.read_shapes(old.model).config
  assert found.attention.name == "auto"
  line = model_options.attention_line(found, old.data)
  assert line == "attention: plain for rows of 24 tokens (model.attention auto)"
