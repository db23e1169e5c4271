"""Checks a compression before its first step, with the reason for each refusal.

check_config(config, done=storage.steps_of(folder))       # before the model is loaded
check_model(config, model, tokens)                        # before anything is computed

A step is checked on the shapes that the steps before it will leave.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from experiments import compression, config_checks
from experiments.compression import Model
from lora_jax import families, tree
from lora_jax.compress import factorization, onnx_program, sensitivity, structured_pruning
from lora_jax.io.pretrained import Pretrained
from lora_jax.models import encoder_attention
from lora_jax.weights import DoRA, Factored, Full, Pruned, TokenRows, is_weight

# ---- in which order

_STRUCTURED = {"channels": "mlp_width", "heads": "num_kv_heads", "value_heads": "value_dim"}
_DENSE = "it makes dense kernels smaller; put it before"
_AFTER: dict[str, tuple[tuple[str, ...], str]] = {
  "channels": (("factorize", "prune", "quantize"), _DENSE),
  "value_heads": (("factorize", "prune", "quantize"), _DENSE),
  "heads": (
    ("factorize", "prune", "quantize", "value_heads"),
    "it makes dense kernels of whole heads smaller; put it before",
  ),
  "factorize": (
    ("prune", "quantize"),
    "the factors of a kernel have none of its zeros, and are not on its levels; put it before",
  ),
  "prune": (("quantize",), "what is quantized has no numbers to set to zero; put it before"),
}


def check_steps(steps: Sequence[str], done: Sequence[str] = ()) -> None:
  """Refuses steps that are unknown, repeated, or in an order that makes no sense.

  Args:
    steps: the config's.
    done: those that the model went through already.

  Raises:
    ValueError: with the reason.
  """
  known = ", ".join(compression.STEPS)
  if not steps:
    raise ValueError(f"config.steps is empty; choose from {known}")
  for n, step in enumerate(steps):
    if step not in compression.STEPS:
      raise ValueError(f"config.steps: {step!r} is unknown; choose from {known}")
    if step in steps[:n]:
      raise ValueError(f"config.steps: {step} is there twice")
    if step in done:
      raise ValueError(
        f"config.steps: the model went through {step} already; start from the one before it"
      )
    earlier, reason = _AFTER.get(step, ((), ""))
    wrong = [other for other in (*done, *steps[:n]) if other in earlier]
    if wrong:
      was = ", which the model went through already," if wrong[0] in done else ""
      raise ValueError(f"config.steps: {step} after {wrong[0]}{was} makes no sense: {reason}")


# ---- what the config alone tells


def check_config(config: ConfigDict, done: Sequence[str] = ()) -> None:
  """Refuses what no model could be put through.

  Args:
    config: the whole config.
    done: the steps that the model went through already.

  Raises:
    ValueError: with the reason.
  """
  check_steps(config.steps, done)
  if config.model.scan_layers:
    raise ValueError("model.scan_layers: layers are compressed one by one; set it to False")
  if config.model.quantize != "none":
    raise ValueError(
      f"model.quantize {config.model.quantize}: the steps start from the numbers themselves; set "
      "it to none, and put quantize among the steps"
    )
  if config.keep_adapter and not config.adapter:
    raise ValueError("keep_adapter: there is no adapter to keep; name a run by config.adapter")
  if config.text.source:
    if min(config.text.calibration, config.text.held_out, config.text.batch_size) < 1:
      raise ValueError("text: calibration, held_out and batch_size must be 1 or more")
    if config.report.prompt < 1:
      raise ValueError(f"report.prompt {config.report.prompt} must be 1 or more")
  if min(config.report.repeats, *config.report.batches) < 1:
    raise ValueError("report: repeats and batches must be 1 or more")
  if config.report.onnx:
    if config.text.source:
      raise ValueError(
        "report.onnx: ONNX Runtime is timed on the batches of a task, and text.source asks for "
        "running text; set it to False"
      )
    onnx_program.require_jax2onnx()
  for step in config.steps:
    if "damping" in config[step] and config[step].damping < 0:
      raise ValueError(f"{step}.damping {config[step].damping} must be 0 or more")
    if step in _SETTINGS:
      _SETTINGS[step](config[step])
  config_checks.check_compression(config)


def check_family(steps: Sequence[str], found: Pretrained) -> None:
  """Refuses steps that a model's family has no layers for, and a model that cannot be stored.

  Args:
    steps: the config's.
    found: the model; shapes are enough.

  Raises:
    ValueError: with the reason.
  """
  encoder_attention.check_storable(found.config)
  for step in set(steps) & set(_STRUCTURED):
    if found.family.kind != families.DECODER:
      raise ValueError(
        f"config.steps: {step} is for decoders, and {found.source} is a {found.config.family!r}; "
        "use factorize, prune and quantize"
      )


def _check_factorize_settings(section: ConfigDict) -> None:
  _check_choice("factorize.method", section.method, compression.METHODS)
  _check_choice("factorize.unit", section.unit, compression.UNITS)
  if (section.budget > 0) == (section.energy > 0):
    raise ValueError("factorize: give either a budget or an energy above 0, and 0 for the other")
  if not 0 <= section.budget < 1:
    raise ValueError(f"factorize.budget {section.budget} must be a fraction below 1 of the targets")
  if not 0 <= section.energy < 1:
    raise ValueError(f"factorize.energy {section.energy} must be a fraction below 1")
  if section.multiple < 1:
    raise ValueError(f"factorize.multiple {section.multiple} must be 1 or more")


def _check_prune_settings(section: ConfigDict) -> None:
  _check_choice("prune.score", section.score, ("wanda", "magnitude"))
  compression.pattern_of(section)


def _check_quantize_settings(section: ConfigDict) -> None:
  _check_choice("quantize.method", section.method, ("nearest", "gptq"))
  if section.method == "gptq" and section.damping <= 0:
    raise ValueError(f"quantize.damping {section.damping} must be above 0 for gptq")
  compression.format_of(section)


def _check_choice(field: str, value: str, known) -> None:
  if value not in known:
    raise ValueError(f"{field} {value!r} is unknown; choose from {', '.join(known)}")


_SETTINGS: dict[str, Callable[[ConfigDict], None]] = {
  "factorize": _check_factorize_settings,
  "prune": _check_prune_settings,
  "quantize": _check_quantize_settings,
}


# ---- what only the model tells


def check_model(config: ConfigDict, model: Model, tokens: int | None) -> None:
  """Refuses what this model, these calibration data and these adapters cannot be put through.

  Args:
    config: that `check_config` took.
    model: as it is before the first step.
    tokens: of the calibration text; None: it is not known yet how many rows kernels get.

  Raises:
    ValueError: with the path, or the setting, and the reason.
  """
  _check_finite(model)
  selected: dict[str, list[str]] = {}  # by the steps before
  for step in config.steps:
    section = config[step]
    if step in _STRUCTURED:
      structured_pruning.check_separate(model.params, step)
      _check_inputs(step, model, compression.fitted(model, step), tokens)
      model = _shrunk(step, section, model)
      continue
    paths = compression.targets(section, model)
    _check_separable(step, paths, model.adapters)
    _KERNELS[step](config, model, paths, selected, tokens)
    selected[step] = paths


def _check_finite(model: Model) -> None:
  for path, leaf in tree.flatten(model.weights, is_leaf=is_weight).items():
    floats = [x for x in jax.tree.leaves(leaf) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not all(bool(jnp.isfinite(x).all()) for x in floats):
      raise ValueError(f"{path}: holds NaN or infinity; the model is damaged")


def _check_inputs(step: str, model: Model, paths: Sequence[str], tokens: int | None) -> None:
  """That kernels have inputs, each no more than there are tokens to know them by."""
  leaves, axes = tree.flatten(model.params, is_leaf=is_weight), model.axes
  for path in paths:
    if compression.is_looked_up(axes[path]):
      raise ValueError(
        f"{path}: its rows are looked up, and {step} calibrates by inputs; leave it out, or choose "
        "a method that does without"
      )
    inputs, _ = compression.matrix_of(path, leaves, axes)
    if tokens is not None and tokens < inputs:
      raise ValueError(
        f"{step}: the calibration text has {tokens} tokens, and {path} {inputs} inputs; raise "
        "config.text.calibration"
      )


def _shrunk(step: str, section: ConfigDict, model: Model) -> Model:
  """The shapes of a model after a step that makes dense kernels smaller."""
  name, old = _STRUCTURED[step], model.config
  most, count = getattr(old, name) or old.head_dim, section[_STRUCTURED[step]]
  if not 0 < count < most:
    raise ValueError(f"{name} is {most} and is to be {count}; choose from 1 to {most - 1}")
  for path, leaf in tree.flatten(model.params, is_leaf=is_weight).items():
    if is_weight(leaf):
      raise ValueError(
        f"{path}: is compressed already, a {type(leaf).__name__}, and {step} needs dense kernels"
      )
  new = dataclasses.replace(old, **{name: count})
  if step == "heads":
    new = dataclasses.replace(new, num_heads=count * (old.num_heads // old.num_kv_heads))
  before, after = families.param_shapes(old), families.param_shapes(new)
  for path in model.adapters:
    if before[path] != after[path]:
      raise ValueError(
        f"config.steps: {step} makes {after[path]} of {path}, {before[path]}, and its adapter is "
        "kept as it is; set keep_adapter to False to merge it first"
      )
  shapes = {path: jax.ShapeDtypeStruct(shape, old.param_dtype) for path, shape in after.items()}
  return model._replace(config=new, params=traverse_util.unflatten_dict(shapes, sep="/"))


def _check_separable(step: str, paths: Sequence[str], adapters: Mapping[str, Any]) -> None:
  """That adapters which are kept mean the same on another base: what they add is their own."""
  for path in paths:
    if isinstance(adapters.get(path), DoRA | Full | TokenRows):
      raise ValueError(
        f"{path}: its adapter, a {type(adapters[path]).__name__}, is what it makes of the base "
        f"before {step}, and no change of its own; set keep_adapter to False to merge it first"
      )


def _check_factorize(config, model, paths, selected, tokens) -> None:
  del selected
  section = config.factorize
  factorization.select(model.params, section.targets, model.axes)  # no Weights among them
  if section.method == "whitened":
    _check_inputs("factorize", model, paths, tokens)
  if section.budget:
    costs, budget = compression.costs_and_budget(section, model, paths)
    sensitivity.check_budget(costs, budget, section.multiple)


def _check_prune(config, model, paths, selected, tokens) -> None:
  del tokens
  section = config.prune
  leaves, axes = tree.flatten(model.params, is_leaf=is_weight), model.axes
  _check_kinds("prune", paths, leaves, (Factored,))
  dense = [path for path in paths if not is_weight(leaves[path])]
  if section.score == "wanda":
    _check_inputs("prune", model, dense, tokens=None)  # it takes the norms of as few as there are
  for path in paths:
    leaf, (d, _) = leaves[path], compression.matrix_of(path, leaves, axes)
    inputs = [d, leaf.rank] if isinstance(leaf, Factored) else [d]
    odd = [count for count in inputs if section.of and count % section.of]
    if odd:
      raise ValueError(
        f"prune.of: {path}: {odd[0]} inputs are no multiple of {section.of}; prune a fraction, or "
        "leave it out"
      )
    gone = round(section.share * d)
    if not section.of and not 0 < gone < d:
      raise ValueError(f"prune.share: {path}: {section.share} of {d} inputs are {gone}")
  both = sorted(set(paths) & set(selected.get("factorize", ())))
  if section.of and both and config.factorize.multiple % section.of:
    raise ValueError(
      f"prune.of: {both[0]} and {len(both) - 1} others are factorized before, to ranks that are no "
      f"multiples of {section.of}; set factorization.multiple to {section.of}, or prune a fraction"
    )


def _check_quantize(config, model, paths, selected, tokens) -> None:
  section = config.quantize
  leaves, axes = tree.flatten(model.params, is_leaf=is_weight), model.axes
  _check_kinds("quantize", paths, leaves, (Factored, Pruned))
  if section.method == "gptq":
    unmasked = [path for path in paths if path not in selected.get("prune", ())]
    dense = compression.calibratable(unmasked, leaves, axes)
    if not dense:
      raise ValueError(
        "quantize.method gptq is for dense kernels, and every target is looked up, factorized or "
        "pruned; use nearest"
      )
    _check_inputs("quantize", model, dense, tokens)


def _check_kinds(step: str, paths, leaves: Mapping[str, Any], kinds: tuple[type, ...]) -> None:
  for path in paths:
    if is_weight(leaves[path]) and not isinstance(leaves[path], kinds):
      raise ValueError(
        f"{path}: is compressed already, a {type(leaves[path]).__name__}; {step} cannot follow"
      )


_KERNELS: dict[str, Callable] = {
  "factorize": _check_factorize,
  "prune": _check_prune,
  "quantize": _check_quantize,
}
