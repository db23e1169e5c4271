"""experiments.export of dense, quantised and compressed models, read where this package is not."""

import dataclasses
import importlib
import json
import pathlib
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import readme_commands
import tiny_experiment
import tiny_tokenizers
from absl import app, flags
from absl.testing import flagsaver
from flax import traverse_util
from peers import torch, transformers

import lora_jax
from experiments import methods, parts
from lora_jax import compress, decompositions, exchange, families, tree
from lora_jax.compress import storage
from lora_jax.io import export as export_lib
from lora_jax.io import gguf_model, pretrained, safetensors
from lora_jax.models import llama
from lora_jax.run import workdir
from lora_jax.weights import Factored, Pruned

TEXT = "A joy of a film."  # the README's
BLOCKED = """
import sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in ("lora_jax", "experiments", "flax"):
      raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def export():
  """The main program, called in this process."""
  program = importlib.import_module("experiments.export")

  def call(*arguments):
    with flagsaver.flagsaver():
      flags.FLAGS(["export", *map(str, arguments)])
      program.main(["export"])

  yield call
  for flag in list(flags.FLAGS.flags_by_module_dict()["experiments.export"]):
    delattr(flags.FLAGS, flag.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("export")
  tiny_experiment.write(folder, pretrained.inspect(pretrained.DEFAULT).tokenizer)
  compressed(folder / "model", folder / "small")
  return folder


def compressed(source, folder):
  """A model with all that experiments.compress makes, in one folder."""
  dense = pretrained.load(source)
  config = dataclasses.replace(dense.config, mlp_width=48, num_heads=2, num_kv_heads=1)
  shapes = families.param_shapes(config)
  params = tree.map_with_path(  # of the channels and the heads the first
    lambda path, leaf: leaf[tuple(slice(n) for n in shapes[path])], dense.params
  )
  axes = parts.trace_axes(llama.Llama(config), params)
  formats = lora_jax.match(params, [(r".*/attn/.*/kernel", compress.NF4)], axes)
  params = compress.quantize(params, formats, axes)
  for block in ("block_0", "block_1"):
    mlp = params[block]["mlp"]
    a, b = decompositions.balanced(decompositions.svd(mlp["gate"]["kernel"], 8))
    mlp["gate"]["kernel"] = Factored(a, b, path=f"{block}/mlp/gate/kernel")
    mask = jnp.abs(mlp["down"]["kernel"]) > 0.05
    mlp["down"]["kernel"] = Pruned.of(mlp["down"]["kernel"], mask, f"{block}/mlp/down/kernel")
  storage.save(folder, params, config, dense.tokenizer)


def make_run(folder, name, fields):
  """A finished run, of a random adapter; returns its path, and its logits of the text."""
  config = runpy.run_path(str(folder / "config.py"))["get_config"]()
  config.update_from_flattened_dict(fields)
  base = methods.load_base(config)
  model = llama.Llama(base.config)
  axes = parts.trace_axes(model, base.params)
  specs = lora_jax.match(base.params, methods.rules_of(config.adapter), axes)
  adapters = lora_jax.init(jax.random.key(0), base.params, specs, axes)
  random = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), adapters
  )
  with workdir.open_workdir(folder / name, config.to_dict()) as run:
    exchange.save(
      run.adapter, adapters, base.params, axes, base_model=config.model.source, table=base.table
    )
  return folder / name, logits_of(base, lora_jax.attach(base.params, adapters))


def logits_of(found, weights) -> np.ndarray:
  """[tokens of the text, vocabulary]"""
  tokens = jnp.asarray([found.tokenizer.encode(TEXT)])
  apply = jax.jit(lora_jax.adapt(llama.Llama(found.config).apply))
  return np.asarray(apply({"params": weights}, tokens))[0]


@pytest.fixture(scope="module")
def dense(folder):
  return make_run(folder, "dense", {})


@pytest.fixture(scope="module")
def quantised(folder):
  return make_run(folder, "quantised", {"model.quantize": "nf4"})


@pytest.fixture(scope="module")
def healed(folder):
  fields = {"model.source": str(folder / "small"), "model.scan_layers": False}
  return make_run(folder, "healed", fields)


# ---- programs


def run_as_the_readme_says(artifact) -> np.ndarray:
  """The logits after the text, by an interpreter in which this package cannot be imported."""
  snippet = readme_commands.exported_program("runs without lora_jax")
  assert f'"{TEXT}"' in snippet
  there = artifact.parent / "elsewhere"
  (there / "runs").mkdir(parents=True)
  artifact.rename(there / "runs/artifact")
  code = BLOCKED + snippet + '\nnp.save("logits.npy", np.asarray(logits))\n'
  subprocess.run([sys.executable, "-I", "-c", code], cwd=there, check=True, timeout=300)
  return np.load(there / "logits.npy")


@pytest.mark.slow
def test_a_program_of_an_adapted_dense_model_runs_without_this_package(
  export, dense, tmp_path, capsys
):
  workdir, expected = dense
  export(
    f"--workdir={workdir}",
    "--to=artifact",
    f"--output={tmp_path / 'artifact'}",
    "--platforms=cpu,cuda,tpu",
  )
  sizes = sum(file.stat().st_size for file in (tmp_path / "artifact").iterdir())
  assert f"{sizes:,} bytes" in capsys.readouterr().out
  names = safetensors.tensor_names(tmp_path / "artifact/params.safetensors")
  assert "blocks/attn/query/kernel" in names and not [x for x in names if x.endswith("/a")]
  np.testing.assert_allclose(
    run_as_the_readme_says(tmp_path / "artifact"), expected[-1], rtol=1e-4, atol=1e-5
  )


@pytest.mark.slow
def test_codes_stay_in_the_program_with_the_adapter_on_top_and_factors_with_it_inside(
  export, healed, tmp_path
):
  workdir, expected = healed
  export(f"--workdir={workdir}", "--to=artifact", f"--output={tmp_path / 'artifact'}")
  kinds = safetensors.tensor_kinds(tmp_path / "artifact/params.safetensors")
  assert kinds["block_0/attn/query/kernel/w/codes"][1] == "U8"
  assert kinds["block_0/mlp/gate/kernel/a"][0] == (32, 8 + 8)
  assert kinds["block_0/attn/query/kernel/a"][1] == "F32"
  assert kinds["block_0/mlp/down/kernel"][0] == (48, 32)  # pruned and healed, an array again
  np.testing.assert_allclose(
    run_as_the_readme_says(tmp_path / "artifact"), expected[-1], rtol=1e-4, atol=1e-5
  )


# ---- dense models


def by_transformers(folder) -> np.ndarray:
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  words = transformers.AutoTokenizer.from_pretrained(folder)
  with torch.no_grad():
    return model.eval()(torch.tensor([words(TEXT).input_ids])).logits.numpy()[0]


@pytest.mark.parametrize("name", [pytest.param("quantised", marks=pytest.mark.slow), "healed"])
def test_what_was_quantised_or_compressed_is_merged_for_transformers(
  export, name, request, tmp_path
):
  workdir, expected = request.getfixturevalue(name)
  export(f"--workdir={workdir}", "--to=merged", f"--output={tmp_path / 'merged'}")
  np.testing.assert_allclose(by_transformers(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)


def test_a_run_becomes_one_file_for_llama_cpp(export, quantised, tmp_path):
  workdir, expected = quantised
  export(f"--workdir={workdir}", "--to=merged_gguf", f"--output={tmp_path / 'model.gguf'}")
  found = pretrained.load(tmp_path / "model.gguf")
  np.testing.assert_allclose(logits_of(found, found.params), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_compressed_model_is_exported_without_a_run(export, folder, tmp_path, capsys):
  small = storage.load(folder / "small")
  expected = logits_of(small, small.params)
  source = f"--model={folder / 'small'}"
  export(source, "--to=merged", f"--output={tmp_path / 'merged'}")
  np.testing.assert_allclose(by_transformers(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)

  config = json.loads((tmp_path / "merged/config.json").read_text())
  assert (config["intermediate_size"], config["num_attention_heads"]) == (48, 2)

  path = tmp_path / "small.gguf"
  export(source, "--to=merged_gguf", "--dtype=q4_0", f"--output={path}")
  printed = capsys.readouterr().out
  assert "wider than asked, in q8_0: token_embd.weight\n" in printed
  assert "in float16: blk.0." in printed  # rows of 48 and of 16
  assert f"{path.stat().st_size:,} bytes" in printed
  directly = tmp_path / "directly.gguf"
  merged = pretrained.load(tmp_path / "merged")
  gguf_model.save(directly, merged.params, merged.config, merged.tokenizer, dtype="q4_0")
  jax.tree.map(
    np.testing.assert_array_equal, pretrained.load(path).params, pretrained.load(directly).params
  )


@pytest.mark.slow
def test_narrower_values_are_refused_where_there_is_no_field_for_them(export, folder, tmp_path):
  config = llama.LlamaConfig(
    vocab_size=49152,
    width=8,
    mlp_width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    value_dim=2,
    max_length=64,
    tie_embeddings=True,
  )
  flat = {path: jnp.ones(shape) for path, shape in families.param_shapes(config).items()}
  params = traverse_util.unflatten_dict(flat, sep="/")
  words = pretrained.inspect(folder / "model").tokenizer
  storage.save(tmp_path / "narrow", params, config, words)
  for to in ("merged", "merged_gguf"):
    with pytest.raises(ValueError, match=r"value_dim 2: .* without the step value_heads"):
      export(f"--model={tmp_path / 'narrow'}", f"--to={to}", f"--output={tmp_path / 'out'}")
  export(f"--model={tmp_path / 'narrow'}", "--to=artifact", f"--output={tmp_path / 'out'}")


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--to=merged", "--workdir=a", "--model=b"], "either --workdir or --model"),
    (["--to=merged"], "either --workdir or --model"),
    (["--to=peft", "--model=b"], "--to=peft writes the adapter of a run; give its --workdir"),
    (["--to=artifact", "--model=b", "--dtype=float16"], "--dtype has no meaning for --to=artifact"),
    (["--to=merged", "--model=b", "--rows=2"], "--rows has no meaning for --to=merged"),
    (["--to=merged", "--model=b", "--dtype=q8_0"], "--dtype=q8_0 is for --to=merged_gguf alone"),
    (["--to=artifact", "--model=b", "--platforms=npu"], r"\['npu'\] are not among cpu, cuda, tpu"),
  ],
)
def test_flags_without_a_meaning_are_refused_before_anything_is_loaded(
  export, tmp_path, arguments, words
):
  with pytest.raises(app.UsageError, match=words):
    export(*arguments, f"--output={tmp_path / 'out'}")


def test_a_package_that_is_not_there_is_named_before_anything_is_loaded(
  export, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  with pytest.raises(ImportError, match=r'jax2onnx: pip install "lora_jax\[onnx\]"'):
    export("--to=onnx", "--model=b", f"--output={tmp_path / 'out'}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_is_exported_in_the_dtype_of_its_files_unless_another_is_asked_for(
  export, tmp_path, dtype
):
  folder = tiny_tokenizers.write(tmp_path / "model", dtype=getattr(torch, dtype))
  asked = f"--model={folder}", "--to=merged"
  export(*asked, f"--output={tmp_path / 'same'}")
  export(*asked, f"--output={tmp_path / 'wide'}", "--dtype=float32")
  export(asked[0], "--to=merged_gguf", f"--output={tmp_path / 'model.gguf'}")
  kinds = safetensors.tensor_kinds(tmp_path / "same" / "model.safetensors").values()
  assert {kind for _, kind in kinds} == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
  assert json.loads((tmp_path / "same" / "config.json").read_text())["torch_dtype"] == dtype
  assert pretrained.load(tmp_path / "wide").stored_dtype == "float32"
  assert pretrained.load(tmp_path / "model.gguf").stored_dtype == dtype
  # What is written is what was there.
  before, after = (
    transformers.AutoModelForCausalLM.from_pretrained(x).state_dict()
    for x in (folder, tmp_path / "same")
  )
  assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("to", ["merged", "merged_gguf"])
@pytest.mark.parametrize("output", ["", "/", "file/out", "..", "file"])
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_loaded(
  export, tmp_path, monkeypatch, to, output
):
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "file").write_text("mine")
  monkeypatch.chdir(tmp_path / "here")
  with pytest.raises((ValueError, OSError), match=r"name a|is empty"):
    export("--model=nowhere", f"--to={to}", f"--output={output}")
  assert [path.name for path in tmp_path.rglob("*")] == ["here", "file"]


@pytest.mark.slow
def test_what_float16_cannot_hold_is_refused_by_name_and_the_current_folder_is_an_output(
  export, folder, tmp_path, monkeypatch
):
  loaded = pretrained.load(folder / "model")
  params = tree.replace(
    loaded.params, {"block_0/mlp/up/kernel": loaded.params["block_0"]["mlp"]["up"]["kernel"] + 7e4}
  )
  large, here = tmp_path / "large", tmp_path / "here"
  export_lib.save(large, params, loaded.config, loaded.tokenizer)
  here.mkdir()
  monkeypatch.chdir(here)
  # Found stacked or not: the command loads scanned layers.
  with pytest.raises(ValueError, match=r"float16 ends at 65504, .*mlp/up/kernel .*bfloat16"):
    export(f"--model={large}", "--to=merged", "--dtype=float16", "--output=.")
  assert not list(here.iterdir())
  export(f"--model={large}", "--to=merged", "--output=.")
  assert pathlib.Path.cwd().samefile(here)
  found = pretrained.load(here).params
  jax.tree.map(np.testing.assert_array_equal, found, params)
