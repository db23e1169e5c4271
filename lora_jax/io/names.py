"""Tables from tensor names of file formats to the model's paths, and a function for each direction.

    assign(names, LLAMA_HF, expected=paths)      # {"model.norm.weight": "norm/scale", ...}
    file_names(paths, LLAMA_HF)                  # {"norm/scale": "model.norm.weight", ...}

HUGGING_FACE and GGUF have the table of each family. In a template `{i}` is the index of a layer. A
name whose path is None is ignored, since it adds nothing to the configuration. `InOut(...)` is the
path of a kernel that is stored as (in, out), `InTurn(...)` that of two tensors in the file, and
`Conv(...)` that of a convolution's kernel. The tables of image models are in
`lora_jax.io.image_names`.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any


class InOut(str):
  """The path of a kernel whose tensor is (in, out), as in transformers' Conv1D.

  With a plain path the tensor of a kernel is (out, in), while a kernel here is always (in, out).
  """


class InTurn(str):
  """The path of a leaf that interleaves the outputs of gate and up, which the file separates."""


class Conv(str):
  """The path of a convolution's kernel, whose tensor is (out, in, *window) in files and (*window,
  in, out) here."""


class WeightNormed(Conv):
  """The path of a convolution's kernel that files hold as a direction and a length; see
  `lora_jax.io.weight_norm`."""


LLAMA_GGUF = {
  "token_embd.weight": "embed/embedding",
  "blk.{i}.attn_norm.weight": "block_{i}/attn_norm/scale",
  "blk.{i}.attn_q.weight": "block_{i}/attn/query/kernel",
  "blk.{i}.attn_k.weight": "block_{i}/attn/key/kernel",
  "blk.{i}.attn_v.weight": "block_{i}/attn/value/kernel",
  "blk.{i}.attn_output.weight": "block_{i}/attn/out/kernel",
  "blk.{i}.ffn_norm.weight": "block_{i}/mlp_norm/scale",
  "blk.{i}.ffn_gate.weight": "block_{i}/mlp/gate/kernel",
  "blk.{i}.ffn_up.weight": "block_{i}/mlp/up/kernel",
  "blk.{i}.ffn_down.weight": "block_{i}/mlp/down/kernel",
  "output_norm.weight": "norm/scale",
  "output.weight": "head/kernel",
  "rope_freqs.weight": None,
}

LLAMA_HF = {
  "model.embed_tokens.weight": "embed/embedding",
  "model.layers.{i}.input_layernorm.weight": "block_{i}/attn_norm/scale",
  "model.layers.{i}.self_attn.q_proj.weight": "block_{i}/attn/query/kernel",
  "model.layers.{i}.self_attn.k_proj.weight": "block_{i}/attn/key/kernel",
  "model.layers.{i}.self_attn.v_proj.weight": "block_{i}/attn/value/kernel",
  "model.layers.{i}.self_attn.o_proj.weight": "block_{i}/attn/out/kernel",
  "model.layers.{i}.self_attn.rotary_emb.inv_freq": None,
  "model.layers.{i}.post_attention_layernorm.weight": "block_{i}/mlp_norm/scale",
  "model.layers.{i}.mlp.gate_proj.weight": "block_{i}/mlp/gate/kernel",
  "model.layers.{i}.mlp.up_proj.weight": "block_{i}/mlp/up/kernel",
  "model.layers.{i}.mlp.down_proj.weight": "block_{i}/mlp/down/kernel",
  "model.norm.weight": "norm/scale",
  "lm_head.weight": "head/kernel",
}

_BIASES_HF = {
  "model.layers.{i}.self_attn.q_proj.bias": "block_{i}/attn/query/bias",
  "model.layers.{i}.self_attn.k_proj.bias": "block_{i}/attn/key/bias",
  "model.layers.{i}.self_attn.v_proj.bias": "block_{i}/attn/value/bias",
}
_HEAD_NORMS_HF = {
  "model.layers.{i}.self_attn.q_norm.weight": "block_{i}/attn/query_norm/scale",
  "model.layers.{i}.self_attn.k_norm.weight": "block_{i}/attn/key_norm/scale",
}
# `post_attention_layernorm` is the norm after attention here; in Llama it is before the MLP.
_NORMS_ON_BOTH_SIDES_HF = {
  "model.layers.{i}.post_attention_layernorm.weight": "block_{i}/attn_post_norm/scale",
  "model.layers.{i}.pre_feedforward_layernorm.weight": "block_{i}/mlp_norm/scale",
  "model.layers.{i}.post_feedforward_layernorm.weight": "block_{i}/mlp_post_norm/scale",
}

# Each expert's kernels are separate tensors in files; see `lora_jax.io.expert_tensors`.
_EXPERTS_HF = {
  "model.layers.{i}.mlp.gate.weight": "block_{i}/mlp/router/kernel",
  "model.layers.{i}.mlp.experts.gate_up_proj": "block_{i}/mlp/experts/gate_up/kernel",
  "model.layers.{i}.mlp.experts.down_proj": "block_{i}/mlp/experts/down/kernel",
}
# gpt-oss has one kernel (in, out) for all experts, with interleaved columns of gate and up.
_GPT_OSS_HF = {
  "model.layers.{i}.self_attn.o_proj.bias": "block_{i}/attn/out/bias",
  "model.layers.{i}.self_attn.sinks": "block_{i}/attn/sinks",
  "model.layers.{i}.mlp.router.weight": "block_{i}/mlp/router/kernel",
  "model.layers.{i}.mlp.router.bias": "block_{i}/mlp/router/bias",
  "model.layers.{i}.mlp.experts.gate_up_proj": InOut("block_{i}/mlp/experts/gate_up/kernel"),
  "model.layers.{i}.mlp.experts.gate_up_proj_bias": "block_{i}/mlp/experts/gate_up/bias",
  "model.layers.{i}.mlp.experts.down_proj": InOut("block_{i}/mlp/experts/down/kernel"),
  "model.layers.{i}.mlp.experts.down_proj_bias": "block_{i}/mlp/experts/down/bias",
}
_HEAD_NORMS_GGUF = {
  "blk.{i}.attn_q_norm.weight": "block_{i}/attn/query_norm/scale",
  "blk.{i}.attn_k_norm.weight": "block_{i}/attn/key_norm/scale",
}
_EXPERTS_GGUF = {
  "blk.{i}.ffn_gate_inp.weight": "block_{i}/mlp/router/kernel",
  "blk.{i}.ffn_gate_up_exps.weight": "block_{i}/mlp/experts/gate_up/kernel",
  "blk.{i}.ffn_down_exps.weight": "block_{i}/mlp/experts/down/kernel",
}


def _without_mlp(table: "Table") -> dict[str, str | None]:
  return {name: path for name, path in table.items() if path is None or "/mlp/" not in path}


_NORMS_AFTER_HF = {
  "model.layers.{i}.post_attention_layernorm.weight": "block_{i}/attn_post_norm/scale",
  "model.layers.{i}.post_feedforward_layernorm.weight": "block_{i}/mlp_post_norm/scale",
}
_FUSED_HF = {
  "model.layers.{i}.self_attn.qkv_proj.weight": "block_{i}/attn/qkv/kernel",
  "model.layers.{i}.mlp.gate_up_proj.weight": "block_{i}/mlp/gate_up/kernel",
}

GPT2_HF = {
  "transformer.wte.weight": "embed/embedding",
  "transformer.wpe.weight": "positions/embedding",
  "transformer.h.{i}.ln_1.weight": "block_{i}/attn_norm/scale",
  "transformer.h.{i}.ln_1.bias": "block_{i}/attn_norm/bias",
  "transformer.h.{i}.attn.c_attn.weight": InOut("block_{i}/attn/qkv/kernel"),
  "transformer.h.{i}.attn.c_attn.bias": "block_{i}/attn/qkv/bias",
  "transformer.h.{i}.attn.c_proj.weight": InOut("block_{i}/attn/out/kernel"),
  "transformer.h.{i}.attn.c_proj.bias": "block_{i}/attn/out/bias",
  "transformer.h.{i}.attn.bias": None,  # a mask, and what it is filled with
  "transformer.h.{i}.attn.masked_bias": None,
  "transformer.h.{i}.ln_2.weight": "block_{i}/mlp_norm/scale",
  "transformer.h.{i}.ln_2.bias": "block_{i}/mlp_norm/bias",
  "transformer.h.{i}.mlp.c_fc.weight": InOut("block_{i}/mlp/up/kernel"),
  "transformer.h.{i}.mlp.c_fc.bias": "block_{i}/mlp/up/bias",
  "transformer.h.{i}.mlp.c_proj.weight": InOut("block_{i}/mlp/down/kernel"),
  "transformer.h.{i}.mlp.c_proj.bias": "block_{i}/mlp/down/bias",
  "transformer.ln_f.weight": "norm/scale",
  "transformer.ln_f.bias": "norm/bias",
  "lm_head.weight": "head/kernel",
}

GPT2_GGUF = {
  "token_embd.weight": "embed/embedding",
  "position_embd.weight": "positions/embedding",
  "blk.{i}.attn_norm.weight": "block_{i}/attn_norm/scale",
  "blk.{i}.attn_norm.bias": "block_{i}/attn_norm/bias",
  "blk.{i}.attn_qkv.weight": "block_{i}/attn/qkv/kernel",
  "blk.{i}.attn_qkv.bias": "block_{i}/attn/qkv/bias",
  "blk.{i}.attn_output.weight": "block_{i}/attn/out/kernel",
  "blk.{i}.attn_output.bias": "block_{i}/attn/out/bias",
  "blk.{i}.ffn_norm.weight": "block_{i}/mlp_norm/scale",
  "blk.{i}.ffn_norm.bias": "block_{i}/mlp_norm/bias",
  "blk.{i}.ffn_up.weight": "block_{i}/mlp/up/kernel",
  "blk.{i}.ffn_up.bias": "block_{i}/mlp/up/bias",
  "blk.{i}.ffn_down.weight": "block_{i}/mlp/down/kernel",
  "blk.{i}.ffn_down.bias": "block_{i}/mlp/down/bias",
  "output_norm.weight": "norm/scale",
  "output_norm.bias": "norm/bias",
  "output.weight": "head/kernel",
}

GEMMA4_HF = {
  name: path
  for name, path in (LLAMA_HF | _NORMS_ON_BOTH_SIDES_HF | _HEAD_NORMS_HF).items()
  if not name.endswith(".inv_freq")
} | {
  "model.embed_tokens_per_layer.weight": "embed_per_layer/embedding",
  "model.per_layer_model_projection.weight": "per_layer_model/kernel",
  "model.per_layer_projection_norm.weight": "per_layer_norm/scale",
  "model.layers.{i}.per_layer_input_gate.weight": "block_{i}/per_layer_gate/kernel",
  "model.layers.{i}.per_layer_projection.weight": "block_{i}/per_layer_out/kernel",
  "model.layers.{i}.post_per_layer_input_norm.weight": "block_{i}/per_layer_norm/scale",
  "model.layers.{i}.layer_scalar": "block_{i}/scalar",
}

HUGGING_FACE = {
  "llama": LLAMA_HF,
  "mistral": LLAMA_HF,
  "qwen2": LLAMA_HF | _BIASES_HF,
  "qwen3": LLAMA_HF | _HEAD_NORMS_HF,
  "qwen3_moe": _without_mlp(LLAMA_HF) | _HEAD_NORMS_HF | _EXPERTS_HF,
  "gpt_oss": _without_mlp(LLAMA_HF) | _BIASES_HF | _GPT_OSS_HF,
  "gemma2": LLAMA_HF | _NORMS_ON_BOTH_SIDES_HF,
  "gemma3_text": LLAMA_HF | _NORMS_ON_BOTH_SIDES_HF | _HEAD_NORMS_HF,
  "phi3": LLAMA_HF | _FUSED_HF,
  "olmo2": LLAMA_HF | _NORMS_AFTER_HF | _HEAD_NORMS_HF,
  "olmo3": LLAMA_HF | _NORMS_AFTER_HF | _HEAD_NORMS_HF,
  "smollm3": LLAMA_HF,
  "granite": LLAMA_HF,
  "ministral": LLAMA_HF,
  "ministral3": LLAMA_HF,
}
"""By `LlamaConfig.family`: of safetensors and of PEFT's adapters."""

_BIASES_GGUF = {
  "blk.{i}.attn_q.bias": "block_{i}/attn/query/bias",
  "blk.{i}.attn_k.bias": "block_{i}/attn/key/bias",
  "blk.{i}.attn_v.bias": "block_{i}/attn/value/bias",
}
_POST_NORMS_GGUF = {
  "blk.{i}.post_attention_norm.weight": "block_{i}/attn_post_norm/scale",
  "blk.{i}.post_ffw_norm.weight": "block_{i}/mlp_post_norm/scale",
}
_FUSED_GGUF = {
  "blk.{i}.attn_qkv.weight": "block_{i}/attn/qkv/kernel",
  "blk.{i}.ffn_up.weight": "block_{i}/mlp/gate_up/kernel",
  "rope_factors_long.weight": None,
  "rope_factors_short.weight": None,
}
# The norm after attention of other formats is the norm before the MLP here.
_GPT_OSS_GGUF = {
  "blk.{i}.post_attention_norm.weight": "block_{i}/mlp_norm/scale",
  "blk.{i}.attn_output.bias": "block_{i}/attn/out/bias",
  "blk.{i}.attn_sinks.weight": "block_{i}/attn/sinks",
  "blk.{i}.ffn_gate_inp.weight": "block_{i}/mlp/router/kernel",
  "blk.{i}.ffn_gate_inp.bias": "block_{i}/mlp/router/bias",
  "blk.{i}.ffn_gate_up_exps.weight": InTurn("block_{i}/mlp/experts/gate_up/kernel"),
  "blk.{i}.ffn_gate_up_exps.bias": InTurn("block_{i}/mlp/experts/gate_up/bias"),
  "blk.{i}.ffn_down_exps.weight": "block_{i}/mlp/experts/down/kernel",
  "blk.{i}.ffn_down_exps.bias": "block_{i}/mlp/experts/down/bias",
}


def _without(table: "Table", *names: str) -> dict[str, str | None]:
  return {name: path for name, path in table.items() if name not in names}


_OLMO_GGUF = (
  _without(LLAMA_GGUF, "blk.{i}.attn_norm.weight", "blk.{i}.ffn_norm.weight")
  | _HEAD_NORMS_GGUF
  | _POST_NORMS_GGUF
)

GGUF = {
  "llama": LLAMA_GGUF,
  "mistral": LLAMA_GGUF,
  "ministral": LLAMA_GGUF,
  "ministral3": LLAMA_GGUF,
  "smollm3": LLAMA_GGUF,
  "qwen2": LLAMA_GGUF | _BIASES_GGUF,
  "qwen3": LLAMA_GGUF | _HEAD_NORMS_GGUF,
  "qwen3_moe": _without_mlp(LLAMA_GGUF) | _HEAD_NORMS_GGUF | _EXPERTS_GGUF,
  "gpt_oss": _without(_without_mlp(LLAMA_GGUF), "blk.{i}.ffn_norm.weight")
  | _BIASES_GGUF
  | _GPT_OSS_GGUF,
  "phi3": _without(LLAMA_GGUF, "blk.{i}.ffn_gate.weight") | _FUSED_GGUF,
  "olmo2": _OLMO_GGUF,
  "olmo3": _OLMO_GGUF,
  "granite": LLAMA_GGUF,
  "gemma2": LLAMA_GGUF | _POST_NORMS_GGUF,
  "gemma3_text": LLAMA_GGUF | _POST_NORMS_GGUF | _HEAD_NORMS_GGUF,
}
"""By `LlamaConfig.family`, llama.cpp's names; a family that is not here has no GGUF files here."""

ROUTERS = frozenset({"model.layers.{i}.mlp.gate.weight", "model.layers.{i}.mlp.router.weight"})
"""Weights of routers, which are no linear layers in transformers 5; PEFT has them as parameters."""

Table = Mapping[str, str | None]

_LISTED = 8


def assign(names: Iterable[str], table: Table, expected: Collection[str]) -> dict[str, str]:
  """Returns {tensor name: path} for the names that hold parameters.

  names: of the tensors in a file.
  table: templates of names to templates of paths.
  expected: the model's paths.

  Raises one ValueError that lists all unmapped names (without a table row), unexpected names (whose
  path is not in the model), missing paths, and paths with several names.
  """
  found: dict[str, str] = {}
  unmapped: list[str] = []
  for name in names:
    for template, path in table.items():
      if (layer := _layer(template, name)) is not None:
        if path is not None:
          found[name] = path.replace("{i}", layer)
        break
    else:
      unmapped.append(name)

  setters = defaultdict(list)
  for name, path in found.items():
    setters[path].append(name)
  problems = {
    "unmapped (in no row of the table)": unmapped,
    "unexpected (the model has no such parameter)": [
      f"{name} -> {path}" for name, path in found.items() if path not in expected
    ],
    "missing": [path for path in expected if path not in setters],
    "set more than once": [
      f"{path} by {' and '.join(several)}" for path, several in setters.items() if len(several) > 1
    ],
  }
  lines = [f"  {problem}: {_listed(items)}" for problem, items in problems.items() if items]
  if lines:
    raise ValueError("the tensors do not fit the model\n" + "\n".join(lines))
  return found


def file_names(paths: Iterable[str], table: Table) -> dict[str, str]:
  """Returns {path: tensor name}, the inverse; `blocks/...` of stacked layers keeps `{i}`.

      file_names(["block_3/attn/query/kernel", "blocks/attn/query/kernel"], LLAMA_HF).values()
      # model.layers.3.self_attn.q_proj.weight, model.layers.{i}.self_attn.q_proj.weight

  Raises ValueError for a path that is not in the table.
  """
  found = {path: names_of(path, table) for path in paths}
  for path, names in found.items():
    if not names:
      raise ValueError(f"{path}: no tensor name in the table leads to this path")
  return {path: names[0] for path, names in found.items()}


def names_of(path: str, table: Table) -> list[str]:
  """Returns the tensor names of a path; a tied parameter has several.

  A name keeps its `{i}` if the path is `blocks/...`, or if the table's path has no `{i}`, that is,
  if the layers are stacked in one leaf.
  """
  wanted = re.sub(r"^blocks/", "block_{i}/", path)
  names = []
  for name, template in table.items():
    if template is not None and (layer := _layer(template, wanted)) is not None:
      names.append(name.replace("{i}", layer or "{i}"))
  return names


def is_transposed(name: str, table: Table) -> bool:
  """Whether a tensor is a kernel (out, in), which must be transposed."""
  path = _path_of(name, table)
  assert path is not None  # the tensor is one that is read
  return path.endswith("/kernel") and not isinstance(path, InOut | Conv)


def axes_of(name: str, table: Table, ndim: int) -> tuple[int, ...]:
  """Returns the axes of a tensor in the order of its parameter's axes."""
  axes = tuple(range(ndim))
  if ndim > 2 and isinstance(_path_of(name, table), Conv):
    return (*axes[2:], 1, 0)
  return (*axes[:-2], *axes[:-3:-1]) if is_transposed(name, table) else axes


def is_in_out(name: str, table: Table) -> bool:
  """Whether a tensor is a kernel (in, out); False for a name that is not in the table."""
  return isinstance(_path_of(name, table), InOut)


def is_in_turn(name: str, table: Table) -> bool:
  """Whether a tensor interleaves gate and up; False for a name that is not in the table."""
  return isinstance(_path_of(name, table), InTurn)


def with_prefix(tensors: Mapping[str, Any], table: Table, prefix: str) -> dict[str, Any]:
  """Returns the tensors by the names of a table, adding the prefix if the file omits it.

  tensors: by the names of the file.
  prefix: of the body's names, as "transformer."; files that were saved from the body lack it.
  """
  if any(name.startswith(prefix) for name in tensors):
    return dict(tensors)
  known = {name for name in tensors if template_of(name, table)}
  return {name if name in known else prefix + name: x for name, x in tensors.items()}


def template_of(name: str, table: Table) -> str | None:
  """The template of a table that matches a name."""
  return next((x for x in table if _layer(x, name) is not None), None)


def _path_of(name: str, table: Table) -> str | None:
  """The template of the path of a tensor; None for one that is ignored or not in the table."""
  template = template_of(name, table)
  return None if template is None else table[template]


def _layer(template: str, text: str) -> str | None:
  """The value of `{i}` in `text` ("" for a template without it); None if they do not match."""
  before, _, after = template.partition("{i}")
  if not after:
    return "" if text == template else None
  match = re.fullmatch(re.escape(before) + r"(0|[1-9]\d*|\{i\})" + re.escape(after), text)
  return match and match[1]


def _listed(items: list[str]) -> str:
  shown = ", ".join(items[:_LISTED])
  return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
