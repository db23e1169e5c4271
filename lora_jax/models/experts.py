"""An MLP of experts: a router sends each token to a few of many small MLPs.

    Experts(ExpertConfig(num_experts=128, per_token=8, width=768, normalized=True))(x_BTD)

No token is dropped: experts have no capacity limit, and the result of a token depends on no other
token. Tokens are sorted by expert, so that one `jax.lax.ragged_dot` multiplies each by its expert's
kernel. The load-balancing loss of pretraining (Fedus et al. 2021, section 2.2) is not computed:
fine-tuning with a frozen router does not need it.

Shazeer et al. 2017, "Outrageously Large Neural Networks" (section 2); Gale et al. 2022, MegaBlocks,
for experts without a capacity limit. Shapes are written as suffixes, with these letters in addition
to those of `lora_jax.models.llama`:

    X experts    K experts of a token    E width of an expert    M tokens, B T    R rows, M K
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import limits

# gpt-oss: the slope of the gate, and the limit at which gate and value are clipped.
_STEEPNESS, _LIMIT = 1.702, 7.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertConfig:
  """The shape of an MLP of experts.

  num_experts, per_token, width: X, K and E.
  normalized: the K largest probabilities of a token are divided by their sum.
  clamped: the gate of gpt-oss, (up + 1) * gate * sigmoid(1.702 gate), both clipped at 7, whose
    columns are interleaved in one kernel; otherwise silu(gate) * up, one half of the kernel each.
  biases: router and experts have biases (gpt-oss).

  Raises ValueError for a value of another type or out of range, and more experts per token than
  experts.
  """

  num_experts: int
  per_token: int
  width: int
  normalized: bool = True
  clamped: bool = False
  biases: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      limits.check("ExpertConfig", field.name, field.type, getattr(self, field.name))
    if self.per_token > self.num_experts:
      raise ValueError(
        f"ExpertConfig: per_token {self.per_token} is more than the {self.num_experts} experts"
      )


class Stack(nn.Module):
  """Multiplies each row by the kernel of its expert, [X, in, out], as one ragged product."""

  features: int
  config: ExpertConfig
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x_RD, expert_R, sizes_X):
    shape = self.config.num_experts, x_RD.shape[-1], self.features
    start = nn.initializers.lecun_normal(batch_axis=0)
    kernel_XDE = self.param("kernel", start, shape, self.param_dtype)
    y_RE = jax.lax.ragged_dot(x_RD, kernel_XDE.astype(self.dtype), sizes_X)
    if not self.config.biases:
      return y_RE
    bias_XE = self.param("bias", nn.initializers.zeros, (shape[0], shape[2]), self.param_dtype)
    return y_RE + bias_XE.astype(self.dtype)[expert_R]


class Experts(nn.Module):
  """The weighted sum of the outputs of each token's K experts: x_BTD in, [B, T, D] out.

  The router's probabilities are float32, as in `transformers`.
  """

  config: ExpertConfig
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_MX = nn.Dense(
      c.num_experts,
      use_bias=c.biases,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="router",
    )(x_MD)
    share_MX = jax.nn.softmax(logits_MX.astype(jnp.float32), axis=-1)
    share_MK, expert_MK = jax.lax.top_k(share_MX, c.per_token)
    if c.normalized:
      share_MK /= jnp.sum(share_MK, axis=-1, keepdims=True)

    expert_R = expert_MK.reshape(-1)
    order_R = jnp.argsort(expert_R)
    expert_R = expert_R[order_R]
    sizes_X = jnp.bincount(expert_R, length=c.num_experts).astype(jnp.int32)
    out_RD = _Mlp(c, x_BTD.shape[-1], self.dtype, self.param_dtype, name="experts")(
      x_MD[order_R // c.per_token], expert_R, sizes_X
    )
    out_MKD = out_RD[jnp.argsort(order_R)].reshape(*expert_MK.shape, -1)
    out_MD = jnp.sum(out_MKD * share_MK[..., None].astype(self.dtype), axis=1)
    return out_MD.reshape(x_BTD.shape)


class _Mlp(nn.Module):
  """The MLPs of all experts, on rows sorted by expert."""

  config: ExpertConfig
  features: int
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x_RD, expert_R, sizes_X):
    c, rows = self.config, (expert_R, sizes_X)
    dtypes = (self.dtype, self.param_dtype)
    both_R2E = Stack(2 * c.width, c, *dtypes, name="gate_up")(x_RD, *rows)
    return Stack(self.features, c, *dtypes, name="down")(_gated(both_R2E, c.clamped), *rows)


def _gated(both_R2E: jax.Array, clamped: bool) -> jax.Array:
  """The activated gate times the other half."""
  if not clamped:
    gate_RE, up_RE = jnp.split(both_R2E, 2, axis=-1)
    return jax.nn.silu(gate_RE) * up_RE
  gate_RE = jnp.minimum(both_R2E[:, ::2], _LIMIT)
  up_RE = jnp.clip(both_R2E[:, 1::2], -_LIMIT, _LIMIT)
  return (up_RE + 1) * gate_RE * jax.nn.sigmoid(_STEEPNESS * gate_RE)
