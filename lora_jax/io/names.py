"""Tensor names of file formats, as literal tables to the model's paths, and one function each way.

    assign(names, LLAMA_HF, expected=paths)      # {"model.norm.weight": "norm/scale", ...}
    file_names(paths, LLAMA_HF)                  # {"norm/scale": "model.norm.weight", ...}

In a template `{i}` stands for the number of a layer. A name whose path is None is known and holds
nothing that the configuration does not say; it is left out.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

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

Table = Mapping[str, str | None]

_LISTED = 8


def assign(names: Iterable[str], table: Table, expected: Collection[str]) -> dict[str, str]:
  """Returns {tensor name: path} for the names that hold parameters.

  names: of the tensors in a file.
  table: templates of names to templates of paths.
  expected: the model's paths.

  Raises one ValueError that lists every unmapped name (no row of the table), unexpected name (its
  path is not the model's), missing path, and path set by several names.
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
  """Returns {path: tensor name}, the other way round; `blocks/...` of stacked layers keeps `{i}`.

      file_names(["block_3/attn/query/kernel", "blocks/attn/query/kernel"], LLAMA_HF).values()
      # model.layers.3.self_attn.q_proj.weight, model.layers.{i}.self_attn.q_proj.weight

  Raises ValueError for a path that the table does not lead to.
  """
  found = {path: names_of(path, table) for path in paths}
  for path, names in found.items():
    if not names:
      raise ValueError(f"{path}: no tensor name in the table leads to this path")
  return {path: names[0] for path, names in found.items()}


def names_of(path: str, table: Table) -> list[str]:
  """Returns the tensor names that lead to a path, of which a tied parameter has several.

  A name keeps its `{i}` where the path is `blocks/...`, or where the table's path has none: then
  the layers are stacked in one leaf.
  """
  wanted = re.sub(r"^blocks/", "block_{i}/", path)
  names = []
  for name, template in table.items():
    if template is not None and (layer := _layer(template, wanted)) is not None:
      names.append(name.replace("{i}", layer or "{i}"))
  return names


def _layer(template: str, text: str) -> str | None:
  """What `{i}` stands for in `text` ("" in a template without it); None where they differ."""
  before, _, after = template.partition("{i}")
  if not after:
    return "" if text == template else None
  match = re.fullmatch(re.escape(before) + r"(0|[1-9]\d*|\{i\})" + re.escape(after), text)
  return match and match[1]


def _listed(items: list[str]) -> str:
  shown = ", ".join(items[:_LISTED])
  return shown if len(items) <= _LISTED else f"{shown} and {len(items) - _LISTED} more"
