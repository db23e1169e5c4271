"""From a config to its adapters and how they train: specs, starting values, optimizer, objective.

config.adapter.method = "dora"                         # one of SPECS
config.adapter.rank, config.adapter.alpha = 8, 16.0    # its settings, the fields of its spec
config.adapter.targets = ("attention", ("mlp", {"rank": 16}), ("norm", {"method": "full"}))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax
from experiments import parts, teachers
from lora_jax import calibration, new_tokens, sharding, targets, tree
from lora_jax.adapters import Method
from lora_jax.compress import FORMATS, quantize, straight_through
from lora_jax.io import pretrained
from lora_jax.models import encoder_attention
from lora_jax.tasks import Task
from lora_jax.train import adalora, optimizer, step
from lora_jax.weights import Format, is_weight, unmasked

PyTree = Any


SPECS: dict[str, type[Method]] = {
  "lora": lora_jax.LoRA,
  "dora": lora_jax.DoRA,
  "pissa": lora_jax.PiSSA,
  "olora": lora_jax.OLoRA,
  "eva": lora_jax.EVA,
  "loftq": lora_jax.LoftQ,
  "vera": lora_jax.VeRA,
  "loha": lora_jax.LoHa,
  "lokr": lora_jax.LoKr,
  "adalora": lora_jax.AdaLoRA,
  "full": lora_jax.Full,
  "token_rows": lora_jax.TokenRows,
}

_MEASURED = "a statistic of the data that the base was trained on, kept as it is"

# The settings that are no fields of the spec, but of how all adapters of a run start or train.
_OF_THE_RUN = {
  "eva": ("rho", "batches", "iterations"),
  "loftq": ("format", "iterations"),
  "adalora": (
    "target_rank", "first_steps", "last_steps", "every", "beta1", "beta2", "orthogonality",
  ),
}  # fmt: skip


def rules_of(adapter: ConfigDict) -> list[tuple[str, Method | None]]:
  """The (pattern, spec) pairs of a config's adapter section, as `lora_jax.match` takes them.

  A target is a pattern; or a pattern with the settings that differ, which must be complete if they
  name another method; or a pattern with None, to exclude leaves. Leaves that `also_train` matches
  train in full, regardless of the targets.

  Raises:
    ValueError: for an unknown method, a setting that a method does not have or lacks, and an
      unknown format of LoftQ's.
  """
  own = {name: x for name, x in adapter.items() if name not in ("targets", "also_train")}
  of_the_run = _OF_THE_RUN.get(own["method"], ())
  missing = [name for name in of_the_run if name not in own]
  if missing:
    raise ValueError(f"adapter: {own['method']} lacks the settings {', '.join(missing)}")
  if own["method"] == "loftq" and own["format"] not in FORMATS:
    known = ", ".join(FORMATS)
    raise ValueError(f"adapter.format {own['format']!r} is unknown; use one of {known}")
  settings = {name: x for name, x in own.items() if name not in of_the_run}
  rules: list[tuple[str, Method | None]] = []
  for pattern in adapter.also_train:
    rules.append((pattern, lora_jax.Full()))
  for target in adapter.targets:
    pattern, changes = (target, {}) if isinstance(target, str) else target
    if changes is None:
      rules.append((pattern, None))
      continue
    changes = dict(changes)
    where = f"adapter.targets {pattern!r}" if changes else "adapter"
    other = changes.get("method", own["method"])
    if other != own["method"] and other in _OF_THE_RUN:
      raise ValueError(f"{where}: {other} is for a whole run; make it config.adapter.method")
    rules.append((pattern, spec_of(where, changes if "method" in changes else settings | changes)))
  return rules


def all_rules(adapter: ConfigDict, task: Task) -> list[tuple[str, Method | None]]:
  """The rules of a run: those of its adapter section, after what the task trains in full."""
  return [*((pattern, lora_jax.Full()) for pattern in task.TRAINS), *rules_of(adapter)]


def specs_of(
  base: pretrained.Pretrained,
  model: ConfigDict,
  rules: Sequence[tuple[str, Method | None]],
  axes: Mapping[str, lora_jax.Axes],
) -> dict[str, Method]:
  """The specs by path of a run's leaves: rows of `model.new_tokens` first, then the leaves of its
  attention, which train in full, then by the rules.

  Raises:
    ValueError: as `lora_jax.match` does.
  """
  own = [*new_tokens.rules(base, parts.new_tokens_of(model))]
  if encoder_attention.adds_leaves(base.config):
    own.append((encoder_attention.PATTERN, lora_jax.Full()))
  statistics = base.family.statistics
  if statistics is None:
    return lora_jax.match(base.params, [*own, *rules], axes)
  found = lora_jax.match(base.params, [(statistics, None), *own, *rules], axes)
  kept = dict.fromkeys(tree.matching(statistics, tree.flatten(base.params)), _MEASURED)
  return targets.Targets(found, axes, found.left_out | kept)


def spec_of(where: str, settings: Mapping[str, Any]) -> Method:
  """The spec of a method's name and settings; `where` is for errors.

  Raises:
    ValueError: for an unknown method, and a setting that it does not have or lacks.
  """
  method, given = settings["method"], {x: settings[x] for x in settings if x != "method"}
  if method not in SPECS:
    raise ValueError(f"{where}: the method {method!r} is unknown; use one of {', '.join(SPECS)}")
  # An initializer is a function, which no config holds.
  fields = [field for field in dataclasses.fields(SPECS[method]) if field.name != "initializer"]
  names = [field.name for field in fields]
  unknown = [name for name in given if name not in names]
  missing = [x.name for x in fields if x.default is dataclasses.MISSING and x.name not in given]
  if unknown or missing:
    problem = f"has no setting {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
    of_the_run = _OF_THE_RUN.get(method, ())
    raise ValueError(
      f"{where}: the method {method} {problem}; its settings are "
      f"{', '.join([*names, *of_the_run]) or 'none'}"
    )
  return SPECS[method](**given)


def start(
  adapter: ConfigDict,
  key: jax.Array,
  params: PyTree,
  specs: Mapping[str, Method],
  axes: Mapping[str, lora_jax.Axes],
  run: Callable[[PyTree, step.Batch], Any],
  mask: Callable[[step.Batch], jax.Array],
  dataset: Sequence[step.Batch],
) -> tuple[PyTree, dict[str, lora_jax.Adapted]]:
  """The base and the adapters at their start; the base is `params`, unless the method is LoftQ.

  Args:
    adapter: the config's section.
    key, params, specs, axes: as `lora_jax.init` takes them.
    run: `(params, batch) -> outputs`, the model.
    mask: True for each token of a batch that is no padding, [rows, tokens].
    dataset: the training batches by step, for a method that starts from the first of them.
  """
  from_inputs = {path: spec for path, spec in specs.items() if isinstance(spec, lora_jax.EVA)}
  quantised = {path: spec for path, spec in specs.items() if isinstance(spec, lora_jax.LoftQ)}
  others = {path: x for path, x in specs.items() if path not in from_inputs | quantised}
  adapters = lora_jax.init(key, params, others, axes)
  if quantised:
    params, own = _start_loftq(adapter, params, quantised, axes)
    adapters |= own
  if from_inputs:
    moments = calibration.second_moments(
      run, params, from_inputs, (dataset[n] for n in range(adapter.batches)), axes=axes, mask=mask
    )
    moments = sharding.gather(moments)  # eigenvectors are sought on the host
    adapters |= lora_jax.eva.start(
      params, from_inputs, moments, rho=adapter.rho, iterations=adapter.iterations, axes=axes
    )
  return params, adapters


def load_base(config: ConfigDict, mesh: Mesh | None = None) -> pretrained.Pretrained:
  """The base that the adapter of a run belongs to: the model's, or what LoftQ made of it.

  With a mesh, each part of it where it belongs there.
  """
  task = parts.make_task(config)
  found = parts.extend(parts.load_model(config.model, mesh), task, config)
  if config.adapter.method != "loftq":
    return found
  axes = parts.trace_axes(parts.make_model(found.config), found.params)
  specs = specs_of(found, config.model, all_rules(config.adapter, task), axes)
  quantised = {path: spec for path, spec in specs.items() if isinstance(spec, lora_jax.LoftQ)}
  base, _ = _start_loftq(config.adapter, found.params, quantised, axes)
  return dataclasses.replace(found, params=base)


def shapes_of_base(
  adapter: ConfigDict, params: PyTree, specs: Mapping[str, Method], axes: Mapping[str, Any]
) -> PyTree:
  """The shapes of the base that adapters start on: of `params`, or of what LoftQ makes of them."""
  if adapter.method != "loftq":
    return params
  format = FORMATS[adapter.format]
  formats = {path: format for path, spec in specs.items() if isinstance(spec, lora_jax.LoftQ)}
  return quantize(params, formats, axes)


def base_name(config: ConfigDict) -> str:
  """The model that the adapter of a run belongs to, or "" where LoftQ made one of its own."""
  return "" if config.adapter.method == "loftq" else config.model.source


def init_shapes(
  params: PyTree, specs: Mapping[str, Method], axes: Mapping[str, lora_jax.Axes]
) -> dict[str, lora_jax.Adapted]:
  """The adapters at their start, unsealed, as `jax.ShapeDtypeStruct`s.

  EVA and LoftQ have those of LoRA: EVA's budget of ranks is settled by data, which is not there.
  """

  def plain(spec: Method) -> Method:
    if not isinstance(spec, lora_jax.EVA | lora_jax.LoftQ):
      return spec
    return lora_jax.LoRA(**{x.name: getattr(spec, x.name) for x in dataclasses.fields(spec)})

  plain_specs = {path: plain(spec) for path, spec in specs.items()}
  return jax.eval_shape(
    lambda key, params: lora_jax.init(key, params, plain_specs, axes), jax.random.key(0), params
  )


def _start_loftq(adapter: ConfigDict, params: PyTree, specs: Mapping[str, lora_jax.LoftQ], axes):
  leaves = tree.flatten(params, is_leaf=is_weight)
  compressed = [path for path in specs if is_weight(leaves[path])]
  if compressed:
    raise ValueError(
      f"{compressed[0]}: is quantized or compressed already, and LoftQ starts from dense kernels; "
      "use --config.model.quantize=none, or the method lora"
    )
  formats = dict.fromkeys(specs, FORMATS[adapter.format])
  return lora_jax.loftq.start(params, specs, formats, iterations=adapter.iterations, axes=axes)


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer of a whole config, and its learning rate."""
  section = config.optimizer
  learning_rate = optimizer.schedule(
    peak=section.peak_learning_rate,
    warmup_steps=section.warmup_steps,
    total_steps=config.train.steps,
    kind=section.schedule,
  )
  return optimizer_at(config, learning_rate), learning_rate


def optimizer_at(config: ConfigDict, learning_rate: optax.Schedule) -> optax.GradientTransformation:
  """The optimizer of a whole config at a learning rate of one's own, which may be traced."""
  steps, section = config.train.steps, config.optimizer
  tx = optimizer.adamw(
    learning_rate,
    b1=section.b1,
    b2=section.b2,
    eps=section.eps,
    weight_decay=section.weight_decay,
    clip_norm=section.clip_norm,
  )
  if section.rates:
    tx = optax.chain(tx, optimizer.scale_rates(section.rates))
  adapter = config.adapter
  if adapter.method == "adalora":
    tx = adalora.allocate_ranks(
      tx,
      target_rank=adapter.target_rank,
      total_steps=steps,
      first_steps=round(adapter.first_steps * steps),
      last_steps=round(adapter.last_steps * steps),
      every=adapter.every,
      beta1=adapter.beta1,
      beta2=adapter.beta2,
    )
  return tx


def merge_format(config: ConfigDict) -> Format | None:
  """The format that a run's merge will be quantized to, if it is trained for that.

  Raises:
    ValueError: for an unknown format, and for a run that has no dense merge.
  """
  name = config.train.quantize_merge
  if name == "none":
    return None
  if name not in FORMATS:
    known = ", ".join(["none", *FORMATS])
    raise ValueError(f"train.quantize_merge {name!r} is unknown; use {known}")
  if config.model.quantize != "none" or config.adapter.method == "loftq":
    raise ValueError(
      f"train.quantize_merge {name}: the base is quantized already, and a merge with it is dense; "
      "use --config.model.quantize=none and a method other than loftq"
    )
  return FORMATS[name]


def merge_formats(config: ConfigDict, params: PyTree, axes) -> dict[str, Format]:
  """`{path: format}` of the leaves that are quantized once the run is merged.

  Raises:
    ValueError: when the base has factors or quantized values, which a merge would make dense.
  """
  format = merge_format(config)
  if format is None:
    return {}
  for path, leaf in tree.flatten(params, is_leaf=is_weight).items():
    if is_weight(unmasked(leaf)):
      raise ValueError(
        f"train.quantize_merge {config.train.quantize_merge}: {path} is compressed already, and "
        "its merge is dense again; set it to none, and quantize the run that comes out by "
        "experiments.compress, which takes it as config.adapter"
      )
  rules = [(pattern, format) for pattern in config.model.quantize_targets]
  return lora_jax.match(params, rules, axes)


def make_apply(config: ConfigDict, forward: Callable, params: PyTree, axes) -> Callable:
  """The adapted function that a run trains: on the merge as it will be, if it is quantized."""
  apply = lora_jax.adapt(forward)
  formats = merge_formats(config, params, axes)
  if not formats:
    return apply

  def apply_rounded(variables, *args, **options):
    weights = straight_through(variables["params"], formats, axes)
    return apply({"params": weights}, *args, **options)

  return apply_rounded


def finish(
  config: ConfigDict, params: PyTree, adapters: Mapping[str, lora_jax.Adapted], axes
) -> PyTree:
  """The result of a run: its base with its adapters, or their merge if that is to be quantized."""
  formats = merge_formats(config, params, axes)
  if not formats:
    return lora_jax.attach(params, adapters)
  return quantize(lora_jax.merge(params, adapters), formats, axes)


def make_objective(
  config: ConfigDict, task: Task, apply: Callable, teacher: teachers.Teacher | None = None
) -> step.Objective:
  """The training objective of a config; `apply` is the adapted model."""
  if teacher:
    objective = teachers.make_objective(config.distill, task, apply, teacher)
  else:
    objective = task.objective(apply)
  if config.adapter.method == "adalora":
    objective = adalora.with_orthogonality(objective, config.adapter.orthogonality)
  return objective


def make_train_step(
  config: ConfigDict,
  task: Task,
  apply: Callable,
  tx: optax.GradientTransformation,
  adapters: Mapping[str, lora_jax.Adapted],
  shardings: step.State | None = None,
  teacher: teachers.Teacher | None = None,
) -> Callable:
  """The training step of a whole config; `apply` is the adapted model."""
  objective = make_objective(config, task, apply, teacher)
  drops = any(adapter.drops for adapter in adapters.values())
  dropout_key = jax.random.key(config.seed) if drops else None
  train_step = step.make_train_step(
    objective, tx, parts=config.train.accumulate, dropout_key=dropout_key, shardings=shardings
  )
  if teacher is None or teacher.params is None:
    return train_step
  return lambda state, frozen, batch: train_step(state, frozen, batch, teacher.params)
