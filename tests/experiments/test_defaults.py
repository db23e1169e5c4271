"""What `model.remat` and `train.loss_chunk` become where a config leaves them to the program."""

import runpy

import jax
import pytest
import tiny_experiment

from configs import quickstart
from experiments import config_checks, defaults, model_options, parts, planning
from experiments.defaults import Settings


@pytest.fixture(scope="module")
def config(tmp_path_factory, smollm2_tokenizer):
  """Rows of 256 tokens, each of them learnt, on two layers."""
  path = tiny_experiment.write(
    tmp_path_factory.mktemp("defaults"),
    smollm2_tokenizer,
    max_length=256,
    data={"packed_length": 256, "append_eos": True},
  )
  return runpy.run_path(str(path))["get_config"]()


@pytest.fixture(scope="module")
def case(config):
  return planning.read(config)


@pytest.fixture(scope="module")
def mesh(config):
  return planning.abstract_mesh(config.mesh, 1)


def with_fields(config, **fields):
  changed = config.copy_and_resolve_references()
  with changed.ignore_type():
    changed.model.remat = fields.get("remat", "auto")
    changed.train.loss_chunk = fields.get("loss_chunk", "auto")
  return changed


@pytest.fixture(scope="module")
def plans(config, case, mesh):
  """The plan of each rung."""
  found = defaults._rungs(config, case)
  return {x: planning.make_plan(config, x.of_case(case), mesh) for x in found}


@pytest.fixture
def traced_once(plans, monkeypatch):
  """Has what is chosen among find the plans that were traced already."""
  names = {policy: name for name, policy in parts.REMAT_POLICIES.items()}

  def make_plan(config, case, mesh):
    return plans[Settings(names[case.model.remat_policy], case.task.loss_chunk)]

  monkeypatch.setattr(planning, "make_plan", make_plan)


def test_the_first_rung_that_fits_is_taken_and_said(config, case, mesh, plans, traced_once):
  steps = [(settings, planned.total) for settings, planned in plans.items()]
  assert [settings.remat for settings, _ in steps] == ["none", "none", "dots", "nothing"]
  assert [settings.loss_chunk > 0 for settings, _ in steps] == [False, True, True, True]
  sizes = [size for _, size in steps]
  assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
  for settings, size in steps:
    memory = size / defaults._USABLE + 1
    found, line = defaults.choose(config, lambda: case, mesh, memory)
    assert found == settings
    assert f"rematerialization: {settings.remat}" in line and "by the plan" in line
  found, _ = defaults.choose(config, lambda: case, mesh, sizes[-1] / 2)
  assert found == steps[-1][0]  # nothing fits; the smallest is nearest


def test_members_of_a_sweep_need_as_much_each(config, case, mesh, plans, traced_once):
  first, *_ = plans
  memory = 1.5 * plans[first].total / defaults._USABLE
  assert defaults.choose(config, lambda: case, mesh, memory)[0] == first
  assert defaults.choose(config, lambda: case, mesh, memory, members=4)[0] != first


@pytest.mark.slow
def test_what_a_config_says_is_kept(config, case, mesh):
  small = 1
  said = with_fields(config, remat="dots", loss_chunk=32)
  assert defaults.choose(said, None, mesh, small) == (Settings("dots", 32), "")
  found, line = defaults.choose(with_fields(config, remat="dots"), lambda: case, mesh, small)
  assert found.remat == "dots" and found.loss_chunk > 0 and "(train.loss_chunk auto" in line
  found, line = defaults.choose(with_fields(config, loss_chunk=0), lambda: case, mesh, small)
  assert found == Settings("nothing", 0) and "(model.remat auto" in line


def test_nothing_is_traced_where_a_bound_shows_that_it_fits(config, case, mesh, plans):
  batch = case.task.batch_of(case.largest, config.train.batch_size)
  bound = defaults.bound_of(config, case.model, case.params, batch, shares=1)
  assert bound > plans[Settings("none", 0)].total
  memory = bound / defaults._SURE + 1
  found, line = defaults.choose(config, None, mesh, memory, bound=bound)
  assert found == Settings("none", 0) and "sure to fit" in line


def test_the_quickstart_is_sure_to_fit_in_sixteen_gibibytes():
  config = quickstart.get_config()
  config_checks.check_run(config)
  base = parts.read_shapes(config.model)
  shapes = {"tokens": (16, 80), "at": (16, 1)}
  batch = {name: jax.ShapeDtypeStruct(shape, "int32") for name, shape in shapes.items()}
  bound = defaults.bound_of(config, base.config, base.params, batch, shares=1)
  assert bound <= defaults._SURE * 16 * 2**30


def test_a_task_of_one_answer_and_a_taught_run_have_no_chunks(config, case):
  assert defaults.chunk_of(config, case) > 0
  taught = with_fields(config)
  taught.distill.teacher = "base"
  assert defaults.chunk_of(taught, case) == 0
  length, _ = case.largest
  answers = case.data | {"shapes": {(length, 1): 3}}
  assert defaults.chunk_of(config, case.__class__(**vars(case) | {"data": answers})) == 0


@pytest.mark.parametrize("value", ["Auto", -1, 1.5, None, True])
def test_another_chunk_is_refused(value):
  config = quickstart.get_config()
  config.train.loss_chunk = value
  with pytest.raises(ValueError, match=r"train\.loss_chunk is .*; it must be 0 or more.*; or auto"):
    config_checks.check_run(config)


def test_the_implementation_of_attention_is_said_and_refused_with_the_reason(config, case):
  line = model_options.attention_line(case.model, config.data)
  assert line == "attention: plain for rows of 256 tokens (model.attention auto)"
  asked = with_fields(config)
  asked.model.attention = "splash"
  model = parts.inspect_model(asked.model).config
  with pytest.raises(ValueError, match=r"model\.attention: attention 'splash': it runs on a TPU"):
    model_options.attention_line(model, asked.data)
  anywhere = model_options.for_export(model).attention
  assert (anywhere.name, anywhere.device) == ("auto", "cpu")
