"""What all decoders share: how they are called, and their layers, scanned or apart."""

from typing import Any

import flax.linen as nn

from lora_jax.models.attention import Cache


class Decoder(nn.Module):
  """A decoder: tokens in, next-token logits out; `logits(hidden(tokens))`, two methods.

  tokens_BT: token ids; right padding needs no mask, for no token looks to its right.
  positions_BT: position of each token, by default 0 ... T-1, or from 0 in each segment. With a
    cache they are also the slots where keys and values are written, and a token at position p sees
    the slots 0 ... p: rows of different length decode together, each at its own position.
  segments_BT: the number of the text that a token belongs to, where a row holds several, one after
    another; no token sees another text's. None: one text a row. Not with a cache.
  at_BC: indices into T; the head is computed at these tokens only. None: at all.
  cache: from `init_cache` or from the call before.

  Returns logits_BTV (logits_BCV with `at_BC`); with a cache, the pair (logits, new cache).
  """

  config: Any

  def __call__(
    self, tokens_BT, *, positions_BT=None, segments_BT=None, at_BC=None, cache: Cache | None = None
  ):
    out = self.hidden(
      tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT, at_BC=at_BC, cache=cache
    )
    if cache is None:
      return self.logits(out)
    hidden_BTD, cache = out
    return self.logits(hidden_BTD), cache


def rematerialized(block: type[nn.Module], config: Any) -> type[nn.Module]:
  """A layer's module, which keeps what `config.remat_policy` says for the backward pass."""
  if config.remat_policy is None:
    return block
  # A scan keeps the recomputation apart from the first computation by itself.
  return nn.remat(block, policy=config.remat_policy, prevent_cse=not config.scan_layers)


def scanned(block: type[nn.Module], config: Any, shared: int, own: int = 2) -> type[nn.Module]:
  """All layers as one module whose parameters have a leading axis L.

  shared: how many arguments after the residual stream are the same for every layer.
  own: how many follow these and have a leading axis L; a decoder's are the layer's cache and what
    tells the layers apart.
  """
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(*(nn.broadcast,) * shared, *(0,) * own),
    length=config.num_layers,
  )


def check_segments(segments_BT, cache: Cache | None) -> None:
  """Raises ValueError for rows of several texts with a cache."""
  if segments_BT is not None and cache is not None:
    raise ValueError("segments_BT: a cache holds one text a row; decode without segments")
