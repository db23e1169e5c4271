"""Encoders against transformers, on tiny random models and on MiniLM's own weights."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import torch, transformers

from configs import glue
from lora_jax.families import parse_config
from lora_jax.io import assets, model_archives, pretrained, safetensors
from lora_jax.models import bert, layers
from lora_jax.tasks import embedding

ATOL = 1e-4  # hidden states of order one, float32
MINILM = 2e-5  # its hidden states are of order one too, and its weights are not random
LENGTHS = (9, 3, 6)
TOKENS_BT = np.random.default_rng(0).integers(5, 400, (3, 9)).astype(np.int32)
MASK_BT = np.arange(9) < np.array(LENGTHS)[:, None]
TYPES_BT = (np.arange(9) >= 4).astype(np.int32) * MASK_BT


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  """(the model of transformers, what `pretrained.load` makes of its folder), by kind and class."""

  @functools.cache
  def load(name, head=None):
    folder = tmp_path_factory.mktemp("encoder")
    return families.write(folder, name, head), pretrained.load(folder)

  return load


def padded(pad_id):
  return np.where(MASK_BT, TOKENS_BT, pad_id)


def theirs(peer, types=None, **options):
  inputs = {"attention_mask": torch.tensor(MASK_BT.astype(np.int64))}
  if types is not None:
    inputs["token_type_ids"] = torch.tensor(types.astype(np.int64))
  with torch.no_grad():
    return peer(torch.tensor(padded(peer.config.pad_token_id)), **inputs, **options)


def ours(found, types=None, pad_id=0, **options):
  apply = jax.jit(found.family.make_model(found.config).apply, static_argnames="method")
  types = {} if types is None else {"types_BT": types}
  return apply(
    {"params": found.params}, jnp.asarray(padded(pad_id)), mask_BT=MASK_BT, **types, **options
  )


@pytest.mark.parametrize("name", families.ENCODERS)
def test_hidden_states_and_logits_of_padded_texts_are_those_of_transformers(loaded, name):
  peer, found = loaded(name)
  types = TYPES_BT if found.config.token_types > 1 else None
  expected = theirs(peer, types, output_hidden_states=True)
  np.testing.assert_allclose(ours(found, types), expected.logits, atol=2e-3, rtol=0)
  assert np.std(expected.logits.numpy()) > 0.3
  # What stands at padding has no meaning, and is another token here.
  hidden = np.asarray(ours(found, types, pad_id=7, method="hidden"))
  last = expected.hidden_states[-1].numpy()
  np.testing.assert_allclose(hidden[MASK_BT], last[MASK_BT], atol=ATOL, rtol=0)


def test_token_types_change_what_berts_layers_see(loaded):
  _, found = loaded("BERT")
  plain, typed = (np.asarray(ours(found, x, method="hidden")) for x in (None, TYPES_BT))
  assert abs(plain - typed)[0].max() > 0.1
  np.testing.assert_array_equal(plain, ours(found, np.zeros_like(TYPES_BT), method="hidden"))


def test_a_model_without_token_types_refuses_them(loaded):
  _, found = loaded("DistilBERT")
  with pytest.raises(ValueError, match="types_BT: the model has no embedding of token types"):
    ours(found, TYPES_BT)


@pytest.mark.parametrize(
  ("name", "head"),
  [
    ("BERT", "Model"), ("BERT", "ForMaskedLM"), ("BERT", "ForPreTraining"), ("RoBERTa", "Model"),
    ("RoBERTa", "ForMaskedLM"), ("DistilBERT", "Model"), ("DistilBERT", "ForMaskedLM"),
  ],
)  # fmt: skip
def test_a_body_is_read_with_or_without_its_prefix_and_the_heads_of_pretraining(
  loaded, tmp_path, name, head
):
  peer, found = loaded(name, head)
  body = getattr(peer, peer.base_model_prefix, peer)
  expected, got = theirs(body), ours(found)
  np.testing.assert_allclose(
    np.asarray(got.hidden_BTD)[MASK_BT], expected.last_hidden_state.numpy()[MASK_BT], atol=ATOL
  )
  # RoBERTa's pooler belongs to no head here, and DistilBERT has none.
  has_pooler = name == "BERT" and head != "ForMaskedLM"
  assert found.config.pooler == has_pooler == (got.pooled_BD is not None)
  if has_pooler:
    np.testing.assert_allclose(got.pooled_BD, expected.pooler_output, atol=ATOL)


def test_a_model_is_inspected_as_it_is_loaded(loaded, tmp_path):
  for head in ("Model", "ForMaskedLM", "ForSequenceClassification"):
    families.write(tmp_path / head, "BERT", head)
    read, seen = pretrained.load(tmp_path / head), pretrained.inspect(tmp_path / head)
    assert read.config == seen.config
    assert jax.tree.map(lambda x: x.shape, read.params) == jax.tree.map(
      lambda x: x.shape, seen.params
    )


def test_norms_that_are_named_as_in_tensorflow_are_read(loaded, tmp_path):
  peer, found = loaded("BERT", "Model")
  families.write_model(tmp_path, peer)
  tensors = safetensors.load_file(tmp_path / "model.safetensors")
  renamed = {
    name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
    for name, x in tensors.items()
  }
  assert renamed.keys() != tensors.keys()
  safetensors.save_file(renamed, tmp_path / "model.safetensors")
  jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path).params, found.params)


@pytest.mark.parametrize("name", ["BERT", "DistilBERT"])
def test_scanned_layers_give_what_layers_apart_give(loaded, name):
  _, found = loaded(name)
  config = dataclasses.replace(found.config, scan_layers=True)
  scanned = dataclasses.replace(found, config=config, params=layers.stack_layers(found.params))
  np.testing.assert_allclose(ours(scanned), ours(found), atol=1e-5)


def test_no_output_depends_on_padding_and_every_one_on_the_whole_text():
  config = bert.BertConfig(
    vocab_size=16,
    width=8,
    mlp_width=8,
    num_layers=1,
    num_heads=2,
    head_dim=4,
    max_length=16,
    classes=("a", "b"),
  )
  tokens_1T = jnp.arange(10)[None]  # each token once: a row of the embedding is a position
  mask_1T = tokens_1T < 6
  model = bert.Bert(config)
  params = model.init(jax.random.key(0), tokens_1T)["params"]

  def output(embedding_VD):
    variables = {"params": params | {"embed": {"embedding": embedding_VD}}}
    return model.apply(variables, tokens_1T, mask_BT=mask_1T)[0, 0]

  gradient = np.asarray(jax.grad(output)(params["embed"]["embedding"]))
  assert list(np.flatnonzero(np.any(gradient != 0, axis=1))) == [0, 1, 2, 3, 4, 5]


def test_robertas_longest_text_ends_at_the_last_row_of_its_positions(loaded):
  peer, found = loaded("RoBERTa")
  assert found.config.position_offset == 2 and found.config.max_length == 64
  tokens_1T = np.random.default_rng(1).integers(5, 400, (1, 64)).astype(np.int32)
  with torch.no_grad():
    expected = peer(torch.tensor(tokens_1T)).logits
  apply = found.family.make_model(found.config).apply
  np.testing.assert_allclose(apply({"params": found.params}, tokens_1T), expected, atol=2e-3)
  with pytest.raises(ValueError, match="rows of 65 tokens, and the model has learned 64 positions"):
    apply({"params": found.params}, np.zeros((1, 65), np.int32))


BERT = {
  "model_type": "bert", "vocab_size": 403, "hidden_size": 32, "intermediate_size": 48,
  "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
DISTILBERT = {
  "model_type": "distilbert", "vocab_size": 403, "dim": 32, "hidden_dim": 48, "n_layers": 2,
  "n_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    (BERT | {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    (BERT | {"is_decoder": True}, "is_decoder=True is not supported, only False"),
    (BERT | {"hidden_act": "silu"}, "hidden_act='silu' is not supported; supported: 'gelu'"),
    (BERT | {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads"),
    (BERT | {"quantization_config": {"bits": 4}}, "quantization_config"),
    (BERT | {"embedding_size": 16}, "'embedding_size'=16 is not known"),
    (BERT | {"type_vocab_size": -1}, "token_types must be an integer from 0, not -1"),
    (BERT | {"layer_norm_eps": "small"}, "norm_eps must be a number"),
    (BERT | {"max_position_embeddings": 1 << 40}, "max_length .* is over the limit"),
    ({x: y for x, y in BERT.items() if x != "hidden_size"}, "lacks hidden_size"),
    (
      BERT | {"model_type": "roberta", "pad_token_id": 63},
      "max_position_embeddings 64 leaves no position after padding's, pad_token_id 63",
    ),
    (BERT | {"model_type": "roberta", "pad_token_id": None}, "pad_token_id must be an integer"),
    (DISTILBERT | {"activation": "tanh"}, "activation='tanh' is not supported"),
    (DISTILBERT | {"n_heads": 3}, "dim 32 is not a multiple of n_heads 3"),
  ],
)
def test_what_an_encoder_does_not_compute_is_refused_by_name(fields, words):
  with pytest.raises(ValueError, match=words):
    parse_config(fields)


# ---- MiniLM

SENTENCES = (
  "A plane is taking off.",
  "an air plane is taking off",
  "Zürich — ein Satz, der in mehr Stücke zerfällt: Donaudampfschifffahrt.",
)


@pytest.fixture(scope="module")
def minilm():
  """(the model of transformers, its tokenizer, MiniLM here)."""
  folder = model_archives.folder_of(assets.resolve(glue.MINILM))
  peer = transformers.AutoModel.from_pretrained(folder).eval()
  return peer, transformers.AutoTokenizer.from_pretrained(folder), pretrained.load(glue.MINILM)


def test_minilms_hidden_states_and_pooled_vectors_are_those_of_transformers(minilm):
  peer, words, found = minilm
  batch = words(list(SENTENCES), padding=True, return_tensors="pt")
  own = [found.tokenizer.encode_whole(text, max_length=512) for text in SENTENCES]
  for ids, mask, each in zip(batch.input_ids, batch.attention_mask, own, strict=True):
    assert ids[mask.bool()].tolist() == each.ids
  with torch.no_grad():
    expected = peer(**batch)
  mask_BT = batch.attention_mask.numpy().astype(bool)
  got = jax.jit(found.family.make_model(found.config).apply)(
    {"params": found.params}, batch.input_ids.numpy(), mask_BT=mask_BT
  )
  hidden, wanted = np.asarray(got.hidden_BTD), expected.last_hidden_state.numpy()
  np.testing.assert_allclose(hidden[mask_BT], wanted[mask_BT], atol=MINILM, rtol=0)
  np.testing.assert_allclose(got.pooled_BD, expected.pooler_output, atol=MINILM, rtol=0)


def test_minilms_embeddings_are_those_of_sentence_transformers(minilm):
  """Mean pooling over the mask, then L2 normalisation, as the model's modules.json has them."""
  peer, words, found = minilm
  batch = words(list(SENTENCES), padding=True, return_tensors="pt")
  mask = batch.attention_mask[..., None].float()
  with torch.no_grad():
    hidden = peer(**batch).last_hidden_state
  mean = (hidden * mask).sum(1) / torch.clamp(mask.sum(1), min=1e-9)
  expected = torch.nn.functional.normalize(mean, p=2, dim=1).numpy()
  apply = found.family.make_model(found.config).apply
  mask_BT = batch.attention_mask.numpy().astype(bool)
  hidden_BTD = apply(
    {"params": found.params}, batch.input_ids.numpy(), mask_BT=mask_BT, method="hidden"
  )
  got = np.asarray(embedding.mean_pooled(hidden_BTD, mask_BT))
  np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)
  np.testing.assert_allclose(got @ got.T, expected @ expected.T, atol=1e-4)
  assert got[0] @ got[1] > 0.9 > 0.5 > got[0] @ got[2]
