"""The config.json of Gemma 4's text model: what transformers makes of it, what is refused."""

import dataclasses

import pytest
from peers import transformers

from lora_jax.io.gemma4_configs import from_hugging_face, to_hugging_face

SMALL = {  # as the text part of google/gemma-4-e2b-it, with fewer layers
  "model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"], "vocab_size": 262144,
  "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 10,
  "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512,
  "max_position_embeddings": 131072, "sliding_window": 512, "final_logit_softcapping": 30.0,
  "num_kv_shared_layers": 5, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 256,
  "vocab_size_per_layer_input": 262144, "enable_moe_block": False, "attention_bias": False,
  "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
  "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
  "rope_parameters": {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {
      "rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25,
    },
  },
}  # fmt: skip
LARGE = SMALL | {
  "attention_k_eq_v": True,
  "num_key_value_heads": 8,
  "num_global_key_value_heads": 2,
  "num_kv_shared_layers": 0,
  "hidden_size_per_layer_input": 0,
  "use_double_wide_mlp": False,
}
ALL = {"small": SMALL, "large": LARGE}


def test_what_a_file_says_is_read():
  config = from_hugging_face(SMALL)
  assert (config.head_dim, config.full_head_dim, config.rotary_dim) == (256, 512, 128)
  assert (config.num_kv_heads, config.full_kv_heads, config.shared_layers) == (1, 1, 5)
  assert config.local_layers == ((True,) * 4 + (False,)) * 2
  assert (config.per_layer_width, config.per_layer_vocab) == (256, 262144)
  config = from_hugging_face(LARGE)
  assert (config.num_kv_heads, config.full_kv_heads, config.keys_are_values) == (8, 2, True)
  assert (config.per_layer_width, config.per_layer_vocab) == (None, None)


@pytest.mark.parametrize("name", ALL)
def test_what_transformers_makes_of_a_config_is_read_alike_and_written_back(name):
  config = from_hugging_face(ALL[name])
  fields = to_hugging_face(config)
  for each in (ALL[name], fields):
    by_transformers = transformers.Gemma4TextConfig(**each).to_dict()
    assert "per_layer_config" in by_transformers and "global_head_dim" not in by_transformers
    # As in a file, whose keys are texts.
    layers = {str(i): x for i, x in by_transformers["per_layer_config"].items()}
    assert from_hugging_face(by_transformers | {"per_layer_config": layers}) == config
    assert from_hugging_face(each) == config


@pytest.mark.parametrize("layers", [7, 12])
def test_absent_fields_take_transformers_defaults(layers):
  names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
  sizes = dict.fromkeys(names, 8) | {"num_hidden_layers": layers}
  theirs = transformers.Gemma4TextConfig(**sizes).to_dict()
  own = {str(i): x for i, x in theirs["per_layer_config"].items()}
  expected = from_hugging_face(theirs | {"per_layer_config": own})
  assert from_hugging_face(sizes | {"model_type": "gemma4_text"}) == expected


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"enable_moe_block": True}, "enable_moe_block=True is not supported, only False"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all' is not supported"),
    ({"attention_bias": True}, "attention_bias=True is not supported"),
    ({"hidden_activation": "silu"}, "hidden_activation='silu' is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
    ({"vision_config": {"hidden_size": 8}}, "'vision_config'=.* is not known of the model_type"),
    ({"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping'=50.0 is not known"),
    ({"sliding_window": None}, "sliding_window must be a positive integer, not None"),
    ({"layer_types": ["full_attention"]}, "layer_types must be .* for 10 layers"),
    ({"layer_types": ["chunked"] * 10}, "layer_types must be 'sliding_attention' or"),
    ({"layer_types": ["sliding_attention"] * 10}, "and False for the last"),
    ({"global_head_dim": "512"}, "full_head_dim must be a positive integer, not '512'"),
    ({"vocab_size_per_layer_input": 8}, "per_layer_vocab 8 is less than the vocab_size 262144"),
    ({"num_kv_shared_layers": True}, "shared_layers must be a positive integer, not True"),
    ({"rope_parameters": {"other": {}}}, "'other' is neither 'sliding_attention' nor"),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e6}}},
      "'full_attention' of type 'yarn' is not supported, only 'proportional'",
    ),
    (
      {"rope_parameters": {"full_attention": SMALL["rope_parameters"]["full_attention"]
                           | {"factor": 8.0}}},
      "'factor' of 'full_attention' is not known",
    ),
    (
      {"rope_parameters": {"full_attention": SMALL["rope_parameters"]["full_attention"]
                           | {"partial_rotary_factor": 2.0}}},
      "partial_rotary_factor must be a number above 0 and up to 1, not 2.0",
    ),
    ({"per_layer_config": {"4": {"head_dim": 512}}}, "for all layers of full attention alike"),
    (
      {"per_layer_config": {"4": {"head_dim": 512}, "9": {"head_dim": 256}}},
      "for all layers of full attention alike",
    ),
    (
      {"per_layer_config": {x: {"intermediate_size": 512} for x in ("4", "9")}},
      "per_layer_config: 'intermediate_size' of a layer is not known",
    ),
  ],
)  # fmt: skip
def test_what_the_model_does_not_do_is_refused_by_name(changes, words):
  with pytest.raises(ValueError, match=words):
    from_hugging_face(SMALL | changes)


def test_heads_that_no_file_has_are_not_written():
  config = dataclasses.replace(from_hugging_face(SMALL), full_kv_heads=2)
  with pytest.raises(ValueError, match="has no field for full_kv_heads=2"):
    to_hugging_face(config)
