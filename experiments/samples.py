"""A few held-out examples with what the model makes of them, before training and after, for people.

chosen = choose(held_out, 4)
kept = task.given(chosen)                # [{"prompt": ..., "wanted": ...}, ...]
add(kept, "before", show(weights))       # [{"prompt": ..., "wanted": ..., "before": ...}, ...]
"""

from collections.abc import Callable, Sequence
from typing import Any

from lora_jax import sharding
from lora_jax.io import outputs
from lora_jax.run import workdir

PyTree = Any
Sample = dict[str, str]


def choose(examples: Sequence[Any], count: int) -> list[Any]:
  """So many of the examples, evenly spread over them; all, where there are no more."""
  count = min(count, len(examples))
  return [examples[n * len(examples) // count] for n in range(count)]


def check(kept: Sequence[Sample], given: Sequence[Sample]) -> None:
  """Raises ValueError unless a run's samples are those of these examples, as they were chosen when
  it began: a run from before its data had fingerprints may resume on other data."""
  same = len(kept) == len(given) and all(
    own.items() <= sample.items() for sample, own in zip(kept, given, strict=True)
  )
  if not same:
    raise ValueError(
      "eval.json: the held-out examples are not those that the run began with; the data or the "
      "tokenizer has changed. Put back what was there, or use another workdir"
    )


def add(samples: Sequence[Sample], when: str, texts: Sequence[str]) -> None:
  """Adds a text to each sample."""
  for sample, text in zip(samples, texts, strict=True):
    sample[when] = text


def draw(case: Any, samples: Sequence[Sample], run: workdir.Workdir) -> None:
  """Draws the case's chosen examples with what was shown of them, where the task has a picture."""
  if drawn := case.task.draw(case.chosen, samples):
    with workdir.writing(run.picture), outputs.whole_file(run.picture) as partial:
      drawn(partial)


def make_show(case: Any, apply: Callable) -> Callable[[PyTree], list[str]]:
  """Makes `weights -> what the model makes of each of the case's chosen examples`.

  If there are several processes, all must call it.
  """
  if not case.chosen:
    return lambda weights: []
  return case.task.make_show(apply, case.chosen, put=sharding.gather, share=case.mesh.size)
