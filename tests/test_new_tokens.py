"""New tokens: rows that alone train, and the same in peft and transformers."""

import dataclasses
import functools
import json

import families as kinds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from peers import peft, torch, transformers

import lora_jax
from lora_jax import LoRA, exchange, families, new_tokens
from lora_jax.io import export, gguf_model, names, pretrained
from lora_jax.weights import GGUFBlocks, is_weight

# More than the rows that no token of the tiny models has.
TOKENS = ("<think>", "</think>", *(f"<{n}>" for n in range(60)))
TEXT = "ab<think>it<59>'s 1969</think> <s> and"
NAMES = {"tied": "Qwen 2.5, tied", "untied": "Qwen 2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  @functools.cache
  def write(kind):
    folder = tmp_path_factory.mktemp(kind)
    kinds.write(folder, NAMES[kind])
    return folder

  return write


def logits_of(base, params, ids):
  apply = jax.jit(lora_jax.adapt(base.family.make_model(base.config).apply))
  return np.asarray(apply({"params": params}, jnp.asarray([ids])))[0]


def axes_of(base):
  apply = base.family.make_model(base.config).apply
  return lora_jax.trace_axes(
    lambda p, t: apply({"params": p}, t), base.params, jnp.zeros((1, 4), jnp.int32)
  )


def resized(folder, size):
  """The model of transformers with a larger vocabulary, whose new rows are random."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  model.resize_token_embeddings(size, mean_resizing=False)
  return model.eval()


def peer_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor([ids])).logits.numpy()[0]


@pytest.mark.parametrize("kind", NAMES)
def test_new_rows_are_the_mean_of_the_old_and_the_old_are_as_they_were(folders, kind):
  base = pretrained.load(folders(kind))
  old, rows = base.tokenizer.vocab_size, base.config.vocab_size
  found = new_tokens.add(base, TOKENS)
  new = len(TOKENS)
  assert old < rows < old + new == found.tokenizer.vocab_size == found.config.vocab_size
  assert dataclasses.replace(found.config, vocab_size=rows) == base.config
  shapes = families.param_shapes(found.config)
  flat, before = lora_jax.tree.flatten(found.params), lora_jax.tree.flatten(base.params)
  assert {path: leaf.shape for path, leaf in flat.items()} == shapes
  changed = {"embed/embedding": 0} | ({"head/kernel": 1} if kind == "untied" else {})
  for path, leaf in flat.items():
    if path not in changed:
      np.testing.assert_array_equal(leaf, before[path])
      continue
    now, then = (np.moveaxis(np.asarray(x), changed[path], 0) for x in (leaf, before[path]))
    np.testing.assert_array_equal(now[:old], then[:old])
    np.testing.assert_allclose(now[old:], np.stack([then[:old].mean(0)] * new), atol=1e-6)
  assert new_tokens.add(base, ()) is base


def test_shapes_alone_grow_as_values_do(folders):
  found = new_tokens.add(pretrained.load(folders("untied"), scan_layers=True), TOKENS)
  shapes = new_tokens.add(pretrained.inspect(folders("untied"), scan_layers=True), TOKENS)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), found.params) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes.params
  )
  assert found.config == shapes.config


def test_a_quantized_embedding_becomes_dense_and_nothing_else_does(folders, tmp_path):
  base = pretrained.load(folders("tied"))
  path = tmp_path / "model.gguf"
  gguf_model.save(path, base.params, base.config, base.tokenizer, dtype="q8_0")
  kept = pretrained.load(path, keep_blocks=GGUFBlocks.of)
  grown = new_tokens.add(kept, TOKENS)
  assert is_weight(kept.params["embed"]["embedding"])
  assert grown.params["embed"]["embedding"].shape == (grown.config.vocab_size, 32)
  blocks = [is_weight(x["block_0"]["attn"]["query"]["kernel"]) for x in (kept.params, grown.params)]
  assert blocks == [True, True]


def adapted(base):
  """The base with LoRA and rows of the new tokens, all of it moved from where it starts."""
  axes = axes_of(base)
  rules = [*new_tokens.rules(base, TOKENS), ("attention", LoRA(rank=2, alpha=4.0))]
  specs = lora_jax.match(base.params, rules, axes)
  adapters = lora_jax.init(jax.random.key(0), base.params, specs, axes)
  random = np.random.default_rng(0)
  moved = jax.tree.map(lambda x: x + 0.3 * random.normal(size=x.shape).astype(x.dtype), adapters)
  return axes, moved, lora_jax.attach(base.params, moved)


def test_of_an_embedding_the_rows_of_new_tokens_alone_train(folders):
  base = new_tokens.add(pretrained.load(folders("untied")), TOKENS)
  _, _, params = adapted(base)
  train, _ = lora_jax.partition(params, lora_jax.trainable_mask(params))
  sizes = {x: [y.shape for y in jax.tree.leaves(leaf)] for x, leaf in train["embed"].items()}
  assert sizes == {"embedding": [(len(TOKENS), 32)]}
  assert [x.shape for x in jax.tree.leaves(train["head"])] == [(len(TOKENS), 32)]
  dense = lora_jax.materialize(params)["embed"]["embedding"] - base.params["embed"]["embedding"]
  assert set(np.flatnonzero(np.abs(dense).max(1))) == set(params["embed"]["embedding"].ids)


@pytest.mark.parametrize("kind", NAMES)
def test_peft_loads_the_rows_onto_a_resized_model_and_they_come_back(folders, tmp_path, kind):
  base = new_tokens.add(pretrained.load(folders(kind)), TOKENS)
  axes, adapters, params = adapted(base)
  table = names.HUGGING_FACE["qwen2"]
  exchange.save(
    tmp_path / "adapter", adapters, base.params, axes, base_model=str(folders(kind)), table=table
  )
  settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  ids = [base.tokenizer.vocabulary[token] for token in TOKENS]
  modules = ["model.embed_tokens"] + ["lm_head"] * (kind == "untied")
  assert settings["trainable_token_indices"] == dict.fromkeys(modules, ids)

  model = resized(folders(kind), base.config.vocab_size)
  peer = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
  tokens = base.tokenizer.encode(TEXT)
  assert {*ids[:2], ids[-1]} <= {*tokens}
  np.testing.assert_allclose(logits_of(base, params, tokens), peer_logits(peer, tokens), atol=1e-4)

  # Back from peft's own writer; rows that no token of theirs has are not in question.
  peer.save_pretrained(tmp_path / "back")
  back = exchange.load(tmp_path / "back", base.params, axes, table=table)
  again = logits_of(base, lora_jax.attach(base.params, back), tokens)
  np.testing.assert_allclose(again, logits_of(base, params, tokens), atol=1e-4)


def of_peft(folder, size, where, **settings):
  """A folder of peft's, of a resized model whose adapter and new rows are random."""
  torch.manual_seed(1)
  config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **settings)
  model = peft.get_peft_model(resized(folder, size), config)
  for name, parameter in model.named_parameters():
    if "modules_to_save" in name or "tokens_delta" in name:
      torch.nn.init.normal_(parameter, std=0.3)
  model.save_pretrained(where)
  return model.eval()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("how", ["saved embeddings", "modules to save", "rows"])
def test_an_adapter_of_a_resized_vocabulary_is_read(folders, tmp_path, kind, how):
  base = new_tokens.add(pretrained.load(folders(kind)), TOKENS)
  modules = ["embed_tokens"] if kind == "tied" else ["embed_tokens", "lm_head"]
  settings = {}
  if how == "modules to save":
    settings = {"modules_to_save": modules, "ensure_weight_tying": kind == "tied"}
  if how == "rows":  # of which the others are those that resizing made
    ids = [base.tokenizer.vocabulary[token] for token in TOKENS[:2]]
    settings = {"trainable_token_indices": dict.fromkeys(modules, ids)}
  peer = of_peft(folders(kind), base.config.vocab_size, tmp_path, **settings)
  adapters = exchange.load(tmp_path, base.params, axes_of(base), table=names.HUGGING_FACE["qwen2"])
  kind_of = lora_jax.TokenRows if how == "rows" else lora_jax.Full
  assert type(adapters["embed/embedding"]).__name__ == kind_of.__name__
  tokens = base.tokenizer.encode(TEXT)
  ours = logits_of(base, lora_jax.attach(base.params, adapters), tokens)
  np.testing.assert_allclose(ours, peer_logits(peer, tokens), atol=1e-4)


@pytest.mark.parametrize(
  "settings",
  [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [403, 404]}],
  ids=["saved embeddings", "modules to save", "rows"],
)
def test_a_base_with_too_few_rows_is_refused_with_the_remedy(folders, tmp_path, settings):
  of_peft(folders("untied"), 405, tmp_path, **settings)
  base = pretrained.load(folders("untied"))
  said = r"(has 405 rows|has rows up to 404), and the base's embed/embedding has 403; .*new_tokens"
  with pytest.raises(ValueError, match=said):
    exchange.load(tmp_path, base.params, axes_of(base), table=names.HUGGING_FACE["qwen2"])


def changed(folder, ending, row):
  """Another number in a row of a tensor of a folder."""
  path = folder / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  (name,) = (name for name in tensors if name.endswith(ending))
  tensors[name][row] += 1
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_stored_twice_must_be_alike_and_the_base_that_is_stored_this_one(folders, tmp_path):
  base = new_tokens.add(pretrained.load(folders("untied")), TOKENS)
  axes, table, size = axes_of(base), names.HUGGING_FACE["qwen2"], base.config.vocab_size
  whole, rows = tmp_path / "whole", tmp_path / "rows"
  of_peft(folders("untied"), size, whole, modules_to_save=["embed_tokens", "lm_head"])
  changed(whole, "embed_tokens.modules_to_save.weight", 0)
  with pytest.raises(ValueError, match="are the same parameter, and differ"):
    exchange.load(whole, base.params, axes, table=table)
  of_peft(folders("untied"), size, rows, trainable_token_indices=[size - 2, size - 1])
  changed(rows, "token_adapter.base_layer.weight", 0)
  with pytest.raises(ValueError, match="is not the embed/embedding that is here"):
    exchange.load(rows, base.params, axes, table=table)


@pytest.mark.parametrize("kind", NAMES)
def test_a_merged_model_is_written_with_the_tokenizer_that_has_them(folders, tmp_path, kind):
  base = new_tokens.add(pretrained.load(folders(kind)), TOKENS)
  _, _, params = adapted(base)
  merged = lora_jax.materialize(params)
  export.save(tmp_path / "merged", merged, base.config, base.tokenizer)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
  words = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "merged")
  tokens = base.tokenizer.encode(TEXT)
  assert words.encode(TEXT, add_special_tokens=False) == base.tokenizer.encode(
    TEXT, add_special_tokens=False
  )
  assert words.decode(tokens) == base.tokenizer.decode(tokens, skip_special_tokens=False)
  ours = logits_of(base, params, tokens)
  np.testing.assert_allclose(ours, peer_logits(peer, tokens), atol=1e-4)
  back = pretrained.load(tmp_path / "merged")
  assert back.tokenizer.encode(TEXT) == tokens

  gguf_model.save(tmp_path / "merged.gguf", merged, base.config, base.tokenizer)
  file = pretrained.load(tmp_path / "merged.gguf")
  assert file.tokenizer.encode(TEXT) == tokens
  np.testing.assert_allclose(logits_of(file, file.params, tokens), ours, atol=1e-4)


def test_files_that_list_added_tokens_list_the_new_ones(folders, tmp_path):
  for path in folders("tied").iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  (tmp_path / "added_tokens.json").write_text('{"<s>": 340}')
  plain = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
  decoder = {"340": plain | {"single_word": False, "special": True}}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
  words = pretrained.load(tmp_path).tokenizer.with_tokens(TOKENS[:2])
  first = words.vocabulary[TOKENS[0]]
  words.save(tmp_path / "saved")
  read = {x.name: json.loads(x.read_text()) for x in (tmp_path / "saved").glob("*.json")}
  assert read["added_tokens.json"] == {"<s>": 340, "<think>": first, "</think>": first + 1}
  described = read["tokenizer_config.json"]["added_tokens_decoder"]
  assert described[str(first)]["content"] == "<think>" and not described[str(first)]["special"]
  assert described["340"] == decoder["340"]


@pytest.mark.parametrize(
  ("tokens", "words"),
  [
    (("<think>", "<think>"), "'<think>' is named twice"),
    (("<s>",), "'<s>' is a token already, with the id 340"),
    (("",), "'' is no text, or an empty one"),
    ((5,), "5 is no text, or an empty one"),
  ],
)
def test_tokens_that_cannot_be_new_are_refused(folders, tokens, words):
  with pytest.raises(ValueError, match=words):
    new_tokens.add(pretrained.inspect(folders("tied")), tokens)
