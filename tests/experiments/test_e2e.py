"""The E2E config, with LoRA and in full, from training to BLEU on files of its form."""

import csv
import gzip
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from lora_jax.io import export
from lora_jax.models import llama

ROOT = pathlib.Path(__file__).parents[2]
NAMES = [f"The {word} {number}" for word in ("Mill", "Punter", "Vaults") for number in range(20)]


def write_data(folder):
  """60 tables to train on, their tokens apart, and 3 for the test with two references each."""
  folder.mkdir(parents=True)
  with gzip.open(folder / "trainset_tokenized.csv.gz", "wt", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["mr", "ref"])
    for name in NAMES:
      rows.writerow([f"name[{name}], priceRange[£ 20 - 25]", f"{name} , a pub , costs £ 20 - 25 ."])
  with open(folder / "devset.csv", "w", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["mr", "ref"])
    for name in ("Aromi", "Cotto", "Zizzi"):
      for verb in ("costs", "asks"):
        rows.writerow([f"name[{name}], priceRange[£20-25]", f"{name}, a pub, {verb} £20-25."])


@pytest.fixture(scope="module")
def home(tmp_path_factory, smollm2):
  """A folder with data, and a random Llama that fits SmolLM2's tokenizer."""
  folder = tmp_path_factory.mktemp("e2e")
  write_data(folder / "data" / "e2e")
  config = llama.LlamaConfig(
    vocab_size=smollm2.config.vocab_size,
    width=32,
    mlp_width=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=256,
    tie_embeddings=True,
  )
  init = jax.jit(llama.Llama(config).init)
  params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  export.save(folder / "model", params, config, smollm2.tokenizer)
  return folder


def run(home, program, *arguments):
  """Runs a main program as a user does; returns what it printed on its standard output."""
  done = subprocess.run(
    [sys.executable, "-m", f"experiments.{program}", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=600,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "LORA_JAX_DATA": str(home / "data")},
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["smoke,full", "smoke"])
def test_a_run_is_scored_by_the_texts_that_it_keeps(home, arguments):
  workdir = home / arguments
  run(
    home,
    "train",
    f"--config=configs/e2e.py:{arguments}",
    f"--workdir={workdir}",
    f"--config.model.source={home / 'model'}",
    "--config.evaluation.split=test",
  )
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert lines[-1]["step"] == 4
  printed = run(
    home, "evaluate", f"--workdir={workdir}", "--nobase", "--max_tokens=6", "--beams=1", "--beams=2"
  )
  result = json.loads(printed.splitlines()[-1])
  assert result == json.loads((workdir / "eval_test.json").read_text())
  assert result.keys() == {"split", "length_penalty", "max_tokens", "adapter"}
  # What is read back is what was trained.
  losses = json.loads((workdir / "eval.json").read_text())
  assert result["adapter"]["loss"] == pytest.approx(losses["after"]["loss"], rel=1e-6)
  assert losses["after"]["loss"] < losses["before"]["loss"]
  for beams in (1, 2):
    score = result["adapter"][f"beams {beams}"]
    assert score["texts"] == 3
    assert "nrefs:2" in score["signature"]
    assert (
      f"BLEU {score['bleu']:.2f}, chrF {score['chrf']:.2f} of 3 texts, beams {beams}" in printed
    )
    file = workdir / "generated" / f"test_adapter_beams{beams}.jsonl"
    texts = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [text["prompt"] for text in texts] == [
      f"name[{name}], priceRange[£20-25]\nText:" for name in ("Aromi", "Cotto", "Zizzi")
    ]
    assert texts[0]["references"] == ["Aromi, a pub, costs £20-25.", "Aromi, a pub, asks £20-25."]
    assert any(text["text"] for text in texts)


def test_both_configs_train_on_the_same_batches():
  from configs import e2e

  lora, full = e2e.get_config(), e2e.get_config("full")
  full.train.max_to_keep = lora.train.max_to_keep  # of the larger checkpoints one
  for section in ("data", "train", "evaluation", "model"):
    assert lora[section].to_dict() == full[section].to_dict()
  assert (lora.seed, lora.adapter.method) == (full.seed, "lora")
  assert (full.adapter.method, full.adapter.targets) == ("full", (".*",))
