"""`model.new_tokens` by the main programs: from the config to a model that others load."""

import json
import pathlib
import runpy

import numpy as np
import pytest
import tiny_experiment
from main_programs import imported, run

from experiments import methods, parts
from lora_jax import exchange, tree
from lora_jax.io import pretrained, tokenizer
from lora_jax.run import workdir as workdir_lib
from lora_jax.weights import LowRank, TokenRows

train = imported("experiments.train")
TOKEN, ID = "<answer>", 49152


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  words = pretrained.inspect(pretrained.DEFAULT).tokenizer
  path = tiny_experiment.write(
    folder, words, model={"new_tokens": (TOKEN,)}, data={"prompt": f"Review: {{text}}\n{TOKEN}"}
  )
  return runpy.run_path(str(path))["get_config"]()


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
  path = tmp_path_factory.mktemp("runs") / "new"
  with workdir_lib.open_workdir(path, config.to_dict()) as opened:
    train.train(config, opened)
  return path


@pytest.mark.slow
def test_a_run_trains_the_row_of_a_new_token_beside_its_adapters(config, workdir):
  result = json.loads((workdir / "eval.json").read_text())
  assert result["after"]["loss"] < result["before"]["loss"]
  settings = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
  assert settings["trainable_token_indices"] == {"model.embed_tokens": [ID]}
  base = methods.load_base(config)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  adapters = exchange.load(workdir / "adapter", base.params, axes, table=base.table)
  assert isinstance(adapters.pop("embed/embedding"), TokenRows)
  assert adapters and all(isinstance(adapter, LowRank) for adapter in adapters.values())


@pytest.mark.slow
def test_what_is_exported_has_the_tokenizer_and_the_rows(config, workdir, tmp_path):
  run("export", f"--workdir={workdir}", "--to=merged", f"--output={tmp_path / 'merged'}")
  merged = pretrained.load(tmp_path / "merged", scan_layers=True)
  assert merged.tokenizer.encode(f"a{TOKEN}b")[1] == ID == merged.config.vocab_size - 1
  base = parts.load_model(config.model)
  now, then = (x["embed"]["embedding"] for x in (merged.params, base.params))
  assert set(np.flatnonzero(np.any(np.asarray(now) != np.asarray(then), axis=1))) == {ID}

  run("export", f"--workdir={workdir}", "--to=peft", f"--output={tmp_path / 'peft'}")
  assert tokenizer.from_folder(tmp_path / "peft").encode(TOKEN) == [ID]


def test_a_plan_counts_the_new_row_and_no_more(config):
  base = parts.inspect_model(config.model)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  specs = methods.specs_of(base, config.model, methods.rules_of(config.adapter), axes)
  assert specs["embed/embedding"].ids == (ID,)
  assert tree.flatten(base.params)["embed/embedding"].shape == (ID + 1, 32)


def test_a_run_of_before_there_was_the_field_has_none(config, workdir, tmp_path):
  assert parts.new_tokens_of(config.model) == (TOKEN,)
  opened, found = parts.open_run(str(workdir))
  assert parts.new_tokens_of(found.model) == (TOKEN,)
  fields = json.loads(opened.config.read_text())
  del fields["model"]["new_tokens"]
  older = tmp_path / "older"
  older.mkdir()
  for path in workdir.iterdir():
    (older / path.name).symlink_to(path) if path != pathlib.Path(opened.config) else None
  (older / opened.config.name).write_text(json.dumps(fields))
  _, found = parts.open_run(str(older))
  assert parts.new_tokens_of(found.model) == ()
