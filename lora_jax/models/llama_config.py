"""The shape of a decoder of the Llama family, and the switches that define its relatives.

    LlamaConfig(vocab_size=256, width=64, mlp_width=192, num_layers=2, num_heads=4, num_kv_heads=2,
                head_dim=16, max_length=128)                        # a Llama
    LlamaConfig(..., family="qwen2", qkv_bias=True)
    LlamaConfig(..., family="mistral", window=4096)

Shapes have the letters of `lora_jax.models.llama`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import limits
from lora_jax.models.attention_kernels import BY_DEVICE, Choice
from lora_jax.models.experts import ExpertConfig
from lora_jax.models.rope import RopeScaling, check_fits

ACTIVATIONS = ("silu", "gelu_tanh")
_OPTIONAL = {
  "window": int, "local_rope_theta": float, "query_divisor": float, "attn_softcap": float,
  "logit_softcap": float, "rotary_dim": int, "query_growth": float, "query_length": int,
  "embedding_multiplier": float, "attention_multiplier": float, "residual_multiplier": float,
  "logit_divisor": float,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """The shape of a decoder and how it is computed; with all switches off it is a Llama.

  vocab_size, width, mlp_width, num_layers: V, D, E and L.
  num_heads, num_kv_heads, head_dim: N, K and H; each key/value head serves N / K query heads.
  value_dim: features of a head's values, G, if there are fewer than H; None: H.
  max_length: the longest context that the model was trained for, in tokens; not enforced.
  rope_theta: the base of the rotary frequencies, theta ** (-2 r / H).
  rope_scaling: how the frequencies are scaled for longer contexts, or None.
  norm_eps: added to the mean square in RMSNorm.
  tie_embeddings: the head is the transposed embedding and has no parameters.
  scan_layers: one `blocks` under nn.scan with leaves stacked to (L, ...), instead of L named
    blocks.
  remat_policy: None keeps every activation for the backward pass; a function from
    jax.checkpoint_policies selects those to keep, and the others are recomputed.
  constrain: a sharding constraint for the residual stream x_BTD, applied before, between and after
    the blocks. Without it the compiler may split D over devices that hold different rows of B.
    None: no constraint.
  attention: how it is computed; see `lora_jax.models.attention_kernels`.
  dtype: of the arithmetic and of the logits (norms, rotations and softmax are float32 inside).
  param_dtype: of the parameters that `init` makes.

  Switches of relatives of Llama:

  family: `model_type` in a config.json; it does not affect the computation.
  qkv_bias: queries, keys and values have biases (Qwen 2).
  qk_norm: each head's query and key pass through an RMSNorm before they are rotated (Qwen 3).
  window: a token sees only the `window` last tokens, itself included; None: all (Mistral).
  local_layers: for each layer whether it has the window; (): every layer has it (Gemma 2).
  local_rope_theta: rope_theta of the layers with the window, without scaling; None: as in the
    others (Gemma 3).
  activation: of the gate, "silu" or "gelu_tanh" (GeGLU, Gemma).
  unit_offset: norms multiply by 1 + scale (Gemma).
  post_norms: the outputs of attention and MLP are normalized too (Gemma 2).
  scale_embeddings: embedded tokens are multiplied by the square root of D (Gemma).
  query_divisor: scores are divided by its square root; None: by that of H (Gemma 2).
  attn_softcap, logit_softcap: scores and logits x become `cap * tanh(x / cap)`; None: no cap
    (Gemma 2).
  fused: query, key and value are one kernel `qkv`, and gate and up one `gate_up` (Phi 3).
  rotary_dim: the number of first features of a head that are rotated; None: all (Phi 4 mini).
  pre_norms: the inputs of attention and MLP are normalized (all but OLMo 2).
  whole_qk_norm: the norms of queries and keys are over all heads at once (OLMo 2).
  rotated_layers: for each layer whether queries and keys are rotated; (): in all (SmolLM 3).
  embedding_multiplier, attention_multiplier, residual_multiplier: factors of the embedded tokens,
    of the scores (instead of the division), and of the outputs of attention and MLP; None: as in a
    Llama (Granite).
  logit_divisor: logits are divided by it; None: no division (Granite).
  query_growth, query_length: queries at position p are multiplied by
    1 + query_growth * ln(1 + floor(p / query_length)); both None: no factor (Ministral 3).
  out_bias: the projection after attention has a bias (gpt-oss).
  attn_sinks: each head has a learned score in its softmax without a value (gpt-oss).
  experts: each layer's MLP is a mixture of experts, and mlp_width is not used; None: a dense MLP
    (Qwen3-MoE).

  For a classifier:

  classes: the names of the outputs of a classification head, which replaces the language model's
    (...ForSequenceClassification in transformers); (): a language model.

  Raises ValueError for a value of another type or out of range, and for inconsistent values.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  max_length: int
  value_dim: int | None = None
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  attention: Choice = BY_DEVICE
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "llama"
  qkv_bias: bool = False
  qk_norm: bool = False
  window: int | None = None
  local_layers: tuple[bool, ...] = ()
  local_rope_theta: float | None = None
  activation: str = "silu"
  unit_offset: bool = False
  post_norms: bool = False
  scale_embeddings: bool = False
  query_divisor: float | None = None
  attn_softcap: float | None = None
  logit_softcap: float | None = None
  classes: tuple[str, ...] = ()
  fused: bool = False
  rotary_dim: int | None = None
  pre_norms: bool = True
  whole_qk_norm: bool = False
  rotated_layers: tuple[bool, ...] = ()
  embedding_multiplier: float | None = None
  attention_multiplier: float | None = None
  residual_multiplier: float | None = None
  logit_divisor: float | None = None
  query_growth: float | None = None
  query_length: int | None = None
  out_bias: bool = False
  attn_sinks: bool = False
  experts: ExpertConfig | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      kind, value = _OPTIONAL.get(field.name, field.type), getattr(self, field.name)
      if field.name not in _OPTIONAL or value is not None:
        limits.check("LlamaConfig", field.name, kind, value)
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"LlamaConfig: num_heads {self.num_heads} is not a multiple of "
        f"num_kv_heads {self.num_kv_heads}"
      )
    if self.value_dim is not None and not (
      type(self.value_dim) is int and 0 < self.value_dim <= self.head_dim
    ):
      raise ValueError(
        f"LlamaConfig: value_dim {self.value_dim!r:.40} must be from 1 to head_dim {self.head_dim}"
      )
    if self.head_dim % 2:
      raise ValueError(f"LlamaConfig: head_dim {self.head_dim} is odd; rotary positions turn pairs")
    if self.activation not in ACTIVATIONS:
      raise ValueError(
        f"LlamaConfig: activation {self.activation!r:.40} is not one of {', '.join(ACTIVATIONS)}"
      )
    if self.experts is not None and not (
      isinstance(self.experts, ExpertConfig) and self.activation == "silu"
    ):
      raise ValueError(
        f"LlamaConfig: experts {self.experts!r:.80} must be an ExpertConfig, with the activation "
        f"'silu', not {self.activation!r}"
      )
    self._check_layers()
    self._check_switches()

  def _check_layers(self) -> None:
    for name in ("local_layers", "rotated_layers"):
      flags = getattr(self, name)
      if flags and not (len(flags) == self.num_layers and all(type(x) is bool for x in flags)):
        raise ValueError(
          f"LlamaConfig: {name} {flags!r:.40} must be True or False for each of the "
          f"{self.num_layers} layers"
        )
    if self.window is None and (self.local_layers or self.local_rope_theta is not None):
      raise ValueError("LlamaConfig: local_layers and local_rope_theta need a window")

  def _check_switches(self) -> None:
    features = rotary_features(self)
    if features % 2 or features > self.head_dim:
      raise ValueError(
        f"LlamaConfig: rotary_dim {features} must be even and up to head_dim {self.head_dim}"
      )
    if self.rope_scaling is not None:
      check_fits(self.rope_scaling, self.rope_theta, features)
    if (self.query_growth is None) != (self.query_length is None):
      raise ValueError("LlamaConfig: query_growth and query_length are given both or neither")
    for one, other in (
      ("query_divisor", "attention_multiplier"),
      ("scale_embeddings", "embedding_multiplier"),
    ):
      if getattr(self, one) and getattr(self, other) is not None:
        raise ValueError(f"LlamaConfig: {one} and {other} set the same factor; give one of them")
    if self.whole_qk_norm and not self.qk_norm:
      raise ValueError("LlamaConfig: whole_qk_norm needs qk_norm")
    if self.fused and value_features(self) != self.head_dim:
      raise ValueError("LlamaConfig: value_dim: values in a fused kernel are of the keys' size")


def rotary_features(config: LlamaConfig) -> int:
  """The features of a head that are rotated, 2 R."""
  return config.head_dim if config.rotary_dim is None else config.rotary_dim


def value_features(config: LlamaConfig) -> int:
  """G, the features of a head's values."""
  return config.head_dim if config.value_dim is None else config.value_dim


def locality(config: LlamaConfig) -> tuple[bool, ...]:
  """For each layer whether it has the window."""
  return config.local_layers or (config.window is not None,) * config.num_layers


def layer_kinds(config: LlamaConfig) -> tuple[tuple[bool, bool], ...]:
  """For each layer whether it has the window, and whether its queries and keys are rotated."""
  rotated = config.rotated_layers or (True,) * config.num_layers
  return tuple(zip(locality(config), rotated, strict=True))


def layer_config(config: LlamaConfig, local: bool) -> LlamaConfig:
  """The configuration of the layers with the window, or of those without it.

  All of its layers are alike: `local_layers`, `local_rope_theta` and `rotated_layers` are unset.
  """
  changes = {"local_layers": (), "local_rope_theta": None, "rotated_layers": ()}
  if not local:
    changes["window"] = None
  elif config.local_rope_theta is not None:
    changes |= {"rope_theta": config.local_rope_theta, "rope_scaling": None}
  return dataclasses.replace(config, **changes)
