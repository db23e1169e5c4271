r"""Compresses a model, step by step, and tells what each step costs and gains.

    python -m experiments.compress --config=configs/compress.py --workdir=runs/small
    python -m experiments.compress --config=configs/compress.py:steps=factorize+quantize \
        --workdir=runs/smaller --config.factorize.budget=0.7

The workdir then holds model/, which train, evaluate and generate take as a model's folder, the
report (report.md, report.json, pareto.png), config.json, and rest.jsonl, the text that was used
neither for calibration nor to measure by. To heal the model on it, and to add that to the report:

    python -m experiments.train --config=configs/heal.py:compressed=runs/small --workdir=runs/healed
    python -m experiments.compress --config=configs/compress.py --workdir=runs/small \
        --healed=runs/healed

Steps that make no sense one after another are refused before the model is loaded.
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import lora_jax
from experiments import parts
from lora_jax import calibration, exchange, tree
from lora_jax.compress import (
  attention,
  factorize,
  factors,
  make_windows,
  perplexity,
  prune,
  quantize,
  report,
  sensitivity,
  storage,
  structured,
)
from lora_jax.data import batches, records
from lora_jax.data.examples import choice_ids
from lora_jax.io import assets
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import llama
from lora_jax.train import evaluation, workdir
from lora_jax.weights import Factored, is_weight
from lora_jax.weights.quantized import Format

PyTree = Any

_CONFIG = config_flags.DEFINE_config_file("config", None, "What is done.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "The folder to write.")
_HEALED = flags.DEFINE_string("healed", None, "A finished run on model/, to add to the report.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  with workdir.open_workdir(_WORKDIR.value, config.to_dict()) as run:
    if _HEALED.value:
      add_healed(config, run.path, _HEALED.value)
    else:
      compress(config, run.path)


class Model(NamedTuple):
  """A model between two steps."""

  config: llama.LlamaConfig
  params: PyTree

  @property
  def apply(self) -> Callable:
    return lora_jax.adapt(llama.Llama(self.config).apply)

  @property
  def axes(self) -> dict[str, lora_jax.Axes]:
    return parts.trace_axes(llama.Llama(self.config), self.params)


def compress(config: ConfigDict, folder: pathlib.Path):
  """Runs the steps of a config, measures before, between and after, and writes everything."""
  check_steps(config.steps)
  if (folder / "model").exists():
    raise FileExistsError(f"{folder / 'model'}: is there already; use another workdir")
  pretrained = parts.load_model(config.model)
  calibration_NT, held_out_NT, rest_NT = read_windows(config.text, pretrained.tokenizer)
  model = Model(pretrained.config, pretrained.params)
  if config.adapter:
    run, _ = parts.open_run(config.adapter)
    adapters = exchange.load(run.adapter, model.params, model.axes)
    model = model._replace(params=lora_jax.merge(model.params, adapters))
  for step in config.steps:  # whatever a step's targets and settings lack is found before the work
    CHECKS[step](config[step], model, calibration_NT)

  measure = make_measure(config, held_out_NT, pretrained.tokenizer)
  rows = [report.Row("dense", measure(model))]
  print(rows[-1])
  for step in config.steps:
    model = STEPS[step](config[step], model, Calibration(calibration_NT, config.text.batch_size))
    rows.append(report.Row(step, measure(model)))
    print(rows[-1])
  storage.save(
    folder / "model", model.params, model.config, pretrained.tokenizer, steps=list(config.steps)
  )
  write_rest(folder / "rest.jsonl", rest_NT, pretrained.tokenizer)
  report.write(folder, rows, about())
  print(report.table(rows))


def add_healed(config: ConfigDict, folder: pathlib.Path, healed: str):
  """Adds a run that trained an adapter on the compressed model to its report."""
  run, _ = parts.open_run(healed)
  small = storage.load(folder / "model")
  model = Model(small.config, small.params)
  adapters = exchange.load(run.adapter, model.params, model.axes)
  model = model._replace(params=lora_jax.attach(model.params, adapters))
  _, held_out_NT, _ = read_windows(config.text, small.tokenizer)
  measures = make_measure(config, held_out_NT, small.tokenizer)(model)
  found = json.loads((folder / "report.json").read_text())
  rows = [row for row in map(_row, found["steps"]) if row.step != "heal"]
  rows.append(report.Row("heal", measures))
  report.write(folder, rows, f"{found['about']}\n\n{about()}")
  print(report.table(rows))


def _row(fields: dict[str, Any]) -> report.Row:
  fields = dict(fields)
  for name in ("prefill", "token"):
    fields[name] = {int(rows): value for rows, value in fields[name].items()}
  return report.Row(fields.pop("step"), report.Measures(**fields))


def about() -> str:
  """Where and by which command it was measured."""
  device = jax.devices()[0].device_kind
  return (
    f"`python -m experiments.compress {shlex.join(sys.argv[1:])}`, {device}, JAX {jax.__version__}"
  )


# ---- text


def read_windows(text: ConfigDict, tokenizer: Tokenizer) -> tuple[np.ndarray, ...]:
  """The windows for calibration, those to measure by, and the rest.

  Raises:
    ValueError: when there are too few.
  """
  rows = records.read(assets.resolve(text.source), format=text.format, columns=text.columns or None)
  records.require(rows, [text.column], "config.text.column")
  windows_NT = make_windows(
    " ".join(str(row[text.column]) for row in rows), tokenizer.encode, text.length
  )
  needed = text.calibration + text.held_out
  if len(windows_NT) < needed or not text.held_out or not text.calibration:
    raise ValueError(
      f"the text has {len(windows_NT)} windows of {text.length} tokens, and config.text asks for "
      f"{text.calibration} for calibration and {text.held_out} to measure by; give more text"
    )
  return tuple(np.split(windows_NT, [text.calibration, needed]))


def write_rest(path: pathlib.Path, rest_NT: np.ndarray, tokenizer: Tokenizer):
  """The windows that are left as records: the first token's text, and what follows it."""
  lines = [
    json.dumps({"first": tokenizer.decode(ids[:1]), "rest": tokenizer.decode(ids[1:])})
    for ids in rest_NT.tolist()
  ]
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Calibration:
  """The windows that steps calibrate by."""

  windows_NT: np.ndarray
  batch_size: int

  def batches(self) -> list[np.ndarray]:
    starts = range(0, len(self.windows_NT), self.batch_size)
    return [self.windows_NT[n : n + self.batch_size] for n in starts]

  def inputs(self, model: Model, paths: Sequence[str], *, diagonal: bool = False):
    """The second moments of kernels' inputs."""
    return calibration.second_moments(
      lambda params, tokens: model.apply({"params": params}, tokens),
      model.params, paths, self.batches(), axes=model.axes, diagonal=diagonal,
    )  # fmt: skip

  def gradients(self, model: Model, paths: Sequence[str]):
    """The second moments of the gradients of their results."""

    def loss(params, tokens_BT):
      logits_BTV = model.apply({"params": params}, tokens_BT[:, :-1]).astype(jnp.float32)
      return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).sum()

    return sensitivity.gradient_moments(loss, model.params, paths, self.batches(), axes=model.axes)


# ---- measures


def make_measure(config: ConfigDict, held_out_NT: np.ndarray, tokenizer: Tokenizer) -> Callable:
  """Makes the function from a Model to its `report.Measures`."""
  task = None
  if config.task.examples:
    rows = parts.pick(parts.load_records(config.task.data), config.task.split, "task.split")
    data = config.task.data
    examples = parts.encode(data, rows, tokenizer)[: config.task.examples]
    task = batches.eval_batches(
      examples, config.task.batch_size, buckets=data.buckets, pad_id=tokenizer.pad_id
    )
    choices = choice_ids(tokenizer, data.choices)

  def measure(model: Model) -> report.Measures:
    accuracy = None
    if task is not None:
      eval_step = evaluation.make_eval_step(model.apply, choices)
      accuracy = evaluation.evaluate(eval_step, model.params, task)["accuracy"]
    section = config.report
    times = {
      rows: report.latency(
        model.apply, model.params, model.config,
        rows=rows, length=section.prompt, repeats=section.repeats,
      )
      for rows in section.batches
    }  # fmt: skip
    return report.Measures(
      parameters=report.count_parameters(model.params),
      memory=report.count_bytes(model.params),
      disk=report.count_bytes(model.params) if _is_adapted(model) else storage.size(model.params),
      flops=report.flops_per_token(model.apply, model.params, section.prompt),
      prefill={rows: prefill for rows, (prefill, _) in times.items()},
      token={rows: token for rows, (_, token) in times.items()},
      perplexity=perplexity(
        model.apply, model.params, held_out_NT, batch_size=config.text.batch_size
      ),
      accuracy=accuracy,
    )

  return measure


def _is_adapted(model: Model) -> bool:
  leaves = jax.tree.leaves(model.params, is_leaf=is_weight)
  return any(type(x).__name__ not in storage.KINDS for x in leaves if is_weight(x))


# ---- the steps


_STRUCTURED = ("channels", "heads", "value_heads")
_AFTER: dict[str, tuple[tuple[str, ...], str]] = {
  **dict.fromkeys(
    _STRUCTURED,
    (("factorize", "prune", "quantize"), "it makes dense kernels smaller; put it before"),
  ),
  "heads": (
    ("factorize", "prune", "quantize", "value_heads"),
    "it makes dense kernels of whole heads smaller; put it before",
  ),
  "factorize": (
    ("prune", "quantize"),
    "the factors of a kernel have none of its zeros, and are not on its levels; put it before",
  ),
  "prune": (("quantize",), "what is quantised has no numbers to set to zero; put it before"),
}


def check_steps(steps: Sequence[str]) -> None:
  """Refuses steps that are unknown, repeated, or in an order that makes no sense.

  Raises:
    ValueError: with the reason.
  """
  if not steps:
    raise ValueError(f"config.steps is empty; choose from {', '.join(STEPS)}")
  for n, step in enumerate(steps):
    if step not in STEPS:
      raise ValueError(f"config.steps: {step!r} is unknown; choose from {', '.join(STEPS)}")
    if step in steps[:n]:
      raise ValueError(f"config.steps: {step} is there twice")
    earlier, reason = _AFTER.get(step, ((), ""))
    wrong = [other for other in steps[:n] if other in earlier]
    if wrong:
      raise ValueError(f"config.steps: {step} after {wrong[0]} makes no sense: {reason}")


def select(section: ConfigDict, model: Model) -> list[str]:
  return factorize.select(model.params, section.targets, model.axes)


def check_factorize(section: ConfigDict, model: Model, windows_NT: np.ndarray):
  if section.method not in METHODS:
    raise ValueError(
      f"factorize.method {section.method!r} is unknown; choose from {', '.join(METHODS)}"
    )
  if section.unit not in UNITS:
    raise ValueError(f"factorize.unit {section.unit!r} is unknown; choose from {', '.join(UNITS)}")
  if (section.budget > 0) == (section.energy > 0):
    raise ValueError("factorize: give either a budget or an energy above 0, and 0 for the other")
  if not 0 <= section.budget < 1:
    raise ValueError(f"factorize.budget {section.budget} must be a share below 1 of the targets")
  leaves = tree.flatten(model.params, is_leaf=is_weight)
  paths = select(section, model)
  most = max(leaves[path].shape[0] for path in paths)
  if section.method == "whitened" and windows_NT.size < most:
    raise ValueError(
      f"the calibration text has {windows_NT.size} tokens for kernels of {most} inputs; give more"
    )


def factorize_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  """Kernels to factors, which are fitted to the inputs that they then have."""
  paths, axes = select(section, model), model.axes
  leaves = tree.flatten(model.params, is_leaf=is_weight)
  decompose, values = METHODS[section.method](section, model, data, paths)
  losses = factorize.tails(model.params, paths, values, axes)
  if section.energy:
    ranks = factorize.energy_ranks(losses, section.energy)
  else:
    cost = functools.partial(UNITS[section.unit], section=section)
    costs = {path: cost(*leaves[path].shape) for path in paths}
    budget = section.budget * sum(cost.dense for cost in costs.values())
    ranks = sensitivity.allocate(losses, costs, budget)
  print(f"factorize: {len(ranks)} of {len(paths)} kernels; the others stay as they are")
  params = factorize.factorize(model.params, ranks, decompose, axes=axes)
  small = model._replace(params=params)
  for _ in range(section.updates if section.method == "whitened" else 0):
    moments = data.inputs(small, list(ranks))
    params = factorize.update(
      small.params, model.params, list(ranks), moments, damping=section.damping
    )
    small = small._replace(params=params)
  return small


def _whitened(section, model, data, paths):
  gradients = data.gradients(model, paths) if section.gradients else None
  whitened = factorize.Whitened(data.inputs(model, paths), gradients, section.damping)
  return whitened, whitened.values


METHODS: dict[str, Callable] = {
  "whitened": _whitened,
  "svd": lambda *_: (factorize.svd, factorize.singular_values),
  "randomized": lambda *_: (factorize.randomized(0), factorize.singular_values),
  "qr": lambda *_: (factorize.pivoted_qr, factorize.singular_values),
}
UNITS: dict[str, Callable] = {
  "parameters": lambda d, k, section: sensitivity.parameters(1, d, k),
  "flops": lambda d, k, section: sensitivity.flops(1, d, k, section.rows),
  "milliseconds": functools.lru_cache(
    lambda d, k, section: sensitivity.milliseconds(1, d, k, section.rows)
  ),
}


def check_prune(section: ConfigDict, model: Model, windows_NT: np.ndarray):
  del windows_NT
  if section.score not in ("wanda", "magnitude"):
    raise ValueError(f"prune.score {section.score!r} is unknown; choose wanda or magnitude")
  pattern_of(section)
  select(section, model)


def pattern_of(section: ConfigDict) -> prune.Pattern:
  if section.of:
    return prune.n_of_m(section.n, section.of)
  return prune.share(section.share)


def prune_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  """Numbers of kernels to zero; of factorised ones, numbers of their factors, by magnitude."""
  leaves = tree.flatten(model.params, is_leaf=is_weight)
  dense = [p for p in _targets(section, model) if not isinstance(leaves[p], Factored)]
  score = prune.magnitude
  if section.score == "wanda" and dense:
    score = prune.wanda(data.inputs(model, dense, diagonal=True))
  params, axes = model.params, model.axes
  if dense:
    params = prune.prune(params, dense, score, pattern_of(section), axes=axes)
  opened = factors.open_factors(params)
  thin = [f"{p}/{x}" for p in _targets(section, model) if p not in dense for x in "ab"]
  if thin:
    opened = prune.prune(opened, thin, prune.magnitude, pattern_of(section))
  print(f"prune: {len(dense)} kernels, and {len(thin)} factors by magnitude")
  return model._replace(params=factors.close_factors(opened, params))


def _targets(section: ConfigDict, model: Model) -> list[str]:
  """The paths that a section's targets select, Weights among them."""
  shapes = jax.eval_shape(lora_jax.materialize, model.params)
  return factorize.select(shapes, section.targets, model.axes)


def check_quantize(section: ConfigDict, model: Model, windows_NT: np.ndarray):
  del windows_NT
  format_of(section)
  select(section, model)


def format_of(section: ConfigDict) -> Format:
  return Format(levels=section.levels, block=section.block or None, double=section.double)


def quantize_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  """Kernels in fewer bits, the factors of factorised ones too; pruned ones keep their zeros."""
  del data
  paths = _targets(section, model)
  opened = factors.open_factors(model.params)
  leaves = tree.flatten(opened, is_leaf=is_weight)
  names = [
    name for path in paths
    for name in ([path] if path in leaves else [f"{path}/a", f"{path}/b"])
  ]  # fmt: skip
  bare = {name: leaves[name] for name in names}
  masked = {name: x for name, x in bare.items() if isinstance(x, lora_jax.weights.Pruned)}
  bare |= {name: x.w for name, x in masked.items()}
  small = {name: quantize({"w": w}, {"w": format_of(section)})["w"] for name, w in bare.items()}
  small |= {name: dataclasses.replace(x, w=small[name]) for name, x in masked.items()}
  opened = tree.map_with_path(lambda name, x: small.get(name, x), opened, is_leaf=is_weight)
  print(f"quantize: {len(small)} matrices to {section.levels}")
  return model._replace(params=factors.close_factors(opened, model.params))


def check_structured(section: ConfigDict, model: Model, windows_NT: np.ndarray):
  del windows_NT
  name = next(name for name in ("mlp_width", "num_kv_heads", "value_dim") if name in section)
  most = getattr(model.config, name) or model.config.head_dim
  if not 0 < section[name] < most:
    raise ValueError(f"{name} is {most} and is to be {section[name]}; choose from 1 to {most - 1}")


def channels_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  moments = data.inputs(model, _layers(model, "mlp/down"))
  params, config = structured.prune_channels(
    model.params, model.config, section.mlp_width, moments, damping=section.damping
  )
  return Model(config, params)


def heads_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  moments = data.inputs(model, _layers(model, "attn/out"))
  params, config = structured.prune_heads(
    model.params, model.config, section.num_kv_heads, moments, damping=section.damping
  )
  return Model(config, params)


def value_heads_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  moments = data.inputs(model, _layers(model, "attn/value"))
  params, config = attention.shrink_values(
    model.params, model.config, section.value_dim, moments, damping=section.damping
  )
  return Model(config, params)


def _layers(model: Model, name: str) -> list[str]:
  return [f"block_{i}/{name}/kernel" for i in range(model.config.num_layers)]


STEPS: dict[str, Callable[[ConfigDict, Model, Calibration], Model]] = {
  "channels": channels_step,
  "heads": heads_step,
  "value_heads": value_heads_step,
  "factorize": factorize_step,
  "prune": prune_step,
  "quantize": quantize_step,
}
CHECKS: dict[str, Callable] = dict.fromkeys(_STRUCTURED, check_structured) | {
  "factorize": check_factorize,
  "prune": check_prune,
  "quantize": check_quantize,
}

if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
