"""BERT, RoBERTa and DistilBERT: encoders with bidirectional attention.

    config = bert.BertConfig(vocab_size=30522, width=384, mlp_width=1536, num_layers=6,
                             num_heads=12, head_dim=32, max_length=512)
    model = bert.Bert(config)
    params = model.init(jax.random.key(0), tokens_BT)["params"]
    hidden_BTD, pooled_BD = model.apply({"params": params}, tokens_BT, mask_BT=mask_BT)

    config = dataclasses.replace(config, classes=("negative", "positive"))
    logits_BC = bert.Bert(config).apply({"params": params}, tokens_BT, mask_BT=mask_BT)

Devlin et al. 2019, "BERT" (section 3); Liu et al. 2019, "RoBERTa"; Sanh et al. 2019, "DistilBERT".

Shapes are written as suffixes:

    B  rows of a batch          N  heads                 V  entries of the vocabulary
    T  tokens of a row          H  features of a head    P  positions of the longest text
    D  width of the model       E  width of the MLP      C  classes, the outputs of the head
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.models import encoder_attention, limits
from lora_jax.models.attention_kernels import BY_DEVICE
from lora_jax.models.decoder import rematerialized, scanned

ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "gelu_tanh": nn.gelu,
  "relu": nn.relu,
}
POOLER_ACTIVATIONS = {"tanh": jnp.tanh, "relu": nn.relu}
_FROM_ZERO = ("token_types", "position_offset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
  """The shape of an encoder and how it is computed.

  vocab_size, width, mlp_width, num_layers, num_heads, head_dim: V, D, E, the number of layers, N
    and H. In files N H = D.
  max_length: P, the most tokens of a text.
  token_types: the number of token types: 2 in BERT (the first and the second text of a pair), 1 in
    RoBERTa, 0 in DistilBERT, which has no embedding for them.
  position_offset: the row of the first token in the position embedding. RoBERTa's tables begin
    with the rows of padding.
  norm_eps: added to the variance in LayerNorm.
  activation: of the MLP, one of `ACTIVATIONS`.
  pooler: whether there is a dense layer on a text's first token. A model with a classification head
    always has it.
  pooler_activation: the activation of that layer, one of `POOLER_ACTIVATIONS`.
  classes: the names of the head's outputs; () for a model without a head.
  attention: how it is computed; see `lora_jax.models.encoder_attention`.
  scan_layers, remat_policy, constrain, dtype, param_dtype: as in `llama_config.LlamaConfig`.
  family: `model_type` in a config.json; it does not affect the computation.

  Raises ValueError for a value of another type or out of range, and an unknown activation.
  """

  vocab_size: int
  width: int
  mlp_width: int
  num_layers: int
  num_heads: int
  head_dim: int
  max_length: int
  token_types: int = 2
  position_offset: int = 0
  norm_eps: float = 1e-12
  activation: str = "gelu"
  pooler: bool = True
  pooler_activation: str = "tanh"
  scan_layers: bool = False
  remat_policy: Callable[..., bool] | None = None
  constrain: Callable[[jax.Array], jax.Array] | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  family: str = "bert"
  classes: tuple[str, ...] = ()
  attention: encoder_attention.How = BY_DEVICE

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in _FROM_ZERO:
        limits.check("BertConfig", field.name, field.type, value)
      elif type(value) is not int or not 0 <= value <= limits.LARGEST["vocab_size"]:
        raise ValueError(f"BertConfig: {field.name} must be an integer from 0, not {value!r:.40}")
    encoder_attention.check("BertConfig", self.attention)
    if self.max_length + self.position_offset > limits.MOST_LEARNED_POSITIONS:
      raise ValueError(
        f"BertConfig: max_length {self.max_length} is over the limit of "
        f"{limits.MOST_LEARNED_POSITIONS:,} learned positions"
      )
    for name, known in (
      ("activation", ACTIVATIONS),
      ("pooler_activation", POOLER_ACTIVATIONS),
    ):
      if (value := getattr(self, name)) not in known:
        raise ValueError(f"BertConfig: {name} {value!r:.40} is not one of {', '.join(known)}")

  @property
  def has_pooler(self) -> bool:
    return self.pooler or bool(self.classes)


class Encoding(NamedTuple):
  """The result of an encoder without a head; `pooled_BD` is None for a model without a pooler."""

  hidden_BTD: jax.Array
  pooled_BD: jax.Array | None


def _dense(config: BertConfig, features: int, name: str | None = None) -> nn.Dense:
  return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def _embed(config: BertConfig, rows: int) -> nn.Embed:
  return nn.Embed(rows, config.width, dtype=config.dtype, param_dtype=config.param_dtype)


def _norm(config: BertConfig, name: str | None = None) -> nn.LayerNorm:
  return nn.LayerNorm(
    epsilon=config.norm_eps,
    dtype=config.dtype,
    param_dtype=config.param_dtype,
    use_fast_variance=False,  # as in GPT-2, a few features are much larger than others
    name=name,
  )


class Attention(nn.Module):
  """Bidirectional attention within a text."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD, seen_BT):
    c = self.config
    query_BTNH, key_BTNH, value_BTNH = (
      _dense(c, c.num_heads * c.head_dim, name)(x_BTD).reshape(
        *x_BTD.shape[:2], c.num_heads, c.head_dim
      )
      for name in ("query", "key", "value")
    )
    out_BTNH = encoder_attention.self_attention(
      self,
      c.attention,
      query_BTNH,
      key_BTNH,
      value_BTNH,
      seen_BT=seen_BT,
      rows=c.max_length,
      param_dtype=c.param_dtype,
    )
    return _dense(c, c.width, "out")(out_BTNH.reshape(*x_BTD.shape[:2], -1))


class Mlp(nn.Module):
  """down(activation(up(x)))."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config
    up_BTE = _dense(c, c.mlp_width, "up")(x_BTD)
    return _dense(c, c.width, "down")(ACTIVATIONS[c.activation](up_BTE))


class Block(nn.Module):
  """One layer: attention, then the MLP, each added to its input and then normalized (post-norm)."""

  config: BertConfig

  @nn.compact
  def __call__(self, x_BTD, seen_BT):
    c = self.config
    x_BTD = _norm(c, "attn_norm")(x_BTD + Attention(c, name="attn")(x_BTD, seen_BT))
    x_BTD = _norm(c, "mlp_norm")(x_BTD + Mlp(c, name="mlp")(x_BTD))
    return c.constrain(x_BTD) if c.constrain else x_BTD, None


class Bert(nn.Module):
  """An encoder: texts in, a vector for each token or class logits out.

  tokens_BT: token ids, padded on the right.
  mask_BT: True for each token of a text, False for padding, which no token sees; None: no padding.
  types_BT: the text of a pair that a token belongs to, from 0; None: the first one.

  Returns logits_BC for a model with classes, otherwise an `Encoding`. Vectors at padding are
  meaningless.

  Raises ValueError for a row of more than P tokens, and for types in a model without them.
  """

  config: BertConfig

  def setup(self):
    c = self.config
    self.embed = _embed(c, c.vocab_size)
    self.positions = _embed(c, c.max_length + c.position_offset)
    if c.token_types:
      self.types = _embed(c, c.token_types)
    self.embed_norm = _norm(c)
    block = rematerialized(Block, c)
    if c.scan_layers:
      self.blocks = scanned(block, c, shared=1, own=0)(c)
    else:  # their names are block_0, block_1, ...
      self.block = [block(c) for _ in range(c.num_layers)]
    if c.has_pooler:
      self.pooler = _dense(c, c.width)
    if c.classes:
      self.head = _dense(c, len(c.classes))

  def __call__(self, tokens_BT, *, mask_BT=None, types_BT=None):
    hidden_BTD = self.hidden(tokens_BT, mask_BT=mask_BT, types_BT=types_BT)
    if self.config.classes:
      return self.logits(hidden_BTD)
    return Encoding(hidden_BTD, self.pooled(hidden_BTD) if self.config.has_pooler else None)

  def hidden(self, tokens_BT, *, mask_BT=None, types_BT=None):
    """The vector of each token after the last layer."""
    c = self.config
    length = tokens_BT.shape[1]
    if length > c.max_length:
      raise ValueError(
        f"tokens_BT: rows of {length:,} tokens, and the model has learned {c.max_length:,} "
        "positions (max_position_embeddings); use shorter texts"
      )
    places_1T = jnp.arange(c.position_offset, c.position_offset + length)[None]
    x_BTD = self.embed(tokens_BT) + self.positions(places_1T)
    if c.token_types:
      x_BTD += self.types(jnp.zeros_like(tokens_BT) if types_BT is None else types_BT)
    elif types_BT is not None:
      raise ValueError("types_BT: the model has no embedding of token types; leave them out")
    x_BTD = self.embed_norm(x_BTD)
    x_BTD = c.constrain(x_BTD) if c.constrain else x_BTD
    seen_BT = None if mask_BT is None else mask_BT.astype(bool)
    if c.scan_layers:
      x_BTD, _ = self.blocks(x_BTD, seen_BT)
    else:
      for block in self.block:
        x_BTD, _ = block(x_BTD, seen_BT)
    return x_BTD

  def pooled(self, hidden_BTD):
    """The dense layer and its activation on each text's first token."""
    return POOLER_ACTIVATIONS[self.config.pooler_activation](self.pooler(hidden_BTD[:, 0]))

  def logits(self, hidden_BTD):
    """The classification head on the pooler's output, as in `...ForSequenceClassification`."""
    return self.head(self.pooled(hidden_BTD))
