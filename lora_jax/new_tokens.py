"""New tokens: a larger vocabulary, of which only the new rows train.

    base = new_tokens.add(pretrained.load("folder"), ("<think>", "</think>"))
    specs = match(base.params, [*new_tokens.rules(base, ("<think>", "</think>")), ("mlp", LoRA())])

    before    {"embed": {"embedding": W (V, D)}}
    after     {"embed": {"embedding": TokenRows(w=[W; mean], dw=0, ids=(V, V + 1))}}

A new row starts as the mean of the existing tokens' rows. A new token is then at most about as
likely as the others are on average, and the model's text hardly changes (Hewitt 2021, "Initializing
New Word Embeddings for Pretrained Language Models"). `transformers` draws its new rows from around
the same mean.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import families, tree
from lora_jax.adapters import TokenRows
from lora_jax.io.pretrained import Pretrained
from lora_jax.weights import is_weight, materialize


def add(base: Pretrained, tokens: Sequence[str]) -> Pretrained:
  """Returns the base with new tokens, and with rows for them in the embedding and the head.

  Unused rows are taken first, as in `transformers`; without any, the vocabulary grows. A quantized
  embedding or head becomes dense, since rows are appended to it.

  Args:
    base: the result of `pretrained.load` or `pretrained.inspect`; shapes yield shapes.
    tokens: as in `Tokenizer.with_tokens`; () changes nothing.

  Raises:
    ValueError: as in `Tokenizer.with_tokens`, and for a vocabulary above the supported size.
  """
  if not tokens:
    return base
  if base.tokenizer is None:
    raise ValueError(
      f"model.new_tokens {tuple(tokens)}: {base.source} is a {base.config.family!r}, which takes "
      "no text; leave them out"
    )
  tokenizer = base.tokenizer.with_tokens(tokens)
  old, ids = base.tokenizer.vocab_size, _ids(tokenizer, tokens)
  config = dataclasses.replace(
    base.config, vocab_size=max(base.config.vocab_size, tokenizer.vocab_size)
  )
  shapes = families.param_shapes(config)
  axes = _vocabulary_axes(base.config)

  def changed(path: str, leaf: Any) -> Any:
    if path not in axes:
      return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(shapes[path], leaf.dtype)
    leaf, axis = materialize(leaf) if is_weight(leaf) else leaf, axes[path]
    mean = jnp.mean(jax.lax.slice_in_dim(leaf, 0, old, axis=axis), axis, jnp.float32, keepdims=True)
    missing = [(0, new - size) for size, new in zip(leaf.shape, shapes[path], strict=True)]
    grown = jnp.moveaxis(jnp.pad(leaf, missing), axis, 0)
    rows = jnp.moveaxis(mean, axis, 0).astype(leaf.dtype)
    return jnp.moveaxis(grown.at[jnp.asarray(ids)].set(rows), 0, axis)

  params = tree.map_with_path(changed, base.params, is_leaf=is_weight)
  return dataclasses.replace(base, config=config, params=params, tokenizer=tokenizer)


def rules(base: Pretrained, tokens: Sequence[str]) -> list[tuple[str, TokenRows]]:
  """Returns the (path, spec) pairs that train the rows of new tokens, for `match`.

  Args:
    base: the result of `add`.
    tokens: the tokens that `add` was called with.
  """
  if not tokens:
    return []
  ids = _ids(base.tokenizer, tokens)
  axes = _vocabulary_axes(base.config)
  return [(path, TokenRows(ids=ids, axis=axis)) for path, axis in axes.items()]


def _ids(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, ...]:
  vocabulary = tokenizer.vocabulary
  return tuple(vocabulary[token] for token in tokens)


def _vocabulary_axes(config: families.Config) -> dict[str, int]:
  """The parameters that grow with the vocabulary, each with the axis of the tokens."""
  shapes = families.param_shapes(config)
  larger = dataclasses.replace(config, vocab_size=config.vocab_size + 1)
  return {
    path: next(n for n, size in enumerate(shape) if size != shapes[path][n])
    for path, shape in families.param_shapes(larger).items()
    if shape != shapes[path]
  }
