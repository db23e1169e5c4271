"""Runs that learn from a teacher: the base without the adapter, or a model of its own."""

import dataclasses
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from main_programs import imported
from scipy import special

import lora_jax
from experiments import parts, planning, sweep_config, teachers
from lora_jax import sharding
from lora_jax.io import export
from lora_jax.models import llama
from lora_jax.run import metrics
from lora_jax.run import workdir as workdir_lib

train = imported("experiments.train")


@pytest.fixture
def make_config(tmp_path, smollm2):
  """A function from fields of the config's `distill` section to a tiny run's config."""

  def make(text="", **distill):
    path = tiny_experiment.write(tmp_path, smollm2.tokenizer, distill=distill)
    return runpy.run_path(str(path))["get_config"](text)

  return make


@pytest.fixture
def other(tmp_path, smollm2):
  """The folder of another model with the same tokens, and what makes it."""
  config = llama.LlamaConfig(
    vocab_size=smollm2.tokenizer.vocab_size,
    width=32,
    mlp_width=48,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
    tie_embeddings=True,
  )
  params = llama.Llama(config).init(jax.random.key(9), jnp.zeros((1, 2), jnp.int32))["params"]
  params = jax.tree.map(lambda x: 3 * x, params)  # further from an even distribution
  export.save(tmp_path / "other", params, config, smollm2.tokenizer)
  return tmp_path / "other"


def losses_of(config, path):
  with workdir_lib.open_workdir(path, config.to_dict()) as run:
    train.train(config, run)
    return [line["loss"] for line in metrics.read_metrics(run.metrics)]


@pytest.mark.slow
def test_an_adapter_that_has_learnt_nothing_says_what_its_base_does(make_config, tmp_path):
  """The divergence from the base is zero while B is, and stays what rounding makes of it."""
  losses = losses_of(make_config(teacher="base", hard=0.0), tmp_path / "run")
  assert abs(losses[0]) < 1e-6 and max(losses) < 0.1


@pytest.mark.slow
def test_a_student_learns_from_another_model(make_config, other, tmp_path):
  """The first loss is the formula's, of both models' own logits, and it falls."""
  config = make_config(teacher=str(other), hard=0.25, hidden=0.5, temperature=3.0)
  losses = losses_of(config, tmp_path / "run")
  assert losses[-1] < 0.9 * losses[0]

  student = parts.load_model(config.model)
  task = parts.make_task(config)
  records = parts.load_records(config.data, task)["train"]
  task = task.of_model(student)
  batch = task.train_batches(task.examples(records), config.train.batch_size, seed=config.seed)[0]
  teacher_section = config.model.copy_and_resolve_references()
  teacher_section.source = str(other)
  read = []
  for found in (student, parts.load_model(teacher_section)):
    model = llama.Llama(found.config)
    variables, at = {"params": found.params}, batch["at"]
    hidden = model.apply(variables, batch["tokens"], at_BC=at, method="hidden")
    logits = model.apply(variables, hidden, method="logits")
    read.append((np.asarray(hidden, np.float64), np.asarray(logits, np.float64)))
  (own_hidden, own), (said_hidden, said) = read
  weights, targets = batch["weights"], batch["targets"]
  soft = 9 * special.rel_entr(special.softmax(said / 3, -1), special.softmax(own / 3, -1)).sum(-1)
  hard = -np.take_along_axis(special.log_softmax(own, -1), targets[..., None], -1)[..., 0]
  squares = np.square(own_hidden - said_hidden).mean(-1)
  expected = ((0.75 * soft + 0.25 * hard + 0.5 * squares) * weights).sum() / weights.sum()
  assert losses[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_teacher_is_an_argument_of_the_step_and_no_constant_in_it(make_config, other):
  config = make_config(teacher=str(other))
  mesh = sharding.make_mesh(**config.mesh)
  student = parts.load_model(config.model, mesh)
  apply = lora_jax.adapt(llama.Llama(student.config).apply)
  task = parts.make_task(config).of_model(student)
  teacher = teachers.load(config, student, task, mesh)
  objective = teachers.make_objective(config.distill, task, apply, teacher)
  at = np.zeros((2, 1), np.int32)
  batch = {"tokens": np.zeros((2, 8), np.int32), "at": at, "targets": at, "weights": at + 1.0}
  traced = jax.make_jaxpr(objective)(student.params, batch, teacher.params)
  assert sum(np.size(x) for x in traced.consts) < 1000


@pytest.mark.parametrize(
  ("text", "fields", "changes", "words"),
  [
    ("method=pissa", {"teacher": "base"}, {}, "pissa keeps a residual"),
    ("", {"teacher": "base", "hard": 2.0}, {}, "from 0 to 1"),
    ("", {"teacher": "base", "temperature": 0.0}, {}, "must be above 0"),
    ("", {"teacher": "base"}, {"train.loss_chunk": 4}, "logit by logit"),
  ],
)
def test_what_cannot_be_taught_is_refused_before_the_model_is_loaded(
  make_config, text, fields, changes, words
):
  config = make_config(text, **fields)
  config.update_from_flattened_dict(changes)
  config.model.source = "nowhere"
  with pytest.raises(ValueError, match=words):
    train.train(config, run=None)


def test_plans_and_sweeps_have_no_teacher(make_config):
  config = make_config(teacher="base")
  with pytest.raises(ValueError, match="a plan is of one model"):
    planning.read(config)
  with pytest.raises(ValueError, match="learn from their texts alone"):
    sweep_config.member_configs(config, [{"seed": 1}])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changes", "hidden", "words"),
  [
    ({"vocab_size": 50000}, 0.0, "its tokens are not those of"),
    ({"width": 16}, 1.0, "have 16 features, the student's 32"),
  ],
)
def test_a_teacher_that_speaks_of_something_else_is_refused(
  make_config, tmp_path, smollm2, changes, hidden, words
):
  config = make_config(teacher=str(tmp_path / "odd"), hidden=hidden)
  student = parts.load_model(config.model)
  odd = dataclasses.replace(student.config, scan_layers=False, **changes)
  params = llama.Llama(odd).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
  export.save(tmp_path / "odd", params, odd, smollm2.tokenizer)
  with pytest.raises(ValueError, match=words):
    teachers.load(config, student, parts.make_task(config), sharding.make_mesh(**config.mesh))
