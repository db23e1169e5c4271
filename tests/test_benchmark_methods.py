"""`benchmarks.methods` on a tiny Llama: the sweep resumes, the table is that of its lines."""

import json

import jax
import jax.numpy as jnp
import pytest
from main_programs import imported

from configs import adapters as presets
from configs import methods as config_file
from lora_jax.io import export
from lora_jax.models import llama

methods = imported("benchmarks.methods")


@pytest.fixture(scope="module")
def get_config(tmp_path_factory, smollm2):
  """From a method and a seed to a config of a tiny Llama on 120 records."""
  folder = tmp_path_factory.mktemp("tiny")
  shape = llama.LlamaConfig(
    vocab_size=smollm2.config.vocab_size,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
    tie_embeddings=True,
  )
  params = llama.Llama(shape).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  export.save(folder / "model", params, shape, smollm2.tokenizer)
  rows = [
    {"text": f"{word} film number {n}", "label": label}
    for n in range(60)
    for word, label in (("fine", "positive"), ("dull", "negative"))
  ]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

  def get_config(method, seed):
    config = config_file.get_config(f"method={method},seed={seed},smoke")
    config.model.source = str(folder / "model")
    data = config.data
    data.source, data.format, data.columns, data.sign_of = (
      str(folder / "data.jsonl"),
      "jsonl",
      (),
      "",
    )
    data.train, data.validation, data.test = 0.6, 0.2, 0.2
    return config

  return get_config


@pytest.mark.slow
def test_a_sweep_makes_the_runs_that_are_not_there_yet(get_config, tmp_path, monkeypatch):
  results = tmp_path / "folder" / "methods.jsonl"
  runs = [("base", get_config("lora", 0)), ("lora", get_config("lora", 0))]
  first = methods.sweep(runs, results)
  assert [(line["method"], line["seed"]) for line in first] == [("base", 0), ("lora", 0)]
  lora = first[1]
  assert lora["trainable"] == 2 * 8 * sum(
    d + k for d, k in [*[(16, 16)] * 4, (16, 24), (16, 24), (24, 16)]
  )
  assert 4 * lora["trainable"] < lora["adapter_bytes"] < 4 * lora["trainable"] + 8192
  assert lora["peak_bytes"] > 4 * 16 * 49152
  assert 0 < lora["step_seconds"] < lora["seconds"]

  measured = []
  monkeypatch.setattr(methods, "measure", lambda config, task: measured.append(config.seed) or lora)
  again = methods.sweep([*runs, ("lora", get_config("lora", 1))], results)
  assert measured == [1]
  assert again[:2] == first
  assert len(results.read_text().splitlines()) == 3

  other = get_config("lora", 0)
  other.adapter.alpha = 3.0
  methods.sweep([("lora", other)], results)
  assert measured == [1, 0]  # a line of another config does not count


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in presets.METHODS if name != "bias"])
def test_every_method_is_measured_from_its_start_to_its_file(get_config, tmp_path, name):
  (line,) = methods.sweep([(name, get_config(name, 0))], tmp_path / "methods.jsonl")
  assert line["adapter_bytes"] > 0
  assert line["trainable"] > 0
  assert f"| {name} |" in methods.format_table([line])


def test_the_table_has_a_row_for_each_method_over_its_seeds():
  def line(method, seed, accuracy, **costs):
    run = {"method": method, "seed": seed, "peak": 2e-3}
    return run | {"accuracy": accuracy, "loss": 0.5} | costs

  costs = {"trainable": 1234567, "peak_bytes": 2e9, "adapter_bytes": 9.8e6}
  table = methods.format_table(
    [
      line("base", 0, 0.8),
      line("lora", 0, 0.84, step_seconds=1.0, **costs),
      line("lora", 1, 0.88, step_seconds=1.5, **costs),
      line("dora", 0, 0.9, step_seconds=1.1, **costs),
    ]
  )
  assert table.splitlines()[2:] == [
    "| base | 80.0 | 0.500 | – | – | – | – | – |",
    "| lora | 86.0 ± 2.8 | 0.500 ± 0.000 | 0.002 | 1,234,567 | 1,250.0 | 2,000.0 | 9.8 |",
    "| dora | 90.0 | 0.500 | 0.002 | 1,234,567 | 1,100.0 | 2,000.0 | 9.8 |",
  ]


@pytest.mark.slow
def test_a_run_that_diverges_is_said_to_and_does_not_stop_the_sweep(get_config, tmp_path):
  config = get_config("lora", 0)
  config.optimizer.peak_learning_rate = 1e30
  (line,) = methods.sweep([("lora", config)], tmp_path / "methods.jsonl")
  assert line["diverged"] <= config.train.steps
  assert f"lora, diverged: seed 0 at step {line['diverged']}" in methods.format_table([line])
  assert methods.format_rates([line]).splitlines()[-1] == "| lora | 1e+30: diverged |"


def test_the_table_of_rates_has_the_mean_of_each():
  lines = [
    {"method": "lora", "seed": seed, "peak": peak, "accuracy": 0.8, "loss": loss}
    for seed, peak, loss in [(0, 2e-3, 0.4), (1, 2e-3, 0.5), (0, 1e-3, 0.3)]
  ]
  assert methods.format_rates(lines).splitlines()[2:] == [
    "| lora | 0.001: 0.300 (80.0), 0.002: 0.450 (80.0) |"
  ]
