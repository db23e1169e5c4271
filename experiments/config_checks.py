"""Checks the fields of a config: a run's, a compression's, and one read from a folder.

    check_run(config)                        # as configs/quickstart.py, before anything is read
    check(config, COMPRESSION)               # as configs/compress.py
    check(config, FINISHED, ADDED_LATER)     # of a finished run, as far as it is read again

An error names the field and its allowed values. Combinations, such as a batch and the devices, are
checked where they are used.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments.field_rules import (
  ANY_COUNT,
  COUNT,
  DECAY,
  FLAG,
  LIMIT,
  NAME,
  PATTERNS,
  POSITIVE,
  SEED,
  SHARE,
  SIZE,
  SOURCES,
  TEXT,
  Rule,
  either,
  optional,
  or_auto,
  real,
  sequence,
  whole,
)
from lora_jax import checks
from lora_jax.data import chat, conversations
from lora_jax.models import attention_kernels, encoder_attention

_ABSENT = object()


def check_run(config: ConfigDict) -> None:
  """Raises ValueError for a field that no run can have; as `check` does."""
  check(config, RUN)
  check_task(config)
  own = {f"adapter.{name}": rule for name, rule in ADAPTERS.items() if name in config.adapter}
  check(config, own)


def check(config: ConfigDict, rules: Mapping[str, Rule], may_lack: Collection[str] = ()) -> None:
  """Checks the fields of a config by rules.

  Args:
    config: whole, or read from a folder.
    rules: `{field: rule}`.
    may_lack: the fields that need not be there.

  Raises:
    ValueError: for a field that is missing or breaks its rule, by its name.
  """
  for field, rule in rules.items():
    value = _find(config, field)
    if value is _ABSENT and field not in may_lack:
      raise ValueError(f"{field} is missing; it must be {rule.words}")
    if value is not _ABSENT and not rule.holds(value):
      raise ValueError(f"{field} is {checks.shown(value)}; it must be {rule.words}")


def _find(config: ConfigDict, field: str) -> Any:
  found: Any = config
  for name in field.split("."):
    if not isinstance(found, ConfigDict) or name not in found:
      return _ABSENT
    found = found[name]
  return found


_MODEL = {
  "model.source": NAME,
  "model.dtype": either("float32", "bfloat16", "float16"),
  "model.scan_layers": FLAG,
  "model.quantize": NAME,
  "model.quantize_targets": PATTERNS,
  "model.new_tokens": sequence(NAME),
  "model.attention": either(
    attention_kernels.AUTO, *attention_kernels.NAMES, *encoder_attention.LOW_RANK
  ),
  "model.attention_rank": ANY_COUNT,
  "model.attention_iterations": ANY_COUNT,
  "model.remat": NAME,
}


_SOURCES_OR_NONE = Rule(
  f"{SOURCES.words}; or '' for none", lambda value: value == "" or SOURCES.holds(value)
)
_DATA = {
  "source": SOURCES, "format": NAME, "columns": sequence(TEXT), "encoding": NAME,
  "quoted": optional(FLAG), "detokenise": sequence(TEXT), "sign_of": TEXT, "neutral": real(0.0),
  "split_by": NAME, "train": SHARE, "validation": SHARE, "test": SHARE,
  "test_source": _SOURCES_OR_NONE,
  "max_length": whole(2), "buckets": sequence(COUNT, empty=False),
}  # fmt: skip
_IMAGES = {
  "source": _DATA["source"], "test_source": _DATA["test_source"], "split_by": either("digest"),
  "train": SHARE, "validation": SHARE, "test": SHARE,
  "arrays": sequence(NAME), "test_arrays": sequence(NAME), "size": whole(1, 1 << 14),
  "mean": sequence(SHARE, empty=False), "std": sequence(POSITIVE, empty=False),
  "crop_area": Rule("above 0 and at most 1", lambda value: POSITIVE.holds(value) and value <= 1),
  "flip": SHARE,
}  # fmt: skip
_CLIPS = {
  **{x: _DATA[x] for x in (
    "source", "test_source", "format", "columns", "encoding", "quoted", "split_by", "train",
    "validation", "test",
  )},
  "audio": NAME, "text": NAME, "window": POSITIVE,
}  # fmt: skip
_OF_ARRAYS = ("arrays", "test_arrays")
_DETECTION = {name: rule for name, rule in _IMAGES.items() if name not in _OF_ARRAYS} | {
  "annotations": NAME,
  "test_annotations": TEXT,
  "images": TEXT,
  "leave_out": sequence(NAME),
}
# The fields of `data` for tasks that do not read texts alone.
_DATA_OF = {"images": _IMAGES, "detection": _DETECTION, "transcribe": _CLIPS, "ctc": _CLIPS}
# The fields of `data` and of `task` that a task has.
_OF_TASKS = {
  "completion": (
    {
      "prompt": TEXT, "completion": TEXT, "special_tokens": FLAG, "choices": sequence(TEXT),
      "append_eos": FLAG, "packed_length": ANY_COUNT,
    },
    {},
  ),
  "classification": (
    {}, {"text": NAME, "pair": TEXT, "label": NAME, "labels": sequence(NAME, empty=False)},
  ),
  "regression": ({}, {"text": NAME, "pair": TEXT, "label": NAME}),
  "embedding": (
    {},
    {
      "text": NAME, "pair": NAME, "label": TEXT, "positive": SIZE,
      "temperature": POSITIVE,
    },
  ),
  "images": (
    {},
    {"labels": sequence(NAME, empty=False)},
  ),
  "transcribe": (
    {"slots": TEXT, "max_length": whole(4)},
    {"prompt": NAME, "normalizer": NAME},
  ),
  "ctc": (
    {"join": sequence(COUNT), "per_speaker": COUNT, "join_seed": SEED},
    {"alphabet": sequence(NAME), "normalizer": NAME, "beams": COUNT},
  ),
  "detection": (
    {},
    {
      "labels": sequence(NAME, empty=False),
      "scales": sequence(sequence(POSITIVE, empty=False), empty=False),
      "ratios": sequence(POSITIVE, empty=False),
      "overlap": SHARE, "negatives": whole(1, 1 << 10), "nms": SHARE, "least_score": SHARE,
      "shown_score": SHARE, "most": whole(1, 1 << 10),
    },
  ),
  "chat": (
    {
      "conversation": either(conversations.AUTO, *conversations.READINGS),
      "too_long": either(*chat.TOO_LONG),
      "packed_length": ANY_COUNT,
    },
    {"learn": either(*chat.LEARN), "template": optional(NAME), "date": NAME},
  ),
}  # fmt: skip


def _section(name: str, rules: Mapping[str, Rule]) -> dict[str, Rule]:
  return {f"{name}.{field}": rule for field, rule in rules.items()}


ADDED_LATER = (
  "data.encoding", "data.quoted", "data.special_tokens", "task.name", "model.new_tokens",
  "task.pair",
  "model.attention", "model.attention_rank", "model.attention_iterations",
)  # fmt: skip
"""Fields that the configs of earlier runs lack; `experiments.parts` has their values."""


def rules_of_task(name: str) -> dict[str, Rule]:
  """The rules of a task's fields, in the sections `data` and `task`.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in _OF_TASKS:
    raise ValueError(f"task.name {checks.shown(name)} is unknown; use {', '.join(_OF_TASKS)}")
  of_data, of_task = _OF_TASKS[name]
  return _section("data", _DATA_OF.get(name, _DATA) | of_data) | _section("task", of_task)


def check_task(config: ConfigDict) -> None:
  """Checks the sections `data` and `task` by the rules of the config's task.

  Raises:
    ValueError: as `check` does; and for a field of `data` that the task would not read.
  """
  if "task" in config and not isinstance(config.task, ConfigDict):
    raise ValueError(f"task is {checks.shown(config.task)}; it must be a section")
  if "task" in config and "name" not in config.task:
    raise ValueError("task.name is missing")
  name = config.task.name if "task" in config else "completion"
  rules = rules_of_task(name)
  check(config, rules, ADDED_LATER)
  if unknown := sorted({f"data.{field}" for field in config.data} - rules.keys()):
    raise ValueError(f"{unknown[0]}: the task {name} reads no such field; delete it")


RUN = {
  "seed": SEED,
  **_MODEL,
  "mesh.data": whole(-1),
  "mesh.fsdp": whole(-1),
  "mesh.tensor": whole(-1),
  "task.name": NAME,
  "train.steps": COUNT,
  "train.batch_size": COUNT,
  "train.accumulate": COUNT,
  "train.loss_chunk": or_auto(ANY_COUNT),
  "train.log_every": COUNT,
  "train.checkpoint_every": COUNT,
  "train.max_to_keep": COUNT,
  "train.evaluate_every": ANY_COUNT,
  "train.quantize_merge": NAME,
  "optimizer.peak_learning_rate": POSITIVE,
  "optimizer.schedule": NAME,
  "optimizer.warmup_steps": ANY_COUNT,
  "optimizer.b1": DECAY,
  "optimizer.b2": DECAY,
  "optimizer.eps": POSITIVE,
  "optimizer.weight_decay": real(0.0),
  "optimizer.clip_norm": LIMIT,
  "distill.teacher": NAME,
  "distill.temperature": POSITIVE,
  "distill.hard": SHARE,
  "distill.hidden": real(0.0),
  "evaluation.split": NAME,
  "evaluation.examples": ANY_COUNT,
  "evaluation.batch_size": COUNT,
  "evaluation.samples": ANY_COUNT,
}
"""Of training; the methods' own are in `ADAPTERS`."""

ADAPTED = {**_MODEL, "adapter.method": NAME}
"""The fields of a run's folder that describe the base of its adapter."""

FINISHED = {
  **ADAPTED,
  "task.name": NAME,
  "train.loss_chunk": or_auto(ANY_COUNT),
  "train.quantize_merge": NAME,
  "evaluation.batch_size": COUNT,
}
"""The fields of a run's folder that evaluation, generation and exports read."""

ADAPTERS = {
  "rank": COUNT,
  "alpha": SIZE,
  "rslora": FLAG,
  "train_a": FLAG,
  "dropout": DECAY,
  "constant_norm": FLAG,
  "seed": SEED,
  "d_initial": SIZE,
  "fan_in": optional(COUNT),
  "decompose_both": FLAG,
  "factor": optional(COUNT),
  "channels": FLAG,
  "deviation": real(0.0),
  "rho": real(1.0),
  "batches": COUNT,
  "iterations": optional(ANY_COUNT),
  "target_rank": COUNT,
  "first_steps": SHARE,
  "last_steps": SHARE,
  "every": COUNT,
  "beta1": DECAY,
  "beta2": DECAY,
  "orthogonality": real(0.0),
}
"""The fields of a config's `adapter`, if the method has them."""

COMPRESSION = {
  **_MODEL,
  "adapter": TEXT,
  "keep_adapter": FLAG,
  "text.source": _SOURCES_OR_NONE,
  # More than the model has, or too few, is told once it is known.
  "channels.mlp_width": ANY_COUNT,
  "heads.num_kv_heads": ANY_COUNT,
  "value_heads.value_dim": ANY_COUNT,
  "factorize.targets": PATTERNS,
  "factorize.gradients": FLAG,
  "factorize.rows": COUNT,
  "factorize.updates": ANY_COUNT,
  "prune.targets": PATTERNS,
  "prune.share": DECAY,
  "prune.n": ANY_COUNT,
  "prune.of": ANY_COUNT,
  "quantize.targets": PATTERNS,
  "quantize.block": ANY_COUNT,
  "quantize.double": FLAG,
  "task.name": NAME,
  "task.examples": ANY_COUNT,
  "task.batch_size": COUNT,
  "task.split": NAME,
  "report.resident": FLAG,
  "report.onnx": FLAG,
  **{f"{step}.damping": real(0.0) for step in ("channels", "heads", "value_heads")},
  **{f"{step}.damping": real(0.0) for step in ("factorize", "quantize")},
}
"""The fields of a compression; `experiments.compression_checks` checks how its steps and sizes fit
together."""

_OF_RUNNING_TEXT = {
  "text.format": NAME,
  "text.columns": sequence(TEXT),
  "text.encoding": NAME,
  "text.quoted": optional(FLAG),
  "text.special_tokens": FLAG,
  "text.column": NAME,
  "text.length": whole(2),
}


def check_compression(config: ConfigDict) -> None:
  """Checks the fields of a compression, by running text or by the batches of its task.

  Raises:
    ValueError: as `check` does; and for a field of `task` that the task would not read.
  """
  check(config, COMPRESSION)
  check(config, _OF_RUNNING_TEXT if config.text.source else {"task.calibration": COUNT})
  moved = {"data": "task.data", "task": "task.fields"}
  rules, lacked = (
    {f"{moved[section]}.{field}": rule for (section, _, field), rule in found.items()}
    for found in (
      {tuple(name.partition(".")): rule for name, rule in rules_of_task(config.task.name).items()},
      {tuple(name.partition(".")): None for name in ADDED_LATER if name.split(".")[0] in moved},
    )
  )
  check(config, rules, lacked)
  for section in ("task.data", "task.fields"):
    fields = {f"{section}.{field}" for field in _find(config, section)}
    if unknown := sorted(fields - rules.keys()):
      raise ValueError(f"{unknown[0]}: the task {config.task.name} reads no such field; delete it")
