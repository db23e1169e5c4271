"""Chooses `model.remat` and `train.loss_chunk` if a config has "auto".

    settings, line = choose(config, make_case, mesh, memory)

Both save memory for time, so the first rung is taken that the plan says will fit:

    keep all; hold the logits of a chunk of positions at a time; of a layer keep its products; keep
    nothing of it

The plan of a rung is traced, which takes seconds. A run whose memory is far below the device's by
a bound from its sizes alone is not traced at all.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from experiments import model_options, parts, planning, teachers
from lora_jax import families
from lora_jax.io import pretrained
from lora_jax.tasks import Task

AUTO = model_options.AUTO

# The usable fraction of a device's memory: a plan is accurate within a tenth, and other users of
# the device need some memory as well.
_USABLE = 0.8
# The usable fraction for the bound from sizes, which is less accurate than a plan.
_SURE = 0.5
_CHUNK_BYTES = 128e6  # of the logits of a chunk, float32
_CHUNKS = (512, 256, 128, 64, 32, 16)


class Settings(NamedTuple):
  """The settings of a run: a name in `parts.REMAT_POLICIES`, and positions, 0 for all."""

  remat: str
  loss_chunk: int

  def applied(self, config: ConfigDict) -> ConfigDict:
    """A copy of a config that says so."""
    config = config.copy_and_resolve_references()
    with config.ignore_type():  # a chunk may be a number or auto
      config.model.remat, config.train.loss_chunk = self.remat, self.loss_chunk
    return config

  def of_task(self, task: Task) -> Task:
    """A task whose loss is computed so."""
    if self.loss_chunk == getattr(task, "loss_chunk", 0):
      return task
    return dataclasses.replace(task, loss_chunk=self.loss_chunk)

  def of_model(self, found: pretrained.Pretrained) -> pretrained.Pretrained:
    """A model that computes so."""
    return dataclasses.replace(found, config=self._of_config(found.config))

  def of_case(self, case: planning.Case) -> planning.Case:
    """A case that computes so."""
    model, task = self._of_config(case.model), self.of_task(case.task)
    return dataclasses.replace(case, model=model, task=task)

  def _of_config(self, config: families.Config) -> families.Config:
    return dataclasses.replace(config, remat_policy=parts.REMAT_POLICIES[self.remat])


def is_asked(config: ConfigDict) -> bool:
  """Whether a config leaves anything to choose."""
  return AUTO in (config.model.remat, config.train.loss_chunk)


def choose(
  config: ConfigDict,
  make_case: Callable[[], planning.Case],
  mesh: Mesh | AbstractMesh,
  memory: int,
  *,
  members: int = 1,
  bound: float | None = None,
  agree: Callable[[bool], bool] = bool,
) -> tuple[Settings, str]:
  """Returns the settings of a run, and a line about them, "" if its config leaves no choice.

  Args:
    config: of the run; of a sweep, of its largest member.
    make_case: makes its case, where a plan is needed.
    mesh: of the run.
    memory: bytes of a device.
    members: of a sweep.
    bound: bytes that the run is sure not to exceed; None: it is not known.
    agree: makes one answer of those of several processes, which must compute alike.
  """
  remat, chunk = config.model.remat, config.train.loss_chunk
  if not is_asked(config):
    return Settings(remat, chunk), ""
  first = Settings("none" if remat == AUTO else remat, 0 if chunk == AUTO else chunk)
  asked = " and ".join(
    name for name, x in (("model.remat", remat), ("train.loss_chunk", chunk)) if x == AUTO
  )
  if agree(bound is not None and members * bound <= _SURE * memory):
    return first, _line(first, asked, f"sure to fit in the {memory / 1e9:,.1f} GB of a device")
  case = make_case()
  found = []
  for settings in _rungs(config, case):
    planned = planning.make_plan(config, settings.of_case(case), mesh).of_members(members)
    found.append(planned.total)
    if agree(planned.total <= _USABLE * memory):
      break
  sizes = f"{found[-1] / 1e9:,.2f} of a device's {memory / 1e9:,.1f} GB by the plan"
  if len(found) > 1:
    sizes += f", {found[0] / 1e9:,.2f} GB without"
  return settings, _line(settings, asked, sizes)


def _line(settings: Settings, asked: str, why: str) -> str:
  chunk = f"in chunks of {settings.loss_chunk}" if settings.loss_chunk else "all at once"
  return f"rematerialization: {settings.remat}; logits: {chunk} ({asked} auto: {why})"


def _rungs(config: ConfigDict, case: planning.Case) -> list[Settings]:
  """The settings to choose from, the fastest first."""
  remat, chunk = config.model.remat, config.train.loss_chunk
  chunks = [0, *filter(None, [chunk_of(config, case)])] if chunk == AUTO else [chunk]
  remats = ["none", "dots", "nothing"] if remat == AUTO else [remat]
  return [
    *(Settings(remats[0], each) for each in chunks),
    *(Settings(each, chunks[-1]) for each in remats[1:]),
  ]


def chunk_of(config: ConfigDict, case: planning.Case) -> int:
  """The chunk of a run's loss that is worth trying; 0 where it has none."""
  if not hasattr(case.task, "loss_chunk") or teachers.is_taught(config):
    return 0
  batch = case.task.batch_of(case.largest, config.train.batch_size // config.train.accumulate)
  if "at" not in batch:
    return 0
  rows, targets = batch["at"].shape
  position = 4 * rows * case.model.vocab_size
  return next((n for n in _CHUNKS if n < targets and n * position <= _CHUNK_BYTES), 0)


def bound_of(
  config: ConfigDict,
  model: families.Config,
  params: Any,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  shares: int,
) -> float | None:
  """Bytes that a decoder's training step is sure not to exceed on a device; None: not known.

  Everything in float32, nothing recomputed: the base four times over (with gradients and an
  optimizer's moments), what every layer makes, its scores, and the logits with their gradients.

  Args:
    config: of the run.
    model, params: of the base; its arrays or their shapes.
    batch: the largest, of all devices.
    shares: devices that the rows are sharded over.
  """
  sizes = ("width", "mlp_width", "num_layers", "num_heads", "head_dim", "vocab_size")
  if "tokens" not in batch or "at" not in batch or not all(hasattr(model, x) for x in sizes):
    return None
  if getattr(model, "experts", None) is not None:
    return None
  rows, length = batch["tokens"].shape
  of_token = 24 * model.width + 10 * model.mlp_width
  of_token += model.num_heads * (12 * model.head_dim + 4 * length)
  logits = 6 * model.vocab_size * batch["at"].shape[1]
  base = sum(leaf.size for leaf in jax.tree.leaves(params))
  rows = rows / (shares * config.train.accumulate)
  return 4 * (4 * base + rows * (length * model.num_layers * of_token + logits))
