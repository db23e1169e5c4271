import jax
import jax.numpy as jnp
import pytest
from abstract_run import SMOLLM2, UNTIED, make_run

from lora_jax import cost
from lora_jax.train.plan import make_plan

# Compiled within a second or two each.
QUICK = {
  "scanned": {},
}
SLOW = {
  "in two parts": {"parts": 2},
  "the base itself": {"full": True},
  "everything computed again": {"remat": "nothing"},
  "products kept, rank 32": {"remat": "dots", "rank": 32},
  "the base itself, everything computed again": {"full": True, "remat": "nothing"},
  "unrolled": {"scan_layers": False},
  "unrolled, all logits": {"scan_layers": False, "targets": 64},
  "unrolled, untied": {"config": UNTIED, "scan_layers": False},
  "rank 32": {"rank": 32},
  "large batch": {"rows": 8, "length": 128},
  "all logits": {"targets": 64},
  "logits in chunks": {"targets": 64, "chunk": 16},
  "packed": {"packed": True, "targets": 8},
  "packed, in two parts, logits in chunks": {
    "packed": True, "parts": 2, "targets": 8, "remat": "dots", "chunk": 4,
  },
  "the base itself, untied": {
    "config": UNTIED, "rows": 8, "length": 128, "full": True, "remat": "nothing",
  },
  "untied": {"config": UNTIED},
  "untied, all logits": {"config": UNTIED, "rows": 8, "targets": 64},
  "untied, products kept": {"config": UNTIED, "rows": 8, "length": 128, "remat": "dots"},
  "untied, logits in chunks": {
    "config": UNTIED, "rows": 8, "length": 128, "targets": 128, "chunk": 32, "remat": "nothing",
  },
  "SmolLM2": {"config": SMOLLM2, "rows": 16, "length": 80},
  "SmolLM2, products kept": {"config": SMOLLM2, "rows": 16, "length": 80, "remat": "dots"},
  "SmolLM2, all logits": {
    "config": SMOLLM2, "rows": 8, "length": 128, "targets": 128, "remat": "nothing",
  },
  "SmolLM2, logits in chunks, in two parts": {
    "config": SMOLLM2, "rows": 8, "length": 128, "targets": 128, "chunk": 32, "parts": 2,
  },
}  # fmt: skip


def compiled(run):
  return run.train_step.lower(run.state, run.frozen, run.batch).compile()


def assert_planned(case):
  run = make_run(**case)
  plan, report = make_plan(run), compiled(run).memory_analysis()
  assert plan.arguments == report.argument_size_in_bytes
  reported = report.argument_size_in_bytes + report.temp_size_in_bytes
  assert plan.total == pytest.approx(reported, rel=0.1)
  # The activations are not hidden behind a large base.
  assert plan.activations == pytest.approx(report.temp_size_in_bytes, rel=0.15)


@pytest.mark.parametrize("name", QUICK)
def test_the_plan_is_what_the_compiler_reports(name):
  assert_planned(QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_plan_is_what_the_compiler_reports_of_more_and_larger_steps(name):
  assert_planned(SLOW[name])


@pytest.mark.parametrize(
  "case",
  [
    {"remat": "nothing"},
    *(
      pytest.param(case, marks=pytest.mark.slow)
      for case in ({}, {"full": True}, {"packed": True, "targets": 8})
    ),
  ],
)
def test_the_flops_are_those_that_the_compiler_counts(case):
  # It counts a loop's body once, whatever its length, so nothing is scanned here.
  run = make_run(num_layers=2, scan_layers=False, **case)
  analysis = compiled(run).cost_analysis()
  reported = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
  assert make_plan(run).flops == pytest.approx(reported, rel=0.1)


@pytest.mark.slow
def test_scanned_layers_compute_what_unrolled_ones_do():
  # A loop also computes the gradient of the first layer's input, which nothing needs.
  flops = [make_plan(make_run(scan_layers=scan, num_layers=8)).flops for scan in (True, False)]
  assert 1 < flops[0] / flops[1] < 1.06


def test_a_step_of_adapters_computes_two_thirds_of_full_fine_tuning():
  adapters, full = (make_plan(make_run(UNTIED, rank=1, full=full)) for full in (False, True))
  assert full.trainable == adapters.frozen and full.frozen == 0
  assert adapters.flops / full.flops == pytest.approx(2 / 3, abs=0.02)


def test_every_number_is_counted_where_it_belongs():
  run = make_run(rank=4)
  plan = make_plan(run)
  linear = 4 * (128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 384)
  norms = (2 * 4 + 1) * 128
  assert plan.frozen == 1000 * 128 + linear + norms
  assert plan.trainable == 4 * 4 * (2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 384))
  assert (plan.base, plan.adapters) == (4 * plan.frozen, 4 * plan.trainable)
  counters = plan.optimizer - 2 * plan.adapters
  assert 0 < counters < 100
  assert plan.batch == 4 * (4 * 64 + 3 * 4)
  assert plan.total == plan.arguments + plan.activations


def test_a_base_in_bfloat16_takes_half_the_memory_and_adapters_none_the_less():
  full, half = (
    make_plan(make_run(dtype=dtype, param_dtype=dtype)) for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert half.base == full.base / 2
  assert (half.adapters, half.optimizer) == (full.adapters, full.optimizer)
  assert half.flops == full.flops


def test_what_is_sharded_counts_for_the_part_that_a_device_has():
  mesh = jax.sharding.AbstractMesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  run = make_run()
  place = jax.sharding.NamedSharding(mesh, jax.P(None, "x"))

  def placed(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) if x.ndim == 3 else x

  plan = make_plan(run._replace(frozen=jax.tree.map(placed, run.frozen)))
  whole = make_plan(run)
  stacked = sum(4 * x.size for x in jax.tree.leaves(run.frozen) if x.ndim == 3)
  assert plan.base == whole.base - stacked * 3 // 4
  assert (plan.frozen, plan.flops) == (whole.frozen, whole.flops)


def test_the_share_of_a_device_says_its_activations():
  run, share = make_run(rows=8), make_run(rows=2)
  plan = make_plan(run, share)
  assert plan.activations == make_plan(share).activations + plan.adapters  # the gradients' sum
  assert plan.activations < make_plan(run).activations
  assert make_plan(run, run) == make_plan(run)
  assert plan.flops == make_plan(run).flops


@pytest.mark.slow
@pytest.mark.parametrize("in_turn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_plan_of_members_is_what_the_compiler_reports_of_their_one_program(in_turn):
  plan = make_plan(make_run(rows=2)).of_members(4, in_turn=in_turn)
  program = make_run(rows=2, together=4, in_turn=in_turn)
  report = compiled(program).memory_analysis()
  assert plan.arguments == pytest.approx(report.argument_size_in_bytes, rel=0.01)
  reported = report.argument_size_in_bytes + report.temp_size_in_bytes
  assert plan.total == pytest.approx(reported, rel=0.1)
  jaxpr = jax.make_jaxpr(program.train_step)(program.state, program.frozen, program.batch)
  assert plan.flops == cost.flops(jaxpr)


def test_the_plan_is_a_table():
  text = str(make_plan(make_run()))
  lines = dict(line.rsplit(None, 1) for line in text.splitlines() if line.count(" ") > 1)
  parts = ["base", "what trains", "optimizer", "batch", "activations and gradients"]
  assert sum(float(lines[name]) for name in parts) == pytest.approx(
    float(lines["together"]), abs=0.3
  )
  assert "TFLOP a step" in text
