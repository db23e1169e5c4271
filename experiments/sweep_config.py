"""A config's `sweep`: which members it asks for, and the config of each.

config.sweep.grid = (("adapter.rank", (2, 8)), ("seed", (0, 1)))     # four members
config.sweep.members = ({"adapter.rank": 4}, {"adapter.rank": 8, "train.steps": 80})
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

Fields = dict[str, Any]
"""The fields that a member changes: `{"adapter.rank": 4}`."""

FIELDS = (
  "seed", "adapter.rank", "adapter.alpha", "adapter.rslora", "optimizer.peak_learning_rate",
  "optimizer.schedule", "optimizer.warmup_steps", "train.steps",
)  # fmt: skip
"""The fields that members may differ in; all others are shared."""


def is_sweep(config: ConfigDict) -> bool:
  """Whether a config asks for more than one run."""
  return bool(config.sweep.grid or config.sweep.members)


def list_members(config: ConfigDict) -> list[Fields]:
  """The fields that each member changes: every one of `sweep.members` with every point of the grid.

  Raises:
    ValueError: for an empty or repeated field or member, and a field that members cannot differ in.
  """
  section = config.sweep
  grid = [(name, tuple(values)) for name, values in section.grid]
  names = [name for name, _ in grid]
  for name, values in grid:
    if not values:
      raise ValueError(f"sweep.grid {name!r} has no values, so there is no member to train")
    if len(set(values)) < len(values) or names.count(name) > 1:
      raise ValueError(f"sweep.grid {name!r} is there twice, or has one value twice: {values}")
  found = []
  for own in section.members or ({},):
    both = sorted(set(own) & set(names))
    if both:
      raise ValueError(f"sweep.members and sweep.grid both set {', '.join(both)}; choose one")
    for point in itertools.product(*(values for _, values in grid)):
      found.append(dict(own) | dict(zip(names, point, strict=True)))
  for name in dict.fromkeys(name for each in found for name in each):
    if name not in FIELDS:
      raise ValueError(
        f"sweep: members cannot differ in {name!r}; one program has one base, one kind of batch "
        f"and one optimizer, and its members differ in {', '.join(FIELDS)}. Make it a run of its "
        "own"
      )
  repeated = [each for n, each in enumerate(found) if each in found[:n]]
  if repeated:
    raise ValueError(f"sweep: two members have the same fields, {repeated[0]}")
  return found


def member_configs(config: ConfigDict, fields: Sequence[Fields]) -> list[ConfigDict]:
  """The config of each member, as of a run of its own.

  Raises:
    ValueError: when a field is not in the config, or has another type; or the members' method or
      the config's other options cannot be in a sweep.
  """
  if config.distill.teacher != "none":
    raise ValueError(
      f"distill.teacher {config.distill.teacher}: the members of a sweep learn from their texts "
      "alone; set it to none"
    )
  if config.train.quantize_merge != "none":
    raise ValueError(
      f"train.quantize_merge {config.train.quantize_merge}: the members of a sweep share a base "
      "that no member's merge may round; train these one by one"
    )
  found = []
  for n, each in enumerate(fields):
    member = config.copy_and_resolve_references()
    member.sweep.grid, member.sweep.members = (), ()
    try:
      member.update_from_flattened_dict(each)
    except (KeyError, OverflowError, TypeError) as error:
      raise ValueError(f"sweep: member {n}, {each}: {error}") from None
    found.append(member)
  if config.adapter.method == "loftq":
    raise ValueError(
      "sweep: LoftQ makes a base of its own for every rank; train these one by one, or LoRA on "
      "--config.model.quantize=nf4"
    )
  if config.adapter.method == "adalora" and len({each.train.steps for each in found}) > 1:
    raise ValueError(
      "sweep: AdaLoRA's budget of ranks follows train.steps, which is part of the program; its "
      "members must make as many steps"
    )
  return found


def settings(configs: Sequence[ConfigDict], fields: Sequence[Fields]) -> list[Fields]:
  """The values of each member in every field that any of them changes."""
  names = dict.fromkeys(name for each in fields for name in each)
  return [
    {name: functools.reduce(operator.getitem, name.split("."), config) for name in names}
    for config in configs
  ]


def label(fields: Fields) -> str:
  """`peak 0.001, rank 4` of what a member changes."""
  return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in fields.items())
