"""One run in several processes: the flags by which each finds the others.

    --distributed                                                     # on a cluster
    --coordinator=host:port --num_processes=2 --process_id=0          # by hand

On TPU pods, under SLURM, Open MPI and Kubernetes JAX reads the rest from the environment. Without
these flags a run is of one process. `experiments.launch` starts several on one machine.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from lora_jax.io import outputs
from lora_jax.run import metrics, workdir

_DISTRIBUTED = flags.DEFINE_boolean(
  "distributed", False, "Join the other processes of this job, as the cluster's environment says."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, without a cluster."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.", 1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "By hand: which one this is, from 0.", 0)


def join() -> None:
  """Joins the other processes, if the flags say that there are any; before any use of JAX.

  Only the first process prints from then on.

  Raises:
    ValueError: when the flags for starting by hand are not given together, or there is no cluster.
  """
  by_hand = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  if any(value is not None for value in by_hand):
    if None in by_hand:
      raise ValueError("--coordinator, --num_processes and --process_id are given together")
    jax.distributed.initialize(*by_hand)
  elif _DISTRIBUTED.value:
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise ValueError(
        f"--distributed: the environment is not that of a cluster that JAX knows ({error}); give "
        "--coordinator, --num_processes and --process_id instead"
      ) from None
  if not is_first():
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, open as long as the process


def is_asked() -> bool:
  """Whether this process is to be one of several."""
  return _DISTRIBUTED.value or _COORDINATOR.value is not None


def is_first() -> bool:
  """Whether this is the process that prints, and writes what is written once."""
  return jax.process_index() == 0


def agree(answer: bool) -> bool:
  """The first process's answer, in all; all processes must call it."""
  return bool(multihost_utils.broadcast_one_to_all(np.array(answer)))


def command(*, without: Sequence[str] = (), more: Sequence[str] = ()) -> str:
  """The command that this run was started by, with other flags; that of its launch, if it was.

  Args:
    without: the names of flags to leave out.
    more: arguments to add.
  """
  given = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
  own = ("coordinator", "num_processes", "process_id")
  # As experiments.launch writes them; by hand the flags stay, for there is no other command.
  launched = given.get("--coordinator", "").startswith("127.0.0.1:") and "--num_processes" in given
  left_out = (*without, *own) if launched else without
  program = ["experiments.train", *_without(sys.argv[1:], left_out), *more]
  if launched:
    program = ["experiments.launch", f"--processes={given['--num_processes']}", "--", *program]
  return shlex.join(["python", "-m", *program])


def _without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
  """The arguments less some flags, `--name=value` or `--name value`."""
  kept, is_value = [], False
  for argument in arguments:
    name, equals, _ = argument.lstrip("-").partition("=")
    if is_value:
      is_value = False
    elif argument.startswith("-") and name in names:
      is_value = not equals
    else:
      kept.append(argument)
  return kept


def open_workdir(
  path: str, config: Mapping[str, Any]
) -> contextlib.AbstractContextManager[workdir.Workdir]:
  """As `workdir.open_workdir` in the first process, which holds it; its paths in the others.

  The folder must be one that all processes see.
  """
  if is_first():
    return workdir.open_workdir(path, config)
  return contextlib.nullcontext(workdir.Workdir(outputs.absolute(path)))


def metrics_writer(run: workdir.Workdir, step: int) -> contextlib.AbstractContextManager:
  """The run's MetricsWriter in the first process; in the others, one that writes nothing."""
  if is_first():
    return metrics.MetricsWriter(run.metrics, run.tensorboard, step=step)
  return contextlib.nullcontext(_Silent())


class _Silent:
  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    del step, metrics
