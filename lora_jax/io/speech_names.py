"""Tensor names of speech models: tables as in `lora_jax.io.names`.

    WHISPER["model.encoder.layers.{i}.fc1.weight"]             # "encoder/block_{i}/mlp/up/kernel"
    WHISPER_CTRANSLATE2["encoder/layer_{i}/ffn/linear_0/weight"]       # the same

`WHISPER_CTRANSLATE2` has the names after `lora_jax.io.whisper_files` has split fused projections.
"""

from lora_jax.io.names import Conv, Table, WeightNormed


def _leaves(name: str, path: str, *, norm: bool = False, bias: bool = True) -> Table:
  rows = {f"{name}.weight": f"{path}/{'scale' if norm else 'kernel'}"}
  return rows | ({f"{name}.bias": f"{path}/bias"} if bias else {})


def _attention(name: str, path: str) -> Table:
  return {
    **_leaves(f"{name}.q_proj", f"{path}/query"),
    **_leaves(f"{name}.k_proj", f"{path}/key", bias=False),
    **_leaves(f"{name}.v_proj", f"{path}/value"),
    **_leaves(f"{name}.out_proj", f"{path}/out"),
  }


def _layers(half: str, *, cross: bool) -> Table:
  layer, block = f"model.{half}.layers.{{i}}", f"{half}/block_{{i}}"
  found = {
    **_leaves(f"{layer}.self_attn_layer_norm", f"{block}/attn_norm", norm=True),
    **_attention(f"{layer}.self_attn", f"{block}/attn"),
    **_leaves(f"{layer}.final_layer_norm", f"{block}/mlp_norm", norm=True),
    **_leaves(f"{layer}.fc1", f"{block}/mlp/up"),
    **_leaves(f"{layer}.fc2", f"{block}/mlp/down"),
  }
  if not cross:
    return found
  return {
    **found,
    **_leaves(f"{layer}.encoder_attn_layer_norm", f"{block}/cross_attn_norm", norm=True),
    **_attention(f"{layer}.encoder_attn", f"{block}/cross_attn"),
  }


WHISPER: Table = {
  "model.encoder.conv1.weight": Conv("encoder/conv1/kernel"),
  "model.encoder.conv1.bias": "encoder/conv1/bias",
  "model.encoder.conv2.weight": Conv("encoder/conv2/kernel"),
  "model.encoder.conv2.bias": "encoder/conv2/bias",
  "model.encoder.embed_positions.weight": "encoder/positions/embedding",
  **_layers("encoder", cross=False),
  **_leaves("model.encoder.layer_norm", "encoder/norm", norm=True),
  "model.decoder.embed_tokens.weight": "decoder/embed/embedding",
  "model.decoder.embed_positions.weight": "decoder/positions/embedding",
  **_layers("decoder", cross=True),
  **_leaves("model.decoder.layer_norm", "decoder/norm", norm=True),
  "proj_out.weight": None,  # a second copy of the tied embedding
}
"""Of `transformers`, in files."""

CTC_HEAD = {"ctc_head.weight": "head/kernel", "ctc_head.bias": "head/bias"}
"""The head of a Whisper on its frames, which `transformers` does not have."""


def _parts(name: str, path: str) -> Table:
  """The weight and bias of a linear layer."""
  return {f"{name}/weight": f"{path}/kernel", f"{name}/bias": f"{path}/bias"}


def _gamma(name: str, path: str) -> Table:
  return {f"{name}/gamma": f"{path}/scale", f"{name}/beta": f"{path}/bias"}


def _half(half: str, *, cross: bool) -> Table:
  layer, block = f"{half}/layer_{{i}}", f"{half}/block_{{i}}"
  own, ffn = f"{layer}/self_attention", f"{layer}/ffn"
  found = {
    f"{half}/position_encodings/encodings": f"{half}/positions/embedding",
    **_gamma(f"{own}/layer_norm", f"{block}/attn_norm"),
    **_parts(f"{own}/query", f"{block}/attn/query"),
    f"{own}/key/weight": f"{block}/attn/key/kernel",
    **_parts(f"{own}/value", f"{block}/attn/value"),
    **_parts(f"{own}/linear_1", f"{block}/attn/out"),
    **_gamma(f"{ffn}/layer_norm", f"{block}/mlp_norm"),
    **_parts(f"{ffn}/linear_0", f"{block}/mlp/up"),
    **_parts(f"{ffn}/linear_1", f"{block}/mlp/down"),
    **_gamma(f"{half}/layer_norm", f"{half}/norm"),
  }
  if not cross:
    return found
  other = f"{layer}/attention"
  return {
    **found,
    **_gamma(f"{other}/layer_norm", f"{block}/cross_attn_norm"),
    **_parts(f"{other}/linear_0", f"{block}/cross_attn/query"),
    f"{other}/key/weight": f"{block}/cross_attn/key/kernel",
    **_parts(f"{other}/value", f"{block}/cross_attn/value"),
    **_parts(f"{other}/linear_2", f"{block}/cross_attn/out"),
  }


WHISPER_CTRANSLATE2: Table = {
  "encoder/conv1/weight": Conv("encoder/conv1/kernel"),
  "encoder/conv1/bias": "encoder/conv1/bias",
  "encoder/conv2/weight": Conv("encoder/conv2/kernel"),
  "encoder/conv2/bias": "encoder/conv2/bias",
  **_half("encoder", cross=False),
  "decoder/embeddings/weight": "decoder/embed/embedding",
  **_half("decoder", cross=True),
}
"""Of CTranslate2's model.bin, its fused projections split."""

WHISPER_FORMATS: dict[str, Table] = {
  "safetensors": WHISPER,
  # PEFT wraps the head and the embedding that it is tied to as two modules.
  "modules": WHISPER | {"proj_out.weight": "decoder/embed/embedding"},
  "ctranslate2": WHISPER_CTRANSLATE2,
}


def _wav2vec2() -> Table:
  body, layer, block = "wav2vec2", "wav2vec2.encoder.layers.{i}", "block_{i}"
  convolution = f"{body}.feature_extractor.conv_layers.{{i}}"
  return {
    f"{convolution}.conv.weight": Conv("convolutions/conv_{i}/kernel"),
    f"{convolution}.conv.bias": "convolutions/conv_{i}/bias",
    **_leaves(f"{convolution}.layer_norm", "convolutions/norm_{i}", norm=True),
    **_leaves(f"{body}.feature_projection.layer_norm", "project_norm", norm=True),
    **_leaves(f"{body}.feature_projection.projection", "project"),
    f"{body}.encoder.pos_conv_embed.conv.weight": WeightNormed("positions/kernel"),
    f"{body}.encoder.pos_conv_embed.conv.bias": "positions/bias",
    **_leaves(f"{body}.encoder.layer_norm", "norm", norm=True),
    **_leaves(f"{layer}.attention.q_proj", f"{block}/attn/query"),
    **_leaves(f"{layer}.attention.k_proj", f"{block}/attn/key"),
    **_leaves(f"{layer}.attention.v_proj", f"{block}/attn/value"),
    **_leaves(f"{layer}.attention.out_proj", f"{block}/attn/out"),
    **_leaves(f"{layer}.layer_norm", f"{block}/attn_norm", norm=True),
    **_leaves(f"{layer}.feed_forward.intermediate_dense", f"{block}/mlp/up"),
    **_leaves(f"{layer}.feed_forward.output_dense", f"{block}/mlp/down"),
    **_leaves(f"{layer}.final_layer_norm", f"{block}/mlp_norm", norm=True),
    f"{body}.masked_spec_embed": None,  # masks frames in pretraining
    **_leaves("lm_head", "head"),
  }


WAV2VEC2: Table = _wav2vec2()
"""Of `transformers`' Wav2Vec2ForCTC, in files and as PEFT's modules."""
