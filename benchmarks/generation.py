r"""Tokens a second of greedy decoding: the base, a merged adapter and one that is kept apart.

    python -m benchmarks.generation --model=smollm2 --output=benchmarks/results.md
    python -m benchmarks.generation --model=llama1b --dtype=bfloat16 --scan_layers

Every row decodes the same prompts with its cache, to the same number of new tokens, without an end
token. The time includes reading the prompts. `transformers`, if it is installed, decodes in a
process of its own, with its own cache. Rows take turns as in `benchmarks.step`.
"""

import contextlib
import functools
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import lora_jax
from benchmarks import torch_peer
from benchmarks.circumstances import describe_circumstances
from benchmarks.models import MODELS, Case
from benchmarks.reporting import define_output, publish
from benchmarks.rows import make_adapters, trained
from benchmarks.turns import ratio, run_in_turns, timed
from lora_jax import families, tables
from lora_jax.models import decode

BASE, MERGED, APART, PEER = "base", "adapter merged", "adapter kept apart", "transformers, base"

_MODELS = [name for name in MODELS if name != "small"]  # it has no tokens
_MODEL = flags.DEFINE_enum("model", None, _MODELS, "The model; see benchmarks.models.")
_BATCHES = flags.DEFINE_list("batches", ["1", "32"], "Rows of a batch; each has its own table.")
_PROMPT = flags.DEFINE_integer("prompt", 128, "Tokens of a prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 48, "New tokens of a row.", lower_bound=1)
_RANK = flags.DEFINE_integer("rank", 8, "The rank of the adapter.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each row.", lower_bound=2)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of base and computation.")
_SCAN = flags.DEFINE_bool("scan_layers", False, "One scanned block instead of one for each layer.")
_OUTPUT = define_output()

flags.register_validator(
  "batches",
  lambda counts: counts and all(count.isdecimal() and int(count) for count in counts),
  "--batches takes positive whole numbers, as in --batches=1,32",
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  has_peer = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
  packages = ["jax", "flax", *(("torch", "transformers") if has_peer else ())]
  lines = [
    f"## Greedy decoding: {_MODEL.value}, prompts of {_PROMPT.value} tokens, {_DTYPE.value}",
    "",
    *describe_circumstances("benchmarks.generation", packages),
    f"- {_ROUNDS.value} rounds, {_TOKENS.value} new tokens. Ratios of the time: medians over the "
    "rounds, with quartiles.",
    "",
  ]
  rows = [cells for batch in _BATCHES.value for cells in measure(int(batch), has_peer)]
  header = ("rows", "weights", "tokens/s", "time / base", "time / transformers")
  publish("\n".join([*lines, tables.markdown(header, rows)]), _OUTPUT.value)


def measure(batch: int, has_peer: bool) -> list[tuple[str, ...]]:
  """The table's rows for one batch size."""
  make = MODELS[_MODEL.value].make
  case = make(jnp.dtype(_DTYPE.value), batch, _PROMPT.value, _SCAN.value)
  programs = make_programs(case, _RANK.value, _TOKENS.value)
  expected = np.asarray(programs[BASE]())
  for program in programs.values():
    jax.block_until_ready(program())
  turns = {label: timed(program) for label, program in programs.items()}
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    if has_peer:
      spec = torch_peer.write_case(case, Path(folder))
      peer = torch_peer.TorchText(PEER, torch_peer.decoding(spec, _TOKENS.value))
      peer.start()
      stack.callback(peer.close)
      check(expected, peer.tokens)
      turns[PEER] = peer.run
    seconds = run_in_turns(turns, _ROUNDS.value)
  return [
    (
      str(batch),
      label,
      f"{batch * _TOKENS.value / statistics.median(own):,.1f}",
      ratio(own, seconds[BASE]),
      ratio(own, seconds[PEER]) if has_peer else "–",
    )
    for label, own in seconds.items()
  ]


def make_programs(case: Case, rank: int, count: int) -> dict[str, Callable[[], jax.Array]]:
  """`{row: the function to time}`; each returns tokens [rows, count]."""
  config = case.module.config
  family = families.family_of(config)
  adapters = trained(make_adapters(case, rank), seed=0)
  rows, length = case.inputs.shape
  lengths_B = jnp.full(rows, length, jnp.int32)
  cache = family.init_cache(config, rows, length + count, config.dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def run(apply, weights, prompts_BT):
    return decode.decode(
      apply,
      weights,
      prompts_BT,
      lengths_B,
      steps=count,
      choose=decode.greedy,
      key=jax.random.key(0),
      eos_id=None,
      cache=cache,
    )

  apply, adapted = case.module.apply, lora_jax.adapt(case.module.apply)
  merged = lora_jax.merge(case.params, adapters)
  apart = lora_jax.attach(case.params, adapters)
  return {
    BASE: functools.partial(run, apply, case.params, case.inputs),
    MERGED: functools.partial(run, apply, merged, case.inputs),
    APART: functools.partial(run, adapted, apart, case.inputs),
  }


def check(expected: np.ndarray, found: Sequence[Sequence[int]]) -> None:
  """Raises RuntimeError if fewer than half of the first tokens agree: the times would be of two
  models. Later ones may differ after a tie in low precision."""
  agree = np.mean(expected[:, 0] == np.asarray(found)[:, 0])
  if agree < 0.5:
    raise RuntimeError(f"only {agree:.0%} of the first tokens are those of transformers")


if __name__ == "__main__":
  flags.mark_flag_as_required("model")
  app.run(main)
