"""`benchmarks.families`: every family of decoders is measured, at one size."""

import numpy as np
import pytest
from main_programs import imported

from lora_jax import families

benchmark = imported("benchmarks.families")


def test_every_family_has_a_model_of_four_layers_of_width_512():
  assert "gemma4_text" in benchmark.DECODERS and "bert" not in benchmark.DECODERS
  for name in benchmark.DECODERS:
    config = benchmark.make_config(name)
    assert config.family == name and config.num_layers == 4
    shapes = families.param_shapes(config)
    assert {shapes["embed/embedding"], shapes["block_3/attn/out/kernel"]} == {
      (4096, 512),
      (512, 512),
    }
    assert 14e6 < sum(np.prod(shape) for shape in shapes.values()) < 24e6


@pytest.mark.slow
def test_a_family_s_row_has_times_and_counts():
  name, floor, ours, ratio, base, trains = benchmark.measure("gpt2", rank=2, rounds=2)
  assert (name, base, trains) == ("gpt2", "14.8M", "65,536")
  floor, ours = (float(x.replace(",", "")) for x in (floor, ours))  # of a busy machine: "1,617.5"
  assert float(ratio.split()[0]) == pytest.approx(ours / floor, rel=0.5)
