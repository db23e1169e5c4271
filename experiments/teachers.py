"""The teacher of a run whose config asks for one, and what is learnt from it.

config.distill.teacher = "none"       # the batches' own tokens alone
config.distill.teacher = "base"       # the model without its adapter; it lies there anyway
config.distill.teacher = "pypi://…"   # another model of the same vocabulary, by its address
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh
from ml_collections import ConfigDict

import lora_jax
from experiments import parts
from lora_jax.compress import storage
from lora_jax.io.pretrained import Pretrained
from lora_jax.models import llama
from lora_jax.train.distillation import Reading, distillation_objective, without_adapters
from lora_jax.train.step import Batch, Objective, model_options

PyTree = Any

_WITHOUT_BASE = ("pissa", "olora")  # their adapters hold a residual in the base's place


class Teacher(NamedTuple):
  """Who is learnt from.

  Attributes:
    apply: the adapted `model.apply`.
    params: its weights; None for the student's base.
  """

  apply: Callable
  params: PyTree | None


def is_taught(config: ConfigDict) -> bool:
  """Whether a config asks for a teacher."""
  return config.distill.teacher != "none"


def check(config: ConfigDict) -> None:
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
  if config.train.loss_chunk:
    raise ValueError(
      f"train.loss_chunk {config.train.loss_chunk}: what a teacher says is compared logit by "
      "logit, all at once; set it to 0, and train.accumulate to hold fewer rows"
    )
  make_objective(config.distill, lambda *_: None, Teacher(lambda *_: None, None))


def load(config: ConfigDict, student: Pretrained, mesh: Mesh) -> Teacher | None:
  """The teacher of a config, its weights laid out on the mesh as the student's are.

  Args:
    config: of the run.
    student: the base, as it was loaded.
    mesh: of the run.

  Raises:
    ValueError: when the two have not the same tokens, or hidden states of different width that are
      to be learnt from.
  """
  if not is_taught(config):
    return None
  if config.distill.teacher == "base":
    return Teacher(lora_jax.adapt(llama.Llama(student.config).apply), None)
  section = config.model.copy_and_resolve_references()
  section.source, section.quantize, section.remat = config.distill.teacher, "none", "none"
  section.scan_layers = not storage.is_compressed(section.source)  # whose layers may differ
  found = parts.load_model(section, mesh)
  sizes = found.config.vocab_size, student.config.vocab_size
  if sizes[0] != sizes[1] or found.tokenizer.vocabulary != student.tokenizer.vocabulary:
    raise ValueError(
      f"distill.teacher {config.distill.teacher}: its tokens are not those of {student.source}; "
      "a teacher says how likely each of the student's tokens is"
    )
  if config.distill.hidden and found.config.width != student.config.width:
    raise ValueError(
      f"distill.hidden {config.distill.hidden}: the teacher's hidden states have "
      f"{found.config.width} features, the student's {student.config.width}; set it to 0"
    )
  return Teacher(lora_jax.adapt(llama.Llama(found.config).apply), found.params)


def make_objective(distill: ConfigDict, apply: Callable, teacher: Teacher) -> Objective:
  """The objective of the student; beside the batch it takes `teacher.params`, unless it is None."""
  read = functools.partial(_read, hidden=bool(distill.hidden))

  def teach(weights: PyTree, batch: Batch) -> Reading:
    if teacher.params is None:
      weights = without_adapters(weights)
    return read(teacher.apply, weights, batch)

  return distillation_objective(
    functools.partial(read, apply),
    teach,
    temperature=distill.temperature,
    hard=distill.hard,
    hidden=distill.hidden,
  )


def _read(apply: Callable, weights: PyTree, batch: Batch, *, hidden: bool) -> Reading:
  options = model_options(batch)
  if not hidden:
    return apply({"params": weights}, batch["tokens"], **options)
  hidden_BCD = apply({"params": weights}, batch["tokens"], method="hidden", **options)
  return apply({"params": weights}, hidden_BCD, method="logits"), hidden_BCD
