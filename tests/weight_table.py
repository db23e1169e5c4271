"""The table of weights: each row makes, from a leaf and its roles, a Weight that stands for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LowRank, tree
from lora_jax.weights import DoRA, Factored, Gated, GGUFBlocks, LoKr, Pruned, input_norms
from lora_jax.weights.coded import rows_of
from lora_jax.weights.masked import Masked
from lora_jax.weights.quantized import INT8, Format, Quantized, quantized

RANK = 2


class Kind(NamedTuple):
  """One kind of weight.

  make: (w, roles) -> Weight.
  dtype: the coarsest dtype of the arithmetic, for the tolerance.
  model_dtype: of the inputs and of the leaves that are no Weights.
  is_formed: whether its array is formed for each use, so that strict mode spares nothing.
  """

  make: Callable[[jax.Array, str], Any]
  dtype: str = "float32"
  model_dtype: str = "float32"
  is_formed: bool = False


def factors(shape, roles: str, seed: int = 0, rank: int = RANK) -> tuple[jax.Array, jax.Array]:
  """Random float32 factors for a leaf; the product is about as large as the leaf."""
  stack, inputs, outputs = (
    tuple(n for n, x in zip(shape, roles, strict=True) if x == role) for role in "sio"
  )
  rng = np.random.default_rng([seed, *shape])
  a = rng.standard_normal((*stack, *inputs, rank)) * 0.3
  b = rng.standard_normal((*stack, rank, *outputs))
  return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


def low_rank(w, roles: str, seed: int = 0) -> LowRank:
  a, b = factors(w.shape, roles, seed)
  return LowRank(w, a, b, scale=0.5, roles=roles.lstrip("s"))


def gated(w, roles: str) -> Gated:
  """Twice the rank, the first half of it open and the rest shut."""
  a, b = factors(w.shape, roles, rank=2 * RANK)
  gate = jnp.broadcast_to(
    jnp.repeat(jnp.array([0.5, 0.0]), RANK), (*a.shape[: roles.count("s")], 2 * RANK)
  )
  return Gated(w, a, b, scale=0.5, gate=gate, roles=roles.lstrip("s"))


def dora(w, roles: str) -> DoRA:
  """With lengths that are not those of the base."""
  a, b = factors(w.shape, roles)
  norm = input_norms(w, roles)
  magnitude = norm * jnp.linspace(0.5, 2.0, norm.size).reshape(norm.shape)
  return DoRA(w, a, b, magnitude, norm, scale=0.5, roles=roles.lstrip("s"))


def lokr(w, roles: str) -> LoKr:
  """With factors of rank one, so that its low-rank form has a small rank too."""
  adapter = lora_jax.LoKr(rank=1, alpha=0.5).init(jax.random.key(0), "", w, roles)
  trained = jax.tree.map(lambda x: x + jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapter)
  return trained.attach(w, "")


def factored(w, roles: str) -> Factored:
  a, b = factors(w.shape, roles)
  return Factored(a.astype(w.dtype), b.astype(w.dtype), roles=roles.lstrip("s"))


def masked(w, roles: str) -> Masked:
  """A LoRA filled up to twice its rank."""
  return Masked.of(low_rank(w, roles), 2 * RANK)


def coded(w, roles: str, format: Format) -> Quantized:
  return quantized(w, format, inputs_of(roles))


def gguf_blocks(w, roles: str) -> GGUFBlocks:
  """In blocks of 32, of which the matrices of the programs fill up no more than one or two."""
  columns = inputs_of(roles)
  rows = np.asarray(rows_of(w, columns), np.float32)
  rows = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 32)])
  blocks = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0)
  sizes = tuple(w.shape[n] for n in columns)
  return GGUFBlocks(jnp.asarray(blocks), kind="Q8_0", columns=columns, sizes=sizes, to=w.dtype.name)


def inputs_of(roles: str) -> tuple[int, ...]:
  """The axes of inputs, counted from the end."""
  return tuple(n - len(roles) for n, role in enumerate(roles) if role == "i")


def pruned(w, roles: str) -> Pruned:
  """With an adapter inside the mask."""
  mask = jnp.asarray(np.random.default_rng(w.shape).random(w.shape) < 0.5)
  return Pruned(low_rank(jnp.where(mask, w, 0), roles), mask)


NF4 = Format(levels="nf4", block=4, double=True)  # the matrices of the programs have few inputs

WEIGHTS = {
  "float32": Kind(low_rank),
  "nested": Kind(lambda w, roles: low_rank(low_rank(w, roles, seed=1), roles)),
  "bfloat16-base": Kind(lambda w, roles: low_rank(w.astype(jnp.bfloat16), roles), "bfloat16"),
  "bfloat16-model": Kind(
    lambda w, roles: low_rank(w.astype(jnp.bfloat16), roles), "bfloat16", "bfloat16"
  ),
  "gated": Kind(gated),
  "dora": Kind(dora),
  "lokr": Kind(lokr),
  "factored": Kind(factored),
  "adapted-factored": Kind(lambda w, roles: low_rank(factored(w, roles), roles, seed=1)),
  "masked": Kind(masked),
  "nf4": Kind(lambda w, roles: coded(w, roles, NF4), is_formed=True),
  "int8": Kind(lambda w, roles: coded(w, roles, INT8), is_formed=True),
  "adapted-nf4": Kind(lambda w, roles: low_rank(coded(w, roles, NF4), roles), is_formed=True),
  "gguf": Kind(gguf_blocks, is_formed=True),
  "adapted-pruned": Kind(pruned, is_formed=True),
}


def method(spec) -> Callable[[jax.Array, str], Any]:
  """The weight of an adapter method, with noise on every part."""

  def make(w, roles):
    adapter = spec.init(jax.random.key(0), "", w, roles)
    noise = jax.tree.map(lambda x: 0.3 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapter)
    return jax.tree.map(jnp.add, adapter, noise).attach(w, "")

  return make


def dropping(w, roles: str) -> LowRank:
  """A LoRA that drops half of its inputs."""
  a, b = factors(w.shape, roles)
  stack = w.shape[: roles.count("s")]
  key = jax.random.split(jax.random.key(1), stack) if stack else jax.random.key(1)
  return LowRank(w, a, b, 0.5, 0.5, key, roles=roles.lstrip("s"))


MAKERS: dict[str, Callable[[jax.Array, str], Any]] = {
  **{name: kind.make for name, kind in WEIGHTS.items() if kind.dtype == "float32"},
  "loha": method(lora_jax.LoHa(rank=2, alpha=1.0)),
  "vera": method(lora_jax.VeRA(rank=2, seed=0)),
  "adalora": method(lora_jax.AdaLoRA(rank=2, alpha=1.0)),
  "pissa": method(lora_jax.PiSSA(rank=2, alpha=1.0)),
  "token rows": method(lora_jax.TokenRows(ids=(3, 1))),
  "full": method(lora_jax.Full()),
  "dropout": dropping,
  "adapted dora": lambda w, roles: low_rank(dora(w, roles), roles, seed=2),
}
"""Every kind of weight, as in `Kind.make`, on a base of any dtype."""


def with_weights(params, roles: dict[str, str], kind: Kind):
  """The params with Weights at the paths of `roles`."""

  def leaf(path, x):
    if path in roles:
      return kind.make(x, roles[path])
    return x.astype(kind.model_dtype) if x.dtype == jnp.float32 else x

  return tree.map_with_path(leaf, params)
