"""A run's folder: where everything of it lies, held by one process at a time.

with open_workdir("runs/quickstart", config.to_dict()) as workdir:
  ...

runs/quickstart/
  README.md            what was done and what came of it, for people
  config.json          the whole config; a run with another one is refused
  metrics.jsonl        one object a logged step
  checkpoints/         Orbax
  adapter/             PEFT's layout
  eval.json            metrics before and after, and samples
  loss.png
  tensorboard/         event files
  lock                 held while a run is alive; the system lets it go when the process dies
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The paths of a run's folder."""

  path: pathlib.Path

  @property
  def readme(self) -> pathlib.Path:
    return self.path / "README.md"

  @property
  def config(self) -> pathlib.Path:
    return self.path / "config.json"

  @property
  def metrics(self) -> pathlib.Path:
    return self.path / "metrics.jsonl"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.path / "checkpoints"

  @property
  def adapter(self) -> pathlib.Path:
    return self.path / "adapter"

  @property
  def evaluation(self) -> pathlib.Path:
    return self.path / "eval.json"

  @property
  def plot(self) -> pathlib.Path:
    return self.path / "loss.png"

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.path / "tensorboard"

  @property
  def lock(self) -> pathlib.Path:
    return self.path / "lock"


@contextlib.contextmanager
def open_workdir(path: str | pathlib.Path, config: Mapping[str, Any]) -> Iterator[Workdir]:
  """Creates or reopens a run's folder and holds it until the block ends.

  Args:
    path: the folder; created with its parents.
    config: the whole config, nested mappings of what JSON can hold.

  Raises:
    ValueError: when the folder holds a run with another config (the fields that differ are
      listed), holds a run without one, or is held by another process.
    TypeError: when the config holds something JSON cannot.
    OSError: when the folder cannot be written to.
  """
  workdir = Workdir(pathlib.Path(path).absolute())
  wanted = _as_json(config)
  try:
    workdir.path.mkdir(parents=True, exist_ok=True)
    lock = open(workdir.lock, "a+")  # noqa: SIM115, closed below
  except OSError as error:
    raise OSError(
      f"{workdir.path}: cannot write here ({error.strerror}); choose another workdir"
    ) from error
  with lock:
    _hold(lock, workdir)
    _clear(workdir)
    _settle_config(workdir, wanted)
    yield workdir


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
  """The config of the run in a folder.

  Raises:
    FileNotFoundError: when the folder holds no run.
    ValueError: when its config.json is not JSON.
  """
  config = Workdir(pathlib.Path(path)).config
  if not config.exists():
    raise FileNotFoundError(f"{config}: not found; {path} is not the workdir of a run")
  try:
    return json.loads(config.read_text())
  except ValueError as error:
    raise ValueError(
      f"{config}: not valid JSON ({error}); restore it, or use another workdir"
    ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file as `write_text` writes text."""
  write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file whole or not at all: a reader never sees half of it.

  Raises:
    OSError: as `writing` does; what the file held is still there.
  """
  temporary = _unfinished(path)
  with writing(path):
    try:
      with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Around the writing of a run's file or folder.

  Raises:
    OSError: for any error of the system, with the path and what is to be done about it.
  """
  try:
    yield
  except OSError as error:
    raise OSError(
      f"{path}: cannot be written ({error.strerror or error}). If the disk is full make room; the "
      "same command then goes on from the last checkpoint"
    ) from error


def fingerprint(config: Mapping[str, Any]) -> str:
  """Sixteen hexadecimal digits that tell one config from another, whatever its fields' order."""
  canonical = json.dumps(_as_json(config), sort_keys=True)
  return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config as it will be read back: tuples are lists, keys are strings."""
  try:
    return json.loads(json.dumps(config))
  except (TypeError, ValueError) as error:
    raise TypeError(f"the config cannot be written as JSON: {error}") from error


def _hold(lock: Any, workdir: Workdir) -> None:
  # A record lock belongs to the process and is not inherited by a fork: neither a killed run nor a
  # data worker that outlives it can leave the folder locked.
  try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    lock.seek(0)
    raise ValueError(
      f"{workdir.path}: another run is at work here (process {lock.read().strip() or 'unknown'}); "
      "wait for it, stop it, or use another workdir"
    ) from error
  with writing(workdir.lock):
    lock.seek(0)
    lock.truncate()
    lock.write(f"{os.getpid()}\n")
    lock.flush()


def _clear(workdir: Workdir) -> None:
  """Removes what a killed run had not written to its end, as `write_text` and `io.peft` name it."""
  for path in (workdir.config, workdir.metrics, workdir.evaluation, workdir.readme):
    _unfinished(path).unlink(missing_ok=True)
  for folder in (".", "members/*"):
    for path in workdir.path.glob(f"{folder}/.{workdir.adapter.name}.[0-9]*"):
      shutil.rmtree(path)


def _unfinished(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name + ".tmp")


def _settle_config(workdir: Workdir, wanted: dict[str, Any]) -> None:
  """Writes the config into a new folder; compares it with that of a folder in use."""
  if not workdir.config.exists():
    if workdir.metrics.exists() or workdir.checkpoints.exists():
      raise ValueError(
        f"{workdir.path}: holds a run but no config.json, so it cannot be told whether it is this "
        "run; use another workdir, or delete this one"
      )
    write_json(workdir.config, wanted)
    return
  found, wanted = _fields(read_config(workdir.path)), _fields(wanted)
  names = [name for name in found | wanted if found.get(name, _ABSENT) != wanted.get(name, _ABSENT)]
  if names:
    lines = [
      f"  {name}: {found.get(name, _ABSENT)!r} there, {wanted.get(name, _ABSENT)!r} now"
      for name in sorted(names)
    ]
    raise ValueError(
      f"{workdir.path}: holds a run with a different config:\n"
      + "\n".join(lines)
      + "\nUse another workdir, or delete this one"
    )


class _Absent:
  def __repr__(self) -> str:
    return "absent"


_ABSENT = _Absent()


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{"lora.rank": 8}` of `{"lora": {"rank": 8}}`; an empty mapping is a field of its own."""
  fields = {}
  for name, value in config.items():
    if isinstance(value, dict) and value:
      fields |= _fields(value, f"{prefix}{name}.")
    else:
      fields[prefix + name] = value
  return fields
