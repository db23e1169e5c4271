"""The training loop: steps, log lines at intervals, checkpoints, and a clean exit.

    state = fit(state, frozen, train_step, batches, steps=100, ...)

It does not wait for the step that it has just started: the metrics are read one step late, while
the device computes the next one. It waits only to evaluate and to save.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from lora_jax.run.progress import compiling
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.step import Batch, State
from lora_jax.train.step import shape_of as shape_of_tokens

PyTree = Any


class Batches(Protocol):
  """An endless iterator of batches with a position that can be saved, such as grain's."""

  def __next__(self) -> Batch: ...

  def get_state(self) -> dict[str, Any]: ...


class Writer(Protocol):
  """The interface of `lora_jax.run.metrics.MetricsWriter` that the loop uses."""

  def write(self, step: int, metrics: dict[str, float]) -> None: ...


class Bar(Protocol):
  """The interface of `lora_jax.run.progress.Progress` that the loop uses."""

  def update(self, *, loss: float, tokens_per_second: float) -> None: ...

  def say(self, what: str) -> None: ...


class Interrupted(Exception):
  """Raised when a signal asks the run to stop; the message says what is saved."""


class StoppedAtOnce(Interrupted):
  """Raised when a signal arrives while there is nothing to save."""

  def __str__(self) -> str:
    kept = "the checkpoints stay, and the same command goes on from the last of them"
    return f"stopped at once; {kept}"


def fit(
  state: State,
  frozen: PyTree,
  train_step: Callable,
  batches: Batches,
  *,
  steps: int,
  learning_rate: optax.Schedule,
  log_every: int,
  log_at: Collection[int] = (),
  checkpoint_every: int,
  evaluate_every: int,
  evaluate: Callable[[State, PyTree], dict[str, Any]],
  checkpoints: Checkpoints,
  writer: Writer,
  progress: Bar,
  shape_of: Callable[[Batch], tuple[int, ...]] = shape_of_tokens,
  unit: str = "token",
) -> State:
  """Trains from `state.step` to `steps`, and saves the final state.

  Ctrl-C or SIGTERM finishes the step, saves and raises `Interrupted`; a second one takes effect at
  once. With several processes, SIGTERM at any of them does this in all, at the same step.

  Args:
    state: the initial state; it is donated. May be a `lora_jax.train.members.Members`: the metrics
      of its step are arrays with an entry for each member, logged as `loss/0`, ...
    frozen: the rest of the weights, as `lora_jax.partition` returns it.
    train_step: as `make_train_step` returns it.
    batches: at the position that belongs to `state`.
    steps: the steps of the whole run, including those before `state`.
    learning_rate: the optimizer's schedule, for the log.
    log_every: steps between two lines of the log; the last step has one too.
    log_at: further steps with a line.
    checkpoint_every: steps between two checkpoints.
    evaluate_every: steps between two evaluations; 0 for none.
    evaluate: maps the state and `frozen` to metrics, which are logged as `validation/<name>`; for
      members to arrays, with NaN for members without a value.
    checkpoints: where to save.
    writer: gets the step's loss, grad_norm, loss_tokens, learning_rate, tokens_per_second (tokens
      of the batches, including padding, per time of the steps since the last line) and validation
      metrics.
    shape_of: the rows and the tokens of a row of a batch; each shape compiles once.
    unit: the name of these tokens, in the singular; the log's names do not change.
    progress: gets the loss and the tokens per second of each step, and the work between steps.

  Returns:
    The state after `steps` steps.

  Raises:
    FloatingPointError: at a loss or gradient that is not finite; for members, if none is left. The
      checkpoints are kept, and the message names the last one.
    Interrupted: after a signal.
    OSError: if a checkpoint or the log cannot be written.
    ValueError: if an interval is less than one step, or the batches end too early.
  """
  if min(log_every, checkpoint_every) < 1 or evaluate_every < 0:
    raise ValueError(
      f"log_every is {log_every}, checkpoint_every {checkpoint_every} and evaluate_every "
      f"{evaluate_every}; the first two must be at least 1, the last at least 0 (for none)"
    )
  # All rates at once, ahead of training: a rate computed per step would wait for the running step.
  rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(steps)))
  ends = {*log_at, steps}
  meter = _Meter()
  late = None
  compiled = set()

  def read(done: _Done) -> None:
    values = jax.device_get(done.metrics)
    if not np.any(values["finite"]):
      raise FloatingPointError(_describe_divergence(done.step, values, checkpoints))
    meter.add(done.tokens)
    if done.validation or done.step % log_every == 0 or done.step in ends:
      line = {
        "loss": values["loss"],
        "grad_norm": values["grad_norm"],
        "learning_rate": rates[done.step - 1],
        "loss_tokens": values["loss_tokens"],
        "tokens_per_second": meter.rate(),
      }
      writer.write(done.step, _numbers(line | done.validation))
      meter.restart()
    progress.update(loss=_mean(values["loss"]), tokens_per_second=meter.rate())

  with _signals() as received:
    for step in range(int(state.step) + 1, steps + 1):
      batch = _next(batches, step, steps)
      checkpoints.check()
      shape = shape_of(batch)
      if shape not in compiled:
        progress.say(compiling(shape, unit))
        compiled.add(shape)
      state, metrics = train_step(state, frozen, batch)
      done = _Done(step, metrics, tokens=math.prod(shape))
      if late:
        read(late)
      late = done
      if evaluate_every and step % evaluate_every == 0:
        progress.say("validating")
        with meter.paused(metrics):
          scores = evaluate(state, frozen)
          done.validation = {f"validation/{name}": score for name, score in scores.items()}
      stopping = bool(received) or multihost_utils.reached_preemption_sync_point(step)
      if step % checkpoint_every == 0 or step == steps or stopping:
        # A checkpoint holds only values that are known to be finite.
        read(late)
        late = None
        progress.say("saving")
        with meter.paused(metrics):
          checkpoints.save(state, batches.get_state())
      if stopping:
        raise Interrupted(
          f"stopped by {received[0] if received else 'SIGTERM'} at step {step} of {steps}; "
          f"saved in {checkpoints.latest()}; the same command goes on from there"
        )
  checkpoints.wait()
  return state


def _numbers(line: dict[str, Any]) -> dict[str, float]:
  """A line as plain numbers: arrays of members become `name/0`, `name/1`, ..., without NaNs."""
  numbers = {}
  for name, value in line.items():
    each = np.asarray(value)
    entries = {f"{name}/{n}": x for n, x in enumerate(each.ravel().tolist()) if math.isfinite(x)}
    numbers |= entries if each.ndim else {name: each.item()}
  return numbers


def _mean(losses: np.ndarray) -> float:
  """The loss, or the mean over the members that have one."""
  known = losses[np.isfinite(losses)]
  return known.mean().item() if known.size else math.nan


@dataclasses.dataclass
class _Done:
  """A started step whose metrics are not read yet."""

  step: int
  metrics: dict[str, jax.Array]
  tokens: int
  validation: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Meter:
  """Measures the tokens per second of the steps, without pauses."""

  def __init__(self):
    self._last = 0.0
    self.restart()

  def restart(self) -> None:
    self._tokens, self._start = 0, time.perf_counter()

  def add(self, tokens: int) -> None:
    self._tokens += tokens
    self._last = self._tokens / max(time.perf_counter() - self._start, 1e-9)

  def rate(self) -> float:
    """The rate since the last restart, or before it if nothing was added since."""
    return self._last

  @contextlib.contextmanager
  def paused(self, running: Any) -> Iterator[None]:
    """Leaves out the time of the block, but not that of the step that still runs."""
    jax.block_until_ready(running)
    begin = time.perf_counter()
    yield
    self._start += time.perf_counter() - begin


def _next(batches: Batches, step: int, steps: int) -> Batch:
  try:
    return next(batches)
  except StopIteration:
    raise ValueError(
      f"the data ended before step {step} of {steps}; repeat it, or train for {step - 1} steps"
    ) from None


def _describe_divergence(step: int, metrics: dict[str, float], checkpoints: Checkpoints) -> str:
  latest = checkpoints.latest()
  kept = f"the last good checkpoint is {latest}" if latest else "no checkpoint was saved before it"
  what = f"the loss is {metrics['loss']} and the gradient norm {metrics['grad_norm']}"
  if np.ndim(metrics["loss"]):
    what = "the loss or the gradient of the last member that was left is not finite"
  return f"step {step}: {what}; {kept}; try a lower learning rate or clip_norm in a new workdir"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Lets Ctrl-C and SIGTERM end a run at once where `fit` is not running, with nothing to save.

  Raises:
    StoppedAtOnce: after a signal.
  """
  handled = _handles_signals()
  # Not Interrupted itself, which the running code may take for an error of its own.
  previous = signal.signal(signal.SIGTERM, signal.default_int_handler) if handled else None
  try:
    yield
  except (KeyboardInterrupt, SystemError) as error:
    # A signal that arrives inside a C function may appear as an error of that function.
    if KeyboardInterrupt not in (type(error), type(error.__cause__)):
      raise
    raise StoppedAtOnce from None
  finally:
    if handled:
      signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _handles_signals() -> bool:
  """True if Python's signal handlers can be set here.

  Only the main thread may set handlers; in other threads signals keep their meaning. With several
  processes JAX handles SIGTERM itself, and lets them agree on the step to stop at.
  """
  is_main = threading.current_thread() is threading.main_thread()
  return is_main and not jax.distributed.is_initialized()


@contextlib.contextmanager
def _signals() -> Iterator[list[str]]:
  """Collects the names of SIGINT and SIGTERM instead of ending the process, each once."""
  received = []
  if not _handles_signals():
    yield received
    return

  def note(number: int, frame: Any) -> None:
    name, before = signal.Signals(number).name, previous[signal.Signals(number)]
    if name in received and callable(before):
      before(number, frame)
    received.append(name)
    if not callable(before):
      signal.signal(number, before)

  previous = {
    number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)
  }
  for number in previous:
    signal.signal(number, note)
  try:
    yield received
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)
