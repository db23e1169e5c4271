"""experiments.compress on encoders and models of images: by their task's batches, and healed."""

import dataclasses
import json
import runpy
import shutil

import image_families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder
import tiny_pictures
import tiny_speech
from main_programs import imported

import lora_jax
from configs import compress as compress_config
from configs import heal
from experiments import compression, compression_data, parts, teachers
from lora_jax import tree
from lora_jax.compress import storage
from lora_jax.io import export, pretrained, tokenizer
from lora_jax.models import bert
from lora_jax.run import workdir
from lora_jax.tasks import heads
from lora_jax.weights import Factored, Pruned, is_weight

SMALL = {"report.batches": (1,), "report.repeats": 1, "factorize.budget": 0.6}
LABELS = ("dark", "red")


@pytest.fixture(scope="module")
def program():
  return imported("experiments.compress")


def text_model(folder):
  """A tiny BERT with a head, and its task."""
  tiny_encoder.write(folder)
  words = tokenizer.from_folder(folder / "model")
  config = dataclasses.replace(
    pretrained.inspect(folder / "model").config, classes=("negative", "positive")
  )
  params = bert.Bert(config).init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"]
  params = jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, params)  # some logits differ
  export.save(folder / "trained", params, config, words)
  return "minilm", tiny_encoder.config_of(folder, "classification")


def image_model(folder):
  """A tiny DINOv2 with a head, and its task."""
  image_families.write(folder / "model", "DINOv2")
  found = heads.add(pretrained.load(folder / "model"), jax.random.key(3), LABELS)
  head = jax.tree.map(lambda x: 20 * x, found.params["head"])  # some logits differ
  export.save(folder / "trained", found.params | {"head": head}, found.config, None)
  labels = np.arange(64) % 2
  for seed, name in enumerate(("train", "test")):
    values = np.random.default_rng(seed).integers(0, 120, (64, 16, 16, 3))
    values += 60 * labels[:, None, None, None]
    np.savez(folder / f"{name}.npz", images=values.astype("u1"), labels=labels)
  run = compress_config.run_of("vit")
  run.update_from_flattened_dict(
    {
      "task.labels": LABELS,
      "data.source": str(folder / "train.npz"),
      "data.test_source": str(folder / "test.npz"),
      "data.size": 28,
    }
  )
  return "vit", run


def detector(folder):
  """A tiny SSDLite and its task."""
  run = runpy.run_path(str(tiny_pictures.write_boxes(folder, {})))["get_config"]()
  found = parts.make_task(run).extend(pretrained.load(folder / "model"), jax.random.key(3))
  export.save(folder / "trained", found.params, found.config, None)
  return "detector", run


def listener(folder):
  """A tiny Whisper and its task."""
  run = tiny_speech.write(folder)
  shutil.copytree(folder / "model", folder / "trained")
  return "whisper", run


MODELS = {"text": text_model, "images": image_model}
OTHERS = {"boxes": detector, "speech": listener}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
  """By kind: the folder, the name of the model in configs/compress.py, and a run's config."""
  made = {}

  def make(kind):
    if kind not in made:
      folder = tmp_path_factory.mktemp(kind)
      made[kind] = (folder, *(MODELS | OTHERS)[kind](folder))
    return made[kind]

  return make


def config_of(folder, model, run, steps, **fields):
  found = compress_config.get_config(f"model={model},steps={steps},source={folder / 'trained'}")
  found.task.fields = {name: x for name, x in run.task.items() if name != "name"}
  found.task.data = run.data.copy_and_resolve_references()
  found.task.calibration, found.task.examples, found.task.batch_size = 32, 16, 8
  found.update_from_flattened_dict(SMALL | fields)
  return found


def compressed(program, folder, config, name):
  with workdir.open_workdir(folder / name, config.to_dict()) as opened:
    program.compress(config, opened.path)
  return opened.path


def steps_of(folder):
  return json.loads((folder / "report.json").read_text())["steps"]


@pytest.mark.parametrize("kind", ["images", pytest.param("text", marks=pytest.mark.slow)])
def test_it_is_compressed_by_its_tasks_batches_and_measured_by_its_metric(program, case, kind):
  folder, model, run = case(kind)
  config = config_of(folder, model, run, "factorize+prune+quantize")
  path = compressed(program, folder, config, "small")
  rows = steps_of(path)
  assert [row["step"] for row in rows] == ["dense", "factorize", "prune", "quantize"]
  for row in rows:
    assert {"loss", "accuracy"} <= set(row["figures"]) and "rows" not in row["figures"]
    assert row["unit"] == "input" and set(row["times"]) == {"latency"}
  sizes = [row["parameters"] for row in rows]
  assert sizes[0] > sizes[1] > sizes[2] and rows[3]["disk"] < rows[2]["disk"]
  assert not (path / "rest.jsonl").exists()

  small = storage.load(path / "model")
  assert small.config.classes == run.task.labels and "head" in small.params
  leaves = tree.flatten(small.params, is_leaf=is_weight)
  kinds = {type(x) for name, x in leaves.items() if is_weight(x)}
  assert Factored in kinds and not is_weight(leaves["head/kernel"])
  data = compression_data.of(config, parts.read_shapes(config.model))
  stored = compression.Model(small.config, small.params, adapters={})
  assert data.figures(stored, small.params) == pytest.approx(rows[-1]["figures"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "metric"), [("boxes", "map50"), ("speech", "wer")])
def test_models_of_other_tasks_are_compressed_and_healed(program, case, kind, metric):
  folder, model, run = case(kind)
  config = config_of(folder, model, run, "factorize+prune+quantize")
  config.task.calibration, config.task.batch_size = 16, 8
  if kind == "boxes":  # the later maps have too few positions for the inputs of their kernels
    for step in ("factorize", "prune", "quantize"):
      config[step].targets = (r"block_[1-6]/(expand|project)/conv/kernel",)
  path = compressed(program, folder, config, "small")
  rows = steps_of(path)
  assert [row["step"] for row in rows] == ["dense", "factorize", "prune", "quantize"]
  assert all({"loss", metric} <= set(row["figures"]) for row in rows)
  assert rows[1]["parameters"] < rows[0]["parameters"] and rows[3]["disk"] < rows[2]["disk"]
  leaves = tree.flatten(storage.load(path / "model").params, is_leaf=is_weight)
  assert any(isinstance(x, Factored) for x in leaves.values())

  healing = heal.get_config(f"model={model},compressed={path},rank=2,smoke")
  healing.update_from_flattened_dict({"train.batch_size": 8, "evaluation.batch_size": 8})
  healing.task, healing.data = run.task, run.data
  healing.evaluation.examples, healing.evaluation.samples = 8, 0
  with workdir.open_workdir(path / "healed", healing.to_dict()) as opened:
    imported("experiments.train").train(healing, opened)
  program.add_healed(config, path, str(opened.path))
  assert [row["step"] for row in steps_of(path)][-1] == "heal"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_it_is_healed_by_lora_and_by_the_dense_model_and_keeps_its_head(program, case, kind):
  folder, model, run = case(kind)
  config = config_of(folder, model, run, "factorize")
  path = compressed(program, folder, config, "factored")
  healing = heal.get_config(f"model={model},compressed={path},rank=2,distill,smoke")
  assert healing.distill.teacher == str(folder / "trained")
  healing.update_from_flattened_dict({"train.batch_size": 8, "evaluation.batch_size": 8})
  healing.task, healing.data = run.task, run.data
  healing.evaluation.examples, healing.evaluation.samples = 16, 0
  with workdir.open_workdir(path / "healed", healing.to_dict()) as opened:
    imported("experiments.train").train(healing, opened)
  before = json.loads(opened.evaluation.read_text())["before"]
  after_factorize = steps_of(path)[-1]["figures"]
  assert before["loss"] == pytest.approx(after_factorize["loss"], rel=1e-3)  # no new head
  program.add_healed(config, path, str(opened.path))
  assert [row["step"] for row in steps_of(path)] == ["dense", "factorize", "heal"]


@pytest.mark.slow
def test_calibration_counts_texts_without_their_padding(case):
  """The second moments of a kernel are those of a loop over texts, each alone."""
  folder, model, run = case("text")
  config = config_of(folder, model, run, "factorize")
  found = parts.load_model(config.model)
  data = compression_data.of(config, found)
  own = compression.Model(found.config, found.params, adapters={})
  path = "block_0/attn/query/kernel"
  moments = data.calibration.inputs(own, [path])[path]
  seen = sum(int(batch["mask"].sum()) for batch in data.calibration.batches)
  assert int(moments.rows) == seen < sum(x["mask"].size for x in data.calibration.batches)
  total = np.zeros((32, 32))
  module = bert.Bert(found.config)
  for batch in data.calibration.batches:
    for tokens, mask, types in zip(batch["tokens"], batch["mask"], batch["types"], strict=True):
      n = int(mask.sum())
      _, state = module.apply(
        {"params": found.params},
        tokens[None, :n],
        types_BT=types[None, :n],
        capture_intermediates=lambda each, _: each.name == "embed_norm",
      )
      x = np.asarray(jax.tree.leaves(state)[0][0], np.float64)
      total += x.T @ x
  np.testing.assert_allclose(moments.total, total, rtol=1e-4, atol=1e-3)


def test_steps_for_decoders_too_little_data_and_a_model_without_head_are_refused(
  program, case, monkeypatch
):
  folder, model, run = case("text")
  monkeypatch.setattr(program, "Measure", lambda *_: pytest.fail("the work has begun"))

  def refused(words, steps="factorize", **fields):
    with pytest.raises(ValueError, match=words):
      program.compress(config_of(folder, model, run, steps, **fields), folder / "refused")

  for step in ("channels", "heads", "value_heads"):
    refused(f"{step} is for decoders, and .*trained is a 'bert'; use factorize", step)
  refused("task.calibration 4096: there are .* records to train on", **{"task.calibration": 4096})
  refused(
    r"task\.labels \('negative', 'positive'\): .*model has no head",
    **{"model.source": str(folder / "model")},
  )
  refused(
    "attention of Linformer: .* have no place in the folder of a whole model",
    **{"model.attention": "linformer", "model.attention_rank": 4},
  )
  config = config_of(folder, model, run, "factorize")
  with config.task.data.unlocked():
    config.task.data.prompt = "{text}"
  with pytest.raises(ValueError, match=r"task\.data\.prompt: the task classification reads no"):
    program.compress(config, folder / "refused")


def test_too_few_rows_for_a_kernel_are_refused_with_its_path(case):
  folder, model, run = case("images")
  config = config_of(folder, model, run, "factorize", **{"task.calibration": 8})
  found = parts.load_model(config.model)
  data = compression_data.of(config, found)
  own = compression.Model(found.config, found.params, adapters={})
  short = dataclasses.replace(
    data.calibration,
    batches=[{name: x[:1] for name, x in data.calibration.batches[0].items()}],
  )
  with pytest.raises(ValueError, match="mlp/down/kernel: the calibration examples give it 17 rows"):
    short.inputs(own, ["block_0/mlp/down/kernel"])


@pytest.mark.slow
def test_deployed_pruned_factors_have_no_masks_and_the_flag_chooses_copies(program, case):
  folder, model, run = case("text")
  config = config_of(folder, model, run, "prune+quantize", **{"report.resident": True})
  path = compressed(program, folder, config, "resident")
  dense, _, last = steps_of(path)
  assert last["memory"] == dense["memory"] and last["disk"] < 0.8 * dense["disk"]
  small = storage.load(path / "model").params
  assert any(isinstance(x, Pruned) for x in jax.tree.leaves(small, is_leaf=is_weight))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", pytest.param("images", marks=pytest.mark.slow)])
def test_a_teachers_logits_are_learned_from_and_a_head_of_the_same_classes_is_kept(case, kind):
  folder, _, run = case(kind)
  config = run.copy_and_resolve_references()
  config.model.source, config.model.scan_layers = str(folder / "trained"), False
  found = parts.load_model(config.model)
  task = parts.make_task(config)
  assert parts.extend(found, task, config) is found
  renamed = dataclasses.replace(task, labels=task.labels[::-1])
  fresh = parts.extend(found, renamed, config)
  assert np.abs(fresh.params["head"]["kernel"] - found.params["head"]["kernel"]).max() > 0

  rows = parts.load_records(config.data, task)["test"]
  task = task.of_model(found)
  batch = task.eval_batches(task.examples(rows), 8)[0]
  apply = lora_jax.adapt(task.forward(parts.make_model(found.config)))
  other = jax.tree.map(lambda x: 1.5 * x, found.params)

  def loss(hard, taught_by):
    distill = config.distill.copy_and_resolve_references()
    distill.hard, distill.temperature = hard, 2.0
    teacher = teachers.Teacher(apply, taught_by)
    objective = teachers.make_objective(distill, task, apply, teacher)
    return float(objective(found.params, batch, taught_by)[0])

  own = float(task.objective(apply)(found.params, batch)[0])
  assert loss(1.0, other) == pytest.approx(own, rel=1e-5)
  assert loss(0.0, found.params) == pytest.approx(0, abs=1e-5)
  p, q = (
    jax.nn.softmax(task.run(apply)(x, batch).astype(jnp.float32) / 2)[batch["weights"].ravel() > 0]
    for x in (other, found.params)
  )
  expected = 4 * jnp.sum(p * jnp.log(p / q), axis=-1).mean()
  assert loss(0.0, other) == pytest.approx(float(expected), rel=1e-4)
  assert loss(0.0, other) > 1e-3


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_timed_in_onnx_runtime_as_well(program, case, kind):
  pytest.importorskip("jax2onnx", reason='needs jax2onnx: pip install -e ".[onnx]"')
  folder, model, run = case(kind)
  config = config_of(folder, model, run, "factorize+quantize", **{"report.onnx": True})
  for row in steps_of(compressed(program, folder, config, "timed")):
    assert set(row["times"]) == {"latency", "ONNX Runtime"}


@pytest.mark.parametrize("kind", MODELS)
def test_onnx_runtime_computes_what_is_timed(case, kind):
  pytest.importorskip("jax2onnx", reason='needs jax2onnx: pip install -e ".[onnx]"')
  folder, model, run = case(kind)
  config = config_of(folder, model, run, "factorize")
  found = parts.load_model(config.model)
  data = compression_data.of(config, found)
  own = compression.Model(found.config, found.params, adapters={})
  forward, batch = data.task.run(data.calibration.forward(own)), data.calibration.batches[0]
  outputs = compression_data.in_onnx(forward, found.params, batch)()
  expected = jax.tree.leaves(forward(found.params, batch))
  for a, b in zip(outputs, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1.0, abs(b).max()))
