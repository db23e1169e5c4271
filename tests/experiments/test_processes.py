"""The command that a run's page gives, for its reader to repeat it."""

import sys

import pytest

from experiments import processes

BY_HAND = ["--coordinator=127.0.0.1:9", "--num_processes", "2", "--process_id=0"]


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["--config=a:b=c", "--workdir=r"], "experiments.train --config=a:b=c --workdir=r"),
    (
      ["--config=a", "--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=0"],
      "experiments.launch --processes=2 -- experiments.train --config=a",
    ),
    (["--config=a", *BY_HAND], f"experiments.train --config=a {' '.join(BY_HAND)}"),
  ],
)
def test_it_is_the_one_that_started_all_processes(monkeypatch, arguments, expected):
  monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
  assert processes.command() == f"python -m {expected}"


def test_flags_are_left_out_in_either_form_and_others_added(monkeypatch):
  given = ["--config=a", "--workdir", "r s", "--config.sweep.grid=()", "--config.seed=--workdir"]
  monkeypatch.setattr(sys, "argv", ["train.py", *given])
  found = processes.command(without=("workdir", "config.sweep.grid"), more=["--workdir=..."])
  assert found == "python -m experiments.train --config=a --config.seed=--workdir --workdir=..."
