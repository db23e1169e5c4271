"""The base of all decoders: the call signature, and layers that are scanned or separate."""

from typing import Any

import flax.linen as nn
import jax

from lora_jax.models.attention import Cache


class Decoder(nn.Module):
  """A decoder: tokens in, next-token logits out; `logits(hidden(tokens))`, two methods.

  tokens_BT: token ids; right padding needs no mask, since attention is causal.
  positions_BT: position of each token, by default 0 ... T-1, or from 0 in each segment. With a
    cache they are also the slots where keys and values are written, and a token at position p sees
    the slots 0 ... p: rows of different lengths decode together, each at its own position.
  segments_BT: the number of the text that a token belongs to, in rows of several texts, one after
    another; no token sees another text's. None: one text per row. Not with a cache.
  at_BC: indices into T; the head is computed at these tokens only. None: at all.
  cache: from `init_cache` or from the previous call.

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
  """Returns a layer's module that applies `config.remat_policy` in the backward pass."""
  if config.remat_policy is None:
    return block
  # In a scan, XLA cannot merge the recomputation with the first computation, so CSE is harmless.
  return nn.remat(block, policy=config.remat_policy, prevent_cse=not config.scan_layers)


def scanned(block: type[nn.Module], config: Any, shared: int, own: int = 2) -> type[nn.Module]:
  """Returns all layers as one module whose parameters have a leading axis L.

  shared: the number of arguments after the residual stream that are the same for every layer.
  own: the number of arguments after those, with a leading axis L; in a decoder, the layer's cache
    and the kind of the layer.
  """
  # Flax declares no type, and its default is an int.
  in_axes: Any = (*(nn.broadcast,) * shared, *(0,) * own)
  return nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=in_axes,
    length=config.num_layers,
  )


def name_of(layer: nn.Module) -> str:
  """The name of a layer that its parent has set up."""
  assert layer.name is not None
  return layer.name


def check_segments(segments_BT: jax.Array | None, cache: Cache | None) -> None:
  """Raises ValueError for rows of several texts with a cache."""
  if segments_BT is not None and cache is not None:
    raise ValueError("segments_BT: a cache holds one text a row; decode without segments")
