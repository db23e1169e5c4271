"""GPT-2's config.json and GGUF metadata: what the hub has, what is refused."""

import dataclasses

import pytest
from peers import transformers

from lora_jax.io import gpt2_configs
from lora_jax.io.gpt2_configs import from_hugging_face, to_hugging_face

GPT2 = {  # openai-community/gpt2
  "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
  "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
  "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
  "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
  "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
  "summary_use_proj": True,
  "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
  "vocab_size": 50257,
}  # fmt: skip
STANFORD = GPT2 | {  # stanford-crfm/alias-gpt2-small-x21
  "reorder_and_upcast_attn": True,
  "scale_attn_by_inverse_layer_idx": True,
  "n_inner": None,
  "scale_attn_weights": True,
  "use_cache": False,
  "gradient_checkpointing": False,
}
CEREBRAS = GPT2 | {  # cerebras/Cerebras-GPT-111M
  "activation_function": "gelu", "n_inner": 3072, "n_positions": 2048, "n_layer": 10,
  "scale_attn_weights": True, "torch_dtype": "float32", "use_cache": True,
}  # fmt: skip
ALL = {"GPT-2": GPT2, "Stanford's": STANFORD, "Cerebras-GPT": CEREBRAS}


def test_what_the_hub_has_is_read():
  config = from_hugging_face(GPT2)
  assert (config.width, config.mlp_width, config.num_layers) == (768, 3072, 12)
  assert (config.max_length, config.tie_embeddings, config.family) == (1024, True, "gpt2")
  assert (config.activation, config.scale_scores, config.scale_by_layer) == (
    "gelu_tanh",
    True,
    False,
  )
  assert from_hugging_face(STANFORD) == dataclasses.replace(config, scale_by_layer=True)
  config = from_hugging_face(CEREBRAS)
  assert (config.activation, config.max_length) == ("gelu", 2048)


@pytest.mark.parametrize("name", ALL)
def test_what_transformers_makes_of_a_config_is_read_alike_and_written_back(name):
  config = from_hugging_face(ALL[name])
  fields = to_hugging_face(config)
  for each in (ALL[name], fields):
    by_transformers = transformers.GPT2Config(**each).to_dict()
    assert from_hugging_face(each) == from_hugging_face(by_transformers) == config


def test_absent_fields_take_transformers_defaults():
  sizes = dict.fromkeys(("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"), 8)
  expected = from_hugging_face(transformers.GPT2Config(**sizes).to_dict())
  assert from_hugging_face(sizes | {"model_type": "gpt2"}) == expected


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"add_cross_attention": True}, "add_cross_attention=True is not supported, only False"),
    ({"activation_function": "relu"}, "activation_function='relu' is not supported; supported: 'g"),
    ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\] is not supported"),
    ({"hidden_size": 768}, "'hidden_size'=768 is not known of the model_type 'gpt2'"),
    ({"scale_attn_weights": 1}, "scale_scores must be True or False, not 1"),
    ({"n_positions": 0}, "n_positions must be a positive integer, not 0"),
    ({"n_positions": 1 << 30}, "over the limit of 16,777,216 learned positions"),
    ({"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
    ({"quantization_config": {"bits": 4}}, "quantized safetensors are not supported"),
  ],
)
def test_what_the_model_does_not_do_is_refused_by_name(change, words):
  with pytest.raises(ValueError, match=words):
    from_hugging_face(GPT2 | change)


def test_any_value_of_a_field_makes_a_config_or_a_value_error_that_is_short():
  odd = [None, True, -1, 0, 3, 1.5, 10**30, 1e300, "x", [], [[]], {}, {"a": 1}]
  refused = 0
  for field in (*GPT2, *gpt2_configs._DEFAULTS, "other"):
    for value in odd:
      try:
        config = from_hugging_face(GPT2 | {field: value})
      except ValueError as error:
        refused += 1
        assert len(str(error)) < 400
      else:
        assert from_hugging_face(to_hugging_face(config)) == config
  assert refused > 100


def test_gguf_metadata_is_read_back_and_what_llama_cpp_computes_otherwise_is_refused():
  config = from_hugging_face(GPT2 | {"n_inner": 1000})
  metadata = gpt2_configs.to_gguf(config)
  assert metadata["gpt2.feed_forward_length"] == 1000
  assert gpt2_configs.from_gguf(metadata, tie_embeddings=True) == config
  untied = dataclasses.replace(config, tie_embeddings=False)
  assert gpt2_configs.from_gguf(metadata, tie_embeddings=False) == untied
  for fields, words in ((STANFORD, "scale_by_layer=True"), (CEREBRAS, "activation='gelu'")):
    with pytest.raises(ValueError, match=f"llama.cpp's architecture 'gpt2' has no {words}"):
      gpt2_configs.to_gguf(from_hugging_face(fields))
  odd = dataclasses.replace(config, num_heads=6)
  for write in (to_hugging_face, gpt2_configs.to_gguf):
    with pytest.raises(ValueError, match="6 heads of 64 features are not together as wide as the"):
      write(odd)
  with pytest.raises(ValueError, match=r"lacks gpt2\.attention\.layer_norm_epsilon"):
    gpt2_configs.from_gguf(
      {x: v for x, v in metadata.items() if "epsilon" not in x}, tie_embeddings=True
    )
