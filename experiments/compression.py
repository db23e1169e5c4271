"""The steps of a compression, each configured by a section of the config.

model = Model(config, params, adapters={})
for step in config.steps:
  model = STEPS[step](config[step], model, Windows(windows_NT, batch_size=4))

`experiments.compression_checks` checks the settings and the order of the steps.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import lora_jax
from experiments import parts
from lora_jax import calibration, families, tree
from lora_jax.axes import roles_of
from lora_jax.compress import (
  attention,
  factorization,
  factors_as_kernels,
  gptq,
  pruning,
  sensitivity,
  structured_pruning,
)
from lora_jax.compress.quantization import quantize_leaf
from lora_jax.tasks import Task
from lora_jax.weights import Factored, inside_mask, is_weight
from lora_jax.weights.quantized import Format

PyTree = Any

HEAD = "head/kernel"


class Model(NamedTuple):
  """A model between two steps.

  config, params: what the steps change.
  adapters: `{path: adapter}` on it that stay as they are.
  """

  config: families.Config
  params: PyTree
  adapters: Mapping[str, lora_jax.Adapted]

  @property
  def weights(self) -> PyTree:
    """The parameters as they are used, with the adapters."""
    return lora_jax.attach(self.params, self.adapters)

  @property
  def apply(self) -> Callable:
    return lora_jax.adapt(parts.make_model(self.config).apply)

  @property
  def axes(self) -> dict[str, lora_jax.Axes]:
    return parts.trace_axes(parts.make_model(self.config), self.params)


class Calibration(Protocol):
  """The data that steps calibrate by."""

  @property
  def tokens(self) -> int | None:
    """How many rows every kernel's input has; None: it is not known before a pass."""

  def inputs(self, model: Model, paths: Sequence[str], *, diagonal: bool = False):
    """The second moments of kernels' inputs."""

  def gradients(self, model: Model, paths: Sequence[str]):
    """The second moments of the gradients of their results."""


@dataclasses.dataclass(frozen=True)
class Windows:
  """Calibration by windows of running text."""

  windows_NT: np.ndarray
  batch_size: int

  @property
  def tokens(self) -> int:
    return self.windows_NT.size

  def batches(self) -> list[np.ndarray]:
    starts = range(0, len(self.windows_NT), self.batch_size)
    return [self.windows_NT[n : n + self.batch_size] for n in starts]

  def inputs(self, model: Model, paths: Sequence[str], *, diagonal: bool = False):
    method = None if HEAD in paths else "hidden"
    return calibration.second_moments(
      lambda params, tokens: model.apply({"params": params}, tokens, method=method),
      model.weights,
      paths,
      self.batches(),
      axes=model.axes,
      diagonal=diagonal,
    )

  def gradients(self, model: Model, paths: Sequence[str]):
    def loss(params, tokens_BT):
      logits_BTV = model.apply({"params": params}, tokens_BT[:, :-1]).astype(jnp.float32)
      return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:]).sum()

    return sensitivity.gradient_moments(loss, model.weights, paths, self.batches(), axes=model.axes)


@dataclasses.dataclass(frozen=True)
class TaskBatches:
  """Calibration by batches of a task: its own inputs, without padding, and its own loss."""

  task: Task
  batches: Sequence[Mapping[str, np.ndarray]]
  tokens: None = None

  def inputs(self, model: Model, paths: Sequence[str], *, diagonal: bool = False):
    axes = model.axes
    found = calibration.second_moments(
      self.task.run(self.forward(model)),
      model.weights,
      paths,
      self.batches,
      axes=axes,
      diagonal=diagonal,
      mask=self.task.mask,
    )
    leaves = tree.flatten(model.params, is_leaf=is_weight)
    for path, moments in found.items():
      rows, (inputs, _) = int(jnp.min(moments.rows)), matrix_of(path, leaves, axes)
      if not diagonal and rows < inputs:
        raise ValueError(
          f"{path}: the calibration examples give it {rows} rows, and it has {inputs} inputs; "
          "raise config.task.calibration"
        )
    return found

  def gradients(self, model: Model, paths: Sequence[str]):
    objective = self.task.objective(self.forward(model))

    def loss(params, batch):
      mean, count = objective(params, batch)
      return mean * count

    return sensitivity.gradient_moments(loss, model.weights, paths, self.batches, axes=model.axes)

  def forward(self, model: Model) -> Callable:
    """The adapted function of the task on a model."""
    return lora_jax.adapt(self.task.forward(parts.make_model(model.config)))


def targets(section: ConfigDict, model: Model) -> list[str]:
  """The paths that a section's targets select, Weights among them."""
  shapes = jax.eval_shape(lora_jax.materialize, model.params)
  return factorization.select(shapes, section.targets, model.axes)


def is_looked_up(axes: lora_jax.Axes) -> bool:
  """Whether rows of a leaf are looked up, so that it has no inputs to calibrate by."""
  return "gather" in axes.uses


# ---- factors


def factorize_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  """Kernels to factors, which are fitted to the inputs that they then have."""
  paths, axes = targets(section, model), model.axes
  decompose, values = METHODS[section.method](section, model, data, paths)
  losses = factorization.tails(model.params, paths, values, axes)
  costs, budget = costs_and_budget(section, model, paths)
  if section.energy:
    ranks = factorization.energy_ranks(losses, section.energy)
    ranks = {path: -(-n // section.multiple) * section.multiple for path, n in ranks.items()}
    ranks = {path: n for path, n in ranks.items() if costs[path].at(n) < costs[path].dense}
    if not ranks:
      raise ValueError(
        f"factorize.energy {section.energy}: no kernel costs less in factors that keep so much of "
        "it; lower it"
      )
  else:
    ranks = sensitivity.allocate(losses, costs, budget, multiple=section.multiple)
  print(f"factorize: {len(ranks)} of {len(paths)} kernels; the others stay as they are")
  params = factorization.factorize(model.params, ranks, decompose, axes=axes)
  small = model._replace(params=params)
  for _ in range(section.updates if section.method == "whitened" else 0):
    moments = data.inputs(small, list(ranks))
    params = factorization.update(
      small.params, model.params, list(ranks), moments, damping=section.damping
    )
    small = small._replace(params=params)
  return small


def costs_and_budget(
  section: ConfigDict, model: Model, paths: Sequence[str]
) -> tuple[dict[str, sensitivity.Cost], float]:
  """The cost of each kernel in the section's unit, and the budget for all of them together."""
  leaves = tree.flatten(model.params, is_leaf=is_weight)
  unit, dtype = UNITS[section.unit], jnp.dtype(model.config.dtype)
  axes = model.axes
  costs = {path: unit(*matrix_of(path, leaves, axes), section.rows, dtype) for path in paths}
  return costs, section.budget * sum(cost.dense for cost in costs.values())


def matrix_of(
  path: str, leaves: Mapping[str, Any], axes: Mapping[str, lora_jax.Axes]
) -> tuple[int, int]:
  """The inputs and outputs of a kernel, which may be a convolution's."""
  _, inputs, outputs = factorization.sizes(leaves[path], roles_of(path, leaves, axes))
  return inputs, outputs


def _whitened(section, model, data, paths):
  gradients = data.gradients(model, paths) if section.gradients else None
  whitened = factorization.Whitened(data.inputs(model, paths), gradients, section.damping)
  return whitened, whitened.values


METHODS: dict[str, Callable] = {
  "whitened": _whitened,
  "svd": lambda *_: (factorization.svd, factorization.singular_values),
  "randomized": lambda *_: (factorization.randomized(0), factorization.singular_values),
  "qr": lambda *_: (factorization.pivoted_qr, factorization.pivoted_rows),
}
UNITS: dict[str, Callable] = {
  "parameters": lambda d, k, rows, dtype: sensitivity.parameters(1, d, k),
  "flops": lambda d, k, rows, dtype: sensitivity.flops(1, d, k, rows),
  "milliseconds": functools.cache(
    lambda d, k, rows, dtype: sensitivity.milliseconds(1, d, k, rows, dtype=dtype)
  ),
}


# ---- zeros


def pattern_of(section: ConfigDict) -> pruning.Pattern:
  if section.of:
    return pruning.n_of_m(section.n, section.of)
  return pruning.share(section.share)


def prune_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  """Prunes values of kernels; in factorized ones, values of their factors, by magnitude."""
  leaves = tree.flatten(model.params, is_leaf=is_weight)
  paths = targets(section, model)
  dense = [path for path in paths if not isinstance(leaves[path], Factored)]
  score = pruning.magnitude
  if section.score == "wanda" and dense:
    score = pruning.wanda(data.inputs(model, dense, diagonal=True))
  params, axes = model.params, model.axes
  if dense:
    params = pruning.prune(params, dense, score, pattern_of(section), axes=axes)
  opened = factors_as_kernels.open_factors(params)
  thin = [f"{path}/{x}" for path in paths if path not in dense for x in "ab"]
  if thin:
    axes = factors_as_kernels.open_axes(params, axes)
    opened = pruning.prune(opened, thin, pruning.magnitude, pattern_of(section), axes=axes)
  print(f"prune: {len(dense)} kernels, and {len(thin)} factors by magnitude")
  return model._replace(params=factors_as_kernels.close_factors(opened, params))


# ---- fewer bits


def format_of(section: ConfigDict) -> Format:
  return Format(levels=section.levels, block=section.block or None, double=section.double)


def quantize_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  """Quantizes kernels, and the factors of factorized ones; pruned ones keep their zeros."""
  paths, params, axes = targets(section, model), model.params, model.axes
  format, leaves = format_of(section), tree.flatten(params, is_leaf=is_weight)
  calibrated = [] if section.method == "nearest" else calibratable(paths, leaves, axes)
  if calibrated:
    moments = data.inputs(model, calibrated)
    params = gptq.quantize(
      params, dict.fromkeys(calibrated, format), moments, axes, damping=section.damping
    )
  opened = factors_as_kernels.open_factors(params)
  opened_axes = factors_as_kernels.open_axes(params, axes)
  leaves = tree.flatten(opened, is_leaf=is_weight)
  names = {
    name
    for path in paths
    if path not in calibrated
    for name in ([path] if path in leaves else [f"{path}/a", f"{path}/b"])
  }

  def smaller(name, leaf):
    if name not in names:
      return leaf
    return inside_mask(lambda w: quantize_leaf(name, w, format, opened_axes), leaf)

  opened = tree.map_with_path(smaller, opened, is_leaf=is_weight)
  print(
    f"quantize: to {section.levels}, {len(calibrated)} kernels by GPTQ, {len(names)} matrices to "
    "the nearest level"
  )
  return model._replace(params=factors_as_kernels.close_factors(opened, params))


def calibratable(
  paths: Sequence[str], leaves: Mapping[str, Any], axes: Mapping[str, lora_jax.Axes]
) -> list[str]:
  """The kernels that GPTQ takes: neither factors, nor what a mask leaves, nor what is looked up."""
  return [path for path in paths if not is_weight(leaves[path]) and not is_looked_up(axes[path])]


# ---- smaller dense kernels


def channels_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  moments = data.inputs(model, fitted(model, "channels"))
  params, config = structured_pruning.prune_channels(
    model.params, model.config, section.mlp_width, moments, damping=section.damping
  )
  return model._replace(config=config, params=params)


def heads_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  moments = data.inputs(model, fitted(model, "heads"))
  params, config = structured_pruning.prune_heads(
    model.params, model.config, section.num_kv_heads, moments, damping=section.damping
  )
  return model._replace(config=config, params=params)


def value_heads_step(section: ConfigDict, model: Model, data: Calibration) -> Model:
  moments = data.inputs(model, fitted(model, "value_heads"))
  params, config = attention.shrink_values(
    model.params, model.config, section.value_dim, moments, damping=section.damping
  )
  return model._replace(config=config, params=params)


def fitted(model: Model, step: str) -> list[str]:
  """The kernels whose inputs such a step calibrates by."""
  name = {"channels": "mlp/down", "heads": "attn/out", "value_heads": "attn/value"}[step]
  return [f"block_{i}/{name}/kernel" for i in range(model.config.num_layers)]


STEPS: dict[str, Callable[[ConfigDict, Model, Calibration], Model]] = {
  "channels": channels_step,
  "heads": heads_step,
  "value_heads": value_heads_step,
  "factorize": factorize_step,
  "prune": prune_step,
  "quantize": quantize_step,
}

NOT_FASTER: dict[str, str] = {
  "factorize": "two thin products take longer than one at these shapes; lower the budget, or let "
  "it count milliseconds (factorization.unit)",
  "prune": "zeros are kept in dense arrays and multiplied like other values; only their bytes on "
  "disk fall",
  "quantize": "the device has no product of quantized values in XLA, so they are dequantized, at "
  "each use or once (report.resident)",
}
"""Why a step may not lower the time of a model, for its report."""
