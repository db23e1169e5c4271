"""Converts the fields of a config.json about experts to and from `ExpertConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.checks import shown
from lora_jax.io.checked_fields import sizes
from lora_jax.models.experts import ExpertConfig

Fields = Mapping[str, Any]

# Transformers 5 writes the second, the released files of Qwen3-MoE have the first.
_COUNTS = ("num_experts", "num_local_experts")
_PER_TOKEN, _NORMALIZED, _DENSE = "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers"
# The router loss is not computed. The last two are in files, but transformers does not read them.
_IGNORED = (
  "output_router_logits",
  "router_aux_loss_coef",
  "experts_per_token",
  "initial_context_length",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertStyle:
  """The style of a family's fields of experts.

  width: the field of the width of an expert.
  says_normalized: whether a field switches the division of a token's probabilities by their sum;
    otherwise they are always divided.
  switches: the family's fields of `ExpertConfig`.
  defaults: transformers' defaults of optional fields.
  """

  width: str
  defaults: Fields
  says_normalized: bool = False
  switches: Fields = dataclasses.field(default_factory=dict)

  @property
  def known(self) -> set[str]:
    """The fields that it reads."""
    own = {_NORMALIZED, _DENSE} if self.says_normalized else set()
    return {*_COUNTS, _PER_TOKEN, self.width, *_IGNORED} | own


CLAMPED = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}
"""The constants of the clamped gate of `lora_jax.models.experts`, by the fields of gpt-oss."""
QWEN3_MOE = ExpertStyle(
  width="moe_intermediate_size",
  defaults={
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
  },
  says_normalized=True,
)
GPT_OSS = ExpertStyle(
  width="intermediate_size",
  defaults={"num_local_experts": 128, "num_experts_per_tok": 4},
  switches={"clamped": True, "biases": True},
)


def read(given: Fields, style: ExpertStyle) -> ExpertConfig:
  """Returns the experts that a file's fields describe.

  Raises ValueError for layers without experts, contradicting fields, and invalid sizes.
  """
  if dense := given.get(_DENSE):
    raise ValueError(
      f"{_DENSE}={shown(dense)} is not supported: every layer's MLP is one of experts here"
    )
  fields = {**style.defaults, **given}
  counts = sizes(fields, {x: x for x in _COUNTS if x in given} or {x: x for x in _COUNTS[1:]})
  if len({*counts.values()}) > 1:
    raise ValueError(f"{' and '.join(f'{x}={n}' for x, n in counts.items())} differ")
  return ExpertConfig(
    num_experts=next(iter(counts.values())),
    normalized=fields[_NORMALIZED] if style.says_normalized else True,
    **sizes(fields, {_PER_TOKEN: "per_token", style.width: "width"}),
    **style.switches,
  )


def written(experts: ExpertConfig, style: ExpertStyle) -> dict[str, Any]:
  """Returns the fields, the inverse of `read`."""
  fields = dict.fromkeys(_COUNTS, experts.num_experts)
  fields |= {_PER_TOKEN: experts.per_token, style.width: experts.width}
  if style.says_normalized:
    fields |= {_NORMALIZED: experts.normalized, _DENSE: []}
  return fields
