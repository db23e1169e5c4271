"""Counts of what trains, from shapes alone."""

import time

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import LoRA
from lora_jax.models import llama

SMOLLM2 = {
  "vocab_size": 49152,
  "width": 576,
  "mlp_width": 1536,
  "num_layers": 30,
  "num_heads": 9,
  "num_kv_heads": 3,
  "head_dim": 64,
  "max_length": 2048,
  "tie_embeddings": True,
}


def transformer(layers: int, width: int):
  """The abstract leaves of a decoder's or an encoder's blocks."""

  def kernel(d, k):
    return {
      "kernel": jax.ShapeDtypeStruct((d, k), jnp.float32),
      "bias": jax.ShapeDtypeStruct((k,), jnp.float32),
    }

  block = {
    "attn": {name: kernel(width, width) for name in ("query", "key", "value", "out")},
    "mlp": {"up": kernel(width, 4 * width), "down": kernel(4 * width, width)},
  }
  return {f"block_{n}": block for n in range(layers)}


@pytest.mark.parametrize(
  ("layers", "width", "rank", "trainable"),
  [
    pytest.param(12, 768, 8, 294_912, id="RoBERTa-base"),
    pytest.param(24, 1024, 8, 786_432, id="RoBERTa-large"),
    pytest.param(24, 1024, 4, 393_216, id="GPT-2 medium"),
    pytest.param(36, 1280, 4, 737_280, id="GPT-2 large"),
    pytest.param(96, 12288, 1, 4_718_592, id="GPT-3 175B, rank 1"),
    pytest.param(96, 12288, 8, 37_748_736, id="GPT-3 175B, rank 8"),
  ],
)
def test_queries_and_values_have_the_published_number_of_trainable_parameters(
  layers, width, rank, trainable
):
  params = transformer(layers, width)
  specs = lora_jax.match(params, [(r".*/attn/(query|value)/kernel", LoRA(rank=rank, alpha=1.0))])
  report = lora_jax.summary(params, specs)
  assert len(report.rows) == 2 * layers
  assert report.trainable == trainable


def test_gpt_3_is_counted_within_a_second_and_without_an_array():
  params = transformer(96, 12288)
  arrays = len(jax.live_arrays())
  start = time.process_time()
  specs = lora_jax.match(params, [("all-linear", LoRA(rank=8, alpha=1.0))])
  report = lora_jax.summary(params, specs)
  assert time.process_time() - start < 1, "seconds of CPU time"
  assert len(jax.live_arrays()) == arrays
  assert report.parameters > 173e9


def abstract_llama(**changes):
  model = llama.Llama(llama.LlamaConfig(**SMOLLM2 | changes))
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  return model, jax.eval_shape(model.init, jax.random.key(0), tokens)["params"], tokens


@pytest.mark.parametrize("traced", [False, True], ids=["by names", "by tracing"])
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_all_linear_of_smollm2_has_the_trainable_parameters_that_peft_counts(scan_layers, traced):
  model, params, tokens = abstract_llama(scan_layers=scan_layers)
  axes = None
  if scan_layers or traced:
    axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, tokens)
  specs = lora_jax.match(
    params, [("all-linear", LoRA(rank=8, alpha=16.0))], axes=axes if traced else None
  )
  report = lora_jax.summary(params, specs, axes=axes)
  assert (report.trainable, report.parameters) == (2_442_240, 134_515_008)
  assert len(report.rows) == (7 if scan_layers else 7 * 30)


def test_the_table_shows_each_kind_of_leaf_once_with_its_spec_and_the_share():
  params = transformer(12, 768)
  specs = lora_jax.match(
    params,
    [
      (r"block_11/.*", None),
      (r".*/(query|value)/kernel", LoRA(rank=8, alpha=16.0)),
      ("mlp", LoRA(rank=4, alpha=8.0, rslora=True)),
    ],
  )
  report = lora_jax.summary(params, specs)
  lines = str(report).splitlines()
  assert lines[0].split() == ["path", "leaves", "shape", "spec", "trainable"]
  assert [line.split() for line in lines[2:-1]] == [
    ["block_*/attn/query/kernel", "11", "768×768", "LoRA(rank=8,", "alpha=16.0)", "135,168"],
    ["block_*/attn/value/kernel", "11", "768×768", "LoRA(rank=8,", "alpha=16.0)", "135,168"],
    ["block_*/mlp/down/kernel", "11", "3072×768"]
    + ["LoRA(rank=4,", "alpha=8.0,", "rslora=True)", "168,960"],
    ["block_*/mlp/up/kernel", "11", "768×3072"]
    + ["LoRA(rank=4,", "alpha=8.0,", "rslora=True)", "168,960"],
  ]
  assert report.share == report.trainable / report.parameters
  assert lines[-1] == (
    f"{608_256:,} of {report.parameters:,} parameters train ({report.share:.2%})"
  )


def test_a_weight_counts_as_the_array_that_it_stands_for():
  params = {"kernel": jnp.ones((6, 5))}
  spec = {"kernel": LoRA(rank=2, alpha=1.0)}
  healed = lora_jax.attach(params, lora_jax.init(jax.random.key(0), params, spec))
  report = lora_jax.summary(healed, spec)
  assert (report.parameters, report.trainable) == (30, 22)


def test_the_table_lists_what_the_presets_left_out_with_the_reasons():
  params = transformer(2, 16) | {"lm_head": {"kernel": jax.ShapeDtypeStruct((16, 99), jnp.float32)}}
  specs = lora_jax.match(params, [("all-linear", LoRA(rank=2, alpha=4.0))])
  report = lora_jax.summary(params, specs)
  assert report.left_out == {"lm_head/kernel": "its path says that it embeds, reads out or routes"}
  assert str(report).splitlines()[-2] == (
    "left out: lm_head/kernel (1): its path says that it embeds, reads out or routes"
  )
  assert lora_jax.summary(params, {**specs}).left_out == {}
