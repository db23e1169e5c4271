"""Adapters, presets, compression and export of each family, against peft and transformers."""

import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import peft, torch, transformers
from torch_models import Twins, in_peft, made_by_peft, shaken

import lora_jax
from lora_jax import compress, exchange, tree
from lora_jax.compress import attention, factorization, storage, structured_pruning
from lora_jax.families import param_shapes
from lora_jax.io import export, gguf_model, pretrained
from lora_jax.io import gguf as gguf_files
from lora_jax.weights import is_weight, materialize
from lora_jax.weights.probe import Moments

TOKENS = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
# Families whose kernels and norms are those of another one that is here.
ALIKE = ("olmo3", "smollm3", "granite", "ministral", "ministral3")
FIRST = [
  pytest.param(family, name, marks=pytest.mark.slow) if family in ALIKE else (family, name)
  for family, name in families.FIRST.items()
]
# What is stored depends on shapes alone: dense, and with experts.
STORED = ("qwen2", "gpt_oss")
# Biases of a layer, those of norms with them. PEFT's "all-linear" takes experts and routers where
# they were linear layers in transformers 4.
OTHERS = {"qwen2": 3, "gpt2": 6, "qwen3_moe": 1, "gpt_oss": -2}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """What `pretrained.load` makes of a kind's folder, by its name."""

  @functools.cache
  def load(name):
    folder = tmp_path_factory.mktemp("family")
    families.write(folder, name)
    return pretrained.load(folder)

  return load


@pytest.fixture(scope="module")
def twins(loaded):
  @functools.cache
  def make(name):
    found = loaded(name)
    model = found.family.make_model(found.config)
    return Twins(
      functools.partial(families.make, name),
      found.params,
      lambda params, tokens: model.apply({"params": params}, tokens),
      TOKENS,
      {"table": found.family.names["safetensors"]},
    )

  return make


def made(params, axes, rules):
  specs = lora_jax.match(params, rules, axes)
  return shaken(params, lora_jax.init(jax.random.key(1), params, specs, axes))


LORA = lora_jax.LoRA(rank=3, alpha=2.0)


@pytest.mark.parametrize(("family", "name"), FIRST)
def test_an_adapter_of_peft_on_all_linear_layers_and_biases_is_read(twins, tmp_path, family, name):
  model = twins(name)
  config = peft.LoraConfig(
    r=3,
    lora_alpha=2.0,
    target_modules="all-linear",
    task_type="CAUSAL_LM",
    bias="all" if family in ("qwen2", "gpt2") else "none",
  )
  expected = made_by_peft(model, config, tmp_path)
  adapters = model.load(tmp_path)
  own = families.num_kernels(name, families.projections(family))
  others = families.num_layers(name) * OTHERS.get(family, 0)
  beside_layers = {"gpt2": 1, "gemma4_text": 1}.get(family, 0)  # a norm; a projection for layers
  assert len(adapters) == own + others + beside_layers
  assert abs(expected - model.logits({})).max() > 0.1
  np.testing.assert_allclose(model.logits(adapters), expected, atol=1e-4)


@pytest.mark.parametrize(("family", "name"), FIRST)
def test_an_adapter_made_here_with_norms_in_full_gives_the_same_logits_in_peft(
  twins, tmp_path, family, name
):
  model = twins(name)
  norms = [(r"block_\d/(attn|mlp)\w*norm/\w+|norm/\w+", lora_jax.Full())]
  rules = [("attention", LORA), (".*/(up|gate_up|down)/kernel", LORA), *norms]
  adapters = made(model.params, model.axes, rules)
  model.save(tmp_path / "adapter", adapters)
  np.testing.assert_allclose(
    in_peft(model, tmp_path / "adapter"), model.logits(adapters), atol=1e-4
  )


@pytest.mark.parametrize(("family", "name"), FIRST)
def test_the_presets_adapt_projections_and_leave_norms_and_biases_out(twins, family, name):
  model = twins(name)
  layers, kernels = families.num_layers(name), families.projections(family)
  of_mlp = [x for x in kernels if x in ("gate", "up", "gate_up", "down")]
  expected = {
    "all-linear": kernels,
    "attention": [x for x in kernels if x not in (*of_mlp, *families.PER_LAYER)],
    "mlp": of_mlp,
  }
  for preset, wanted in expected.items():
    specs = lora_jax.match(model.params, [(preset, LORA)], model.axes)
    blocks = [path for path in specs if path.startswith("block_")]
    assert sorted({path.split("/")[-2] for path in blocks}) == sorted(wanted), preset
    assert len(blocks) == families.num_kernels(name, wanted)
    assert {*specs} - {*blocks} <= {"head/kernel", "per_layer_model/kernel"}
    embeddings = ("embed", "embed_per_layer", "positions", "head")
    apart = {x for x in specs.left_out if x.split("/")[0] not in embeddings}
    routers = {path for path in apart if "routes" in specs.left_out[path]}
    assert len(routers) == (
      layers if family in families.WITH_EXPERTS and preset != "attention" else 0
    )
    assert all("router/kernel" in path for path in routers)
    # The biases of experts are looked up.
    assert all(path.endswith("/bias") for path in apart - routers)
    assert str(lora_jax.summary(model.params, specs)).count("kernel") >= len(wanted)


@pytest.mark.parametrize(("family", "name"), FIRST)
def test_a_merged_model_is_read_back_by_transformers_as_the_family_that_it_was(
  loaded, twins, tmp_path, family, name
):
  found, model = loaded(name), twins(name)
  adapters = made(model.params, model.axes, [("all-linear", LORA)])
  merged = lora_jax.merge(found.params, adapters)
  export.save(tmp_path / "merged", merged, found.config, found.tokenizer)
  peer, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert type(peer) is type(families.make(name))
  with torch.no_grad():
    theirs = peer.eval()(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(theirs, model.logits(adapters), atol=1e-4)
  again = pretrained.load(tmp_path / "merged")
  assert again.config == found.config
  jax.tree.map(np.testing.assert_array_equal, again.params, merged)


@pytest.mark.parametrize(
  ("family", "name"),
  [
    pytest.param(family, name, marks=() if family in STORED else pytest.mark.slow)
    for family, name in families.FIRST.items()
  ],
)
def test_a_model_in_nf4_and_one_in_factors_are_stored_and_the_same_when_read(
  loaded, twins, tmp_path, family, name
):
  found, model = loaded(name), twins(name)
  formats = lora_jax.match(model.params, [("all-linear", compress.FORMATS["nf4"])], model.axes)
  nf4 = compress.quantize(model.params, formats, model.axes)
  ranks = dict.fromkeys([path for path in formats if "/mlp/" in path], 20)
  factored = factorization.factorize(model.params, ranks, axes=model.axes)
  dense = model.logits({})
  for kind, params in (("nf4", nf4), ("factors", factored)):
    storage.save(tmp_path / kind, params, found.config, found.tokenizer)
    again = storage.load(tmp_path / kind)
    assert again.config == found.config
    formed = jax.tree.map(materialize, params, is_leaf=is_weight)
    expected = jax.jit(model.apply)(formed, TOKENS)
    apply = lora_jax.adapt(again.family.make_model(again.config).apply, strict=kind == "factors")
    got = jax.jit(apply)({"params": again.params}, jnp.asarray(TOKENS))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert 1e-3 < np.sqrt(np.mean((expected - dense) ** 2)) < 2.0


@pytest.mark.parametrize(
  "name", ["Qwen 2", "Qwen 3, heads of 128", "Mistral without a window", "GPT-2", "GPT-2, untied"]
)
def test_a_gguf_file_is_read_back_here_and_by_transformers(loaded, tmp_path, name):
  found, path = loaded(name), tmp_path / "model.gguf"
  gguf_model.save(path, found.params, found.config, found.tokenizer)
  architecture = {"mistral": "llama"}.get(found.config.family, found.config.family)
  assert gguf_files.read(path).metadata["general.architecture"] == architecture
  again = pretrained.load(path)
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  assert again.config.family == architecture
  # transformers reads the positions of GPT-2 as n_ctx, and has 1,024 whatever that is.
  fields = {"n_positions": 256} if found.config.family == "gpt2" else {}
  peer = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path, gguf_file="model.gguf", dtype=torch.float32, **fields
  )
  with torch.no_grad():
    theirs = peer.eval()(torch.tensor(TOKENS)).logits.numpy()
  ours = jax.jit(again.family.make_model(again.config).apply)({"params": again.params}, TOKENS)
  np.testing.assert_allclose(theirs, ours, atol=1e-4)


@pytest.mark.parametrize(
  ("name", "words"),
  [
    (
      "gpt-oss, tied, no windows, unscaled",
      "llama.cpp's architecture 'gpt-oss' has no head that is tied to the embedding; export the",
    ),
    (
      "Gemma 4",
      "GGUF files of the family 'gemma4_text' are not supported; supported: llama, mistral",
    ),
    ("Phi 3 with a window", "llama.cpp's architecture 'phi3' has no window=6; export the model"),
    ("Mistral", "llama.cpp's architecture 'llama' has no window=6; export the model as a folder"),
    ("GPT-2 of Stanford", "llama.cpp's architecture 'gpt2' has no scale_by_layer=True; export the"),
  ],
)
def test_what_llama_cpp_is_not_given_is_refused_by_name(loaded, twins, tmp_path, name, words):
  found, model = loaded(name), twins(name)
  with pytest.raises(ValueError, match=words):
    gguf_model.save(tmp_path / "model.gguf", found.params, found.config, found.tokenizer)
  adapters = made(model.params, model.axes, [("attention", LORA)])
  with pytest.raises(ValueError, match=words):
    exchange.save_gguf(tmp_path / "a.gguf", adapters, model.params, model.axes, config=found.config)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "tensor", "kernel"),
  [("Qwen 2", "attn_q", "query"), ("GPT-2", "attn_qkv", "qkv")],
)
def test_an_adapter_in_gguf_has_its_rows_as_they_are(loaded, twins, tmp_path, name, tensor, kernel):
  found, model = loaded(name), twins(name)
  adapters = made(model.params, model.axes, [("attention", LORA)])
  path = tmp_path / "a.gguf"
  exchange.save_gguf(path, adapters, model.params, model.axes, config=found.config)
  file = gguf_files.read(path)
  assert file.metadata["general.architecture"] == found.config.family
  b = file.tensors[f"blk.1.{tensor}.weight.lora_b"].load()
  np.testing.assert_array_equal(b, np.asarray(adapters[f"block_1/attn/{kernel}/kernel"].b).T)


@pytest.mark.parametrize("by_name", [["qkv_proj", "down_proj"], "all-linear"])
def test_an_adapter_of_peft_on_fused_projections_is_read_and_written(twins, tmp_path, by_name):
  model = twins("Phi 4 mini")
  config = peft.LoraConfig(r=3, lora_alpha=2.0, target_modules=by_name, task_type="CAUSAL_LM")
  expected = made_by_peft(model, config, tmp_path / "theirs")
  adapters = model.load(tmp_path / "theirs")
  assert adapters["block_1/attn/qkv/kernel"].b.shape == (3, 64)  # 4 + 2 + 2 heads of 8 features
  np.testing.assert_allclose(model.logits(adapters), expected, atol=1e-4)
  model.save(tmp_path / "ours", adapters)
  np.testing.assert_allclose(in_peft(model, tmp_path / "ours"), expected, atol=1e-4)


def test_fused_kernels_and_norms_over_all_heads_are_not_pruned(loaded):
  phi, olmo = loaded("Phi 4 mini"), loaded("OLMo 2")
  for change in (
    lambda: structured_pruning.prune_channels(phi.params, phi.config, 24, {}),
    lambda: structured_pruning.prune_heads(phi.params, phi.config, 1, {}),
    lambda: attention.shrink_values(phi.params, phi.config, 4),
  ):
    with pytest.raises(ValueError, match="fused"):
      change()
  with pytest.raises(ValueError, match="norms of queries and keys are over all heads"):
    structured_pruning.prune_heads(olmo.params, olmo.config, 1, {})


def test_layers_of_several_sizes_are_not_pruned_alike(loaded):
  found = loaded("Gemma 4")
  for field, change in (
    ("mlp_width", lambda: structured_pruning.prune_channels(found.params, found.config, 24, {})),
    ("num_kv_heads", lambda: structured_pruning.prune_heads(found.params, found.config, 1, {})),
    ("value_dim", lambda: attention.shrink_values(found.params, found.config, 4)),
  ):
    with pytest.raises(
      ValueError, match=f"^{field}: the layers of a 'gemma4_text' differ in their"
    ):
      change()


def moments_of(config, kernel, width):
  """Second moments of the inputs, of a size, to a kernel of each layer."""
  rows = np.random.default_rng(0).normal(size=(200, width)).astype(np.float32)
  return {
    f"block_{i}/{kernel}/kernel": Moments(jnp.asarray(rows.T @ rows), jnp.asarray(200.0))
    for i in range(config.num_layers)
  }


def test_heads_of_a_model_with_biases_are_pruned_with_their_biases_and_values_not_shrunk(loaded):
  found = loaded("Qwen 2")
  moments = moments_of(found.config, "attn/out", 32)
  params, config = structured_pruning.prune_heads(found.params, found.config, 1, moments)
  assert config.num_heads == 2
  shapes = {x: leaf.shape for x, leaf in tree.flatten(params).items()}
  assert shapes == param_shapes(config)
  old, new = (tree.flatten(x)["block_0/attn/key/bias"] for x in (found.params, params))
  assert new.tolist() in (old[:8].tolist(), old[8:].tolist())
  with pytest.raises(ValueError, match="values that have a bias cannot be shrunk"):
    attention.shrink_values(found.params, found.config, 4)


def test_heads_are_pruned_with_their_sinks_and_channels_of_experts_are_not(loaded):
  found = loaded("gpt-oss")
  moments = moments_of(found.config, "attn/out", 64)
  params, config = structured_pruning.prune_heads(found.params, found.config, 1, moments)
  assert {x: leaf.shape for x, leaf in tree.flatten(params).items()} == param_shapes(config)
  for i in range(config.num_layers):
    old, new = (tree.flatten(x) for x in (found.params, params))
    first = bool(
      np.array_equal(new[f"block_{i}/attn/key/bias"], old[f"block_{i}/attn/key/bias"][:16])
    )
    kept = slice(0, 2) if first else slice(2, 4)
    assert new[f"block_{i}/attn/sinks"].tolist() == old[f"block_{i}/attn/sinks"][kept].tolist()
  with pytest.raises(ValueError, match="mlp_width: the MLPs are of experts"):
    structured_pruning.prune_channels(found.params, found.config, 12, moments)


def test_channels_of_gpt_2_are_pruned_with_their_biases_and_heads_of_a_fused_kernel_are_not(loaded):
  found = loaded("GPT-2")
  moments = moments_of(found.config, "mlp/down", 128)
  params, config = structured_pruning.prune_channels(found.params, found.config, 96, moments)
  shapes = {x: leaf.shape for x, leaf in tree.flatten(params).items()}
  assert config.mlp_width == 96 and shapes == param_shapes(config)
  old, new = (tree.flatten(x) for x in (found.params, params))
  kernel, bias = "block_1/mlp/up/kernel", "block_1/mlp/up/bias"
  kept = [np.asarray(old[kernel]).T.tolist().index(x) for x in np.asarray(new[kernel]).T.tolist()]
  np.testing.assert_array_equal(new[bias], old[bias][np.array(kept)])
  for what, prune in (
    ("heads", lambda: structured_pruning.prune_heads(found.params, found.config, 1, {})),
    ("value_heads", lambda: attention.shrink_values(found.params, found.config, 4)),
  ):
    with pytest.raises(ValueError, match=rf"^{what}: this model has no kernel block_0/attn/"):
      prune()
