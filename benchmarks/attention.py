r"""Exact attention: the time and the temporary memory of its gradient, by implementation.

    python -m benchmarks.attention --output=benchmarks/results.md
    python -m benchmarks.attention --tokens=64 --rounds=1

Random values in float32. The first table has the causal attention of SmolLM2, 9 heads of queries
and 3 of keys with 64 features, 2 rows. The second one has four layers of an encoder that are not
scanned, 6 heads of 64 features, 8 rows: JAX's attention, and this package's, which keeps only the
weights for the backward pass. Memory is the compiler's figure.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks.circumstances import describe_circumstances
from benchmarks.reporting import define_output, publish
from benchmarks.turns import ratio, run_in_turns, timed
from lora_jax import tables
from lora_jax.models.attention import attend
from lora_jax.models.attention_kernels import Choice

_TOKENS = flags.DEFINE_multi_integer("tokens", [512, 1024, 2048], "Tokens of a row.", 1)
_LENGTHS = flags.DEFINE_multi_integer(
  "encoder_tokens", [257, 450], "Tokens of a row of the encoder: ViT-S/14, Whisper with 9 s.", 1
)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Measurements of each program.", lower_bound=1)
_OUTPUT = define_output()

_LAYERS = 4


class Program(NamedTuple):
  """The call of a compiled function, and its temporary memory in bytes."""

  run: Callable[[], object]
  memory: int


def main(_):
  decoder, encoder = (
    table(f, lengths, _ROUNDS.value)
    for f, lengths in ((causal, _TOKENS.value), (layers, _LENGTHS.value))
  )
  lines = [
    "## Exact attention: time and temporary memory of its gradient",
    "",
    *describe_circumstances("benchmarks.attention", ["jax"]),
    "",
    "Causal, 2 rows, 9 heads of queries and 3 of keys, 64 features:",
    "",
    decoder,
    "",
    f"{_LAYERS} layers of an encoder, not scanned, 8 rows, 6 heads of 64 features:",
    "",
    encoder,
  ]
  publish("\n".join(lines), _OUTPUT.value)


def causal(length: int) -> dict[str, Program]:
  """The gradients of causal attention by each implementation."""
  shapes = [(2, length, heads, 64) for heads in (9, 3, 3)]
  inputs = [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]

  def gradient(name):
    def loss(inputs):
      return jnp.sum(attend(*inputs, is_causal=True, choice=Choice(name)) ** 2)

    return compiled(jax.grad(loss), inputs)

  return {name: gradient(name) for name in ("plain", "blockwise")}


def layers(length: int) -> dict[str, Program]:
  """The gradients of an encoder's layers of attention, by JAX's and by this package's."""
  heads, features = 6, 64
  width = heads * features
  x_BTD = jax.random.normal(jax.random.key(0), (8, length, width))
  kernels = 0.05 * jax.random.normal(jax.random.key(1), (_LAYERS, 3, width, heads, features))

  def gradient(attention):
    def loss(kernels):
      x = x_BTD
      for kernel in kernels:
        query, key, value = (jnp.einsum("btd,dnh->btnh", x, each) for each in kernel)
        x = x + attention(query, key, value).reshape(x.shape)
      return jnp.sum(x**2)

    return compiled(jax.grad(loss), kernels)

  plain = functools.partial(attend, choice=Choice("plain"))
  return {"jax.nn": gradient(jax.nn.dot_product_attention), "lora_jax": gradient(plain)}


def compiled(f: Callable, *inputs) -> Program:
  """Compiles a function of these inputs."""
  program = jax.jit(f).lower(*inputs).compile()
  memory = program.memory_analysis().temp_size_in_bytes
  return Program(functools.partial(program, *inputs), memory)


def table(make: Callable[[int], Mapping[str, Program]], lengths: Sequence[int], rounds: int) -> str:
  """The measurements of a function's programs for each length, as Markdown."""
  cells = []
  for length in lengths:
    programs = make(length)
    seconds = run_in_turns({name: timed(x.run) for name, x in programs.items()}, rounds + 1)
    seconds = {name: each[1:] for name, each in seconds.items()}  # the first one warms up
    first, second = programs
    cells.append(
      (
        f"{length:,}",
        *(f"{x.memory / 1e6:,.1f}" for x in programs.values()),
        *(f"{1e3 * statistics.median(each):,.0f}" for each in seconds.values()),
        ratio(seconds[second], seconds[first]),
      )
    )
  names = list(programs)
  header = ("tokens", *(f"{x}, MB" for x in names), *(f"{x}, ms" for x in names))
  return tables.markdown((*header, f"time, {second} / {first}"), cells)


if __name__ == "__main__":
  app.run(main)
