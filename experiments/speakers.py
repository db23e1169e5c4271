"""Models that write texts for people: one alone, or a run's with its adapter; conversations.

    speaker = of_run("runs/mine", fetch=False)      # its configuration and its tokenizer are read
    with speaker.prompts(None, None) as prompts:
      ids = prompts.ask(messages.check_asked(record))
    found, adapted = speaker.load()                 # its weights are loaded

Prompts are so refused before weights are loaded.
"""

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from experiments import inputs, methods, parts
from lora_jax import exchange
from lora_jax.data import chat_templates, chat_tokens
from lora_jax.data.messages import Conversation
from lora_jax.io.pretrained import Pretrained
from lora_jax.run import workdir
from lora_jax.tasks import Task
from lora_jax.tasks.writing import ChatFormat

PyTree = Any

_INSTEAD = "experiments.predict answers by a run of it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speaker:
  """A model that writes texts.

  name: for people.
  shapes: the model, with shapes instead of arrays.
  task: of its run, on the model; None without a run.
  load: the model, and its weights with the run's adapter alongside, which has no copy of them;
    without a run None.
  """

  name: str
  shapes: Pretrained
  task: Task | None
  load: Callable[[], tuple[Pretrained, PyTree | None]]

  @contextlib.contextmanager
  def prompts(self, template: str | None, date: str | None) -> Iterator["Prompts"]:
    """Yields how conversations are written for it.

    Args:
      template: by name, or a file; None for the run's, or the model's own.
      date: what templates that ask for the day are told, a flag; None for the run's, or today.

    Raises:
      ValueError: for a template that does not do, and a run whose task writes no texts.
      FileNotFoundError: for a file that is not there.
    """
    format = self.task.chat_format if self.task else ChatFormat()
    if date:
      chat_templates.check_date("--date", date)
    date = date or format.date or datetime.date.today().isoformat()
    tokenizer = self.shapes.tokenizer
    with chat_templates.renderers(tokenizer, template or format.template, date) as renderer:
      yield Prompts(tokenizer, renderer)


class Prompts:
  """Conversations as tokens that a model goes on from.

  stop_ids: the tokens at which an answer ends.
  """

  def __init__(self, tokenizer: Any, renderer: Callable[[bool], chat_templates.Renderer]):
    self._tokenizer, self._renderer = tokenizer, renderer
    self.stop_ids = chat_tokens.stop_ids(renderer(False), tokenizer)

  def ask(self, conversation: Conversation) -> list[int]:
    """As `chat_tokens.ask`."""
    return chat_tokens.ask(
      conversation, self._renderer(conversation.tools is not None), self._tokenizer
    )


def of_source(source: str) -> Speaker:
  """A model alone, by its address; raises ValueError for one that writes no texts."""
  shapes = parts.inspect_source(source)
  parts.check_writes(shapes, _INSTEAD)
  return Speaker(
    name=source,
    shapes=shapes,
    task=None,
    load=lambda: (parts.load_source(source), None),
  )


def of_run(path: str, *, fetch: bool) -> Speaker:
  """A run's model with its adapter.

  Args:
    path: the run's folder.
    fetch: whether what its config names may be downloaded.

  Raises:
    ValueError: as `parts.open_run` does, and for a model that writes no texts.
    FileNotFoundError: as `inputs.require_of` does.
  """
  run, config = parts.open_run(path)
  inputs.require_of(run, config, ["model.source"], fetch=fetch)
  inputs.warn_of_changes(run, config, ["model.source"])
  shapes = parts.extend(parts.read_shapes(config.model), parts.make_task(config), config)
  parts.check_writes(shapes, _INSTEAD)
  return Speaker(
    name=f"{config.model.source} with the adapter of {run.path}",
    shapes=shapes,
    task=parts.make_task(config).of_model(shapes),
    load=lambda: load_run(run, config),
  )


def load_run(run: workdir.Workdir, config: ConfigDict) -> tuple[Pretrained, PyTree]:
  """A finished run's base, and its weights with the adapter."""
  found = methods.load_base(config)
  axes = parts.trace_axes(parts.make_model(found.config), found.params)
  adapters: Mapping[str, Any] = exchange.load(run.adapter, found.params, axes, table=found.table)
  return found, methods.finish(config, found.params, adapters, axes)
