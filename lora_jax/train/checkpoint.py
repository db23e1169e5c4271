"""Checkpoints of what trains, by Orbax, one folder per step, without the base.

    with Checkpoints(workdir.checkpoints, keep=2, fingerprint=fingerprint(config)) as checkpoints:
      restored = checkpoints.restore(state)             # None when there is none yet
      checkpoints.save(state, data_state=batches.get_state())

A checkpoint is `{path: array}` of the `State` (step, trainable part, optimizer state) and one JSON
record: the position of the data, the fingerprint of the config, each array's shape, type and
CRC-32, and the CRC-32 of the record itself. So it can be read without this library, and a bit that
flipped on disk, which neither JSON nor the array format would detect, is detected.

With several processes, all call every method, on a folder that all of them see; each writes and
reads its own shards. A checkpoint saved on one mesh can be restored on another.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lora_jax.checks import shown
from lora_jax.train.step import State
from lora_jax.tree import flatten, replace

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
  """The contents of a checkpoint: the state, and the saved position of the data."""

  state: State
  data_state: dict[str, Any]


class DamagedCheckpointError(ValueError):
  """A checkpoint that cannot be read, or whose contents differ from those that were saved."""


class Checkpoints:
  """The checkpoints of one run; a context manager that waits for the last write on exit.

  Args:
    folder: created if it does not exist.
    keep: the number of latest checkpoints to keep.
    fingerprint: the fingerprint of the run's config; a checkpoint of another config is refused.
  """

  def __init__(self, folder: str | pathlib.Path, *, keep: int, fingerprint: str):
    if keep < 1:
      raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
    self.folder = pathlib.Path(folder).absolute()
    self._fingerprint = fingerprint
    self._saving = 0  # the step of the last save
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *unused: Any) -> None:
    self.close()

  def path(self, step: int) -> pathlib.Path:
    """The folder of the checkpoint of a step."""
    return self.folder / str(step)

  def latest(self) -> pathlib.Path | None:
    """The folder of the last complete checkpoint, or None."""
    self.wait()
    step = self._manager.latest_step()
    return None if step is None else self.path(step)

  def save(self, state: State, data_state: dict[str, Any]) -> None:
    """Saves the state of `state.step`; the writing continues in the background.

    Args:
      state: its arrays are copied before this returns, so the next step may donate them.
      data_state: the position of the data after this step's batch, as JSON values.

    Raises:
      OSError: if the previous checkpoint, or the start of this one, cannot be written.
    """
    self.wait()
    step = self._saving = int(state.step)
    arrays = flatten(state)
    record = {
      "data_state": data_state,
      "fingerprint": self._fingerprint,
      "arrays": {path: _describe(leaf) | {"crc32": _crc32(leaf)} for path, leaf in arrays.items()},
    }
    record["crc32"] = _crc32_of_record(record)
    with self._writing():
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
        ),
      )
    assert saved, f"{self.folder}: there is a checkpoint of step {step} or of a later one"

  def restore(self, like: State) -> Restored | None:
    """Restores the latest intact checkpoint, bit for bit.

    A damaged checkpoint is skipped for the previous one, with a warning. Its folder is renamed to
    `damaged-<step>`, so that the step can be saved again and nothing is lost.

    Args:
      like: arrays, or `jax.ShapeDtypeStruct`s, in the structure to restore. If they have shardings,
        the restored arrays get these.

    Returns:
      The state and the data's position, or None if nothing was saved yet.

    Raises:
      ValueError: if the checkpoint is of another config or another structure.
      DamagedCheckpointError: if there are checkpoints but none of them can be read.
    """
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored = self._load(step, like)
      except DamagedCheckpointError as error:
        _log.warning("%s; it is passed over for the one before it", error)
        damaged[step] = error
        continue
      self._set_aside(damaged)
      return restored
    if damaged:
      raise DamagedCheckpointError(
        f"{self.folder}: no checkpoint can be read. "
        + "; ".join(str(error) for error in damaged.values())
        + f". Delete {self.folder} to start the run afresh"
      )
    return None

  def check(self) -> None:
    """Raises OSError if the writing has failed by now; does not wait."""
    with self._writing():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until all saved checkpoints are on disk; raises OSError if writing failed."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits as `wait` does, then closes the folder."""
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    # A full disk is an OSError of Orbax, or a ValueError of the array format beneath it.
    except Exception as error:
      self._manager.reload()
      whole = self._manager.latest_step()
      kept = "no other one was there yet" if whole is None else f"{self.path(whole)} is whole"
      raise OSError(
        f"{self.folder}: the checkpoint of step {self._saving} cannot be written "
        f"({_first_line(error)}); {kept}. If the disk is full make room; the same command "
        "then goes on from the last whole checkpoint"
      ) from error

  def _load(self, step: int, like: State) -> Restored:
    path = self.path(step)
    wanted = flatten(like)
    record = self._read(step, "record", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
    if not _is_whole(record):
      raise DamagedCheckpointError(f"{path}: its record is not what was saved (its CRC-32 differs)")
    if problem := _problem_of_record(record):
      raise DamagedCheckpointError(f"{path}: its record is not that of a checkpoint, {problem}")
    if record["fingerprint"] != self._fingerprint:
      raise ValueError(
        f"{path}: this checkpoint was made with another config "
        f"({record['fingerprint']}, now {self._fingerprint}); use another workdir or delete it"
      )
    _check_structure(path, saved=record["arrays"], wanted=wanted)
    abstract = {key: _abstract(leaf) for key, leaf in wanted.items()}
    how = ocp.args.StandardRestore(abstract)
    arrays = self._read(step, "state", ocp.StandardCheckpointHandler, how)
    for key, array in arrays.items():
      if _crc32(array) != record["arrays"][key]["crc32"]:
        raise DamagedCheckpointError(f"{path}: {key} is not what was saved (its CRC-32 differs)")
    state = replace(like, arrays)
    if int(state.step) != step:
      raise DamagedCheckpointError(
        f"{path}: is the checkpoint of step {int(state.step)} under another name"
      )
    return Restored(state, record["data_state"])

  def _read(self, step: int, item: str, handler: Callable, how: Any) -> Any:
    # Each process reads on its own, without a barrier: at one, a process would wait forever for
    # another whose shards are damaged.
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
      primary_host=None, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
    )
    reader = ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)
    found = problem = None
    try:
      with reader:
        found = reader.restore(self.path(step) / item, args=how)
    # Orbax reports damage by many types, including bare Exception.
    except Exception as error:
      problem = error
    # All processes must take the same decision.
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(problem is not None)))
    if problem:
      raise DamagedCheckpointError(
        f"{self.path(step)}: cannot be read ({_first_line(problem)})"
      ) from problem
    if failed.size:
      raise DamagedCheckpointError(f"{self.path(step)}: cannot be read by process {failed[0]}")
    return found

  def _set_aside(self, steps: Any) -> None:
    if not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        self.path(step).rename(_free_name(self.folder / f"damaged-{step}"))
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    self._manager.reload()


def _free_name(path: pathlib.Path) -> pathlib.Path:
  """The path itself, or with the first number appended that is not taken."""
  number, free = 1, path
  while free.exists():
    number, free = number + 1, path.with_name(f"{path.name}-{number}")
  return free


def _first_line(error: Exception) -> str:
  """The first line of an error; a long one is cut in the middle, before the system's own words."""
  line = f"{type(error).__name__}: {error}".partition("\n")[0]
  if len(line) <= 200:
    return line
  # The array format ends with the number of the system's error, with the words before it.
  code = re.search(r"os_error_code='(\d+)'", line)
  reason = f"{os.strerror(int(code[1]))}: " if code else ""
  return f"{reason}{line[:60]} … {line[-130:]}"


def _describe(leaf: Any) -> dict[str, Any]:
  return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _crc32(leaf: Any) -> int:
  if not getattr(leaf, "is_fully_addressable", True):
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).reshape(-1).data)


def _is_whole(record: Any) -> bool:
  try:
    return isinstance(record, dict) and record.get("crc32") == _crc32_of_record(record)
  except RecursionError:
    return False


def _problem_of_record(record: dict[str, Any]) -> str | None:
  """A field that every checkpoint's record has, but this one lacks, despite a correct CRC-32."""
  for name, kind in (("data_state", dict), ("fingerprint", str), ("arrays", dict)):
    if not isinstance(record.get(name), kind):
      return f"{name} is {shown(record.get(name))}"
  for key, of in record["arrays"].items():
    shape = of.get("shape") if isinstance(of, dict) else None
    if (
      not isinstance(shape, list)
      or not all(isinstance(size, int) for size in shape)
      or not isinstance(of.get("dtype"), str)
      or not isinstance(of.get("crc32"), int)
    ):
      return f"{key[:100]} is {shown(of)}"
  return None


def _crc32_of_record(record: dict[str, Any]) -> int:
  """The CRC-32 of all other fields, independent of their order."""
  as_read = json.loads(json.dumps({key: x for key, x in record.items() if key != "crc32"}))
  return zlib.crc32(json.dumps(as_read, sort_keys=True).encode())


def _check_structure(path: pathlib.Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Refuses a checkpoint with other leaves than the wanted ones; lists all differences."""
  differences = [f"{key}: not in the checkpoint" for key in wanted if key not in saved]
  differences += [f"{key}: only in the checkpoint" for key in saved if key not in wanted]
  for key in wanted.keys() & saved.keys():
    was = {name: saved[key][name] for name in ("shape", "dtype")}
    now = _describe(wanted[key])
    if was != now:
      differences.append(
        f"{key}: {was['dtype']}{was['shape']} in the checkpoint, {now['dtype']}{now['shape']} here"
      )
  if differences:
    raise ValueError(
      f"{path}: the checkpoint does not fit what trains now:\n  "
      + "\n  ".join(sorted(differences))
      + "\nUse the config it was made with, or another workdir"
    )
