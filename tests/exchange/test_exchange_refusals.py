"""What is refused on the way in and on the way out: by name, with the reason, and never in part."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import peft
from torch_models import gpt2_twins, image_twins, llama_twins, made_by_peft

import lora_jax
from lora_jax import exchange, weights
from lora_jax.io import safetensors

LLAMA = llama_twins()
SCANNED = llama_twins(scan=True)
TIED = llama_twins(tie=True)
GPT2 = gpt2_twins()
IMAGES = image_twins()
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path):
  """An adapter of the query and the down projections, the norm saved with it."""
  specs = lora_jax.match(
    LLAMA.params,
    [(".*/(query|down)/kernel", lora_jax.LoRA(rank=2, alpha=3.0)), ("norm/.*", lora_jax.Full())],
    LLAMA.axes,
  )
  adapters = lora_jax.init(jax.random.key(0), LLAMA.params, specs, LLAMA.axes)
  LLAMA.save(tmp_path / "adapter", adapters)
  return tmp_path / "adapter"


def edit(folder, **fields):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder, change):
  """Writes the tensors again after `change({name in the model: tensor})`."""
  path = folder / "adapter_model.safetensors"
  tensors = {
    name.removeprefix("base_model.model."): x for name, x in safetensors.load_file(path).items()
  }
  change(tensors)
  safetensors.save_file({f"base_model.model.{name}": x for name, x in tensors.items()}, path)


def without(name):
  return lambda tensors: tensors.pop(name)


def moved(name, other):
  return lambda tensors: tensors.update({other: tensors.pop(name)})


def added(name, *shape):
  return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


# ---- in

A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (without(A), f"{QUERY}: has lora_B.weight; an adapter of its kind has lora_A.weight, lora_B"),
    (lambda x: (x.pop(A), x.pop(B)), f"1 parameters that the config names .*{QUERY}.weight of"),
    (without("model.norm.weight"), "model.norm.weight of modules_to_save"),
    (moved(A, "visual.proj.lora_A.weight"), "1 tensors fit nothing in the model: visual.proj"),
    (moved(A, "model.layers.3.self_attn.q_proj.lora_A.weight"), "fit nothing in the model: model"),
    (moved(A, "model.layers.00.self_attn.q_proj.lora_A.weight"), "fit nothing in the model"),
    (moved(A, "model.layers.{i}.self_attn.q_proj.lora_A.weight"), "fit nothing in the model"),
    (moved(A, "model.layers.-1.self_attn.q_proj.lora_A.weight"), "fit nothing in the model"),
    (moved(A, f"{QUERY}.lora_embedding_A"), "an adapter of its kind has"),
    (added(f"{QUERY}.weight", 16, 16), "an adapter of its kind has lora_A"),
    (added(f"{QUERY}.lora_E", 2, 1), "fit nothing in the model"),
    (added("model.base_layer.norm.weight", 16), "are the same parameter"),
    (added(A, 3, 16), r"lora_A.weight: shape \(3, 16\), where the model and the rank say"),
    (added(A, 2, 17), r"lora_A.weight: shape \(2, 17\)"),
    (added(A, 32), r"lora_A.weight: shape \(32,\)"),
    (added(A, 0, 16), r"lora_A.weight: shape \(0, 16\)"),
    (added(B, 2, 16), r"lora_B.weight: shape \(2, 16\), where the model and the rank say"),
    (added("model.norm.weight", 17), r"model.norm.weight: shape \(17,\)"),
    (lambda x: x.update({A: x[A] * np.nan}), "lora_A.weight: holds values that are not finite"),
  ],
)  # fmt: skip
def test_tensors_that_are_not_those_of_the_model_are_refused_by_name(folder, change, words):
  edit_tensors(folder, change)
  with pytest.raises(ValueError, match=words):
    LLAMA.load(folder)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"r": 3}, r"lora_A.weight: shape \(2, 16\), where the model and the rank say"),
    ({"r": 33}, r"rank 33 is out of proportion to a kernel \(16, 16\)"),
    ({"rank_pattern": {"q_proj": 1000000}}, "rank 1000000 is out of proportion"),
    ({"use_dora": True}, "an adapter of its kind has .*lora_magnitude_vector"),
    ({"peft_type": "LOHA"}, "is no field that is known, and what it changes cannot be told"),
    ({"peft_type": "TRAINABLE_TOKENS"}, "is no field that is known"),
    ({"target_modules": ["q_proj", "v_proj"]}, "3 parameters .*v_proj.weight of target_modules"),
    ({"modules_to_save": ["model.norm", "score"]}, "score of modules_to_save"),
    ({"modules_to_save": ["norm"]}, "input_layernorm.weight of modules_to_save"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': the factors belong to a base"),
    ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "loftq"}, "the factors belong to a base"),
    ({"init_lora_weights": "pissa", "use_dora": True}, "the factors belong to a base"),
    ({"init_lora_weights": "lora_ga"}, "the factors belong to a base"),
  ],
)  # fmt: skip
def test_a_config_that_is_not_of_the_tensors_is_refused(folder, fields, words):
  edit(folder, **fields)
  with pytest.raises(ValueError, match=words):
    LLAMA.load(folder)


def test_a_layer_that_is_missing_from_a_stack_is_no_layer_left_out_on_purpose(folder):
  edit_tensors(folder, lambda x: (x.pop(A), x.pop(B)))
  with pytest.raises(ValueError, match=rf"{QUERY}.weight of target_modules"):
    SCANNED.load(folder)
  edit(
    folder, target_modules=r".*(q_proj|down_proj)"
  )  # which says of no layer that it must be there
  adapters = SCANNED.load(folder)
  np.testing.assert_array_equal(adapters["blocks/attn/query/kernel"].a[0], 0)


def test_an_adapter_of_another_model_is_refused(folder):
  with pytest.raises(ValueError, match=r"13 tensors fit nothing in the model: model.*and 5 more"):
    GPT2.load(folder)


def test_projections_that_are_not_in_the_file_are_not_made_up(tmp_path):
  config = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=False)
  made_by_peft(LLAMA, config, tmp_path)
  with pytest.raises(ValueError, match=r"vera_A and base_model.vera_B are not in the file.*=True"):
    LLAMA.load(tmp_path)


def test_projections_that_are_too_small_are_refused(tmp_path):
  made_by_peft(LLAMA, peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path)
  path = tmp_path / "adapter_model.safetensors"
  tensors = safetensors.load_file(path)
  for shape in ((4, 15), (3, 16), (64,)):
    safetensors.save_file(tensors | {"base_model.vera_A": np.zeros(shape, np.float32)}, path)
    with pytest.raises(ValueError, match=r"vera_A: shape .* is too small for .*q_proj, \(4, 16\)"):
      LLAMA.load(tmp_path)


@pytest.mark.parametrize(
  ("twins", "options", "words"),
  [
    (TIED, {"target_modules": ["embed_tokens"]}, "embed_tokens.weight is the head too .lm_head"),
    (TIED, {"target_modules": ["lm_head"]}, "the adapter treats the two differently"),
    (
      TIED,
      {"modules_to_save": ["embed_tokens", "lm_head"]},
      "treats the two differently, where the model here has one array for both",
    ),
    (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "is the head too"),
    (IMAGES, {"target_modules": ["first"], "lora_bias": True}, "B has a bias of its own"),
  ],
)
def test_what_would_be_another_model_here_is_refused(twins, options, words, tmp_path):
  made_by_peft(twins, peft.LoraConfig(r=2, **options), tmp_path)
  with pytest.raises(ValueError, match=words):
    twins.load(tmp_path)


def test_an_embedding_that_was_changed_before_the_training_is_refused(tmp_path):
  made_by_peft(LLAMA, peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path)
  assert len(LLAMA.load(tmp_path)) == 1
  base = LLAMA.params["embed"]["embedding"]
  other = {**LLAMA.params, "embed": {"embedding": base.at[3].add(1.0)}}
  with pytest.raises(
    ValueError, match=r"base_layer.weight is not the embed/embedding that is here"
  ):
    exchange.load(tmp_path, other, LLAMA.axes, **LLAMA.settings)


@pytest.mark.parametrize("rows", [[5, 5], [-1, 5], [5, 40], [5], [5, 6, 7], []])
def test_rows_that_are_not_those_of_the_file_are_refused(rows, tmp_path):
  made_by_peft(
    LLAMA, peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 9]), tmp_path
  )
  edit(tmp_path, trainable_token_indices=rows)
  with pytest.raises(ValueError, match=r"trainable_tokens_delta: "):
    LLAMA.load(tmp_path)


def test_a_base_of_shapes_alone_serves_where_no_values_are_needed(folder):
  shapes = jax.eval_shape(lambda: LLAMA.params)
  with pytest.raises(ValueError, match="norm/scale: its values are needed, but it is only a shape"):
    exchange.load(folder, shapes, LLAMA.axes, **LLAMA.settings)
  edit(folder, modules_to_save=None)
  edit_tensors(folder, without("model.norm.weight"))
  assert len(exchange.load(folder, shapes, LLAMA.axes, **LLAMA.settings)) == 6


def test_the_names_of_the_tensors_are_asked_for(folder, tmp_path):
  words = r"table: the names .* are needed, .* lora_jax.families.tensor_names\(config\)"
  with pytest.raises(TypeError, match=words):
    exchange.load(folder, LLAMA.params, LLAMA.axes)
  adapters = started(LLAMA, [("mlp", LORA)])
  with pytest.raises(TypeError, match=words):
    exchange.save(tmp_path / "x", adapters, LLAMA.params, LLAMA.axes, base_model="tiny")
  with pytest.raises(TypeError, match=words):
    exchange.check(adapters, LLAMA.params, LLAMA.axes)
  assert not (tmp_path / "x").exists()


def test_axes_of_something_else_are_refused(folder):
  with pytest.raises(ValueError, match=r"blocks/attn/key/kernel: has no axes; trace them"):
    exchange.load(folder, SCANNED.params, LLAMA.axes, **LLAMA.settings)


# ---- in, damaged


def damaged(data, content: bytes) -> bytes:
  """The content cut, or with some of its bytes changed, taken out or put in."""
  content = bytearray(content)
  for _ in range(data.draw(st.integers(1, 3))):
    place = data.draw(st.integers(0, len(content)))
    how = data.draw(st.sampled_from(["flip", "cut", "drop", "insert"]))
    if how == "flip" and place < len(content):
      content[place] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
      del content[place:]
    elif how == "drop":
      del content[place : place + data.draw(st.integers(1, 64))]
    else:
      content[place:place] = data.draw(st.binary(min_size=1, max_size=16))
  return bytes(content)


@settings(
  max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), name=st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
def test_a_damaged_file_is_an_error_or_a_whole_adapter(folder, data, name):
  original = (folder / name).read_bytes()
  content = damaged(data, original)
  (folder / name).write_bytes(content)
  try:
    adapters = LLAMA.load(folder)
  except ValueError as error:
    assert len(str(error)) < 4000
  else:  # a flip in a number, or in a field without bearing
    assert len(adapters) == 7
    lora_jax.attach(LLAMA.params, adapters)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(adapters))
  finally:
    (folder / name).write_bytes(original)


# ---- out


def started(twins, rules):
  specs = lora_jax.match(twins.params, rules, twins.axes)
  return lora_jax.init(jax.random.key(0), twins.params, specs, twins.axes)


LORA = lora_jax.LoRA(rank=2, alpha=3.0)
REFUSED = {
  "kinds that do not go together": (
    LLAMA, [("mlp", lora_jax.DoRA(rank=2, alpha=1.0)), ("attention", LORA)],
    "PEFT has one kind of adapter in a folder, and here are LowRank .*attn.* and DoRA .*mlp",
  ),
  "dropouts": (
    LLAMA, [("mlp", LORA), ("attention", dataclasses.replace(LORA, dropout=0.1))],
    "PEFT has one dropout for all modules, and here are 0.1 .* and 0.0",
  ),
  "rows and full training without adapters": (
    LLAMA, [("norm", lora_jax.Full()), ("embed/.*", lora_jax.TokenRows(ids=(1,)))],
    "only alongside adapters",
  ),
  "rows of tokens beside DoRA's cousins": (
    LLAMA, [("mlp", lora_jax.LoHa(rank=2, alpha=1.0)), ("embed/.*", lora_jax.TokenRows(ids=(1,)))],
    "PEFT trains rows of tokens alongside LORA or alone, not alongside LOHA",
  ),
  "rows of several sets alone": (
    LLAMA,
    [("embed/.*", lora_jax.TokenRows(ids=(1,))), ("head/.*", lora_jax.TokenRows(ids=(2,), axis=1))],
    "PEFT trains the same rows of all embeddings",
  ),
  "loha of an embedding": (
    LLAMA, [("embed/.*", lora_jax.LoHa(rank=2, alpha=1.0))],
    "embed/embedding: PEFT has no LOHA of an embedding; merge",
  ),
  "lokr of a conv1d": (
    GPT2, [(".*c_attn/kernel", lora_jax.LoKr(rank=2, alpha=1.0))],
    "h_0/attn/c_attn/kernel: PEFT has no LOKR of transformers' Conv1D",
  ),
  "vera of a convolution": (
    IMAGES, [("first/kernel", lora_jax.VeRA(rank=2))], "PEFT has no VERA of a convolution",
  ),
  "vera of two seeds": (
    LLAMA,
    [("mlp", lora_jax.VeRA(rank=3)), ("attention", lora_jax.VeRA(rank=3, seed=1))],
    "is not a part of the one that all layers share in PEFT",
  ),
  "vera of two ranks": (
    LLAMA,
    [("mlp", lora_jax.VeRA(rank=3)), ("attention", lora_jax.VeRA(rank=2))],
    "is not a part of the one that all layers share|share",
  ),
  "lokr of a window": (
    IMAGES, [("first/kernel", lora_jax.LoKr(rank=1, alpha=1.0))],
    r"first/kernel: PEFT splits the channels .*LoKr\(channels=True\)",
  ),
  "lokr by two factors": (
    LLAMA,
    [("mlp", lora_jax.LoKr(rank=1, alpha=1.0, factor=2)),
     (".*/query/kernel", lora_jax.LoKr(rank=1, alpha=1.0, factor=8))],
    "PEFT splits the sizes of all layers by one factor",
  ),
  "lokr with and without a product": (
    LLAMA,
    [("mlp", lora_jax.LoKr(rank=1, alpha=1.0, decompose_both=True)),
     (".*/query/kernel", lora_jax.LoKr(rank=1, alpha=1.0))],
    "PEFT derives from one rank which matrices of a LoKr are products",
  ),
  "a bias beside LoHa": (
    IMAGES, [("first/kernel", lora_jax.LoHa(rank=2, alpha=1.0)), ("first/bias", lora_jax.Full())],
    "first.bias: PEFT has no LOHA of a module of which another parameter is trained in full",
  ),
  "tied DoRA": (
    TIED, [("embed/.*", lora_jax.DoRA(rank=2, alpha=1.0))],
    "embed/embedding: is the head too, and PEFT cannot tie the two in its LORA",
  ),
  "a tied embedding in full beside LoHa": (
    TIED, [("embed/.*", lora_jax.Full()), ("mlp", lora_jax.LoHa(rank=2, alpha=1.0))],
    "is the head too, and PEFT cannot tie the two in its LOHA",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("twins", "rules", "words"), REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_say_is_refused_and_nothing_is_written(twins, rules, words, tmp_path):
  adapters = started(twins, rules)
  with pytest.raises(ValueError, match=words):
    twins.save(tmp_path / "adapter", adapters)
  assert not list(tmp_path.iterdir())
  table = twins.settings["table"]
  with pytest.raises(ValueError, match=words):
    exchange.check(adapters, twins.params, twins.axes, table=table)


def test_adapters_that_are_not_of_the_model_are_refused(tmp_path):
  adapters = started(LLAMA, [("mlp", LORA)])
  exchange.check(adapters, LLAMA.params, LLAMA.axes, **LLAMA.settings)
  path, adapter = next(iter(adapters.items()))
  for wrong, words in (
    ({}, "there is no adapter to save"),
    ({"nothing/kernel": adapter}, "nothing/kernel: no tensor name in the table leads to this leaf"),
    (
      {path: dataclasses.replace(adapter, a=adapter.a[:-1])},
      f"{path}: the adapter's parts .* do not",
    ),
    ({path: dataclasses.replace(adapter, roles="oi")}, "do not fit|was made for the axes 'oi'"),
  ):
    with pytest.raises(ValueError, match=words):
      LLAMA.save(tmp_path / "adapter", wrong)


def test_a_stack_of_experts_is_refused(tmp_path):
  params = {"block_0": {"experts": {"kernel": jnp.ones((4, 6, 5))}}}
  axes = lora_jax.trace_axes(
    lambda p, x: jnp.einsum("end,edk->enk", x, p["block_0"]["experts"]["kernel"]),
    params,
    jnp.ones((4, 2, 6)),
  )
  adapters = lora_jax.init(
    jax.random.key(0), params, lora_jax.match(params, [(".*", LORA)], axes), axes
  )
  table = {"layers.{i}.experts.weight": "block_{i}/experts/kernel"}
  with pytest.raises(
    ValueError, match=r"experts/kernel: its axes are 'sio', and PEFT knows no stack"
  ):
    exchange.save(tmp_path / "x", adapters, params, axes, base_model="", table=table)


def test_modules_whose_names_end_alike_are_told_apart(tmp_path):
  """PEFT takes a list of modules for the ends of their names."""
  params = {x: {"kernel": jnp.ones((4, 4))} for x in ("fc", "block_fc", "last")}
  table = {
    "fc.weight": "fc/kernel",
    "block.fc.weight": "block_fc/kernel",
    "xlast.weight": "last/kernel",
  }

  def f(p, x):
    return x @ p["fc"]["kernel"] @ p["block_fc"]["kernel"] @ p["last"]["kernel"]

  axes = lora_jax.trace_axes(f, params, jnp.ones((1, 4)))
  adapters = {"fc/kernel": weights.LowRank(None, jnp.ones((4, 2)), jnp.ones((2, 4)), 1.5)}
  both = adapters | {"block_fc/kernel": dataclasses.replace(adapters["fc/kernel"], scale=2.5)}
  exchange.save(tmp_path / "one", adapters, params, axes, base_model="", table=table)
  exchange.save(tmp_path / "two", both, params, axes, base_model="", table=table)
  one, two = (
    json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("one", "two")
  )
  assert re.fullmatch(one["target_modules"], "fc")
  assert not re.fullmatch(one["target_modules"], "block.fc")
  assert two["target_modules"] == ["block.fc", "fc"]
  assert two["alpha_pattern"] in ({"^fc": 3}, {"block.fc": 5})
  assert exchange.load(tmp_path / "two", params, axes, table=table)["fc/kernel"].scale == 1.5
  full = {"last/kernel": weights.Full(None, jnp.ones((4, 4)))}
  table["last.weight"] = table.pop("xlast.weight")
  table["first.last.weight"] = table.pop("block.fc.weight")
  with pytest.raises(
    ValueError, match=r"last is trained in full, but PEFT would match first.last too"
  ):
    exchange.save(tmp_path / "x", adapters | full, params, axes, base_model="", table=table)
