"""Splits a data set by a hash of its text, so that no sentence stands in two splits.

  parts = split(records, "text", {"train": 0.9, "validation": 0.05, "test": 0.05})
  parts["test"]

Where a record goes depends on its own text alone: not on the order, the other records, a seed or
the process (Python's `hash` differs from one to the next). A data set can grow, and what was held
out stays held out. The exception is a data set so small that a split would be empty: it gets one
text of the largest split.
"""

import collections
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence

from lora_jax.data.records import Record, require

_POINT_BYTES = 6  # 48 bits: a float64 holds every quotient exactly, so that a point is below 1


def normalise(text: str) -> str:
  """Returns what two spellings of a sentence share: casefolded, runs of white space as one."""
  return " ".join(text.casefold().split())


def split(
  records: Sequence[Record], column: str, fractions: Mapping[str, float]
) -> dict[str, list[Record]]:
  """Returns the records of each split, in their order.

  u = SHA-256(normalise(text)) / 2^256 lies in [0, 1); a record goes to the split i for which
  fractions[0] + ... + fractions[i - 1] <= u < fractions[0] + ... + fractions[i].

  A split that would be empty gets, from the split with the most texts, the text whose u is nearest.
  Where there are fewer texts than splits, the first split is filled first, then the others from the
  last, and the rest stay empty.

  Args:
    records: as `lora_jax.data.records.read` returns them.
    column: the column that decides; records that agree on it (see `normalise`) stay together.
    fractions: {name of the split: its expected share}, all positive, with the sum 1.

  Raises:
    ValueError: no records, a missing column, or fractions that are not shares of 1.
  """
  shares = list(fractions.values())
  if not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
    raise ValueError(f"fractions {dict(fractions)} must be positive and have the sum 1")
  require(records, [column], "split")
  names = list(fractions)
  bounds = list(itertools.accumulate(shares))[:-1]  # the last split takes the rest, rounding too
  points = [_point(str(record[column])) for record in records]
  places = {point: sum(point >= bound for bound in bounds) for point in points}
  if len(set(places.values())) < len(names):
    _fill(places, [0.0, *bounds, 1.0])
  parts = {name: [] for name in names}
  for record, point in zip(records, points, strict=True):
    parts[names[places[point]]].append(record)
  return parts


def _fill(places: dict[float, int], edges: Sequence[float]) -> None:
  """Moves points into splits that have none.

  Args:
    places: `{point: its split}`, changed in place.
    edges: of the splits' intervals, one more than there are splits.
  """
  splits = range(len(edges) - 1)
  order = (splits[0], *reversed(splits[1:]))
  for rank, empty in enumerate(order):
    counts = collections.Counter(places.values())
    # The only text of a split is taken where that one comes later.
    givers = [n for n in splits if counts[n] > 1] or [n for n in order[rank:] if counts[n]]
    if counts[empty] or not givers:
      continue
    largest, (low, high) = max(givers, key=lambda n: counts[n]), edges[empty : empty + 2]
    there = [point for point, place in places.items() if place == largest]
    places[min(there, key=lambda point: (max(low - point, point - high), point))] = empty


def without(records: Sequence[Record], held_out: Sequence[Record], column: str) -> list[Record]:
  """Returns the records whose text is not among the held-out ones.

  For data sets that come already split into files: some publish the same sentence in two of them.

  Args:
    records: the records to choose from, usually the training part.
    held_out: the records that must not be among them.
    column: the column that is compared, see `normalise`.

  Raises:
    ValueError: no records on either side, or a missing column.
  """
  require(records, [column], "without: records")
  require(held_out, [column], "without: held_out")
  taken = {normalise(str(record[column])) for record in held_out}
  return [record for record in records if normalise(str(record[column])) not in taken]


def _point(text: str) -> float:
  # JSON may carry half of a surrogate pair, which plain UTF-8 cannot encode.
  digest = hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:_POINT_BYTES], "big") / 256**_POINT_BYTES
