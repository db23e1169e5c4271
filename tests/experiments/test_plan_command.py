"""`python -m experiments.plan`, on a model of which there is a configuration and no tensor."""

import dataclasses
import importlib.util
import json
import re
import runpy

import jax
import numpy as np
import pytest
from main_programs import imported, run

import lora_jax
from experiments import defaults, parts, planning, topologies
from lora_jax import compress, tree
from lora_jax.io import configs
from lora_jax.models import llama
from lora_jax.train import plan

command = imported("experiments.plan")

CONFIG = """
import ml_collections
from configs import quickstart

def get_config(text=""):
  config = quickstart.get_config(text)
  config.model.source = {model!r}
  data = config.data
  data.source, data.format, data.columns, data.sign_of = {data!r}, "jsonl", (), ""
  data.buckets = (16, 64)
  data.max_length = 65
  config.train.batch_size = 32
  return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, smollm2):
  """A config of a small Llama that fits SmolLM2's tokenizer, and 120 records."""
  folder = tmp_path_factory.mktemp("planned")
  model = llama.LlamaConfig(
    vocab_size=smollm2.config.vocab_size,
    width=128,
    mlp_width=384,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_length=64,
    tie_embeddings=True,
  )
  (folder / "model").mkdir()
  (folder / "model" / "config.json").write_text(json.dumps(configs.to_hugging_face(model)))
  smollm2.tokenizer.save(folder / "model")
  rows = [{"text": f"film number {n}" + " and on" * (n % 23), "label": "fine"} for n in range(120)]
  (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  path = folder / "config.py"
  path.write_text(CONFIG.format(model=str(folder / "model"), data=str(folder / "data.jsonl")))
  return path


@pytest.fixture
def config(config_file):
  return runpy.run_path(str(config_file))["get_config"]()


def planned(config, mesh):
  case = planning.read(config)
  share = planning.share_of_a_device(config, case, mesh)
  return plan.make_plan(planning.whole_run(config, case, mesh), share)


def mesh_of(data, fsdp, tensor):
  return planning.abstract_mesh({"data": data, "fsdp": fsdp, "tensor": tensor}, None)


def test_it_prints_what_trains_what_it_costs_and_whether_it_fits(config_file):
  printed = run("plan", f"--config={config_file}", "--device_memory=1GB")
  assert re.search(r"data: \d+ examples in \d+ batches, \d+% padding; 160 steps are", printed)
  assert re.search(r"largest batch: 32 rows of 64 tokens, 1 of them", printed)
  assert "parameters train (" in printed
  assert re.search(r"\d\.\d+ TFLOP a step", printed)
  assert "of the 1.0 GB of each device (data 1 x fsdp 1 x tensor 1): it fits" in printed
  assert "activations and gradients" in printed


def test_what_does_not_fit_comes_with_a_remedy(config_file):
  printed = run("plan", f"--config={config_file}", "--device_memory=10MB")
  assert "it does not fit; config.train.accumulate cuts the batch" in printed
  assert "rematerialization: nothing" in printed and "config.model.remat" not in printed


def test_the_arguments_are_those_that_training_has(config):
  mesh = mesh_of(1, 1, 1)
  case = planning.read(config)
  built = planning.whole_run(config, case, mesh)
  params = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  assert sum(leaf.size for leaf in jax.tree.leaves(built.frozen)) == params
  assert built.batch["tokens"].shape == (32, 64) and built.batch["at"].shape == (32, 1)
  assert planned(config, mesh).base == 4 * params


@pytest.mark.slow
def test_packing_accumulation_and_the_chunked_loss_are_planned(config):
  mesh = mesh_of(1, 1, 1)
  plain = planned(config, mesh)
  config.train.accumulate = 4
  parts = planned(config, mesh)
  assert parts.flops == pytest.approx(plain.flops, rel=1e-3)
  assert parts.activations < 0.5 * plain.activations
  config.train.accumulate, config.data.packed_length = 1, 64
  case = planning.read(config)
  ((shape, _),) = case.data["shapes"].items()
  built = planning.whole_run(config, case, mesh)
  assert built.batch["segments"].shape == (32, 64)
  assert built.batch["at"].shape == (32, shape[1]) and shape[1] > 1
  whole = planned(config, mesh)
  config.train.loss_chunk = 1
  assert planned(config, mesh).flops > whole.flops  # the head's forward pass once more


@pytest.mark.slow
def test_a_mesh_shares_out_the_base_the_rows_and_the_heads(config):
  alone = planned(config, mesh_of(1, 1, 1))
  for sizes in ((4, 1, 1), (1, 4, 1), (1, 1, 4)):
    shared = planned(config, mesh_of(*sizes))
    assert shared.flops == alone.flops
    assert 0.2 * alone.activations < shared.activations < 0.55 * alone.activations
    assert (shared.base < alone.base) == (sizes[0] == 1)


@pytest.mark.slow
def test_heads_that_do_not_divide_stay_whole(config):
  case = planning.read(config)
  built = planning.share_of_a_device(config, case, mesh_of(1, 1, 8))  # of four key/value heads
  shapes = {path: leaf.shape for path, leaf in tree.flatten(built.frozen).items()}
  assert shapes["blocks/attn/key/kernel/w"] == (4, 128, 64)
  assert shapes["blocks/mlp/up/kernel/w"] == (4, 128, 48)
  assert planned(config, mesh_of(1, 1, 8)).activations > 0


_SIZES = {
  "hidden_size": 64,
  "intermediate_size": 96,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 64,
}
_EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2}
_QWEN = _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 48}


@pytest.mark.parametrize(
  ("family", "fields"),
  [
    ("gpt_oss", _EXPERTS | {"num_local_experts": 4}),
    ("olmo2", {}),
    pytest.param("qwen3_moe", _QWEN, marks=pytest.mark.slow),
    pytest.param("qwen2", {}, marks=pytest.mark.slow),
    pytest.param("gemma2", {}, marks=pytest.mark.slow),
  ],
)
def test_what_the_rules_of_a_family_leave_whole_is_cut_to_the_heads_of_a_device(
  config, smollm2, tmp_path, family, fields
):
  """Attention sinks, norms of all heads, biases, and the kernels and biases of experts."""
  known = {"model_type": family, "vocab_size": smollm2.config.vocab_size}
  (tmp_path / "config.json").write_text(json.dumps(known | _SIZES | fields))
  smollm2.tokenizer.save(tmp_path)
  config.model.source = str(tmp_path)
  case = planning.read(config)
  alone = planning.make_plan(config, case, mesh_of(1, 1, 1))
  shared = planning.make_plan(config, case, mesh_of(1, 1, 2))
  assert shared.base < alone.base
  assert 0.4 * alone.activations < shared.activations < 0.8 * alone.activations


@pytest.mark.parametrize(
  ("sizes", "devices", "expected"),
  [
    ((-1, 1, 1), 8, (8, 1, 1)),
    ((-1, 2, 2), 8, (2, 2, 2)),
    ((2, 2, 2), None, (2, 2, 2)),
    ((1, -1, 1), None, (1, 1, 1)),
  ],
)
def test_a_mesh_needs_no_devices(sizes, devices, expected):
  names = ("data", "fsdp", "tensor")
  mesh = planning.abstract_mesh(dict(zip(names, sizes, strict=True)), devices)
  assert tuple(mesh.shape.values()) == expected


@pytest.mark.parametrize(("sizes", "devices"), [((-1, 3, 1), 8), ((2, 1, 1), 8), ((-1, 16, 1), 8)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, devices):
  names = ("data", "fsdp", "tensor")
  with pytest.raises(ValueError, match="does not fit 8 devices; see --devices"):
    planning.abstract_mesh(dict(zip(names, sizes, strict=True)), devices)


def test_rows_that_do_not_divide_over_the_mesh_are_refused(config):
  config.train.accumulate = 8
  with pytest.raises(ValueError, match=r"train\.batch_size 32 is no multiple of 8 devices on data"):
    planning.share_of_a_device(config, planning.read(config), mesh_of(8, 1, 1))


@pytest.mark.parametrize(
  ("text", "size"), [("16GB", 16_000_000_000), ("16GiB", 2**34), ("1.5 MB", 1_500_000)]
)
def test_memory_is_given_in_decimal_or_binary_units(text, size):
  assert command.parse_memory(text) == size


@pytest.mark.parametrize("text", ["16", "GB", "16gb", "-1GB", "16 Gigabytes"])
def test_another_way_to_write_memory_is_refused(text):
  with pytest.raises(ValueError, match="a number and one of KB, MB"):
    command.parse_memory(text)


def test_the_devices_own_memory_is_known():
  assert planning.own_memory() > 1e8


def test_more_devices_than_there_are_cannot_be_compiled_for(config):
  case = planning.read(config)
  config.mesh.data, config.mesh.tensor = 1, 64
  with pytest.raises(ValueError, match=r"the mesh has 64 devices, and there are .*NUM_CPU_DEVICES"):
    command.target(config, case, jax.devices(), None)


def share_of_the_compiled(printed):
  (percent,) = re.findall(r"MB are (\d+)%", printed)
  return int(percent) / 100


@pytest.mark.slow
def test_the_compiler_reports_what_was_planned(config_file):
  printed = run("plan", f"--config={config_file}", "--topology=here")
  assert share_of_the_compiled(printed) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (2, 1, 4)])
@pytest.mark.parametrize("arguments", ["", "method=full"])
def test_the_compiler_reports_what_was_planned_for_a_device_of_a_mesh(
  config_file, sizes, arguments
):
  mesh = [
    f"--config.mesh.{name}={n}" for name, n in zip(("data", "fsdp", "tensor"), sizes, strict=True)
  ]
  printed = run(
    "plan",
    f"--config={config_file}:{arguments}",
    *mesh,
    "--topology=here",
    JAX_NUM_CPU_DEVICES=f"{np.prod(sizes)}",
  )
  assert share_of_the_compiled(printed) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["stsb", "sst2,method=full"])
def test_the_compiler_reports_what_was_planned_for_minilm(public_data, arguments):
  del public_data  # which the config finds
  printed = run("plan", f"--config=configs/glue.py:{arguments}", "--topology=here")
  assert share_of_the_compiled(printed) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_a_change_that_would_help_is_compiled_and_named(config, monkeypatch):
  settings = defaults.Settings("none", 0)
  config = settings.applied(config)
  config.data.packed_length = 64
  case, mesh, _ = command.target(config, planning.read(config), jax.devices()[:1], None)
  compiled = command.compile_case(config, case, mesh, jax.devices())
  memory = compiled.peak - 1
  assert not compiled.fits(memory) and compiled.fits(memory + 1)
  asked = [
    ("--config.model.remat=nothing", {"model.remat": "nothing"}),
    ("--config.train.batch_size=33", {"train.batch_size": 33, "train.accumulate": 2}),
  ]
  monkeypatch.setattr(command, "possible_changes", lambda *_: asked)
  _, helps, refused = command.changes_that_help(config, case, mesh, jax.devices(), memory)
  assert re.fullmatch(r"--config\.model\.remat=nothing: 0\.\d\d GB, fits", helps)
  assert "a batch of 33 rows has no 2 equal parts" in refused


def test_the_changes_are_those_that_a_config_has_room_for(config):
  config = defaults.Settings("none", 0).applied(config)
  config.data.packed_length = 64
  mesh, case = mesh_of(1, 1, 1), planning.read(config)
  found = [fields for _, fields in command.possible_changes(config, case, mesh, devices=8)]
  assert found == [
    {"model.remat": "dots"},
    {"model.remat": "nothing"},
    {"train.accumulate": 32},
    {"model.quantize": "nf4"},
    {"mesh.data": 1, "mesh.fsdp": 8, "mesh.tensor": 1},
  ]
  config = defaults.Settings("nothing", 0).applied(config)
  config.model.quantize, config.train.accumulate = "int8", 32
  assert command.possible_changes(config, case, mesh, devices=1) == []


def test_without_the_compiler_of_tpus_the_remedy_is_told(monkeypatch):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r'pip install "lora_jax\[tpu\]" brings it, and no TPU'):
    topologies.devices_of("v5e:2x2")


@pytest.mark.slow
def test_the_program_ends_with_that_remedy_before_anything_is_read(config_file):
  if importlib.util.find_spec("libtpu") is not None:
    pytest.skip("needs an environment without libtpu, which is installed")
  printed = run("plan", "--config=configs/quickstart.py", "--topology=v5e:2x2", fails=True)
  assert "pip install" in printed and "data:" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("format", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_quantized_base_is_planned_as_it_is_loaded(config, tmp_path, format):
  config.model.quantize = format
  case = planning.read(config)
  model = llama.Llama(dataclasses.replace(case.model, param_dtype="float32"))
  params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
  formats = lora_jax.match(
    params, [("all-linear", compress.FORMATS[format])], parts.trace_axes(model, params)
  )
  loaded = compress.quantize(params, formats)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (loaded, case.params))
  assert shapes[0] == shapes[1]
  base = planned(config, mesh_of(1, 1, 1)).base
  assert base == sum(x.nbytes for x in jax.tree.leaves(loaded))


@pytest.mark.slow
def test_loftq_is_planned_on_the_base_that_it_makes(config_file):
  config = runpy.run_path(str(config_file))["get_config"]("method=loftq")
  assert (
    planned(config, mesh_of(1, 1, 1)).base
    < planned(runpy.run_path(str(config_file))["get_config"](), mesh_of(1, 1, 1)).base
  )
