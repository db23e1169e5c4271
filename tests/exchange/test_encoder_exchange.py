"""Adapters, presets, compression and export of each encoder, against peft and transformers."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import peft, torch, transformers
from torch_models import Twins, in_peft, made_by_peft, shake, shaken

import lora_jax
from lora_jax import compress, exchange
from lora_jax.compress import factorization, storage
from lora_jax.io import export, pretrained
from lora_jax.weights import is_weight, materialize

TOKENS = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
FIRST = ("BERT", "RoBERTa", "DistilBERT")
LORA = lora_jax.LoRA(rank=3, alpha=2.0)
READ_OUT = ("(head|pooler)/.*", lora_jax.Full())  # as the tasks train it


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """What `pretrained.load` makes of a kind's folder, by its name and transformers' class."""

  @functools.cache
  def load(name, head=None):
    folder = tmp_path_factory.mktemp("encoder")
    families.write(folder, name, head)
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
      {"table": found.table},
    )

  return make


def made(params, axes, rules):
  specs = lora_jax.match(params, rules, axes)
  return shaken(params, lora_jax.init(jax.random.key(1), params, specs, axes))


# PEFT's own names of the linear layers of a block.
BY_NAME = {
  "BERT": ["query", "value", "intermediate.dense"],
  "RoBERTa": ["query", "value", "intermediate.dense"],
  "DistilBERT": ["q_lin", "v_lin", "lin1"],
}


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("targets", ["all-linear", "by name"])
def test_a_classifier_of_peft_is_read_with_its_modules_to_save(twins, tmp_path, name, targets):
  model = twins(name)
  config = peft.LoraConfig(
    r=3,
    lora_alpha=2.0,
    task_type="SEQ_CLS",
    target_modules=BY_NAME[name] if targets == "by name" else "all-linear",
    # PEFT adds `classifier`, by whose ending it would save what it has adapted already.
    modules_to_save=["pre_classifier"] if name == "DistilBERT" else None,
  )
  expected = made_by_peft(model, config, tmp_path)
  adapters = model.load(tmp_path)
  assert {"head/kernel", "head/bias"} <= {
    path for path, x in adapters.items() if isinstance(x, lora_jax.weights.Full)
  }
  kernels = [path for path in adapters if path.startswith("block_")]
  assert len(kernels) == 2 * (6 if targets == "all-linear" else 3)
  assert abs(expected - model.logits({})).max() > 0.1
  np.testing.assert_allclose(model.logits(adapters), expected, atol=1e-4)


@pytest.mark.parametrize("name", FIRST)
def test_an_adapter_with_its_read_out_in_full_gives_the_same_logits_in_peft(twins, tmp_path, name):
  model = twins(name)
  adapters = made(model.params, model.axes, [READ_OUT, ("all-linear", LORA)])
  assert len(adapters) == 2 * 6 + 4
  folder = tmp_path / "adapter"
  model.save(folder, adapters, task_type="SEQ_CLS")
  assert abs(model.logits(adapters) - model.logits({})).max() > 0.1
  np.testing.assert_allclose(in_peft(model, folder), model.logits(adapters), atol=1e-4)
  again = model.load(folder)
  np.testing.assert_allclose(model.logits(again), model.logits(adapters), atol=1e-5)
  # As a user loads it, for a model whose head is new.
  peer = peft.PeftModel.from_pretrained(families.make(name), folder).eval()
  with torch.no_grad():
    theirs = peer(torch.tensor(TOKENS)).logits
  np.testing.assert_allclose(theirs, model.logits(adapters), atol=1e-4)


def test_a_part_of_robertas_head_in_full_is_saved_with_the_rest_of_it(twins, tmp_path):
  model = twins("RoBERTa")
  adapters = made(model.params, model.axes, [("head/.*", lora_jax.Full()), ("attention", LORA)])
  model.save(tmp_path / "adapter", adapters, task_type="SEQ_CLS")
  np.testing.assert_allclose(
    in_peft(model, tmp_path / "adapter"), model.logits(adapters), atol=1e-4
  )
  both = made(model.params, model.axes, [("head/.*", lora_jax.Full()), ("all-linear", LORA)])
  with pytest.raises(ValueError, match=r"classifier\.dense: has an adapter, but PEFT saves"):
    model.save(tmp_path / "both", both, task_type="SEQ_CLS")


def test_the_adapter_of_a_body_has_the_names_of_transformers_body(loaded, tmp_path):
  found = loaded("BERT", "Model")
  model = found.family.make_model(found.config)
  assert found.peft_task == "FEATURE_EXTRACTION"

  def apply(params, tokens):
    return model.apply({"params": params}, tokens)

  axes = lora_jax.trace_axes(apply, found.params, jnp.asarray(TOKENS))
  peer = families.make("BERT", "Model")
  config = peft.LoraConfig(
    r=3, lora_alpha=2.0, target_modules="all-linear", task_type="FEATURE_EXTRACTION"
  )
  twin = Twins(lambda: peer, found.params, lambda *x: apply(*x)[1], TOKENS, {"table": found.table})
  theirs = peft.get_peft_model(peer, config)

  shake(theirs)
  theirs.save_pretrained(tmp_path / "theirs")
  with torch.no_grad():
    expected = theirs.eval()(torch.tensor(TOKENS)).pooler_output
  adapters = exchange.load(tmp_path / "theirs", found.params, axes, table=found.table)
  np.testing.assert_allclose(twin.logits(adapters), expected, atol=1e-4)


@pytest.mark.parametrize("name", FIRST)
def test_the_presets_adapt_projections_and_leave_the_embeddings_out(twins, name):
  model = twins(name)
  attention, mlp = ("key", "out", "query", "value"), ("down", "up")
  expected = {"all-linear": attention + mlp, "attention": attention, "mlp": mlp}
  for preset, wanted in expected.items():
    specs = lora_jax.match(model.params, [(preset, LORA)], model.axes)
    blocks = [path for path in specs if path.startswith("block_")]
    assert sorted({path.split("/")[-2] for path in blocks}) == sorted(wanted), preset
    assert len(blocks) == 2 * len(wanted)
    assert {*specs} - {*blocks} == ({"pooler/kernel"} if preset == "all-linear" else set())
  left_out = lora_jax.match(model.params, [("all-linear", LORA)], model.axes).left_out
  tables = {"embed/embedding", "positions/embedding"}
  assert left_out.keys() - {"types/embedding"} == tables | {"head/kernel"}


@pytest.mark.parametrize("name", FIRST)
def test_every_kernels_axes_are_traced(twins, name):
  model = twins(name)
  for path, axes in model.axes.items():
    if path.endswith("/kernel"):
      assert axes.roles == "io" and axes.uses == ("dot_general",), path
    assert not axes.not_followed, path


@pytest.mark.parametrize("name", FIRST)
def test_a_merged_classifier_is_read_back_by_transformers_as_the_family_that_it_was(
  loaded, twins, tmp_path, name
):
  found, model = loaded(name), twins(name)
  adapters = made(model.params, model.axes, [READ_OUT, ("all-linear", LORA)])
  merged = lora_jax.merge(found.params, adapters)
  export.save(tmp_path / "merged", merged, found.config, found.tokenizer)
  peer, info = transformers.AutoModelForSequenceClassification.from_pretrained(
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
  ("name", "head"), [("BERT", "Model"), ("BERT", "ForMaskedLM"), ("RoBERTa", "Model")]
)
def test_a_body_is_written_as_transformers_body(loaded, tmp_path, name, head):
  found = loaded(name, head)
  scanned = dataclasses.replace(found.config, scan_layers=True)
  export.save(tmp_path / "body", found.params, found.config, found.tokenizer)
  peer, info = transformers.AutoModel.from_pretrained(
    tmp_path / "body", output_loading_info=True, attn_implementation="eager"
  )
  assert not info["unexpected_keys"]
  assert all("pooler" in key for key in info["missing_keys"])
  with torch.no_grad():
    theirs = peer.eval()(torch.tensor(TOKENS)).last_hidden_state
  model = found.family.make_model(found.config)
  hidden = model.apply({"params": found.params}, TOKENS, method="hidden")
  np.testing.assert_allclose(theirs, hidden, atol=1e-4)
  again = pretrained.load(tmp_path / "body")
  assert again.config == found.config != scanned
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


@pytest.mark.parametrize("name", FIRST)
def test_an_encoder_in_nf4_and_one_in_factors_are_stored_and_the_same_when_read(
  loaded, twins, tmp_path, name
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


def test_an_adapted_encoder_stays_factored_with_padding_and_gradients(loaded, twins):
  found, model = loaded("BERT"), twins("BERT")
  adapters = made(model.params, model.axes, [READ_OUT, ("all-linear", LORA)])
  weights = lora_jax.attach(found.params, adapters)
  apply = lora_jax.adapt(found.family.make_model(found.config).apply, strict=True)
  mask = np.arange(10)[None] < 7

  def loss(apply, weights):
    return jnp.sum(apply({"params": weights}, TOKENS, mask_BT=mask, types_BT=mask * 1) ** 2)

  plain = found.family.make_model(found.config).apply
  expected = loss(plain, lora_jax.merge(found.params, adapters))
  np.testing.assert_allclose(jax.jit(functools.partial(loss, apply))(weights), expected, rtol=1e-5)
  assert all(
    np.isfinite(x).all()
    for x in jax.tree.leaves(jax.jit(jax.grad(functools.partial(loss, apply)))(weights))
  )
