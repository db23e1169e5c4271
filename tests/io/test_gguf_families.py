"""GGUF files of each family of decoders: written here, read here, by transformers and llama.cpp."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from gguf_peers import by_transformers, llama_cpp
from tokenizers import pre_tokenizers

from lora_jax import families, trace_axes
from lora_jax.exchange import save_gguf
from lora_jax.io import gguf_configs, gguf_model, names, pretrained, tokenizer
from lora_jax.models import llama
from lora_jax.models.rope import yarn_attention_factor
from lora_jax.weights import GGUFBlocks, LowRank, gguf_blocks, is_weight, materialize

VOCABULARY = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "Ġab"]
TEXT = "ab it's 1969, ab<|end|> and so on"
_SIZES = {
  "vocab_size": len(VOCABULARY), "width": 256, "mlp_width": 256, "num_layers": 2, "num_heads": 4,
  "num_kv_heads": 2, "head_dim": 64, "max_length": 512, "norm_eps": 1e-6,
}  # fmt: skip
_GEMMA = gguf_configs.ARCHITECTURES["gemma2"] | {"tie_embeddings": True, "query_divisor": 64.0}
_SETTINGS = {
  "llama": {"rope_theta": 500.0},
  "mistral": {"tie_embeddings": True},
  "ministral": {},
  "ministral3": {
    "query_growth": 0.5, "query_length": 8, "tie_embeddings": True,
    "rope_scaling": llama.YarnRope(factor=4.0, original_length=8, attention_factor=1.3),
  },
  "smollm3": {"num_layers": 5, "rotated_layers": (True,) * 3 + (False, True)},
  "phi3": {
    "fused": True, "rotary_dim": 48, "num_layers": 3,
    "rope_scaling": llama.LongRope(
      short_factors=tuple(1 + r / 32 for r in range(24)),
      long_factors=tuple(1 + r / 4 for r in range(24)), original_length=16, attention_factor=1.25,
    ),
  },
  "olmo3": gguf_configs.ARCHITECTURES["olmo2"]
  | {
    "num_layers": 5, "window": 8, "local_layers": (True,) * 3 + (False, True), "rope_theta": 500.0,
    "local_rope_theta": 500.0,
    "rope_scaling": llama.YarnRope(factor=4.0, original_length=16, attention_factor=1.3),
  },
  "gpt_oss": gguf_configs.ARCHITECTURES["gpt-oss"]
  | {
    "num_layers": 3, "window": 8, "local_layers": (True, False, True), "rope_theta": 150_000.0,
    # The ends of the ramp are all but whole features, for llama.cpp rounds them.
    "rope_scaling": llama.YarnRope(
      factor=32.0, original_length=123, attention_factor=1.2, truncate=False,
    ),
    "experts": llama.ExpertConfig(
      num_experts=5, per_token=2, width=256, clamped=True, biases=True
    ),
  },
  "qwen2": {"qkv_bias": True, "tie_embeddings": True},
  "qwen3": {"qk_norm": True},
  "gemma2": _GEMMA
  | {"window": 8, "local_layers": (True, False), "attn_softcap": 50.0, "logit_softcap": 30.0},
  "gemma3_text": _GEMMA
  | {
    "num_layers": 7, "qk_norm": True, "window": 8, "local_layers": (True,) * 5 + (False, True),
    "rope_theta": 1e6, "local_rope_theta": 1e4, "rope_scaling": llama.LinearRope(factor=8.0),
  },
}  # fmt: skip
# Run on request: these have no setting of their own.
_ALIKE = ("mistral", "ministral")
# Those whose files transformers reads. It has no names for the experts of a gpt-oss.
_READ_BY_TRANSFORMERS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"}
# What transformers does not read of a file, and has from its own configuration.
_NOT_READ = {
  "qwen3": {"head_dim": 64},
  "phi3": {
    "pad_token_id": None,
    "original_max_position_embeddings": 16,
    "rope_parameters": {
      "rope_type": "longrope",
      "rope_theta": 10000.0,
      "partial_rotary_factor": 0.75,
      "short_factor": [1 + r / 32 for r in range(24)],
      "long_factor": [1 + r / 4 for r in range(24)],
      "attention_factor": 1.25,
      "original_max_position_embeddings": 16,
    },
  },
  "gemma2": {"query_pre_attn_scalar": 64},
  "gemma3_text": {
    "query_pre_attn_scalar": 64,
    "rope_parameters": {
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    },
  },
}


def config_of(name):
  return llama.LlamaConfig(**_SIZES | _SETTINGS[name], family=name)


def params_of(config):
  random = np.random.default_rng(0)

  def values(path, shape):
    mean = path.endswith("scale") and not config.unit_offset
    return jnp.asarray(mean + random.normal(scale=0.1, size=shape), jnp.float32)

  shapes = families.param_shapes(config)
  flat = {path: values(path, shape) for path, shape in shapes.items()}
  # llama.cpp says nothing of the likeliest token where that ends a text or is half a character.
  for path, axis in (("embed/embedding", 0), ("head/kernel", 1)):
    if path in flat:
      spoken = jnp.asarray([x.isascii() and x != "<|end|>" for x in VOCABULARY])
      flat[path] *= jnp.expand_dims(spoken, 1 - axis)
  return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def words():
  return tokenizer.from_gguf(
    {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": "llama-bpe",
      "tokenizer.ggml.tokens": VOCABULARY,
      "tokenizer.ggml.token_type": [3] + [1] * (len(VOCABULARY) - 1),
      "tokenizer.ggml.merges": ["a b", "Ġ ab"],
      "tokenizer.ggml.bos_token_id": 0,
      "tokenizer.ggml.eos_token_id": 0,
      "tokenizer.ggml.add_bos_token": True,
    }
  )


def logits(config, params, ids):
  apply = jax.jit(llama.Llama(config).apply)
  return np.asarray(apply({"params": params}, jnp.asarray([ids])))[0]


def numbers_of(rope):
  """What a scaling of rotary frequencies is, as numbers; -1 where there is none."""
  fields = [-1.0] if rope is None else list(dataclasses.asdict(rope).values())
  return [x for field in fields for x in (field if isinstance(field, tuple) else [field])]


@pytest.mark.parametrize(
  "name", [pytest.param(x, marks=pytest.mark.slow) if x in _ALIKE else x for x in _SETTINGS]
)
def test_a_file_is_read_alike_here_in_transformers_and_in_llama_cpp(tmp_path, words, name):
  config, path = config_of(name), tmp_path / "model.gguf"
  params = params_of(config)
  gguf_model.save(path, params, config, words)
  back = pretrained.load(path)
  # float32; a Mistral's file is a Llama's
  same = {x: getattr(config, x) for x in ("norm_eps", "family", "rope_scaling")}
  assert dataclasses.replace(back.config, **same) == config
  assert numbers_of(back.config.rope_scaling) == pytest.approx(numbers_of(config.rope_scaling))
  # A norm that was stored with 1 added has lost a bit or two.
  near = {"atol": 1.2e-7} if config.unit_offset else {"atol": 0}
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, **near), back.params, params)

  ids = words.encode(TEXT)
  ours = logits(config, params, ids)
  assert np.std(ours) > 0.3
  if name in _READ_BY_TRANSFORMERS:
    _, apply = by_transformers(path, **_NOT_READ.get(name, {}))
    np.testing.assert_allclose(apply(ids), ours, atol=2e-3)
  likely = llama_cpp(path, TEXT)
  logs = jax.nn.log_softmax(ours[-1])
  # llama.cpp keeps keys and values in float16.
  np.testing.assert_allclose([logs[i] for i in likely], list(likely.values()), atol=0.03)


def apart(name):
  """The names of the experts' gates and of what they are multiplied by, where one is of both."""
  of_both = "gate_up" in name and "exp" in name
  return [name.replace("gate_up", x) for x in ("gate", "up")] if of_both else [name]


@pytest.mark.parametrize("name", _SETTINGS)
def test_tensors_have_the_names_that_the_gguf_package_gives_the_architecture(name):
  architecture = gguf_configs.architecture(config_of(name))
  (arch,) = (x for x, theirs in gguf.MODEL_ARCH_NAMES.items() if theirs == architecture)
  known = {gguf.TENSOR_NAMES[x].replace("{bid}", "{i}") for x in gguf.MODEL_TENSORS[arch]}
  ours = {x.rpartition(".")[0] for template in names.GGUF[name] for x in apart(template)}
  # What a family's file has not, a tied head or scaled rotations, its table may name.
  assert ours - {"output", "rope_freqs"} <= known
  theirs = gguf.get_tensor_name_map(arch, 2)
  for theirs_name, path in names.GGUF[name].items():
    published = [x for x, y in names.HUGGING_FACE[name].items() if y == path and path]
    if path == "head/kernel" and "output" not in known:
      continue
    for each in published:
      for one, wanted in zip(apart(each), apart(theirs_name), strict=True):
        module = one.removesuffix(".weight").removesuffix(".bias").removesuffix("_bias")
        found = theirs.get_name(module.replace("{i}", "1"))
        assert found == wanted.rpartition(".")[0].replace("{i}", "1")


# Blocks of every kind that is kept, in the matrices of one model.
_KINDS = {name: gguf.GGMLQuantizationType[name] for name in gguf_blocks.KINDS}


def rewrite(path, copy, change):
  """Writes a file again; change: (name, values) -> (what is written, its ggml type or None)."""
  file = gguf.GGUFReader(path)
  writer = gguf.GGUFWriter(copy, file.fields["general.architecture"].contents())
  for key, field in file.fields.items():
    if not key.startswith("GGUF.") and key != "general.architecture":
      sub_type = field.types[-1] if len(field.types) > 1 else None
      writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)
  for tensor in file.tensors:
    values, kind = change(tensor.name, np.array(tensor.data))
    writer.add_tensor(tensor.name, values, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [x if x == "gemma3_text" else pytest.param(x, marks=pytest.mark.slow) for x in _SETTINGS],
)
def test_blocks_of_every_kind_are_kept_as_they_are(tmp_path, words, name):
  config, path = config_of(name), tmp_path / "model.gguf"
  if name == "gemma3_text":
    config = dataclasses.replace(config, num_layers=2, local_layers=())
  params = params_of(config)
  gguf_model.save(path, params, config, words)
  random, kinds = np.random.default_rng(0), iter([*_KINDS] * 8)

  def in_blocks(name, values):
    if values.ndim == 1 or name.endswith(".bias"):
      return values, None
    kind = next(kinds)
    numbers, size = gguf.GGML_QUANT_SIZES[_KINDS[kind]]
    # The package makes no K-quants: any bytes are blocks, those of the scales being small.
    shape = (*values.shape[:-1], values.shape[-1] // numbers * size)
    return random.integers(0, 32, shape, dtype=np.uint8), _KINDS[kind]

  rewrite(path, tmp_path / "blocks.gguf", in_blocks)
  kept = pretrained.load(tmp_path / "blocks.gguf", keep_blocks=GGUFBlocks.of).params
  weights = [x for x in jax.tree.leaves(kept, is_leaf=is_weight) if is_weight(x)]
  assert {x.kind for x in weights} == _KINDS.keys()
  dense = pretrained.load(tmp_path / "blocks.gguf").params
  jax.tree.map(np.testing.assert_array_equal, materialize(kept), dense)


def test_experts_in_mxfp4_are_kept_in_their_blocks_and_are_those_of_llama_cpp(tmp_path, words):
  config, path = config_of("gpt_oss"), tmp_path / "model.gguf"
  gguf_model.save(path, params_of(config), config, words)
  mxfp4 = gguf.GGMLQuantizationType.MXFP4

  def as_published(name, values):
    if not name.endswith("_exps.weight"):
      return values, None
    return gguf.quants.quantize(values, mxfp4), mxfp4

  rewrite(path, tmp_path / "mxfp4.gguf", as_published)
  dense = pretrained.load(tmp_path / "mxfp4.gguf").params
  kept = pretrained.load(tmp_path / "mxfp4.gguf", keep_blocks=GGUFBlocks.of).params
  experts = kept["block_1"]["mlp"]["experts"]
  assert {experts[x]["kernel"].kind for x in ("gate_up", "down")} == {"MXFP4"}
  jax.tree.map(np.testing.assert_array_equal, materialize(kept), dense)
  ours = jax.nn.log_softmax(logits(config, dense, words.encode(TEXT))[-1])
  # It multiplies by activations that it rounds to 8 bits.
  likely = llama_cpp(tmp_path / "mxfp4.gguf", TEXT)
  np.testing.assert_allclose([ours[i] for i in likely], list(likely.values()), atol=0.1)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_an_adapter_has_the_names_and_the_order_of_its_base(tmp_path, name):
  config = config_of(name)
  shapes = families.param_shapes(config)
  params = {x: jax.ShapeDtypeStruct(shapes[x], jnp.float32) for x in shapes}
  params = traverse_util.unflatten_dict(params, sep="/")
  model = llama.Llama(config)
  axes = trace_axes(lambda p, t: model.apply({"params": p}, t), params, jnp.zeros((1, 4), int))
  path = "block_1/attn/query/kernel"
  random = np.random.default_rng(0)
  a, b = (jnp.asarray(random.normal(size=x), jnp.float32) for x in ((256, 2), (2, 256)))
  adapter = LowRank(None, a, b, scale=1.0, roles=axes[path].roles)
  save_gguf(tmp_path / "adapter.gguf", {path: adapter}, params, axes, config=config)
  file = gguf.GGUFReader(tmp_path / "adapter.gguf")
  found = {x.name: np.array(x.data) for x in file.tensors}
  assert file.fields["general.architecture"].contents() == gguf_configs.architecture(config)
  np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_a"], a.T)
  np.testing.assert_array_equal(found["blk.1.attn_q.weight.lora_b"], b.T)


@pytest.mark.parametrize(
  ("name", "changes", "reason"),
  [
    ("gemma2", {"tie_embeddings": False}, "'gemma2' has no head that is not tied"),
    ("gemma2", {"attn_softcap": None}, "'gemma2' has no attn_softcap=None"),
    ("gemma2", {"local_layers": (False, True)}, "'gemma2' has no local_layers="),
    ("gemma3_text", {"query_divisor": 100.0}, "'gemma3' has no query_divisor=100.0"),
    ("gemma3_text", {"local_layers": (False,) * 6 + (True,)}, "'gemma3' has no local_layers="),
    ("gemma3_text", {"unit_offset": False}, "'gemma3' has no unit_offset=False"),
    ("mistral", {"window": 8}, "'llama' has no window=8"),
    ("ministral", {"window": 8}, "'llama' has no window=8"),
    ("ministral3", {"window": 8}, "'mistral3' has no window=8"),
    (
      "ministral3",
      {"query_length": 9},
      "'mistral3' has one length for the growth of queries and for YaRN, .* 9 and 8",
    ),
    ("smollm3", {"rotated_layers": (False,) + (True,) * 4}, "'smollm3' has no rotated_layers="),
    ("smollm3", {"window": 8}, "'smollm3' has no window=8"),
    ("phi3", {"window": 511}, "'phi3' has no window=511"),
    ("phi3", {"num_heads": 2}, "'phi3' the 2 heads share the width 256"),
    ("phi3", {"qkv_bias": True}, "'phi3' has no qkv_bias=True"),
    ("olmo3", {"tie_embeddings": True}, "'olmo2' has no head that is tied"),
    ("olmo3", {"local_layers": (False,) + (True,) * 4}, "'olmo2' has no local_layers="),
    ("olmo3", {"local_rope_theta": None}, "'olmo2' has no local_rope_theta=None"),
    ("olmo3", {"local_rope_theta": 400.0}, "'olmo2' has no local_rope_theta=400.0"),
    ("gpt_oss", {"tie_embeddings": True}, "'gpt-oss' has no head that is tied"),
    ("gpt_oss", {"window": None, "local_layers": ()}, "'gpt-oss' has no window=None"),
    ("gpt_oss", {"local_layers": (False, True, True)}, "'gpt-oss' has no local_layers="),
    ("gpt_oss", {"attn_sinks": False}, "'gpt-oss' has no attn_sinks=False"),
    (
      "gpt_oss",
      {"rope_scaling": llama.YarnRope(factor=4.0, original_length=16, attention_factor=1.3)},
      "'gpt-oss' has no YarnRope",
    ),
  ],
)
def test_what_an_architecture_does_not_compute_is_not_written(name, changes, reason):
  config = dataclasses.replace(config_of(name), **changes)
  with pytest.raises(ValueError, match=f"architecture {reason}"):
    gguf_configs.to_gguf(config)


@pytest.mark.parametrize("window", [None, 512])
def test_a_window_that_no_context_reaches_is_written_of_a_phi(window):
  metadata = metadata_of("phi3", **{"attention.sliding_window": window or 0})
  assert (
    gguf_configs.to_gguf(dataclasses.replace(config_of("phi3"), window=window))[0].items()
    <= metadata.items()
  )
  assert read(metadata, FACTORS).window == window


def test_factors_of_rotary_frequencies_by_length_are_both_there_and_of_a_phi():
  metadata = metadata_of("phi3")
  assert numbers_of(read(metadata, FACTORS).rope_scaling) == pytest.approx(
    numbers_of(config_of("phi3").rope_scaling)
  )
  older = {x: y for x, y in metadata.items() if x != "phi3.rope.scaling.type"}
  assert read(older, FACTORS) == read(metadata, FACTORS)
  for factors, words in (
    ({}, "rope_factors_long.weight: a list of numbers is needed, and the file lacks it"),
    (FACTORS | {"rope_factors_short.weight": np.ones((2, 12))}, r"its shape is \(2, 12\)"),
    (FACTORS | {"rope_factors_short.weight": np.ones(23)}, "short_factors has 23 numbers"),
    (FACTORS | {"rope_factors_long.weight": np.zeros(24)}, "each of long_factors must be a number"),
  ):
    with pytest.raises(ValueError, match=words):
      read(metadata, factors)
  linear = metadata | {"phi3.rope.scaling.type": "linear", "phi3.rope.scaling.factor": 2.0}
  with pytest.raises(ValueError, match=r"'linear' and rope_factors_long.weight scale rope twice"):
    read(linear, FACTORS)


def test_a_file_of_a_ministral_without_growth_and_one_that_says_the_recommended_factor_of_yarn():
  key = "attention.temperature_scale"
  still = {x: y for x, y in metadata_of("ministral3").items() if not x.endswith(key)}
  assert read(still).query_growth == 0.0 and read(still).query_length == 8
  recommended = yarn_attention_factor(4.0)
  key = {"rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_attn_factor": np.float32(recommended)}
  found = read(metadata_of("olmo3", **{x: float(y) for x, y in key.items()}))
  assert found.rope_scaling.attention_factor == pytest.approx(recommended)
  with pytest.raises(ValueError, match=r"yarn_attn_factor=1.5 is not supported, only 1.0 or 1.13"):
    read(metadata_of("olmo3", **{"rope.scaling.yarn_attn_factor": 1.5}))
  with pytest.raises(ValueError, match=r"yarn_log_multiplier=1.0 is not supported, only 0.0"):
    read(metadata_of("olmo3", **{"rope.scaling.yarn_log_multiplier": 1.0}))


def test_a_file_may_say_which_layers_of_an_olmo_have_the_window_and_one_without_is_an_olmo_2():
  key = {"attention.sliding_window_pattern": [True, False, True, True, False]}
  found = read(metadata_of("olmo3", **key))
  assert found.family == "olmo3" and found.local_layers == (True, False, True, True, False)
  found = read(metadata_of("olmo3", **{"attention.sliding_window": 0}))
  assert (found.family, found.window, found.local_rope_theta) == ("olmo2", None, None)
  metadata = metadata_of("gpt_oss")
  with pytest.raises(ValueError, match=r"lacks gpt-oss.attention.sliding_window"):
    read({x: y for x, y in metadata.items() if not x.endswith("window")})


def metadata_of(name, **changes):
  config = config_of(name)
  metadata, _ = gguf_configs.to_gguf(config)
  arch = gguf_configs.architecture(config)
  metadata["general.architecture"] = arch
  return metadata | {f"{arch}.{key}": value for key, value in changes.items()}


FACTORS = {
  f"rope_factors_{name}.weight": np.asarray(
    getattr(_SETTINGS["phi3"]["rope_scaling"], f"{name}_factors"), np.float32
  )
  for name in ("long", "short")
}


def read(metadata, factors=None):
  return gguf_configs.from_gguf(metadata, tie_embeddings=True, rope_factors=factors or {})


def test_gemmas_largest_models_divide_scores_by_their_width():
  found = read(metadata_of("gemma2", block_count=46))
  assert found.query_divisor == 256 / 4
  sizes = {"embedding_length": 5376, "attention.head_count": 32, "attention.head_count_kv": 16}
  found = read(metadata_of("gemma3_text", block_count=62, **sizes))
  assert found.query_divisor == 168.0  # of Gemma 3 27B
  assert read(metadata_of("gemma3_text", **sizes)).query_divisor == 64.0


def test_a_file_may_say_which_layers_have_the_window():
  key = {"attention.sliding_window_pattern": 3}
  assert read(metadata_of("gemma3_text", **key)).local_layers == (True, True, False) * 2 + (True,)
  key = {"attention.sliding_window_pattern": [True] * 3 + [False] * 4}
  assert read(metadata_of("gemma3_text", **key)).local_layers == (True,) * 3 + (False,) * 4
  key = {"attention.sliding_window": 0}
  assert read(metadata_of("gemma3_text", **key)).window is None
  for wrong in (0, [True], "6", True):
    with pytest.raises(ValueError, match="is neither a period nor a list of 7 layers"):
      read(metadata_of("gemma3_text", **{"attention.sliding_window_pattern": wrong}))
  with pytest.raises(ValueError, match="window must be a positive integer, not '8'"):
    read(metadata_of("gemma3_text", **{"attention.sliding_window": "8"}))
