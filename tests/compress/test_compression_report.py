"""What a compressed tree is counted as, and what is written of it."""

import json

import jax
import jax.numpy as jnp
import pytest
from functions import normal

import lora_jax
from lora_jax.compress import pruning, report
from lora_jax.models import llama
from lora_jax.weights import Factored
from lora_jax.weights.quantized import Format, quantized

PARAMS = {
  "dense": normal(8, 6),
  "factored": Factored(normal(8, 2), normal(2, 6)),
  "codes": quantized(normal(8, 6), Format(levels="int8"), (-2,)),
  "pruned": pruning.prune({"w": normal(8, 6)}, ["w"], pruning.magnitude, pruning.n_of_m(2, 4))["w"],
}


def test_numbers_and_bytes_are_those_that_are_held():
  assert report.count_parameters(PARAMS) == 48 + 28 + 48 + 24
  scales = PARAMS["codes"].scale.size
  assert report.count_bytes(PARAMS) == 4 * 48 + 4 * 28 + (48 + 4 * scales) + (4 * 48 + 48)


def test_an_adapter_is_counted_beside_its_base_and_inside_a_mask():
  specs = dict.fromkeys(PARAMS, lora_jax.LoRA(rank=1, alpha=1.0))
  weights = lora_jax.attach(PARAMS, lora_jax.init(jax.random.key(0), PARAMS, specs))
  assert report.count_parameters(weights) == report.count_parameters(PARAMS) + 4 * 14


def test_the_operations_of_a_token_are_those_of_its_products():
  def apply(variables, tokens):
    p = variables["params"]
    return (jax.nn.one_hot(tokens, 8) @ p["factored"]).sum() + (
      jax.nn.one_hot(tokens, 8) @ p["dense"]
    ).sum()

  assert report.flops_per_token(lora_jax.adapt(apply), PARAMS, 4) == 2 * (28 + 48)


def measures(memory, figures, ratios=None):
  return report.Measures(
    parameters=10**6,
    memory=memory,
    disk=memory,
    flops=10**9,
    unit="token",
    times={"prefill": {1: 5.0, 8: 20.0}, "token": {1: 1.0, 8: 2.0}},
    ratios=ratios or {},
    figures=figures,
  )


def rows():
  ratios = {"prefill": {1: 0.5, 8: 0.25}, "token": {1: 1.0, 8: 2.0}}
  return [
    report.Row("dense", measures(4 * 10**6, {"perplexity": 50.0, "accuracy": 0.75})),
    report.Row("prune", measures(10**6, {"perplexity": 75.0}, ratios)),
  ]


def test_the_report_is_a_table_a_plot_and_json(tmp_path):
  report.write(tmp_path, rows(), about="`command`, device")
  text = (tmp_path / "report.md").read_text()
  line = "| prune | 1.0 M (1.00) | 1.0 MB (0.25) | 1.0 MB (0.25) | 1.000 (1.00) | 5.0 ms (0.50) | "
  assert line in text and "2.0 ms (2.00) | 75 | - |" in text and "`command`" in text
  assert "| GFLOP per token | prefill × 1 | prefill × 8 | token × 1 | token × 8 |" in text
  assert "| 1.0 ms | 2.0 ms | 50 | 0.75 |" in text
  found = json.loads((tmp_path / "report.json").read_text())
  assert [row["step"] for row in found["steps"]] == ["dense", "prune"]
  assert found["steps"][1]["figures"]["perplexity"] == 75.0
  assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
  assert report.read(tmp_path) == ("`command`, device", rows())


def test_a_report_whose_steps_do_not_fit_each_other_is_refused(tmp_path):
  first, second = rows()
  other = report.Row("prune", measures(10**6, {"accuracy": 0.5}))
  report.write(tmp_path, [first, second], about="")
  fields = json.loads((tmp_path / "report.json").read_text())
  for change, words in (
    ({"times": {"prefill": {"1": 5.0}}}, "the same batch sizes"),
    ({"figures": other.measures.figures}, "figures is"),
    ({"figures": {"loss": 1.0}}, "not every step has its perplexity"),
    ({"unit": "page"}, "step and unit"),
    ({"memory": 0}, "memory is 0"),
  ):
    damaged = {"about": "", "steps": [fields["steps"][0], fields["steps"][1] | change]}
    (tmp_path / "report.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=words):
      report.read(tmp_path)


def test_latency_is_measured_of_a_prompt_and_of_a_token_against_the_first_model():
  config = llama.LlamaConfig(
    vocab_size=16,
    width=8,
    mlp_width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_length=8,
    tie_embeddings=True,
  )
  model = llama.Llama(config)
  params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  runs = report.decoding(model.apply, params, config, rows=2, length=4)
  times, ratios = report.latencies(runs, None, repeats=2)
  assert times["prefill"][2] > 0 and times["token"][2] > 0 and ratios == {}
  calls = []
  fake = {("latency", 1): lambda: calls.append("first")}
  own = {("latency", 1): lambda: calls.append("own")}
  _, ratios = report.latencies(own, fake, repeats=2)
  assert calls == ["first", "own"] * 3 and ratios["latency"][1] > 0
