"""The tensors of each kind of adapter in PEFT's files.

    model.layers.0.self_attn.q_proj.lora_A.weight      (rank, in)        a    [in, rank]
    model.layers.0.self_attn.q_proj.lora_B.weight      (out, rank)       b    [rank, out]

Letters as in `lora_jax.exchange.modules`.
"""

import dataclasses
from typing import NamedTuple

from lora_jax.exchange.modules import Module
from lora_jax.weights import AdaLoRA, Adapted, DoRA, LoHa, LoKr, LowRank, Recentred, VeRA


class Part(NamedTuple):
  """A part of an adapter: the suffix of its tensor, its field here, its axes in the file."""

  suffix: str
  field: str
  letters: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """The form in which PEFT stores a kind of adapter.

  Attributes:
    peft_type: its name in the config.
    kind: the Weight that represents it here.
    parts: the parts for a linear layer.
    others: further suffixes, for kinds with more than one form.
    shared: parts that all layers share, as large as the largest layer needs.
    alpha: the config's field for the scale's numerator; None for a kind without a scale.
    scaled: the fields to multiply by the scale where layers of a stack have different scales.
    window: True if a convolution's parts have axes for its window in the file.
    layers: the layers it supports in addition to linear ones: conv, embedding, conv1d
      (transformers').
    biases: True if the config says which biases are stored.
  """

  peft_type: str
  kind: type[Adapted]
  parts: tuple[Part, ...] = ()
  others: tuple[str, ...] = ()
  shared: tuple[Part, ...] = ()
  alpha: str | None = None
  scaled: tuple[str, ...] = ()
  window: bool = False
  layers: tuple[str, ...] = ()
  biases: bool = False

  def parts_of(self, module: Module) -> tuple[Part, ...]:
    """The parts for a module; LoRA's factors have other names in an embedding."""
    if module.has_experts:
      return _OF_EXPERTS
    names = _IN_AN_EMBEDDING if module.is_embedding else {}
    return tuple(part._replace(suffix=names.get(part.suffix, part.suffix)) for part in self.parts)

  @property
  def suffixes(self) -> list[str]:
    """The suffixes of all tensors."""
    own = [part.suffix for part in self.parts]
    return [*own, *self.others, *(_IN_AN_EMBEDDING[x] for x in own if x in _IN_AN_EMBEDDING)]

  def layout(self, field: str, module: Module) -> str:
    """The axes of a part of one layer in this library."""
    layout = self.kind.LAYOUTS[field]
    return layout if module.has_experts else layout.replace("s", "")

  def unfit(self, module: Module) -> str | None:
    """The reason why PEFT cannot adapt a module in this form, or None."""
    if module.parameter and self.kind is not LowRank:
      return f"PEFT has no {self.kind.__name__} of {module.parameter}, a parameter: LoRA alone"
    traits = {
      "an embedding": ("embedding", module.is_embedding),
      "a convolution": ("conv", module.is_conv),
      "transformers' Conv1D": ("conv1d", module.fan_in_fan_out),
    }
    lacking = [words for words, (x, is_so) in traits.items() if is_so and x not in self.layers]
    return f"PEFT has no {self.peft_type} of {' and '.join(lacking)}" if lacking else None


_FACTORS = (Part("lora_A.weight", "a", "ri"), Part("lora_B.weight", "b", "or"))
_OF_EXPERTS = (Part("lora_A.weight", "a", "sri"), Part("lora_B.weight", "b", "ors"))
_IN_AN_EMBEDDING = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
_LORA = Format(
  peft_type="LORA",
  kind=LowRank,
  parts=_FACTORS,
  alpha="lora_alpha",
  scaled=("b",),
  window=True,
  layers=("conv", "embedding", "conv1d"),
  biases=True,
)

FORMATS = {
  "LORA": _LORA,
  "DORA": dataclasses.replace(
    _LORA, kind=DoRA, parts=(*_FACTORS, Part("lora_magnitude_vector", "magnitude", "o"))
  ),
  "ADALORA": Format(
    peft_type="ADALORA", kind=AdaLoRA, alpha="lora_alpha", scaled=("e",), layers=("conv", "conv1d"),
    biases=True,
    parts=(Part("lora_A", "a", "ri"), Part("lora_E", "e", "r1"), Part("lora_B", "b", "or")),
  ),
  "VERA": Format(
    peft_type="VERA", kind=VeRA, layers=("conv1d",), biases=True,
    parts=(Part("vera_lambda_d", "lambda_d", "r"), Part("vera_lambda_b", "lambda_b", "o")),
    shared=(Part("base_model.vera_A", "a", "ri"), Part("base_model.vera_B", "b", "or")),
  ),
  "LOHA": Format(
    peft_type="LOHA", kind=LoHa, alpha="alpha", scaled=("b1",), layers=("conv",),
    parts=(
      Part("hada_w1_a", "b1", "or"), Part("hada_w1_b", "a1", "ri"),
      Part("hada_w2_a", "b2", "or"), Part("hada_w2_b", "a2", "ri"),
    ),
    others=("hada_t1", "hada_t2"),
  ),
  "LOKR": Format(
    peft_type="LOKR", kind=LoKr, alpha="alpha", scaled=("w1", "w1_b"), layers=("conv",),
    others=(
      "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    ),
  ),
}  # fmt: skip
"""The formats that are read and written, by the config's `peft_type`, and DoRA by its name."""

RECENTRED = dataclasses.replace(_LORA, kind=Recentred, scaled=("b", "b0"), layers=("conv1d",))
"""PiSSA and OLoRA as PEFT saves them without their start: only read."""

WHOLE = "ln_tuning_layers."
"""The prefix of a parameter that LN_TUNING stores whole, in any module."""

ROWS = "trainable_tokens_delta"
ROWS_BESIDE = f"token_adapter.{ROWS}"
"""The suffixes for the rows of an embedding, in their own adapter and alongside another one."""

IN_THE_HEAD = {"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"}
"""The suffixes that an embedding's factors have, transposed, in the tied head."""

ADALORA_EPSILON = 1e-5
"""The value that PEFT adds to AdaLoRA's first rank before it divides alpha by it."""
