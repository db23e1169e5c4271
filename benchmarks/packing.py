r"""The gain of packing: training tokens per second, without padding, on short examples.

    python -m benchmarks.packing --output=benchmarks/results.md

Uses the quickstart's sentences, model and adapter. Batches have one row per example, padded to one
length or to the nearest of the config's buckets, or are packed, with several examples in a row
(`lora_jax.data.packing`). A step has about as many examples in each case. The cases take turns on
the same batches in each round; every ratio is taken within a round.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

import lora_jax
from benchmarks.circumstances import describe_circumstances
from benchmarks.reporting import define_output, publish
from benchmarks.turns import ratio, run_in_turns, timed
from configs import quickstart
from experiments import methods, parts
from lora_jax.data import batches, packing
from lora_jax.train import step

_BATCH = flags.DEFINE_integer("batch", 16, "Examples per step; about as many when packed.", 1)
_LENGTH = flags.DEFINE_integer("length", 160, "Tokens per packed row.", 1)
_STEPS = flags.DEFINE_integer("steps", 4, "Steps per turn, each on its own batch.", 1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each case.", 2)
_OUTPUT = define_output()

Batches = Sequence[step.Batch]


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  config = quickstart.get_config()
  task = parts.make_task(config)
  records = parts.load_records(config.data, task)
  pretrained = parts.load_model(config.model)
  task = task.of_model(pretrained)
  examples = task.examples(records["train"])
  mean = statistics.mean(len(example.tokens) - 1 for example in examples)
  rows = max(1, round(_BATCH.value * mean / _LENGTH.value))
  shapes = {"seed": config.seed, "pad_id": pretrained.tokenizer.pad_id}
  buckets = tuple(config.data.buckets)
  ways = {
    f"{_BATCH.value} rows of {buckets[-1]}": batches.train_batches(
      examples, _BATCH.value, buckets=buckets[-1:], **shapes
    ),
    f"{_BATCH.value} rows of the batch's bucket": batches.train_batches(
      examples, _BATCH.value, buckets=buckets, **shapes
    ),
    f"{rows} packed rows of {_LENGTH.value}": packing.packed_batches(
      examples, rows, length=_LENGTH.value, **shapes
    ),
  }
  ways = {name: [dataset[n] for n in range(_STEPS.value)] for name, dataset in ways.items()}
  run = make_run(config, task, pretrained)
  for data in tqdm(ways.values(), desc="compile"):
    run(data)
  turns = {name: timed(functools.partial(run, data)) for name, data in ways.items()}
  seconds = run_in_turns(turns, _ROUNDS.value)
  report = "\n".join(
    [
      "## Packing short examples: SmolLM2-135M, LoRA of rank 8, layers scanned",
      "",
      *describe_circumstances("benchmarks.packing", ["jax", "flax", "optax"]),
      f"- {len(examples):,} sentences of {mean:.1f} tokens on average. {_ROUNDS.value} rounds of "
      f"{_STEPS.value} steps. Tokens: those of the examples, without padding. Ratios: medians over "
      "the rounds, with quartiles.",
      "",
      format_table(ways, seconds),
    ]
  )
  publish(report, _OUTPUT.value)


def make_run(config, task, pretrained) -> Callable[[Batches], None]:
  """A function that takes a step on each of some batches, and waits for all of them."""
  model = pretrained.family.make_model(pretrained.config)
  axes = parts.trace_axes(model, pretrained.params)
  specs = lora_jax.match(pretrained.params, methods.rules_of(config.adapter), axes)
  adapters = lora_jax.init(jax.random.key(config.seed), pretrained.params, specs, axes)
  weights = lora_jax.attach(pretrained.params, adapters)
  trainable, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  tx, _ = methods.make_optimizer(config)
  train_step = methods.make_train_step(config, task, lora_jax.adapt(model.apply), tx, adapters)
  state = step.init_state(trainable, tx)

  def run(data: Batches) -> None:
    nonlocal state
    for batch in data:
      state, metrics = train_step(state, frozen, batch)
    jax.block_until_ready((state, metrics))

  return run


def counted(batch: step.Batch) -> np.ndarray:
  """True [rows, tokens] for the tokens of examples."""
  if "segments" in batch:
    return batch["segments"] > 0
  last_B = np.where(batch["weights"] > 0, batch["at"], -1).max(axis=1)
  return np.arange(batch["tokens"].shape[1]) <= last_B[:, None]


def format_table(ways: Mapping[str, Batches], seconds: Mapping[str, Sequence[float]]) -> str:
  """The table in Markdown; ratios relative to the first way."""
  lines = [
    "| rows of a step | padding, % | tokens/s | / the first |",
    "| --- " + "| ---: " * 3 + "|",
  ]
  rates = {}
  for name, data in ways.items():
    tokens = sum(counted(batch).sum() for batch in data)
    places = sum(batch["tokens"].size for batch in data)
    rates[name] = [tokens / own for own in seconds[name]]
    lines.append(
      f"| {name} | {100 * (1 - tokens / places):.0f} | {statistics.median(rates[name]):,.0f} "
      f"| {ratio(rates[name], next(iter(rates.values())))} |"
    )
  return "\n".join(lines)


if __name__ == "__main__":
  app.run(main)
