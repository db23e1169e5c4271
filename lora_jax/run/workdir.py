"""A run's folder: the files of the run, held by one process at a time.

with open_workdir("runs/quickstart", config.to_dict()) as workdir:
  ...

runs/quickstart/
  README.md            settings and results, for people
  config.json          the whole config, and fingerprints of the files that it names; a run with
                       others is refused once there is something to lose
  metrics.jsonl        one object per logged step
  checkpoints/         Orbax
  adapter/             PEFT's layout
  eval.json            metrics before and after, and samples
  loss.png
  samples.png          of a task on images
  tensorboard/         event files
  lock                 held while a run is alive; the system releases it when the process dies
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from lora_jax.checks import shown
from lora_jax.io import files, json_files, outputs

# The outputs of a run other than its config; without a config, a run would overwrite them.
_OWN = (
  "README.md", "metrics.jsonl", "checkpoints", "adapter", "eval.json", "loss.png", "tensorboard",
  "samples.png",
  "members", "results.md", "results.json", "report.md", "report.json", "pareto.png", "rest.jsonl",
)  # fmt: skip
_INPUTS = "inputs"  # the field for fingerprints in config.json; no config has a field of this name


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
  def picture(self) -> pathlib.Path:
    return self.path / "samples.png"

  @property
  def tensorboard(self) -> pathlib.Path:
    return self.path / "tensorboard"

  @property
  def lock(self) -> pathlib.Path:
    return self.path / "lock"


@contextlib.contextmanager
def open_workdir(path: str | pathlib.Path, config: Mapping[str, Any]) -> Iterator[Workdir]:
  """Creates or reopens a run's folder and holds it until the block ends.

  The folder belongs to the config once there is something to lose: a line of metrics, a checkpoint,
  an adapter or a model. Until then, for instance after a failed check, a run with another config
  takes it over.

  Args:
    path: the folder; created with its parents.
    config: the whole config, nested mappings of JSON values.

  Raises:
    ValueError: if the folder holds a run with another config (the fields that differ are listed),
      holds a run without a config or other files that would be overwritten, or is held by another
      process; or if the path cannot be a folder.
    TypeError: if the config has values that JSON does not support.
    OSError: if the folder cannot be written to.
  """
  wanted = _as_json(config)
  try:
    workdir = Workdir(outputs.absolute(path))
  except ValueError as error:
    raise ValueError(f"the workdir: {error}") from None
  except NotADirectoryError as error:
    raise OSError(f"{path}: cannot write here (Not a directory); {error}") from None
  _check_others(workdir)
  try:
    workdir.path.mkdir(parents=True, exist_ok=True)
    lock = _open_lock(workdir.lock)
  except OSError as error:
    raise OSError(
      f"{workdir.path}: cannot write here ({error.strerror}); choose another workdir"
    ) from error
  with lock:
    _hold(lock, workdir)
    _clear(workdir)
    _settle_config(workdir, wanted)
    try:
      yield workdir
    except BaseException:
      if {path.name for path in workdir.path.iterdir()} <= {workdir.config.name, workdir.lock.name}:
        workdir.config.unlink(missing_ok=True)  # the run was refused, and has left nothing
      raise


def settle_inputs(workdir: Workdir, inputs: Mapping[str, Mapping[str, str]]) -> None:
  """Stores the fingerprints of a run's inputs, or compares them with the stored ones.

  A run from a version without fingerprints has none to compare.

  Args:
    workdir: an open folder.
    inputs: `{field of the config: {file: fingerprint}}`, as `lora_jax.io.fingerprints` returns.

  Raises:
    ValueError: if there is something to lose and a file has changed or was replaced; all such files
      are listed.
  """
  wanted, content = _as_json(inputs), _read(workdir)
  if not _holds_work(workdir):
    if content.get(_INPUTS, wanted) != wanted:
      _clear_results(workdir)
    write_json(workdir.config, content | {_INPUTS: wanted})
  elif _INPUTS in content:
    found = content[_INPUTS]
    lines = [
      f"  {field} {file}: {found.get(field, {}).get(file, 'absent'):.200} there, "
      f"{wanted.get(field, {}).get(file, 'absent')} now"
      for field in sorted(found | wanted)
      for file in sorted(found.get(field, {}) | wanted.get(field, {}))
      if found.get(field, {}).get(file) != wanted.get(field, {}).get(file)
    ]
    if lines:
      raise ValueError(
        f"{workdir.path}: the files that the run reads have changed since it began:\n"
        + _listed(lines)
        + "\nRestore them, or use another workdir"
      )


def read_inputs(path: str | pathlib.Path) -> dict[str, dict[str, str]]:
  """The fingerprints of a run's inputs, as `settle_inputs` stores them; empty for a run from a
  version without fingerprints. Raises as `read_config` does."""
  return _read(Workdir(pathlib.Path(path).expanduser())).get(_INPUTS, {})


def read_config(path: str | pathlib.Path) -> dict[str, Any]:
  """Returns the config of the run in a folder.

  Raises:
    FileNotFoundError: if the folder holds no run.
    PermissionError: if its config.json cannot be read.
    ValueError: if its config.json does not hold a JSON object, or its fingerprints are invalid.
  """
  content = _read(Workdir(pathlib.Path(path).expanduser()))
  return {name: value for name, value in content.items() if name != _INPUTS}


def _read(workdir: Workdir) -> dict[str, Any]:
  """The contents of config.json."""
  config = workdir.config
  try:
    found = files.read_bytes(config, json_files.MAX_BYTES)
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{config}: not found; {workdir.path} is not the workdir of a run"
    ) from None
  try:
    content = json_files.parse(found)
  except ValueError as error:
    raise ValueError(
      f"{config}: not valid JSON ({error}); restore it, or use another workdir"
    ) from None
  inputs = content.get(_INPUTS, {})
  if not isinstance(inputs, dict) or not all(
    isinstance(files, dict) and all(isinstance(x, str) for x in files.values())
    for files in inputs.values()
  ):
    raise ValueError(
      f"{config}: {_INPUTS} are not fingerprints, {{field: {{file: text}}}}; restore it, or use "
      "another workdir"
    )
  return content


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file as `write_text` writes text, with null for NaN and infinity."""
  write_text(path, outputs.as_json(value, indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a text file completely or not at all: a reader never sees a partial file.

  Raises:
    OSError: as `writing` does; the file keeps its old contents.
  """
  with writing(path):
    outputs.write_text(path, text)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Wraps the writing of a run's file or folder.

  Raises:
    OSError: for any error of the system, with the path and a remedy.
  """
  try:
    yield
  except OSError as error:
    raise OSError(
      f"{path}: cannot be written ({error.strerror or error}). If the disk is full make room; the "
      "same command then goes on from the last checkpoint"
    ) from error


def fingerprint(config: Mapping[str, Any]) -> str:
  """Sixteen hexadecimal digits that identify a config, for any order of its fields."""
  canonical = json.dumps(_as_json(config), sort_keys=True)
  return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """The config as JSON will return it: tuples are lists, keys are strings."""
  try:
    # By name, since config.json is read again, and an infinite limit is a valid setting.
    return json.loads(outputs.as_json(config, not_finite=str))
  except (TypeError, ValueError) as error:
    raise TypeError(f"the config cannot be written as JSON: {error}") from error


def _open_lock(path: pathlib.Path) -> TextIO:
  """Opens or creates the lock; a file that is not a lock is never written to."""
  wrong = f"{path}: is not the lock of a run but {{}}; delete it, or use another workdir"
  try:
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
  except OSError as error:
    if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
      raise
    raise ValueError(wrong.format("a link, a folder or a socket")) from None
  found = os.fstat(number)
  if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
    os.close(number)
    raise ValueError(wrong.format("a pipe, a device, or another file's second name"))
  lock = open(number, "r+", encoding="ascii", errors="replace")  # noqa: SIM115, for the caller
  if lock.read(32).strip("0123456789\n"):
    lock.close()
    raise ValueError(wrong.format("a file of another kind"))
  return lock


def _hold(lock: TextIO, workdir: Workdir) -> None:
  # A record lock belongs to the process and is not inherited by a fork. So neither a killed run nor
  # a data worker that outlives it can leave the folder locked.
  try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    lock.seek(0)
    holder = lock.read(32).strip() or "unknown"
    raise ValueError(
      f"{workdir.path}: another run is at work here (process {holder}); "
      "wait for it, stop it, or use another workdir"
    ) from error
  with writing(workdir.lock):
    lock.seek(0)
    lock.truncate()
    lock.write(f"{os.getpid()}\n")
    lock.flush()


def _clear(workdir: Workdir) -> None:
  """Removes files that a killed run has not completed."""
  # The names that earlier versions used.
  for path in (workdir.config, workdir.metrics, workdir.evaluation, workdir.readme):
    outputs.remove(path.with_name(path.name + ".tmp"))
  for folder in (workdir.path, *workdir.path.glob("members/*")):
    for path in folder.glob(f".{workdir.adapter.name}.[0-9]*"):
      outputs.remove(path)
    outputs.clear(folder)


def _check_others(workdir: Workdir) -> None:
  """Refuses a folder with files that a run would overwrite, and no config of a run."""
  if workdir.config.exists() or not workdir.path.is_dir():
    return
  if workdir.metrics.exists() or workdir.checkpoints.exists():
    raise ValueError(
      f"{workdir.path}: holds a run but no config.json, so it cannot be told whether it is this "
      "run; use another workdir, or delete this one"
    )
  others = [name for name in _OWN if (workdir.path / name).exists()]
  if others:
    raise ValueError(
      f"{workdir.path}: holds {', '.join(others)}, which no run wrote and a run would overwrite; "
      "use another workdir"
    )


def _holds_work(workdir: Workdir) -> bool:
  """True if a folder holds something to lose."""
  if any((workdir.path / name).exists() for name in ("adapter", "model", "members")):
    return True
  if workdir.metrics.exists() and _has_line(workdir.metrics):
    return True
  # An incomplete checkpoint has another name.
  saved = workdir.checkpoints.iterdir() if workdir.checkpoints.is_dir() else ()
  return any(path.name.isdecimal() or path.name.startswith("damaged-") for path in saved)


def _has_line(path: pathlib.Path) -> bool:
  with files.open_regular(path) as file:
    return any(b"\n" in part for part in iter(lambda: file.read(1 << 20), b""))


def _clear_results(workdir: Workdir) -> None:
  """Removes the leftovers of a run without results, which do not belong to another run."""
  for name in _OWN:
    outputs.remove(workdir.path / name)


def _settle_config(workdir: Workdir, wanted: dict[str, Any]) -> None:
  """Writes the config into a free folder; compares it with that of a folder in use."""
  if not workdir.config.exists():
    write_json(workdir.config, wanted)
    return
  if not _holds_work(workdir):
    if read_config(workdir.path) != wanted:
      _clear_results(workdir)
      write_json(workdir.config, wanted)
    return
  found, wanted = _fields(read_config(workdir.path)), _fields(wanted)
  names = [name for name in found | wanted if found.get(name, _ABSENT) != wanted.get(name, _ABSENT)]
  if names:
    pairs = [(name, found.get(name, _ABSENT), wanted.get(name, _ABSENT)) for name in sorted(names)]
    lines = [f"  {name:.200}: {shown(was)} there, {shown(now)} now" for name, was, now in pairs]
    raise ValueError(
      f"{workdir.path}: holds a run with a different config:\n"
      + _listed(lines)
      + "\nUse another workdir, or delete this one"
    )


def _listed(lines: list[str], most: int = 100) -> str:
  more = [f"  and {len(lines) - most} more"] if len(lines) > most else []
  return "\n".join([*lines[:most], *more])


class _Absent:
  def __repr__(self) -> str:
    return "absent"


_ABSENT = _Absent()


def _fields(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{"lora.rank": 8}` for `{"lora": {"rank": 8}}`; an empty mapping is a field of its own."""
  fields = {}
  for name, value in config.items():
    if isinstance(value, dict) and value:
      fields |= _fields(value, f"{prefix}{name}.")
    else:
      fields[prefix + name] = value
  return fields
