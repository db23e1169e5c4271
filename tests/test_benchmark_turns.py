"""`benchmarks.turns`: what is compared runs in turns, and ratios are of one round."""

import time

import jax.numpy as jnp

from benchmarks import turns


def test_rows_take_turns_in_an_order_that_alternates():
  taken = []
  rows = {name: lambda name=name: taken.append(name) or float(len(taken)) for name in "xy"}
  assert turns.run_in_turns(rows, rounds=3) == {"x": [1.0, 4.0, 5.0], "y": [2.0, 3.0, 6.0]}
  assert taken == ["x", "y", "y", "x", "x", "y"]


def test_a_ratio_is_the_median_of_the_rounds_with_its_quartiles():
  # The ratio of the medians would be 1.
  assert turns.ratio([1.0, 4.0, 9.0], [4.0, 2.0, 3.0]) == "2.00 (1.12–2.50)"
  assert turns.ratio([1.0], [4.0]) == "0.25"


def test_a_row_is_timed_to_its_result():
  assert turns.timed(lambda: time.sleep(0.02) or jnp.ones(3))() > 0.02
