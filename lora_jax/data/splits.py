"""Splits a data set by a hash of its text, so that no sentence is in two splits.

  parts = split(records, "text", {"train": 0.9, "validation": 0.05, "test": 0.05})
  parts["test"]

The split of a record depends only on its own text: not on the order, the other records, a seed or
the process (Python's `hash` differs between processes). A data set can grow, and held-out records
stay held out. The exception is a data set so small that a split would be empty: that split gets one
text of the largest one.
"""

import collections
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence

from lora_jax.data.records import Record, require

_POINT_BYTES = 6  # 48 bits: exact in float64, so that a point is below 1


def normalise(text: str) -> str:
  """Returns the text casefolded, with runs of white space collapsed to one space."""
  return " ".join(text.casefold().split())


def split(
  records: Sequence[Record], column: str, fractions: Mapping[str, float]
) -> dict[str, list[Record]]:
  """Returns the records of each split, in their order.

  u = SHA-256 of `normalise(text)` / 2^256 lies in [0, 1); a record goes to the split i for which
  fractions[0] + ... + fractions[i - 1] <= u < fractions[0] + ... + fractions[i].

  A split that would be empty gets the text with the nearest u from the split with the most texts.
  With fewer texts than splits, the first split is filled first, then the others from the last, and
  the rest stay empty.

  Args:
    records: from `lora_jax.data.records.read`.
    column: the column that is hashed; records with the same text (see `normalise`) stay together.
    fractions: {name of the split: its expected fraction}, all positive, with the sum 1.

  Raises:
    ValueError: for no records, a missing column, or fractions that do not sum to 1.
  """
  shares = list(fractions.values())
  if not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
    raise ValueError(f"fractions {dict(fractions)} must be positive and have the sum 1")
  require(records, [column], "split")
  names = list(fractions)
  bounds = list(itertools.accumulate(shares))[:-1]  # the last split takes the rest
  points = [_point(str(record[column])) for record in records]
  places = {point: sum(point >= bound for bound in bounds) for point in points}
  if len(set(places.values())) < len(names):
    _fill(places, [0.0, *bounds, 1.0])
  parts = {name: [] for name in names}
  for record, point in zip(records, points, strict=True):
    parts[names[places[point]]].append(record)
  return parts


def _fill(places: dict[float, int], edges: Sequence[float]) -> None:
  """Moves points into empty splits.

  Args:
    places: `{point: its split}`, modified in place.
    edges: of the splits' intervals, one more than there are splits.
  """
  splits = range(len(edges) - 1)
  order = (splits[0], *reversed(splits[1:]))
  for rank, empty in enumerate(order):
    counts = collections.Counter(places.values())
    # The only text of a split is moved if that split is filled later.
    givers = [n for n in splits if counts[n] > 1] or [n for n in order[rank:] if counts[n]]
    if counts[empty] or not givers:
      continue
    largest, (low, high) = max(givers, key=lambda n: counts[n]), edges[empty : empty + 2]
    there = [point for point, place in places.items() if place == largest]
    places[min(there, key=lambda point: (max(low - point, point - high), point))] = empty


def without(records: Sequence[Record], held_out: Sequence[Record], column: str) -> list[Record]:
  """Returns the records whose text is not among the held-out ones.

  This is for data sets that are published as several files, some with the same sentence in two.

  Args:
    records: the records to choose from, usually the training set.
    held_out: the records to exclude.
    column: the column to compare, see `normalise`.

  Raises:
    ValueError: for no records on either side, or a missing column.
  """
  require(records, [column], "without: records")
  require(held_out, [column], "without: held_out")
  taken = {normalise(str(record[column])) for record in held_out}
  return [record for record in records if normalise(str(record[column])) not in taken]


def _point(text: str) -> float:
  # JSON may contain half of a surrogate pair, which plain UTF-8 cannot encode.
  digest = hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).digest()
  return int.from_bytes(digest[:_POINT_BYTES], "big") / 256**_POINT_BYTES
