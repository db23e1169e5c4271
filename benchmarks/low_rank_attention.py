r"""Attention of low rank against exact attention: error, time and temporary memory by landmarks.

    python -m benchmarks.low_rank_attention --output=benchmarks/results.md
    python -m benchmarks.low_rank_attention --cases=vit-257 --landmarks=16 --rows=1 --rounds=2

MiniLM-L6 on newspaper sentences joined by spaces (Hutto and Gilbert 2014), ViT-S/14 on images of
CIFAR-10 enlarged to 224 and 518 pixels; all in float32, nothing trained. The error is the distance
of the last hidden states from those of exact attention, relative to their norm, and the cosine of
what represents an input: the mean of a text's tokens, an image's first token. The metric of a task
before and after healing is a run's: see docs/guide/low_rank_attention.md.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.circumstances import describe_circumstances
from benchmarks.compression import EDITORIALS
from benchmarks.reporting import define_output, publish
from benchmarks.turns import ratio, run_in_turns, timed
from configs import glue, images
from lora_jax import families, tables
from lora_jax.data import image_batches, image_sets, records
from lora_jax.io import assets, pretrained
from lora_jax.models.attention_kernels import Choice
from lora_jax.models.low_rank_attention import Linformer, Nystrom, segment_means
from lora_jax.tree import flatten, map_with_path

PyTree = Any

ITERATIONS = 6  # of the pseudo-inverse, as in the paper
EXACT = {"exact, plain": Choice("plain"), "exact, blockwise": Choice("blockwise")}


class Case(NamedTuple):
  """A model and its inputs.

  Attributes:
    config, params: of the model.
    inputs: tokens [rows, tokens], all of them seen, or images.
    tokens: of each input.
    pooled: hidden states to what represents each input.
  """

  config: families.Config
  params: PyTree
  inputs: jax.Array
  tokens: int
  pooled: Callable[[jax.Array], jax.Array]


def minilm(rows: int, tokens: int = 512) -> Case:
  """MiniLM on running text, cut at so many tokens."""
  found = pretrained.load(glue.MINILM, scan_layers=False)
  table = records.read(assets.resolve(EDITORIALS), format="tsv", columns=("id", "rating", "text"))
  text = " ".join(row["text"] for row in table)
  size = len(text) // rows
  encode = functools.partial(found.tokenizer.encode_whole, max_length=tokens)
  inputs_BT = np.array([encode(text[n * size : (n + 1) * size]).ids for n in range(rows)], np.int32)
  return Case(found.config, found.params, jnp.asarray(inputs_BT), tokens, lambda x: x.mean(axis=1))


def vit(rows: int, side: int) -> Case:
  """The ViT on images of so many pixels a side."""
  config = images.get_config("cifar")
  found = pretrained.load(config.model.source, scan_layers=False)
  data = config.data
  each = image_sets.read(
    assets.resolve(data.test_source), tuple(data.test_arrays), config.task.labels, most=2 * side
  )[:rows]
  pictures = np.stack([image_batches.crop(x["picture"], side, 1.0, 0.5, 0.5) for x in each])
  normal = (pictures / np.float32(255) - np.float32(data.mean)) / np.float32(data.std)
  tokens = 1 + (side // found.config.patch_size) ** 2
  return Case(found.config, found.params, jnp.asarray(normal), tokens, lambda x: x[:, 0])


CASES: Mapping[str, Callable[[int], Case]] = {
  "minilm-512": minilm,
  "vit-257": functools.partial(vit, side=224),
  "vit-1370": functools.partial(vit, side=518),
}

_CASES = flags.DEFINE_list("cases", list(CASES), "The models and lengths to measure.")
_LANDMARKS = flags.DEFINE_list("landmarks", ["16", "32", "64", "128", "256"], "Their numbers.")
_ROWS = flags.DEFINE_integer("rows", 4, "Texts or images at once.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each row.", 2)
_OUTPUT = define_output()
flags.register_validator(
  "cases", lambda names: set(names) <= set(CASES), f"--cases takes some of {', '.join(CASES)}"
)
flags.register_validator(
  "landmarks", lambda xs: xs and all(x.isdigit() and int(x) for x in xs), "--landmarks=16,64"
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  lines = [
    "## Attention of low rank: error, time and memory",
    "",
    *describe_circumstances("benchmarks.low_rank_attention", ["jax", "flax"]),
    f"- float32, {_ROWS.value} inputs at once, {ITERATIONS} iterations of the pseudo-inverse; "
    f"{_ROUNDS.value} rounds in turns. Error: of the last hidden states, relative; cosine: of what "
    "represents an input. Times: medians; ratios to exact, plain: medians over the rounds, with "
    "quartiles. Memory: temporary arrays of the compiled forward pass, and of the gradient by the "
    "parameters.",
  ]
  for name in _CASES.value:
    case = CASES[name](_ROWS.value)
    table = measure(case, rows_of(map(int, _LANDMARKS.value)), _ROUNDS.value)
    lines += ["", f"{name}, {case.tokens:,} tokens:", "", table]
    print(table, flush=True)
  publish("\n".join(lines), _OUTPUT.value)


def rows_of(landmarks) -> dict[str, Any]:
  """The kinds of attention that are measured: exact attention first."""
  rows = dict(EXACT)
  for count in landmarks:
    rows[f"nystrom, {count}"] = Nystrom(landmarks=count, iterations=ITERATIONS)
    rows[f"linformer, {count}"] = Linformer(rank=count)
  return rows


def with_attention(case: Case, how: Any) -> tuple[Callable, PyTree]:
  """The function from parameters and inputs to hidden states, and its parameters."""
  config = dataclasses.replace(case.config, attention=how)
  model, leaves = families.family_of(config).make_model(config), flatten(case.params)
  shapes = jax.eval_shape(model.init, jax.random.key(0), case.inputs)["params"]
  params = map_with_path(
    lambda path, x: leaves[path] if path in leaves else segment_means(None, x.shape, x.dtype),
    shapes,
  )
  return lambda params, x: model.apply({"params": params}, x, method="hidden"), params


def measure(case: Case, rows: Mapping[str, Any], rounds: int) -> str:
  """The table of a case in Markdown."""
  runs, hidden, memory = {}, {}, {}
  for name, how in rows.items():
    f, params = with_attention(case, how)
    forward = jax.jit(f).lower(params, case.inputs).compile()

    def loss(params, x, f=f):
      return jnp.mean(jnp.square(f(params, x)))

    backward = jax.jit(jax.grad(loss)).lower(params, case.inputs).compile()
    memory[name] = [x.memory_analysis().temp_size_in_bytes / 1e6 for x in (forward, backward)]
    hidden[name] = forward(params, case.inputs)
    runs[name] = timed(functools.partial(forward, params, case.inputs))
  seconds = run_in_turns(runs, rounds)
  first = next(iter(rows))
  exact, pooled = hidden[first], case.pooled(hidden[first])
  cells = []
  for name in rows:
    off = jnp.linalg.norm(hidden[name] - exact) / jnp.linalg.norm(exact)
    own = case.pooled(hidden[name])
    norms = jnp.linalg.norm(own, axis=-1) * jnp.linalg.norm(pooled, axis=-1)
    cosine = jnp.mean(jnp.sum(own * pooled, axis=-1) / norms)
    cells.append(
      (
        name,
        f"{off:.3f}",
        f"{cosine:.4f}",
        f"{1e3 * statistics.median(seconds[name]):,.1f}",
        ratio(seconds[name], seconds[first]),
        *(f"{x:,.1f}" for x in memory[name]),
      )
    )
  header = ("attention", "error", "cosine", "ms", "/ exact", "forward, MB", "gradient, MB")
  return tables.markdown(header, cells)


if __name__ == "__main__":
  app.run(main)
