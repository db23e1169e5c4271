"""Models written as GGUF, read by us, by the `gguf` package, by transformers and by llama.cpp."""

import dataclasses
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from gguf_peers import by_transformers, llama_cpp
from tokenizers import pre_tokenizers

from lora_jax import families
from lora_jax.io import assets, gguf_configs, gguf_model, pretrained, tokenizer
from lora_jax.io import gguf as reader
from lora_jax.models import gpt2, layers, llama

VOCABULARY = ["<|end|>", "<think>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġab"]
CONFIG = llama.LlamaConfig(
  vocab_size=len(VOCABULARY) + 3,
  width=64,
  mlp_width=48,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  max_length=128,
  rope_theta=500.0,
)
TEXT = "ab <think> ab<|end|>it's 1969"


@pytest.fixture(scope="module")
def words():
  return tokenizer.from_gguf(
    {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": "llama-bpe",
      "tokenizer.ggml.tokens": VOCABULARY,
      "tokenizer.ggml.token_type": [3, 4] + [1] * (len(VOCABULARY) - 2),
      "tokenizer.ggml.merges": ["a b", "Ġ ab"],
      "tokenizer.ggml.bos_token_id": 0,
      "tokenizer.ggml.eos_token_id": 0,
      "tokenizer.ggml.add_bos_token": True,
      "tokenizer.chat_template": "{{ messages[0].content }}",
    }
  )


def random_params(config):
  random = np.random.default_rng(0)
  flat = {
    path: jnp.asarray(path.endswith("scale") + random.normal(scale=0.2, size=shape), jnp.float32)
    for path, shape in families.param_shapes(config).items()
  }
  return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def params():
  return random_params(CONFIG)


def logits(config, params, ids):
  apply = jax.jit(llama.Llama(config).apply)
  return np.asarray(apply({"params": params}, jnp.asarray([ids])))[0]


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_file_in_float32_is_read_back_as_it_was(tmp_path, words, tie_embeddings):
  config = dataclasses.replace(CONFIG, tie_embeddings=tie_embeddings)
  params = random_params(config)
  assert gguf_model.save(tmp_path / "model.gguf", params, config, words) == {}
  back = pretrained.load(tmp_path / "model.gguf")
  jax.tree.map(np.testing.assert_array_equal, back.params, params)
  assert dataclasses.replace(back.config, norm_eps=config.norm_eps) == config
  assert back.config.norm_eps == np.float32(config.norm_eps)
  assert back.tokenizer.encode(TEXT) == words.encode(TEXT)
  assert back.tokenizer.chat_template == words.chat_template
  assert (back.tokenizer.bos_id, back.tokenizer.eos_id) == (0, 0)


def test_stacked_layers_in_bfloat16_are_written_one_by_one(tmp_path, words, params):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  stacked = layers.stack_layers(half)
  config = dataclasses.replace(CONFIG, scan_layers=True)
  gguf_model.save(tmp_path / "model.gguf", stacked, config, words, dtype="bfloat16")
  back = pretrained.load(tmp_path / "model.gguf", dtype=jnp.bfloat16)
  jax.tree.map(np.testing.assert_array_equal, back.params, half)


@pytest.mark.parametrize("dtype", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_in_blocks_it_holds_what_the_gguf_package_makes_of_each_matrix(
  tmp_path, words, params, dtype
):
  path = tmp_path / "model.gguf"
  wider = gguf_model.save(path, params, CONFIG, words, dtype=dtype)
  rows_of_48 = {f"blk.{i}.ffn_down.weight": "float16" for i in range(2)}
  embeddings = dict.fromkeys(["token_embd.weight", "output.weight"], "q8_0")
  assert wider == rows_of_48 | ({} if dtype == "q8_0" else embeddings)

  kinds = {x.name: x.tensor_type.name.lower() for x in gguf.GGUFReader(path).tensors}
  assert kinds["blk.1.attn_k.weight"] == dtype and kinds["token_embd.weight"] == "q8_0"
  assert kinds["blk.0.ffn_down.weight"] == "f16" and kinds["blk.0.attn_norm.weight"] == "f32"
  found = traverse_util.flatten_dict(pretrained.load(path).params, sep="/")
  for name, array in traverse_util.flatten_dict(params, sep="/").items():
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    rows = np.array(array.T if name.endswith("kernel") else array)
    if rows.ndim == 1:
      expected = rows
    elif rows.shape[-1] == 48:
      expected = rows.astype(np.float16)
    else:
      if name in ("embed/embedding", "head/kernel"):
        kind = gguf.GGMLQuantizationType.Q8_0
      expected = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    expected = expected.T if name.endswith("kernel") else expected
    np.testing.assert_array_equal(found[name], expected, name)


def test_the_gguf_package_reads_what_the_model_is(tmp_path, words, params):
  gguf_model.save(tmp_path / "model.gguf", params, CONFIG, words, dtype="q4_1")
  fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
  found = {key: field.contents() for key, field in fields.items()}
  assert found["general.architecture"] == "llama"
  assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_1
  assert found["llama.attention.key_length"] == found["llama.rope.dimension_count"] == 32
  assert found["llama.rope.freq_base"] == 500.0
  assert found["tokenizer.ggml.tokens"] == [*VOCABULARY, *(f"[PAD{260 + i}]" for i in range(3))]
  assert found["tokenizer.ggml.token_type"] == [3, 4] + [1] * 258 + [5] * 3
  assert found["tokenizer.ggml.merges"] == ["a b", "Ġ ab"]


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_transformers_has_the_same_ids_and_logits(tmp_path, words, params, dtype):
  path = tmp_path / "model.gguf"
  gguf_model.save(path, params, CONFIG, words, dtype=dtype)
  peer, apply = by_transformers(path)
  ids = words.encode(TEXT)
  assert peer(TEXT, add_special_tokens=False).input_ids == ids[1:]
  assert peer.chat_template == words.chat_template
  ours = logits(CONFIG, pretrained.load(path).params, ids)
  np.testing.assert_allclose(apply(ids), ours, atol=1e-4, rtol=1e-4)


# It says no probabilities where the likeliest token is a part of a character.
PROMPTS = ("ab it's 1969, ab<|end|> and <think> so on", "so on ab<|end|> and on <think> ab")


@pytest.mark.parametrize(
  ("rope", "prompt"),
  [
    (None, PROMPTS[0]),
    (llama.LinearRope(factor=4.0), PROMPTS[0]),
    (llama.Llama3Rope(factor=8.0), PROMPTS[0]),
    (llama.YarnRope(factor=4.0, original_length=16, attention_factor=1.3), PROMPTS[1]),
  ],
)
def test_llama_cpp_goes_on_from_a_text_as_the_model_does(tmp_path, words, params, rope, prompt):
  config = dataclasses.replace(CONFIG, rope_scaling=rope, max_length=65536)
  gguf_model.save(tmp_path / "model.gguf", params, config, words)
  likely = llama_cpp(tmp_path / "model.gguf", prompt)
  ours = jax.nn.log_softmax(logits(config, params, words.encode(prompt))[-1])
  # llama.cpp keeps keys and values in float16.
  np.testing.assert_allclose([ours[i] for i in likely], list(likely.values()), atol=0.02)
  assert next(iter(likely)) == ours.argmax()


@pytest.mark.parametrize(
  "changes",
  [
    {"family": "olmo2", "head_dim": 16, **gguf_configs.ARCHITECTURES["olmo2"]},
    {
      "family": "granite",
      "embedding_multiplier": 3.0,
      "attention_multiplier": 0.5,
      "residual_multiplier": 0.7,
      "logit_divisor": 0.5,
    },
  ],
  ids=["olmo2", "granite"],
)
def test_llama_cpp_goes_on_from_a_text_as_a_relative_of_llama_does(tmp_path, words, changes):
  config = dataclasses.replace(CONFIG, **changes)
  params = random_params(config)
  gguf_model.save(tmp_path / "model.gguf", params, config, words)
  again = pretrained.load(tmp_path / "model.gguf")
  # Numbers are float32 there.
  assert {name: getattr(again.config, name) for name in changes} == pytest.approx(changes)
  assert dataclasses.replace(again.config, norm_eps=config.norm_eps, **changes) == config
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  prompt = "so on and on ab"
  likely = llama_cpp(tmp_path / "model.gguf", prompt)
  ours = jax.nn.log_softmax(logits(config, params, words.encode(prompt))[-1])
  np.testing.assert_allclose([ours[i] for i in likely], list(likely.values()), atol=0.02)
  assert next(iter(likely)) == ours.argmax()


def test_heads_that_do_not_share_the_width_are_refused_where_llama_cpp_has_none(tmp_path, words):
  config = dataclasses.replace(CONFIG, family="olmo2", **gguf_configs.ARCHITECTURES["olmo2"])
  with pytest.raises(ValueError, match="'olmo2' the 4 heads share the width 64"):
    gguf_model.save(tmp_path / "model.gguf", random_params(config), config, words)


def test_llama_cpp_goes_on_from_a_text_as_gpt_2_does(tmp_path, words):
  config = gpt2.GPT2Config(
    vocab_size=CONFIG.vocab_size,
    width=64,
    mlp_width=96,
    num_layers=2,
    num_heads=4,
    head_dim=16,
    max_length=64,
  )
  params, path = random_params(config), tmp_path / "model.gguf"
  wider = gguf_model.save(path, params, config, words, dtype="q8_0")
  assert wider == {"position_embd.weight": "float32"}
  params = pretrained.load(path).params
  prompt = "ab it's 1969, ab<|end|> and <think> so on"
  likely = llama_cpp(path, prompt)
  ids = jnp.asarray(words.encode(prompt))[None]
  ours = jax.nn.log_softmax(gpt2.GPT2(config).apply({"params": params}, ids)[0, -1])
  np.testing.assert_allclose([ours[i] for i in likely], list(likely.values()), atol=0.05)
  assert next(iter(likely)) == ours.argmax()


@pytest.fixture(scope="module")
def real(tmp_path_factory, smollm2):
  """SmolLM2 as a file, and the logits of a text."""
  path, text = tmp_path_factory.mktemp("smollm2") / "smollm2.gguf", "The capital of France is"
  gguf_model.save(path, smollm2.params, smollm2.config, smollm2.tokenizer)
  ids = smollm2.tokenizer.encode(text)
  yield path, text, logits(smollm2.config, smollm2.params, ids)
  path.unlink()  # half a gigabyte


@pytest.mark.slow
def test_smollm2_is_the_same_model_here_and_in_transformers(real, smollm2):
  path, text, expected = real
  back = pretrained.load(path)
  jax.tree.map(np.testing.assert_array_equal, back.params, smollm2.params)
  assert back.config == smollm2.config
  peer, apply = by_transformers(path)
  ids = smollm2.tokenizer.encode(text)
  assert peer(text).input_ids == ids
  np.testing.assert_allclose(apply(ids), expected, atol=2e-3)


@pytest.mark.slow
def test_llama_cpp_goes_on_from_a_text_as_smollm2_does(real):
  path, text, expected = real
  likely = llama_cpp(path, text)
  ours = jax.nn.log_softmax(expected[-1])
  np.testing.assert_allclose([ours[i] for i in likely], list(likely.values()), atol=0.02)
  assert next(iter(likely)) == ours.argmax()


def test_the_real_vocabulary_is_written_as_its_file_had_it():
  original = reader.read(assets.resolve(pretrained.DEFAULT)).metadata
  written = tokenizer.to_gguf(tokenizer.from_gguf(original), 49152)
  assert written == {key: original[key] for key in written}
  left_out = {key for key in original if key.startswith("tokenizer.")} - set(written)
  assert left_out == {"tokenizer.ggml.unknown_token_id"}


def test_a_tokenizer_that_the_format_has_no_words_for_is_refused(tmp_path, words):
  def changed(change):
    words.save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(fields)))
    return tokenizer.from_folder(tmp_path)

  cases = {
    "changes or cuts text": lambda x: x | {"normalizer": {"type": "NFC"}},
    "cuts text in a way of its own": lambda x: x | {"pre_tokenizer": {"type": "Whitespace"}},
    "takes in the spaces": lambda x: (
      x | {"added_tokens": [token | {"lstrip": True} for token in x["added_tokens"]]}
    ),
    "is a BPE, neither byte-level": lambda x: x | {"decoder": None},
  }
  for reason, change in cases.items():
    with pytest.raises(ValueError, match=reason):
      tokenizer.to_gguf(changed(change), 300)
  with pytest.raises(ValueError, match="ids up to 259, the model 259 rows"):
    tokenizer.to_gguf(words, 259)


def test_a_file_that_cannot_be_whole_is_not_there(tmp_path, words, params):
  def save(name="model.gguf", params=params, config=CONFIG, dtype="float32"):
    gguf_model.save(tmp_path / name, params, config, words, dtype=dtype)

  def with_norm(value):
    return params | {"norm": {"scale": params["norm"]["scale"].at[0].set(value)}}

  def with_head(value):
    return params | {"head": {"kernel": params["head"]["kernel"].at[0, 0].set(value)}}

  (tmp_path / "there.gguf").write_bytes(b"mine")
  with pytest.raises(FileExistsError, match=r"there.gguf: is there already"):
    save("there.gguf")
  with pytest.raises(ValueError, match=r"output_norm.weight: holds values that are not finite"):
    save(params=with_norm(np.nan))
  with pytest.raises(ValueError, match=r"output.weight: its largest value 1e\+05 is beyond q8_0"):
    save(params=with_head(1e5), dtype="q4_0")
  with pytest.raises(ValueError, match="dtype 'q2_k' is unknown; use one of float32, bfloat16"):
    save(dtype="q2_k")
  with pytest.raises(ValueError, match="value_dim 16: a head's values are narrower than its 32"):
    save(config=dataclasses.replace(CONFIG, value_dim=16))
  with pytest.raises(ValueError, match=r"missing: .'head/kernel'."):
    save(params={name: x for name, x in params.items() if name != "head"})
  assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"]
