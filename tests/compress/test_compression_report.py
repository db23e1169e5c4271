"""What a compressed tree is counted as, and what is written of it."""

import json

import jax
import jax.numpy as jnp
from functions import normal

import lora_jax
from lora_jax.compress import prune, report
from lora_jax.models import llama
from lora_jax.weights import Factored
from lora_jax.weights.quantized import Format, quantized

PARAMS = {
  "dense": normal(8, 6),
  "factored": Factored(normal(8, 2), normal(2, 6)),
  "codes": quantized(normal(8, 6), Format(levels="int8"), (-2,)),
  "pruned": prune.prune({"w": normal(8, 6)}, ["w"], prune.magnitude, prune.n_of_m(2, 4))["w"],
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


def measures(memory, perplexity, accuracy=0.75):
  return report.Measures(
    parameters=10**6, memory=memory, disk=memory, flops=10**9, prefill={1: 5.0, 8: 20.0},
    token={1: 1.0, 8: 2.0}, perplexity=perplexity, accuracy=accuracy,
  )  # fmt: skip


def test_the_report_is_a_table_a_plot_and_json(tmp_path):
  rows = [
    report.Row("dense", measures(4 * 10**6, 50.0)),
    report.Row("prune", measures(10**6, 75.0, None)),
  ]
  report.write(tmp_path, rows, about="`command`, device")
  text = (tmp_path / "report.md").read_text()
  line = (
    "| prune | 1.0 M (1.00) | 1.0 MB (0.25) | 1.0 MB (0.25) | 1.000 (1.00) | 5.0 ms | 20.0 ms |"
  )
  assert line in text and "75.00 | - |" in text and "75.0%" in text and "`command`" in text
  found = json.loads((tmp_path / "report.json").read_text())
  assert [row["step"] for row in found["steps"]] == ["dense", "prune"]
  assert found["steps"][1]["perplexity"] == 75.0
  assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_latency_is_measured_of_a_prompt_and_of_a_token():
  config = llama.LlamaConfig(
    vocab_size=16, width=8, mlp_width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    max_length=8, tie_embeddings=True,
  )  # fmt: skip
  model = llama.Llama(config)
  params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  prefill, token = report.latency(model.apply, params, config, rows=2, length=4, repeats=2)
  assert prefill > 0 and token > 0
