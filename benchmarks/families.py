r"""The cost of a LoRA step relative to its floor, for each family of decoders at one small size.

    python -m benchmarks.families
    python -m benchmarks.families --families=gemma2,gpt2 --output=benchmarks/results.md

Random weights, float32. A step is forward, backward and AdamW, adapters on all linear layers. The
floor is the same model with a frozen base, where only norms train. See benchmarks.step.
"""

import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags
from tqdm import tqdm

from benchmarks import rows
from benchmarks.circumstances import describe_circumstances
from benchmarks.models import language_model
from benchmarks.reporting import define_output, publish
from benchmarks.rows import JaxRow
from benchmarks.turns import ratio, run_in_turns
from lora_jax import families, tables

BATCH, LENGTH = 4, 128
_SIZES = {
  "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
  "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
  "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "silu",
  "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 384}
FIELDS: dict[str, dict[str, Any]] = {
  "qwen3_moe": _EXPERTS | {"num_experts": 8, "norm_topk_prob": True},
  "gpt_oss": {
    "num_experts_per_tok": 2, "num_local_experts": 8, "intermediate_size": 384,
    "attention_bias": True,
  },
  "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
  "gemma3_text": _GEMMA,
  "smollm3": {"no_rope_layer_interval": 4},
  "granite": {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
  },
  "gemma4_text": {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "global_head_dim": 64,
    "num_kv_shared_layers": 1, "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": 4096, "max_position_embeddings": 256,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
  },
  "gpt2": {
    "vocab_size": 4096, "n_embd": 512, "n_layer": 4, "n_head": 8, "n_inner": 2048,
    "n_positions": 256,
  },
}  # fmt: skip
"""The fields of a family's config.json, in addition to `_SIZES`; of ALONE these are all."""
ALONE = ("gpt2", "gemma4_text")

DECODERS = [name for name, x in families.FAMILIES.items() if x.kind == families.DECODER]

_FAMILIES = flags.DEFINE_list("families", DECODERS, "The families of decoders to measure.")
_RANK = flags.DEFINE_integer("rank", 8, "Rank of the adapters.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Turns of each row.", lower_bound=2)
_OUTPUT = define_output()

flags.register_validator(
  "families",
  lambda names: names and set(names) <= set(DECODERS),
  f"--families takes some of {', '.join(DECODERS)}",
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  cells = [measure(name, _RANK.value, _ROUNDS.value) for name in tqdm(_FAMILIES.value)]
  header = ("family", "floor, ms", "LoRA, ms", "LoRA / floor", "base", "trains")
  report = "\n".join(
    [
      f"## A step of each family, {BATCH} × {LENGTH}, float32, rank {_RANK.value}",
      "",
      *describe_circumstances("benchmarks.families", ["jax", "flax", "optax"]),
      f"- {_ROUNDS.value} rounds. Ratios: medians over the rounds, with quartiles.",
      "",
      tables.markdown(header, cells),
    ]
  )
  publish(report, _OUTPUT.value)


def make_config(name: str) -> families.Config:
  """The configuration of a family's model with four layers of width 512."""
  own = FIELDS.get(name, {})
  fields = own if name in ALONE else _SIZES | own
  return families.parse_config({"model_type": name} | fields)


def measure(name: str, rank: int, rounds: int) -> tuple[str, ...]:
  """A family's row of the table."""
  case = language_model(make_config(name), None, BATCH, LENGTH)
  adapters = rows.make_adapters(case, rank)
  floor = JaxRow("floor", rows.floor(case), case)
  ours = JaxRow("LoRA", rows.ours(case, adapters), case)
  for row in (floor, ours):
    row.compile()
    row.start()
  seconds = run_in_turns({row: functools.partial(row.run, 1) for row in (floor, ours)}, rounds)
  size = sum(leaf.size for leaf in jax.tree.leaves(case.params))
  times = (f"{1e3 * statistics.median(seconds[row]):,.1f}" for row in (floor, ours))
  return (
    name,
    *times,
    ratio(seconds[ours], seconds[floor]),
    f"{size / 1e6:,.1f}M",
    f"{ours.trainable:,}",
  )


if __name__ == "__main__":
  app.run(main)
