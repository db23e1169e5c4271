"""The benchmark of low-rank attention on a tiny BERT: its rows, and that errors fall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from main_programs import imported

from lora_jax.models import bert

benchmark = imported("benchmarks.low_rank_attention")


@pytest.mark.slow
def test_a_case_has_a_line_for_each_row_and_as_many_landmarks_as_tokens_are_exact():
  config = bert.BertConfig(
    vocab_size=61, width=16, mlp_width=24, num_layers=1, num_heads=2, head_dim=8, max_length=32
  )
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 32)), jnp.int32)
  params = bert.Bert(config).init(jax.random.key(0), tokens)["params"]
  case = benchmark.Case(config, params, tokens, 32, lambda x: x.mean(axis=1))
  lines = benchmark.measure(case, benchmark.rows_of([2, 32]), rounds=2).splitlines()[2:]
  cells = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in lines}
  assert list(cells) == list(benchmark.rows_of([2, 32])) and len(cells) == 6
  errors = {name: float(row[0]) for name, row in cells.items()}
  assert errors["exact, blockwise"] < 1e-3 and errors["linformer, 32"] < 1e-3
  assert errors["nystrom, 32"] < 1e-2 < errors["nystrom, 2"]
  assert cells["exact, plain"][3] == "1.00 (1.00–1.00)"
