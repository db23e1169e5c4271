import re

import numpy as np
import pytest

from lora_jax.run.progress import Progress, stage, watched
from lora_jax.train import step


def test_the_bar_shows_loss_speed_and_time_left_and_goes_on_from_where_it_was(capsys):
  with Progress(start=40, total=42) as progress:
    progress.update(loss=0.7119, tokens_per_second=1234.5)
    progress.update(loss=0.4123, tokens_per_second=812.4)
  text = capsys.readouterr().err
  first, last = text.strip().split("\r")[0], text.strip().split("\r")[-1]
  assert first.startswith("train:  95%") and "40/42 [" in first
  assert last.startswith("train: 100%") and "42/42 [" in last
  assert last.endswith("<00:00, loss 0.412, 812 tokens/s]")


def test_a_log_file_is_not_filled_with_bars(capsys):
  with Progress(start=0, total=500) as progress:
    for _ in range(500):
      progress.update(loss=1.0, tokens_per_second=1.0)
  assert capsys.readouterr().err.count("\r") <= 4


def test_the_bar_says_what_is_waited_for_until_the_next_step(capsys):
  with Progress(start=0, total=2) as progress:
    progress.say("saving")
    progress.update(loss=1.0, tokens_per_second=1.0)
  saving, last = capsys.readouterr().err.strip().split("\r")[1:]
  assert saving.endswith("saving]")
  assert last.endswith("loss 1.000, 1 tokens/s]")


def test_a_shape_is_said_to_be_compiled_when_it_is_first_met_and_never_again(capsys):
  batches = [{"tokens": np.zeros(shape)} for shape in [(2, 8), (2, 16), (2, 8)]]
  compiled = set()
  for _ in range(2):
    shown = watched(batches, "evaluate", compiled=compiled, shape_of=step.shape_of)
    for batch, given in zip(shown, batches, strict=True):
      assert batch is given
  first, second = capsys.readouterr().err.split("evaluate: 100%")[:2]
  assert first.count("compiling for 2 × 8 tokens") == first.count("compiling for 2 × 16") == 1
  assert "compiling" not in second


def test_a_bar_that_is_not_to_stay_is_taken_away(capsys):
  assert list(watched("abc", "validate", leave=False)) == ["a", "b", "c"]
  assert capsys.readouterr().err.endswith("\r")


def test_a_stage_tells_what_is_begun_and_how_long_it_took_even_if_it_fails(capsys):
  with pytest.raises(ValueError), stage("start the adapters"):
    raise ValueError
  assert re.fullmatch(r"start the adapters \.\.\. 0\.\d s\n", capsys.readouterr().err)


def test_what_is_disabled_says_nothing(capsys):
  with stage("load", disable=True), Progress(start=0, total=1, disable=True) as progress:
    progress.say("saving")
    assert list(watched("ab", "load", disable=True)) == ["a", "b"]
  assert capsys.readouterr().err == ""
