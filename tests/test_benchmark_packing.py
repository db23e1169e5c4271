"""`benchmarks.packing`: what it counts, on batches as the data room makes them."""

from main_programs import imported

from lora_jax.data import batches, packing
from lora_jax.data.examples import Example

packing_benchmark = imported("benchmarks.packing")

# An example's input is one token shorter: the last is only an answer.
EXAMPLES = [Example(tokens=tuple(range(1, n + 2)), prompt_length=n, cut=0) for n in (3, 2, 4, 3)]


def test_padding_does_not_count_in_any_way_of_batching():
  ways = {
    "rows": [batches.train_batches(EXAMPLES, 4, buckets=(8,), seed=0, pad_id=0)[0]],
    "packed": [packing.packed_batches(EXAMPLES, 2, length=8, seed=0, pad_id=0)[0]],
  }
  for (batch,) in ways.values():
    assert packing_benchmark.counted(batch).sum() == 12
  table = packing_benchmark.format_table(ways, {"rows": [2.0, 2.0], "packed": [1.0, 0.5]})
  cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
  assert cells[0][:3] == ["rows", "62", "6"]  # 12 of 32 places
  assert cells[1] == ["packed", "25", "18", "3.00 (2.50–3.50)"]  # 12 of 16 places
