"""The steps of a compression: what a config's section does to a model, and what is refused.

check_steps(config.steps)
for step in config.steps:
  CHECKS[step](config[step], model, windows_NT)
for step in config.steps:
  model = STEPS[step](config[step], model, Calibration(windows_NT, batch_size=4))
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lora_jax
from experiments import parts
from lora_jax import calibration, tree
from lora_jax.compress import (
  attention,
  factorize,
  factors,
  prune,
  quantize,
  sensitivity,
  structured,
)
from lora_jax.models import llama
from lora_jax.weights import Factored, is_weight
from lora_jax.weights.quantized import Format

PyTree = Any


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
      lambda params, tokens: model.apply({"params": params}, tokens, method="hidden"),
      model.params, paths, self.batches(), axes=model.axes, diagonal=diagonal,
    )  # fmt: skip

  def gradients(self, model: Model, paths: Sequence[str]):
    """The second moments of the gradients of their results."""

    def loss(params, tokens_BT):
      logits_BTV = model.apply({"params": params}, tokens_BT[:, :-1]).astype(jnp.float32)
      return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).sum()

    return sensitivity.gradient_moments(loss, model.params, paths, self.batches(), axes=model.axes)


# ---- in which order


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
    costs = {path: sensitivity.parameters(1, *leaves[path].shape) for path in paths}
    ranks = {path: n for path, n in ranks.items() if costs[path].at(n) < costs[path].dense}
  else:
    cost = functools.partial(UNITS[section.unit], rows=section.rows)
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
  "parameters": lambda d, k, rows: sensitivity.parameters(1, d, k),
  "flops": lambda d, k, rows: sensitivity.flops(1, d, k, rows),
  "milliseconds": functools.cache(lambda d, k, rows: sensitivity.milliseconds(1, d, k, rows)),
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
