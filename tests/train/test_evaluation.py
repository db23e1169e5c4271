import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.train.evaluation import evaluate, make_eval_step

VOCAB = 6


def apply(variables, tokens_BT, at_BC):
  """A model whose logits are a table: the row of the token at the position."""
  return variables["params"]["table"][jnp.take_along_axis(tokens_BT, at_BC, axis=1)]


def batch(tokens, targets, weights):
  tokens = np.array(tokens, np.int32)
  return {
    "tokens": tokens,
    "at": np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)),
    "targets": np.array(targets, np.int32),
    "weights": np.array(weights, np.float32),
  }


def test_the_answer_is_the_best_choice_at_the_first_position_and_fill_rows_do_not_count():
  table = np.zeros((VOCAB, VOCAB), np.float32)
  table[0, 5] = 9.0  # the best of all ids, but no choice
  table[0, 2] = 1.0  # so token 0 is answered with 2
  table[1, 3] = 1.0  # and token 1 with 3
  rows = [
    batch([[0, 1], [1, 0]], [[2, 0], [2, 3]], [[1, 0], [1, 1]]),  # right, wrong
    batch([[1, 1], [0, 0]], [[3, 4], [2, 2]], [[1, 1], [0, 0]]),  # right, a fill row
  ]
  scores = evaluate(make_eval_step(apply, choices=[2, 3]), {"table": table}, rows)
  assert scores["accuracy"] == pytest.approx(2 / 3)
  assert scores["rows"] == 3
  assert scores["tokens"] == 5


def test_the_loss_is_the_mean_over_tokens_however_they_are_spread_over_batches():
  table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
  tokens, targets = np.random.default_rng(1).integers(0, VOCAB, (2, 6, 3))
  weights = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]] * 2)
  step = make_eval_step(apply, choices=())
  whole = evaluate(step, {"table": table}, [batch(tokens, targets, weights)])
  parts = [batch(tokens[i : i + 2], targets[i : i + 2], weights[i : i + 2]) for i in (0, 2, 4)]
  log_p = table - np.log(np.exp(table).sum(axis=-1, keepdims=True))
  wanted = -np.sum(log_p[tokens, targets] * weights) / weights.sum()
  assert whole["loss"] == pytest.approx(wanted, rel=1e-6)
  assert evaluate(step, {"table": table}, parts)["loss"] == pytest.approx(wanted, rel=1e-6)
  assert "accuracy" not in whole


def test_choices_that_share_their_first_token_are_refused():
  with pytest.raises(ValueError, match=r"\[4, 4\] hold one id twice.*first tokens differ"):
    make_eval_step(apply, choices=[4, 4])


@pytest.mark.parametrize("rows", [[], [batch([[0]], [[0]], [[0]])]], ids=["no batch", "no row"])
def test_an_empty_split_is_refused(rows):
  table = np.zeros((VOCAB, VOCAB), np.float32)
  with pytest.raises(ValueError, match="the split is empty"):
    evaluate(make_eval_step(apply, choices=()), {"table": table}, rows)
