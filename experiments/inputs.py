"""The inputs of a run: changed files are detected, and nothing is downloaded by default.

workdir.settle_inputs(run, inputs.of_run(config))
inputs.require(run.config, {"model.source": config.model.source}, fetch=False)

A run keeps fingerprints in its config.json. The same command again, or a program that takes the
run's model, holds them against the files as they are.

A folder may come from a stranger, and so may the addresses in its files. A program that takes one
reads what is on this machine: paths, and what is in the caches. A run that was trained here has put
there all that it needs, so it is evaluated as it stands; for another one --fetch must be given.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from absl import logging
from ml_collections import ConfigDict

from experiments import parts, teachers
from lora_jax.data.chat_templates import is_file
from lora_jax.io import assets, fingerprints
from lora_jax.run import workdir

Inputs = dict[str, dict[str, str]]
"""`{field of the config: {file: fingerprint}}`."""


def of_run(config: ConfigDict) -> Inputs:
  """The inputs of training: the data, the base with its tokenizer, the teacher, a chat template.

  Raises:
    FileNotFoundError: when one of them is not there.
  """
  sources = {"model.source": config.model.source, "data.source": config.data.source}
  if config.data.test_source:
    sources["data.test_source"] = config.data.test_source
  if teachers.is_taught(config) and config.distill.teacher != "base":
    sources["distill.teacher"] = config.distill.teacher
  if "task" in config and config.task.get("template") and is_file(config.task.template):
    sources["task.template"] = config.task.template
  return _fingerprints(sources)


def _fingerprints(sources: Mapping[str, str | Sequence[str]]) -> Inputs:
  """Of `{field: address or several}`, each of several under the field with its number."""
  found = {}
  for field, source in sources.items():
    if isinstance(source, str):
      found |= {field: fingerprints.of(source)} if source else {}
    else:
      found |= {f"{field}[{n}]": fingerprints.of(each) for n, each in enumerate(source)}
  return found


def of_import(config: ConfigDict, adapter: str) -> Inputs:
  """The inputs of an import: the adapter's folder, the base, and the evaluation data."""
  return of_run(config) | {"adapter.from": fingerprints.of(adapter)}


def of_compression(config: ConfigDict) -> Inputs:
  """The inputs of a compression: the text, and the task."""
  sources = {"text.source": config.text.source} if config.text.source else {}
  if config.task.examples or not config.text.source:
    data = config.task.data
    sources |= {"task.data.source": data.source, "task.data.test_source": data.test_source}
  return _fingerprints(sources)


def warn_of_changes(run: workdir.Workdir, config: ConfigDict, fields: Iterable[str]) -> None:
  """Warns of files that changed since a finished run was trained."""
  kept = workdir.read_inputs(run.path)
  for name in fields:
    section, _, last = name.partition(".")
    source = config[section][last]
    for field, found in _fingerprints({name: source}).items():
      if field in kept and found != kept[field]:
        logging.warning(
          "%s: %s has changed since the run in %s was trained with it; what follows is of what "
          "lies there now",
          *(field, source, run.path),
        )


def require(file: pathlib.Path, sources: Mapping[str, str | Sequence[str]], *, fetch: bool) -> None:
  """Sees that what a file names is on this machine, and fetches it where that was asked for.

  Args:
    file: that the addresses stand in.
    sources: `{field: address or several}`, as `lora_jax.io.assets.resolve` takes them; empty ones
      are skipped.
    fetch: whether the user allows it.

  Raises:
    FileNotFoundError: when something is not there, with what would be fetched.
    ValueError, ConnectionError: as `assets.resolve` does.
  """
  for field, source in (
    (x, each) for x, found in sources.items() for each in parts.addresses(found)
  ):
    try:
      assets.resolve(source, fetch=fetch)
    except assets.NotFetchedError as error:
      raise FileNotFoundError(
        f"{file}: its {field} is {error}. The file may come from a stranger, so nothing is fetched "
        "for it unasked; if you trust it, give --fetch"
      ) from None
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{file}: its {field} is {error}") from None


def require_of(run: workdir.Workdir, config: ConfigDict, fields: Iterable[str], *, fetch: bool):
  """`require` for fields of a run's config, as "model.source"; ValueError where it lacks one."""
  sources = {}
  for field in fields:
    section, _, name = field.partition(".")
    try:
      sources[field] = config[section][name]
    except (KeyError, TypeError, AttributeError):
      raise ValueError(
        f"{run.config}: has no {field}; restore it, or use another workdir"
      ) from None
  require(run.config, sources, fetch=fetch)
