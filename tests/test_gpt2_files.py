"""GPT-2's files: the spelling of the published ones, and kernels that are stored as they are."""

import json

import families
import jax
import numpy as np
import pytest
from peers import peft, torch, transformers
from torch_models import Twins, in_peft, made_by_peft, shaken, torch_logits

import lora_jax
from lora_jax.io import export, pretrained, safetensors
from lora_jax.weights import DoRA, LowRank

TOKENS = np.array([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]])
CONV1D = ["c_attn", "c_proj", "c_fc"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("gpt2")
  families.write(folder, "GPT-2")
  return folder


@pytest.fixture(scope="module")
def found(folder):
  return pretrained.load(folder)


@pytest.fixture(scope="module")
def twins(found):
  model = found.family.make_model(found.config)
  return Twins(
    lambda: families.make("GPT-2"),
    found.params,
    lambda params, tokens: model.apply({"params": params}, tokens),
    TOKENS,
    {"table": found.family.names["safetensors"]},
  )


def changed(source, folder, change):
  """A copy of a model's folder, its tensors changed: `{name: array}` to the same."""
  tensors = {name: tensor.load() for name, tensor in safetensors.open_folder(source).items()}
  folder.mkdir()
  for name in ("config.json", "tokenizer.json"):
    (folder / name).write_bytes((source / name).read_bytes())
  safetensors.save_file(change(tensors), folder / safetensors.SINGLE)
  return folder


def as_published(tensors):
  """As openai-community/gpt2 has them: without a prefix, and with the masks of attention."""
  mask = np.tril(np.ones((1, 1, 256, 256), np.float32))
  return {
    **{name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
    **{f"h.{i}.attn.bias": mask for i in range(2)},
    **{f"h.{i}.attn.masked_bias": np.float32(-1e4) for i in range(2)},
  }


def test_the_published_spelling_is_read(folder, found, tmp_path):
  again = pretrained.load(changed(folder, tmp_path / "bare", as_published))
  assert again.config == found.config
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)


def test_what_the_published_spelling_lacks_is_listed(folder, tmp_path):
  def incomplete(tensors):
    kept = {name: x for name, x in as_published(tensors).items() if name != "h.1.ln_2.bias"}
    return kept | {"h.1.crossattention.c_attn.weight": np.zeros((2, 2), np.float32)}

  with pytest.raises(ValueError) as caught:
    pretrained.load(changed(folder, tmp_path / "bare", incomplete))
  assert "missing: block_1/mlp_norm/bias" in str(caught.value)
  assert "unmapped (in no row of the table): transformer.h.1.crossattention" in str(caught.value)


def test_a_tied_head_may_be_stored_and_must_be_the_embedding(folder, found, tmp_path):
  def with_head(shift):
    return lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + shift}

  def bare(tensors):
    return as_published(with_head(0)(tensors))

  again = pretrained.load(changed(folder, tmp_path / "same", bare))
  jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
  words = r"ties the embeddings, yet lm_head.weight differs from transformer\.wte\.weight"
  with pytest.raises(ValueError, match=words):
    pretrained.load(changed(folder, tmp_path / "other", with_head(1)))


def test_square_kernels_are_stored_as_they_are_and_the_head_is_not(tmp_path):
  families.write(tmp_path, "GPT-2, untied")
  found = pretrained.load(tmp_path)
  tensors = safetensors.open_folder(tmp_path)
  np.testing.assert_array_equal(
    found.params["block_1"]["attn"]["out"]["kernel"],
    tensors["transformer.h.1.attn.c_proj.weight"].load(),
  )
  np.testing.assert_array_equal(found.params["head"]["kernel"], tensors["lm_head.weight"].load().T)
  export.save(tmp_path / "copy", found.params, found.config, found.tokenizer)
  for name, tensor in safetensors.open_folder(tmp_path / "copy").items():
    np.testing.assert_array_equal(tensor.load(), tensors[name].load())


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_of_peft_by_the_names_of_conv1d_are_read_and_written_back(
  twins, tmp_path, use_dora
):
  config = peft.LoraConfig(
    r=3,
    lora_alpha=2.0,
    target_modules=CONV1D,
    fan_in_fan_out=True,
    use_dora=use_dora,
    task_type="CAUSAL_LM",
  )
  expected = made_by_peft(twins, config, tmp_path / "theirs")
  adapters = twins.load(tmp_path / "theirs")
  assert {type(x) for x in adapters.values()} == {DoRA if use_dora else LowRank}
  assert len(adapters) == 8
  np.testing.assert_allclose(twins.logits(adapters), expected, atol=1e-4)
  twins.save(tmp_path / "ours", adapters)
  fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
  assert fields["fan_in_fan_out"] is True and fields["use_dora"] is use_dora
  np.testing.assert_allclose(in_peft(twins, tmp_path / "ours"), expected, atol=1e-4)


def test_adapters_of_a_head_and_of_the_positions_are_read_by_peft(tmp_path):
  families.write(tmp_path, "GPT-2, untied")
  found = pretrained.load(tmp_path)
  model = found.family.make_model(found.config)
  twins = Twins(
    lambda: families.make("GPT-2, untied"),
    found.params,
    lambda params, tokens: model.apply({"params": params}, tokens),
    TOKENS,
    {"table": found.family.names["safetensors"]},
  )
  lora = lora_jax.LoRA(rank=3, alpha=2.0)
  rules = [("(positions/embedding|head/kernel|.*/attn/qkv/kernel)", lora)]
  specs = lora_jax.match(found.params, rules, twins.axes)
  assert len(specs) == 4
  adapters = shaken(found.params, lora_jax.init(jax.random.key(0), found.params, specs, twins.axes))
  twins.save(tmp_path / "adapter", adapters)
  np.testing.assert_allclose(
    in_peft(twins, tmp_path / "adapter"), twins.logits(adapters), atol=1e-4
  )


def test_a_head_of_classes_is_read_and_written_back_for_transformers(folder, tmp_path):
  labels = {0: "bad", 1: "good", 2: "neither"}
  torch.manual_seed(0)
  peer = transformers.GPT2ForSequenceClassification.from_pretrained(
    folder, id2label=labels, label2id={x: n for n, x in labels.items()}, pad_token_id=0
  )
  peer.save_pretrained(tmp_path / "theirs")
  (tmp_path / "theirs" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
  found = pretrained.load(tmp_path / "theirs")
  assert found.config.classes == ("bad", "good", "neither")
  export.save(tmp_path / "ours", found.params, found.config, found.tokenizer)
  again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
  assert again.config.id2label == labels
  ours = found.family.make_model(found.config).apply({"params": found.params}, TOKENS)[:, -1]
  for model in (peer, again):
    np.testing.assert_allclose(torch_logits(model.eval(), TOKENS), ours, atol=1e-4)
