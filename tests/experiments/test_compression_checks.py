"""What `experiments.compress` refuses: with the reason, and before anything is written."""

import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_compression
from main_programs import imported

import lora_jax
from configs import compress
from experiments import compression, compression_checks, parts
from lora_jax import tree
from lora_jax.compress import factorization, storage
from lora_jax.io import export, pretrained
from lora_jax.run import workdir
from lora_jax.weights import Pruned


@pytest.fixture(scope="module")
def program():
  return imported("experiments.compress")


@pytest.fixture(scope="module")
def tokenizer():
  return pretrained.inspect(pretrained.DEFAULT).tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
  folder = tmp_path_factory.mktemp("checks")
  return folder, tiny_compression.write(folder, tokenizer)


@pytest.fixture(scope="module")
def model(tiny):
  found = pretrained.load(str(tiny[0] / "model"))
  return compression.Model(found.config, found.params, adapters={})


def refused(program, tmp_path, config, words, monkeypatch):
  """That the program says so before its first measure, and writes nothing."""
  monkeypatch.setattr(program, "Measure", lambda *_: pytest.fail("the work has begun"))
  with pytest.raises(ValueError, match=words):
    program.compress(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("steps", "done", "words"),
  [
    ("quantize+factorize", (), "factorize after quantize makes no sense: the factors"),
    ("prune+factorize", (), "factorize after prune makes no sense"),
    ("quantize+prune", (), "prune after quantize makes no sense"),
    ("factorize+channels", (), "channels after factorize makes no sense"),
    ("value_heads+heads", (), "heads after value_heads makes no sense"),
    ("factorize+factorize", (), "factorize is there twice"),
    ("melt", (), "'melt' is unknown; choose from channels"),
    ("prune", ("quantize",), "prune after quantize, which the model went through already, makes"),
    ("quantize", ("factorize", "quantize"), "the model went through quantize already"),
  ],
)
def test_steps_that_make_no_sense_are_refused_with_the_reason(steps, done, words):
  with pytest.raises(ValueError, match=words):
    compression_checks.check_steps(compress.get_config(f"steps={steps}").steps, done)


def test_steps_in_any_sensible_order_are_taken_in_one_run_or_in_several():
  compression_checks.check_steps(("heads", "channels", "value_heads", "factorize", "quantize"))
  compression_checks.check_steps(("prune", "quantize"), done=("channels", "factorize"))


@pytest.mark.parametrize(
  ("steps", "field", "value", "words"),
  [
    ("factorize", "factorize.budget", 0.0, "give either a budget or an energy"),
    ("factorize", "factorize.budget", 1.5, "must be a fraction below 1"),
    ("factorize", "factorize.method", "magic", "'magic' is unknown; choose from whitened"),
    ("factorize", "factorize.unit", "euros", "'euros' is unknown; choose from parameters"),
    ("prune", "prune.score", "magic", "'magic' is unknown; choose from wanda"),
    ("prune", "prune.share", 1.0, "fraction 1.0 to prune must be above 0"),
    ("prune", "prune.of", 2, "2 of 2 is no pattern"),
    ("quantize", "quantize.levels", "int3", "levels 'int3' are unknown"),
    ("quantize", "quantize.block", 7, "block 7 is not an even number"),
    ("quantize", "quantize.double", True, "double quantizes the scales of blocks"),
    ("quantize", "quantize.method", "magic", "'magic' is unknown; choose from nearest, gptq"),
    ("quantize", "model.quantize", "nf4", "set it to none, and put quantize among the steps"),
    ("quantize", "model.scan_layers", True, "layers are compressed one by one"),
    ("quantize", "keep_adapter", True, "there is no adapter to keep"),
    ("quantize", "text.calibration", 0, "must be 1 or more"),
    ("factorize", "factorize.damping", -1.0, "factorize.damping -1.0 must be 0 or more"),
    ("channels", "channels.damping", -1.0, "channels.damping -1.0 must be 0 or more"),
    ("quantize", "report.prompt", 0, "report.prompt 0 must be 1 or more"),
  ],
)
def test_settings_are_refused_before_the_model_is_loaded(
  program, tmp_path, tiny, monkeypatch, steps, field, value, words
):
  monkeypatch.setattr(parts, "load_model", lambda _: pytest.fail("the model is loaded"))
  config = tiny_compression.config(*tiny, f"steps={steps}", **{field: value})
  refused(program, tmp_path, config, words, monkeypatch)


CANNOT = [
  ("factorize", {"text.calibration": 500}, "asks for 500 for calibration"),
  ("factorize", {"text.calibration": 1}, "has 32 tokens, and .*/mlp/down/kernel 64 inputs"),
  ("channels", {"text.calibration": 1}, "channels: the calibration text has 32 tokens"),
  (
    "quantize", {"text.calibration": 1, "quantize.method": "gptq"},
    "quantize: the calibration text has 32 tokens",
  ),
  ("factorize", {"factorize.budget": 0.01}, "budget 122.9 cannot be met: with rank 1"),
  (
    "factorize", {"factorize.budget": 0.01, "factorize.unit": "flops"},
    "cannot be met: with rank 1",
  ),
  (
    "factorize", {"factorize.budget": 1e-6, "factorize.unit": "milliseconds"},
    "cannot be met: with rank 1",
  ),
  ("channels", {"channels.mlp_width": 64}, "mlp_width is 64 and is to be 64"),
  ("heads", {"heads.num_kv_heads": 0}, "num_kv_heads is 2 and is to be 0"),
  ("value_heads", {"value_heads.value_dim": 8}, "value_dim is 8 and is to be 8"),
  ("prune", {"prune.share": 0.001}, "0.001 of 32 inputs are 0"),
  ("prune", {"prune.of": 5}, "prune.of: block_0/.*: 32 inputs are no multiple of 5"),
  (
    "channels+prune", {"prune.of": 32, "prune.targets": ("mlp",)},
    "block_0/mlp/down/kernel: 48 inputs are no multiple of 32",
  ),
  (
    "factorize+prune", {"prune.of": 4}, "and 5 others are factorized before, to ranks",
  ),
  ("prune", {"prune.targets": (".*/nothing/kernel",)}, "'.*/nothing/kernel' matches no leaf"),
  ("factorize", {"factorize.targets": ("embed/embedding",)}, "its rows are looked up"),
  ("quantize", {"quantize.targets": ("norm/scale",)}, "cannot be adapted: its shape"),
  (
    "quantize", {"quantize.targets": ("embed/embedding",), "quantize.method": "gptq"},
    "gptq is for dense kernels, and every target",
  ),
  ("prune+quantize", {"quantize.method": "gptq"}, "gptq is for dense kernels, and every target"),
]  # fmt: skip


@pytest.mark.parametrize(
  ("steps", "fields", "words"),
  # At every commit every second one.
  [pytest.param(*x, marks=pytest.mark.slow) if n % 2 else x for n, x in enumerate(CANNOT)],
)
def test_what_a_model_cannot_be_put_through_is_refused_before_anything_is_computed(
  program, tmp_path, tiny, monkeypatch, steps, fields, words
):
  config = tiny_compression.config(*tiny, f"steps={steps}", **fields)
  refused(program, tmp_path, config, words, monkeypatch)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_model_with_a_number_that_is_none_is_refused(
  program, tmp_path, tiny, tokenizer, model, monkeypatch, bad
):
  path = "block_1/attn/key/kernel"
  leaf = tree.flatten(model.params)[path].at[3, 4].set(bad)
  damaged = model._replace(params=tree.replace(model.params, {path: leaf}))
  config = tiny_compression.config(*tiny, "steps=channels")
  with pytest.raises(ValueError, match=f"{path}: holds NaN or infinity"):
    compression_checks.check_model(config, damaged, 256)
  export.save(tmp_path / "damaged", model.params, model.config, tokenizer)
  file = tmp_path / "damaged/model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  tensors["model.layers.1.self_attn.k_proj.weight"][4, 3] = bad
  safetensors.numpy.save_file(tensors, file)
  config.model.source = str(tmp_path / "damaged")
  refused(program, tmp_path, config, "not finite", monkeypatch)


# ---- what is compressed already


@pytest.mark.parametrize(
  ("steps", "fields", "words"),
  [
    ("factorize", {}, "the model went through factorize already"),
    ("channels", {}, "channels after factorize, which the model went through already, makes"),
    ("prune", {"prune.of": 4}, "prune.of: block_0/mlp/up/kernel: 6 inputs are no multiple of 4"),
    (
      "quantize",
      {"quantize.method": "gptq", "quantize.targets": (".*/up/kernel",)},
      "gptq is for dense kernels, and every target",
    ),
  ],
)
def test_of_a_compressed_model_the_steps_that_it_went_through_count_as_steps_before(
  program, tmp_path, tiny, tokenizer, model, monkeypatch, steps, fields, words
):
  ranks = {f"block_{n}/mlp/up/kernel": 6 for n in range(2)}
  params = factorization.factorize(model.params, ranks)
  storage.save(tmp_path / "small", params, model.config, tokenizer, steps=["factorize"])
  config = tiny_compression.config(*tiny, f"steps={steps}", **fields)
  config.model.source = str(tmp_path / "small")
  refused(program, tmp_path, config, words, monkeypatch)


@pytest.mark.parametrize(
  ("step", "words"),
  [
    ("factorize", "block_0/mlp/up/kernel: is compressed already, a Pruned"),
    ("prune", "block_0/mlp/up/kernel: is compressed already, a Pruned; prune cannot follow"),
    ("heads", "block_0/mlp/up/kernel: is compressed already, a Pruned, and heads needs dense"),
  ],
)
def test_what_a_kernel_is_counts_where_a_folder_does_not_say_its_steps(tiny, model, step, words):
  path = "block_0/mlp/up/kernel"
  leaf = tree.flatten(model.params)[path]
  pruned = model._replace(
    params=tree.replace(model.params, {path: Pruned.of(leaf, leaf > 0, path)})
  )
  config = tiny_compression.config(*tiny, f"steps={step}")
  with pytest.raises(ValueError, match=words):
    compression_checks.check_model(config, pruned, 256)


# ---- adapters that are kept


@pytest.mark.parametrize(
  ("step", "method", "words"),
  [
    pytest.param(
      "channels",
      lora_jax.LoRA(rank=2, alpha=2.0),
      r"channels makes \(48, 32\) of block_0/mlp/down/kernel, \(64, 32\), and its adapter is kept",
      marks=pytest.mark.slow,
    ),
    (
      "prune",
      lora_jax.DoRA(rank=2, alpha=2.0),
      "block_0/mlp/down/kernel: its adapter, a DoRA, is what it makes of the base before prune",
    ),
    ("quantize", lora_jax.Full(), "its adapter, a Full, is what it makes of the base"),
  ],
)
def test_an_adapter_that_would_mean_something_else_on_the_smaller_base_is_not_kept(
  program, tmp_path, tiny, monkeypatch, step, method, words
):
  run = tiny_compression.write_run(tmp_path / "adapted", tiny[0] / "model", method)
  config = tiny_compression.config(*tiny, f"steps={step}", adapter=str(run), keep_adapter=True)
  refused(program, tmp_path, config, words, monkeypatch)


def test_an_adapter_of_other_kernels_than_a_step_shrinks_is_kept(tiny, model):
  specs = lora_jax.match(model.params, [("mlp", lora_jax.DoRA(rank=2, alpha=2.0))])
  adapters = lora_jax.init(jax.random.key(0), model.params, specs)
  config = tiny_compression.config(*tiny, "steps=heads")
  compression_checks.check_model(config, model._replace(adapters=adapters), 256)


def test_onnx_runtime_is_timed_on_a_task_alone_and_where_it_can_be(monkeypatch):
  config = compress.get_config("steps=factorize")
  config.report.onnx = True
  with pytest.raises(ValueError, match=r"report\.onnx: .* text\.source asks for running text"):
    compression_checks.check_config(config)
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  config = compress.get_config("model=vit,steps=factorize")
  config.report.onnx = True
  with pytest.raises(ImportError, match=r'jax2onnx: pip install "lora_jax\[onnx\]"'):
    compression_checks.check_config(config)


def test_a_workdir_that_holds_a_model_is_left_alone(program, tmp_path, tiny):
  config = tiny_compression.config(*tiny, "steps=quantize")
  with workdir.open_workdir(tmp_path / "run", config.to_dict()) as run:
    (run.path / "model").mkdir()
    with pytest.raises(FileExistsError, match="is there already; use another workdir"):
      program.compress(config, run.path)
