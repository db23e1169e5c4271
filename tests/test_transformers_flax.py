"""The Flax models of transformers 4.57, the last release that had them, untouched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

import lora_jax

pytestmark = [
  pytest.mark.skipif(
    not hasattr(transformers, "FlaxBertModel"),
    reason=f"transformers {transformers.__version__} has no Flax models; .ci/run tests with 4.57",
  ),
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
  pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SPEC = lora_jax.LoRA(rank=2, alpha=4.0)
IDS = jnp.asarray(np.arange(16).reshape(2, 8) % 61 + 1, jnp.int32)
_SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")

# name of the model: its config, its inputs, the leaves that "all-linear" must adapt, with roles
MODELS = {
  "FlaxGPT2LMHeadModel": (
    {"vocab_size": 64, "n_positions": 16, "n_embd": 18, "n_layer": 1, "n_head": 2},
    (IDS,),
    {
      f"transformer/h/0/{layer}/kernel": "oi"
      for layer in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    },
  ),
  "FlaxBertModel": (
    {"vocab_size": 64, "hidden_size": 18, "max_position_embeddings": 16} | _SMALL,
    (IDS,),
    {"pooler/dense/kernel": "io"}
    | {
      f"encoder/layer/{i}/{layer}/kernel": "io"
      for i in range(2)
      for layer in (
        "attention/self/query", "attention/self/key", "attention/self/value",
        "attention/output/dense", "intermediate/dense", "output/dense",
      )
    },
  ),
  "FlaxViTModel": (
    {"hidden_size": 18, "image_size": 8, "patch_size": 4} | _SMALL,
    (jnp.ones((1, 3, 8, 8)) * jnp.arange(8),),
    {"pooler/dense/kernel": "io"}
    | {
      f"encoder/layer/{i}/{layer}/kernel": "io"
      for i in range(2)
      for layer in (
        "attention/attention/query", "attention/attention/key", "attention/attention/value",
        "attention/output/dense", "intermediate/dense", "output/dense",
      )
    },
  ),
  "FlaxLlamaForCausalLM": (
    {"vocab_size": 64, "hidden_size": 16, "max_position_embeddings": 16} | _SMALL,
    (IDS,),
    {
      f"model/layers/{i}/{layer}_proj/kernel": "io"
      for i in range(2)
      for layer in (
        "self_attn/q", "self_attn/k", "self_attn/v", "self_attn/o",
        "mlp/gate", "mlp/up", "mlp/down",
      )
    },
  ),
  "FlaxWhisperForConditionalGeneration": (
    {
      "vocab_size": 64, "d_model": 18, "encoder_layers": 1, "decoder_layers": 1,
      "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 36,
      "decoder_ffn_dim": 36, "max_source_positions": 10, "max_target_positions": 16,
      "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
      "decoder_start_token_id": 1,
    },
    (jnp.sin(jnp.arange(320.0)).reshape(2, 8, 20), IDS),
    {
      f"model/{side}/layers/0/{layer}/kernel": "io"
      for side, layers in {
        "encoder": [*(f"self_attn/{x}" for x in _ATTENTION), "fc1", "fc2"],
        "decoder": [
          *(f"{kind}/{x}" for kind in ("self_attn", "encoder_attn") for x in _ATTENTION),
          "fc1", "fc2",
        ],
      }.items()
      for layer in layers
    },
  ),
  "FlaxWav2Vec2Model": (
    {
      "hidden_size": 18, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
      "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
      "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True,
      "feat_extract_norm": "layer",
    } | _SMALL,
    (jnp.sin(jnp.arange(800.0)).reshape(2, 400),),
    {"feature_projection/projection/kernel": "io"}
    | {
      f"encoder/layers/{i}/{layer}/kernel": "io"
      for i in range(2)
      for layer in (
        *(f"attention/{x}" for x in _ATTENTION), "feed_forward/intermediate_dense",
        "feed_forward/output_dense",
      )
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_adapted_untouched(name):
  """In float64: in float32 some of these random models differ by how a machine sums."""
  fields, inputs, expected = MODELS[name]
  cls = getattr(transformers, name)
  with jax.enable_x64(True):
    model = cls(cls.config_class(**fields), seed=0, dtype=jnp.float64)
    params, *inputs = jax.tree.map(in_float64, (model.params, *inputs))

    def f(params, *inputs):
      return model(*inputs, params=params)[0]

    axes = lora_jax.trace_axes(f, params, *inputs)
    specs = lora_jax.match(params, [("all-linear", SPEC)], axes)
    assert {path: axes[path].roles for path in specs} == expected
    adapters = lora_jax.init(jax.random.key(0), params, specs, axes)
    apply, bare = jax.jit(lora_jax.adapt(f, strict=True)), jax.jit(f)
    base = bare(params, *inputs)
    fresh = apply(lora_jax.attach(params, adapters), *inputs)
    np.testing.assert_allclose(fresh, base, atol=1e-12, rtol=1e-12)

    noise = jax.random.key(1)
    adapters = jax.tree.map(
      lambda x: x + 0.3 * jax.random.normal(noise, x.shape, x.dtype), adapters
    )
    weights = lora_jax.attach(params, adapters)
    adapted = apply(weights, *inputs)
    np.testing.assert_allclose(
      adapted, bare(lora_jax.materialize(weights), *inputs), atol=1e-12, rtol=1e-12
    )
    assert float(jnp.abs(adapted - base).max()) > 1e-3


def in_float64(x):
  return jnp.asarray(x, jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
