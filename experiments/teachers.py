"""The teacher of a run whose config asks for one, and what is learned from it.

config.distill.teacher = "none"       # the batches' own tokens or labels alone
config.distill.teacher = "base"       # the model without its adapter; it lies there anyway
config.distill.teacher = "pypi://…"   # another model of the same vocabulary or classes
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax
from experiments import parts
from lora_jax.compress import storage
from lora_jax.io.pretrained import Pretrained
from lora_jax.models import encoder_attention
from lora_jax.tasks import Task
from lora_jax.train.distillation import Reading, distillation_objective, without_adapters
from lora_jax.train.step import Batch, Objective

PyTree = Any

_WITHOUT_BASE = ("pissa", "olora")  # their adapters hold a residual in the base's place


class Teacher(NamedTuple):
  """Who is learned from.

  Attributes:
    apply: the adapted `model.apply`.
    params: its weights; None for the student's base.
  """

  apply: Callable
  params: PyTree | None


def is_taught(config: ConfigDict) -> bool:
  """Whether a config asks for a teacher."""
  return config.distill.teacher != "none"


def check(config: ConfigDict, task: Task) -> None:
  """Refuses what cannot be, before a model is loaded.

  Raises:
    ValueError: with the reason.
  """
  if not is_taught(config):
    return
  methods = {config.adapter.method} | {
    target[1]["method"]
    for target in config.adapter.targets
    if not isinstance(target, str) and target[1] and "method" in target[1]
  }
  if config.distill.teacher == "base" and methods & set(_WITHOUT_BASE):
    raise ValueError(
      f"distill.teacher base: {', '.join(sorted(methods & set(_WITHOUT_BASE)))} keeps a residual "
      f"in the base's place; name the model, --config.distill.teacher={config.model.source}"
    )
  make_objective(config.distill, task, lambda *_: None, Teacher(lambda *_: None, None))


def load(config: ConfigDict, student: Pretrained, task: Task, mesh: Mesh) -> Teacher | None:
  """The teacher of a config, its weights laid out on the mesh as the student's are.

  Args:
    config: of the run.
    student: the base, as it was loaded.
    task: of the run.
    mesh: of the run.

  Raises:
    ValueError: when the two have not the same tokens, or hidden states of different width that are
      to be learned from.
  """
  if not is_taught(config):
    return None
  if config.distill.teacher == "base":
    return Teacher(lora_jax.adapt(task.forward(parts.make_model(student.config))), None)
  section = config.model.copy_and_resolve_references()
  section.source, section.quantize, section.remat = config.distill.teacher, "none", "none"
  if section.get("attention") in encoder_attention.LOW_RANK:  # the teacher's own is exact
    section.attention, section.attention_rank, section.attention_iterations = "auto", 0, 0
  section.scan_layers = not storage.is_compressed(section.source)  # whose layers may differ
  found = parts.load_model(section, mesh)
  if _vocabulary(found) != _vocabulary(student):
    raise ValueError(
      f"distill.teacher {config.distill.teacher}: its tokens are not those of {student.source}; "
      "a teacher says how likely each of the student's tokens is"
    )
  task.of_model(found)  # that it can be used for it too
  if config.distill.hidden and found.config.width != student.config.width:
    raise ValueError(
      f"distill.hidden {config.distill.hidden}: the teacher's hidden states have "
      f"{found.config.width} features, the student's {student.config.width}; set it to 0"
    )
  return Teacher(lora_jax.adapt(task.forward(parts.make_model(found.config))), found.params)


def _vocabulary(found: Pretrained) -> tuple:
  """The tokens of a model's inputs; nothing for a model that takes no text."""
  if found.tokenizer is None:
    return ()
  return found.config.vocab_size, found.tokenizer.vocabulary


def make_objective(distill: ConfigDict, task: Task, apply: Callable, teacher: Teacher) -> Objective:
  """The objective of the student; it takes the batch and `teacher.params`, unless that is None."""
  hidden = bool(distill.hidden)
  taught = task.reading(teacher.apply, hidden)

  def teach(weights: PyTree, batch: Batch) -> Reading:
    if teacher.params is None:
      weights = without_adapters(weights)
    return taught(weights, batch)

  return distillation_objective(
    task.reading(apply, hidden),
    teach,
    temperature=distill.temperature,
    hard=distill.hard,
    hidden=distill.hidden,
    answers=task.answers,
  )
