"""Tensor names of speech models: tables as in `lora_jax.io.names`.

    WHISPER["model.encoder.layers.{i}.fc1.weight"]             # "encoder/block_{i}/mlp/up/kernel"
    WHISPER_CTRANSLATE2["encoder/layer_{i}/ffn/linear_0/weight"]       # the same

`WHISPER_CTRANSLATE2` has the names after `lora_jax.io.whisper_files` has split fused projections.
"""

from lora_jax.io.names import Conv, Table


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
"""Of `transformers`, in files and as PEFT's modules."""

CTC_HEAD = {"ctc_head.weight": "head/kernel", "ctc_head.bias": "head/bias"}
"""Of a Whisper with a head on its frames, which `transformers` does not have."""


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
