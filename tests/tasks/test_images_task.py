"""Classes of images: runs on tiny random models, their figures, their page, and what is refused."""

import dataclasses
import json
import re

import image_families
import jax
import jax.numpy as jnp
import main_programs
import numpy as np
import pytest
from main_programs import imported
from peers import peft, torch, transformers
from PIL import Image

import lora_jax
from configs import classify, images
from experiments import methods, parts, planning
from lora_jax import exchange
from lora_jax.io import export, pretrained
from lora_jax.run import report, workdir
from lora_jax.tasks import heads
from lora_jax.train import evaluation, plan

train = imported("experiments.train")
command = imported("experiments.plan")

LABELS = ("dark", "green", "red")


def pictures(count, seed):
  """Noise, in which one color is stronger."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % 3
  values = rng.integers(0, 120, (count, 16, 16, 3))
  values[labels == 1, ..., 1] += 60
  values[labels == 2, ..., 0] += 60
  return {"images": values.astype(np.uint8), "labels": labels}


def write(folder, name):
  """A config of a tiny model of a kind and of pictures that it can tell apart."""
  image_families.write(folder / "model", name)
  np.savez(folder / "train.npz", **pictures(90, 0))
  np.savez(folder / "test.npz", **pictures(40, 1))
  is_vit = name not in ("ResNet", "MobileNetV2")
  config = images.get_config(f"cifar,model={'vit' if is_vit else 'mobilenet'}")
  config.update_from_flattened_dict({
    "model.source": str(folder / "model"), "task.labels": LABELS,
    "data.source": str(folder / "train.npz"), "data.test_source": str(folder / "test.npz"),
    "data.size": 28 if is_vit else 32, "train.steps": 12, "train.batch_size": 16,
    "train.log_every": 4, "optimizer.warmup_steps": 1, "optimizer.peak_learning_rate": 2e-2,
    "optimizer.rates": (), "evaluation.batch_size": 16, "evaluation.samples": 5,
  })  # fmt: skip
  if not is_vit:
    config.adapter.targets = ("convolutions",)
  return config


def run_of(config, folder):
  with workdir.open_workdir(folder, config.to_dict()) as opened:
    train.train(config, opened)
  return opened


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return write(tmp_path_factory.mktemp("tiny"), "DINOv2")


def test_it_reads_and_writes_no_texts(config):
  task = parts.make_task(config)
  with pytest.raises(
    ValueError, match=r"the task images writes no texts; use experiments\.predict"
  ):
    _ = task.chat_format
  with pytest.raises(ValueError, match="the task images reads no texts, and has no tokens to show"):
    task.tokens(None)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  return run_of(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(config, run):
  """The base with its new head, its axes, and the adapters of the run's folder."""
  base = methods.load_base(config)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  return base, axes, exchange.load(run.adapter, base.params, axes, table=base.table)


def changed(config, **fields):
  copy = config.copy_and_resolve_references()
  with copy.ignore_type(), copy.unlocked():
    copy.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
  return copy


def test_a_run_learns_the_classes_and_keeps_its_figures(config, run, trained):
  results = json.loads(run.evaluation.read_text())
  before, after = results["before"], results["after"]
  assert after["accuracy"] > 0.8 > before["accuracy"]
  assert after.keys() == {"loss", "accuracy", "balanced_accuracy", "auc", "rows"}
  assert after["rows"] == 40 and after["auc"] > 0.9
  base, _, adapters = trained
  task = parts.make_task(config)
  rows = parts.load_records(config.data, task)["test"]
  task = task.of_model(base)
  apply = lora_jax.adapt(task.forward(parts.make_model(base.config)))
  weights = lora_jax.attach(base.params, adapters)
  data = task.eval_batches(task.examples(rows), 8)
  found = evaluation.evaluate(task.make_eval_step(apply), weights, data, task.metrics)
  assert found == pytest.approx(after, rel=1e-4)


def test_the_page_shows_the_pictures_with_what_the_model_took_them_for(run):
  page = run.readme.read_text()
  assert "![the samples](samples.png)" in page and "images/s" in page and "tokens/s" not in page
  assert "held_out: 40 images of 28 pixels a side: 14 dark, 13 green, 13 red" in page
  with Image.open(run.picture) as picture:
    assert picture.format == "PNG" and min(picture.size) > 150
  samples = report.read_results(run.evaluation)["samples"]
  assert [sample["prompt"] for sample in samples] == [f"images[{8 * n}]" for n in range(5)]
  assert {sample["wanted"] for sample in samples} <= set(LABELS)
  assert sum(sample["after"] == sample["wanted"] for sample in samples) >= 4


def test_peft_loads_a_run_with_its_classifier_and_gives_the_same_logits(config, run, trained):
  base, _, adapters = trained
  settings = json.loads((run.adapter / "adapter_config.json").read_text())
  assert settings["task_type"] is None and settings["modules_to_save"] == ["classifier"]
  model = transformers.Dinov2ForImageClassification.from_pretrained(config.model.source)
  model = peft.PeftModel.from_pretrained(model, run.adapter).eval()
  pixels = np.random.default_rng(0).normal(size=(3, 28, 28, 3)).astype(np.float32)
  apply = lora_jax.adapt(parts.make_model(base.config).apply)
  ours = apply({"params": lora_jax.attach(base.params, adapters)}, pixels)
  with torch.no_grad():
    theirs = model(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2))).logits
  np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_a_merged_classifier_is_transformers_own(trained, tmp_path):
  base, _, adapters = trained
  merged = lora_jax.merge(base.params, adapters)
  export.save(tmp_path / "merged", merged, base.config, None)
  model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
  assert model.config.id2label == dict(enumerate(LABELS))
  pixels = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
  ours = parts.make_model(base.config).apply({"params": merged}, pixels)
  with torch.no_grad():
    theirs = model.eval()(torch.tensor(pixels.transpose(0, 3, 1, 2))).logits
  np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_a_plan_knows_batches_of_images(config):
  case = planning.read(config)
  assert case.largest == (28, 28) and case.data["examples"] == 79
  mesh = planning.abstract_mesh(config.mesh, 1)
  made = plan.make_plan(planning.whole_run(config, case, mesh))
  batch = 16 * (28 * 28 * 3 + 4 + 4)
  assert made.batch == batch and made.trainable > 64 * 3 and made.flops > 1e6
  assert "16 rows of 28 × 28 pixels" in command.describe_data(config, case)


def test_the_head_alone_and_everything_train_as_one_may_choose(config, trained):
  base, axes, _ = trained
  task = parts.make_task(config)
  for method, targets, count in (("full", (), 2), ("full", (".*",), len(axes))):
    own = changed(config, adapter={"method": method, "targets": targets, "also_train": ()})
    specs = methods.specs_of(base, own.model, methods.all_rules(own.adapter, task), axes)
    assert len(specs) == count and {"head/kernel", "head/bias"} <= specs.keys()


def test_statistics_of_batch_norm_never_train_and_the_table_says_so(tmp_path):
  config = write(tmp_path, "ResNet")
  base = parts.extend(parts.read_shapes(config.model), parts.make_task(config), config)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  for targets in (("convolutions",), (".*",)):
    adapter = {"method": "full", "targets": targets, "also_train": ()}
    rules = methods.all_rules(changed(config, adapter=adapter).adapter, parts.make_task(config))
    specs = methods.specs_of(base, config.model, rules, axes)
    assert not [path for path in specs if path.endswith(("/mean", "/var"))]
    assert ("stem/norm/scale" in specs) == (targets == (".*",))
    table = str(lora_jax.summary(base.params, specs, axes))
    assert "left out: stem/norm/mean (1): a statistic of the data that the base was" in table


def test_a_new_head_takes_the_place_of_one_or_of_two(tmp_path):
  image_families.write(tmp_path, "DeiT, two heads")
  found = pretrained.load(tmp_path)
  assert found.config.pooling == "two heads" and "distillation_head" in found.params
  made = heads.add(found, jax.random.key(0), ("a", "b"))
  assert (
    made.config.pooling == "token" and not {"distillation_head", "token_head"} & made.params.keys()
  )
  assert made.params["head"]["kernel"].shape == (32, 2) and not made.params["head"]["bias"].any()
  shapes = heads.add(
    dataclasses.replace(found, params=jax.eval_shape(lambda: found.params)),
    jax.random.key(0),
    ("a", "b"),
  )
  assert jax.tree.map(jnp.shape, shapes.params) == jax.tree.map(jnp.shape, made.params)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"data__size": 30}, "data.size 30 is no multiple of the model's patches of 7 pixels"),
    ({"data__mean": (0.5,)}, "data.mean has 1 value"),
    ({"task__labels": ("a",)}, "give two or more different names"),
    ({"task__labels": ("a", "b")}, "is 2, and task.labels names the classes 0 to 1"),
    ({"task__labels": ("a", "b", "c", "a")}, "give two or more different names"),
    ({"train__loss_chunk": 4}, "train.loss_chunk 4"),
    ({"model__new_tokens": ("<a>",)}, "which takes no text; leave them out"),
    ({"data__crop_area": 0.0}, "data.crop_area is 0.0; it must be above 0"),
    ({"data__arrays": ("images",)}, "name the array of pictures and that of labels"),
    ({"data__max_length": 8}, "data.max_length: the task images reads no such field"),
  ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(config, tmp_path, fields, words):
  own = changed(config, **fields)
  with (
    pytest.raises(ValueError, match=words.replace(".", r"\.")),
    workdir.open_workdir(tmp_path, own.to_dict()) as opened,
  ):
    train.train(own, opened)


def test_a_class_that_training_never_saw_is_refused(config, tmp_path):
  found = pictures(60, 2)
  seen = found["labels"] != 1
  np.savez(tmp_path / "a.npz", **{name: x[seen] for name, x in found.items()})
  own = changed(config, data__source=str(tmp_path / "a.npz"))
  with (
    pytest.raises(ValueError, match="held_out: has images of green, of which there are none"),
    workdir.open_workdir(tmp_path / "run", own.to_dict()) as opened,
  ):
    train.train(own, opened)


def test_texts_and_images_do_not_take_each_other_s_models(config):
  task = parts.make_task(config)
  with pytest.raises(ValueError, match="takes no images of 3 colors"):
    task.of_model(pretrained.inspect(pretrained.DEFAULT))
  of_text = parts.make_task(classify.get_config())
  with pytest.raises(ValueError, match="takes no text, and the task is on text"):
    of_text.of_model(parts.read_shapes(config.model))


# ---- stops


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(config, run, tmp_path):
  """The batches too are those that come next: their crops and flips go by seed and step."""
  whole = changed(config, train__checkpoint_every=3)
  one = run_of(whole, tmp_path / "one")
  folder = tmp_path / "two"
  with workdir.open_workdir(folder, whole.to_dict()) as opened:
    loop = train.loop

    class Stops(loop.Checkpoints):
      pass

    original = loop.Checkpoints.save
    try:

      def save(self, state, data_state):
        original(self, state, data_state)
        if int(state.step) == 6:
          self.wait()
          raise KeyboardInterrupt

      loop.Checkpoints.save = save
      with pytest.raises(KeyboardInterrupt):
        train.train(whole, opened)
    finally:
      loop.Checkpoints.save = original
  two = run_of(whole, folder)
  for name in ("adapter/adapter_model.safetensors", "eval.json"):
    assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "steps"), [("ResNet", 12), ("MobileNetV2", 3)])
def test_a_sweep_of_learning_rates_trains_in_one_program(tmp_path, name, steps):
  config = write(tmp_path, name)
  with config.unlocked():
    config.train.steps = steps  # roundings grow by every step of a deep network
    config.sweep.grid = (("optimizer.peak_learning_rate", (1e-3, 1e-2, 2e-2)),)
  run = run_of(config, tmp_path / "run")
  found = json.loads((run.path / "results.json").read_text())["members"]
  assert [row["outcome"] for row in found] == ["finished"] * 3
  alone = changed(config, sweep__grid=(), optimizer__peak_learning_rate=1e-2)
  one = json.loads(run_of(alone, tmp_path / "one").evaluation.read_text())["after"]
  assert found[1]["loss"] == pytest.approx(one["loss"], rel=1e-3)
  assert (run.path / "members" / "1" / "samples.png").exists()


def test_predict_answers_for_a_picture_and_for_a_folder_of_them(run, config, tmp_path):
  found = pictures(9, 5)
  for n in (2, 0, 1):
    Image.fromarray(found["images"][n]).save(tmp_path / f"{n}.png")
  (tmp_path / "notes.txt").write_text("no picture")
  printed = main_programs.run("predict", f"--workdir={run.path}", f"--input={tmp_path}")
  answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
  assert [answer["image"] for answer in answers] == [str(tmp_path / f"{n}.png") for n in range(3)]
  task = parts.make_task(config)
  for answer in answers:
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
  [one] = task.asked(str(tmp_path / "1.png"))
  np.testing.assert_array_equal(one.picture, found["images"][1])
  with pytest.raises(ValueError, match=r"notes\.txt: is no picture"):
    task.asked(str(tmp_path / "notes.txt"))
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="the folder has no pictures"):
    task.asked(str(tmp_path / "empty"))
  with pytest.raises(FileNotFoundError):
    task.asked("a text")


def config_file(folder, name):
  """The file of a config as `write` makes it."""
  config = write(folder, name)
  fields = {x: config[x].to_dict() for x in ("model", "data", "task", "train", "evaluation")}
  path = folder / "config.py"
  model = "mobilenet" if name == "ResNet" else "vit"
  path.write_text(
    "from configs import images\n\ndef get_config(text=''):\n"
    f"  config = images.get_config('cifar,model={model}')\n"
    f"  for name, values in {fields!r}.items():\n    config[name].update(values)\n"
    f"  config.adapter.targets = {tuple(config.adapter.targets)!r}\n"
    "  config.optimizer.peak_learning_rate, config.optimizer.warmup_steps = 2e-2, 1\n"
    "  config.optimizer.rates = ()\n  return config\n"
  )
  return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_two_devices_make_what_one_makes(tmp_path, name):
  config, losses = config_file(tmp_path, name), {}
  meshes = {"one": {}, "rows": {"data": 2}, "layers": {"data": 1, "fsdp": 2}}
  meshes |= {"columns": {"data": 1, "tensor": 2}} if name == "ViT" else {}
  for label, mesh in meshes.items():
    folder = tmp_path / label
    how = [f"--config.mesh.{axis}={count}" for axis, count in mesh.items()]
    main_programs.run(
      "train",
      f"--config={config}",
      f"--workdir={folder}",
      "--config.train.steps=3",
      *how,
      JAX_NUM_CPU_DEVICES="2" if mesh else "1",
    )
    found = json.loads((folder / "eval.json").read_text())
    losses[label] = [found["before"]["loss"], found["after"]["loss"]]
  for label in losses:
    assert losses[label] == pytest.approx(losses["one"], rel=1e-4), label


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "ResNet"])
def test_a_family_is_planned_trained_evaluated_and_exported_by_commands(tmp_path, name):
  path = config_file(tmp_path, name)
  folder = tmp_path / "run"
  assert "it fits" in main_programs.run("plan", f"--config={path}")
  main_programs.run("train", f"--config={path}", f"--workdir={folder}")
  assert "adapter  accuracy" in main_programs.run("evaluate", f"--workdir={folder}")
  merged = f"--output={tmp_path / 'merged'}"
  main_programs.run("export", f"--workdir={folder}", "--to=merged", merged)
  transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
  artifact = f"--output={tmp_path / 'artifact'}"
  main_programs.run("export", f"--workdir={folder}", "--to=artifact", artifact, "--length=28")
  printed = main_programs.run("generate", f"--workdir={folder}", "--prompt=a", fails=True)
  assert "generates no text" in printed


def test_a_folder_of_one_s_own_is_a_config_by_its_name(tmp_path):
  found = pictures(60, 7)
  for n, (picture, label) in enumerate(zip(found["images"], found["labels"], strict=True)):
    folder = tmp_path / LABELS[label]
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"{n}.png")
  config = images.get_config(f"data={tmp_path},model=mobilenet")
  assert config.task.labels == LABELS
  task = parts.make_task(config)
  splits = parts.load_records(config.data, task)
  assert (
    sum(map(len, splits.values())) == 60 and len(splits) == 3 and min(map(len, splits.values()))
  )
  for text in ("", "cifar,pneumonia", f"cifar,data={tmp_path}"):
    with pytest.raises(ValueError, match="give one of :cifar, :pneumonia and :data"):
      images.get_config(text)
  with pytest.raises(ValueError, match="is no folder"):
    images.get_config("data=nowhere")
  with pytest.raises(ValueError, match="the model 'resnet' is unknown"):
    images.get_config("cifar,model=resnet")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "mobilenet"])
def test_the_plan_of_a_real_run_is_within_a_tenth_of_the_compiler(public_data, model):
  printed = main_programs.run(
    "plan", f"--config=configs/images.py:cifar,model={model}", "--topology=here"
  )
  assert 90 <= int(re.search(r"the plan's .* are (\d+)%", printed)[1]) <= 110
