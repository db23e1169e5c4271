"""The task of detection on a function that stands for a detector: metrics, answers, pictures."""

import contextlib
import io
import json

import boxed_sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import detect
from experiments import config_checks, parts
from lora_jax.data import box_batches
from lora_jax.models import boxes
from lora_jax.tasks import box_drawings, coco_metrics
from lora_jax.train import evaluation

SIZES = [(4, 4), (2, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return boxed_sets.write(tmp_path_factory.mktemp("set"), counts=(6, 5))


def config_of(folder, **fields):
  config = detect.get_config("smoke")
  with config.ignore_type(), config.unlocked():
    config.update_from_flattened_dict({
      "data.source": str(folder), "data.test_source": str(folder),
      "data.annotations": "train.json", "data.test_annotations": "test.json",
      "data.leave_out": (), "data.train": 1.0, "data.validation": 0.0,
      "task.labels": boxed_sets.LABELS, "task.scales": ((0.3, 0.45), (0.6,)),
      "task.ratios": (1.0, 0.8), "evaluation.samples": 2,
    } | {name.replace("__", "."): x for name, x in fields.items()})  # fmt: skip
  return config


@pytest.fixture(scope="module")
def task(folder):
  return parts.make_task(config_of(folder))


@pytest.fixture(scope="module")
def examples(folder, task):
  return task.examples(parts.load_records(config_of(folder).data, task)["test"])


def perfect(task, examples, confidence=8.0):
  """An `apply` that finds the boxes of examples: weights have the table of them, by their means."""
  anchors = jnp.asarray(boxes.anchors(SIZES, task.scales, task.ratios))
  data = task.eval_batches(examples, len(examples))[0]

  def apply(variables, images, method=None):
    # The picture that looks most like each image.
    distances = jnp.abs(images[:, None].astype(jnp.float32) - data["images"][None]).sum((2, 3, 4))
    rows = jnp.argmin(distances, axis=1)

    def of_row(row):
      true, labels = jnp.asarray(data["boxes"])[row], jnp.asarray(data["labels"])[row]
      index = boxes.match(true, labels >= 0, anchors, 0.5)
      classes = jnp.where(index >= 0, labels[index] + 1, 0)
      logits = confidence * variables["params"] * jax.nn.one_hot(classes, len(task.labels) + 1)
      return logits, boxes.encode(true[index], anchors)

    logits, offsets = jax.vmap(of_row)(rows)
    if method == "offsets":
      return logits, offsets, anchors
    return logits, boxes.decode(offsets, anchors)

  return apply


def measured(task, apply, examples, weight=1.0):
  data = task.eval_batches(examples, 4)
  return evaluation.evaluate(task.make_eval_step(apply), jnp.float32(weight), data, task.metrics)


def test_a_detector_that_finds_all_has_a_precision_of_one(task, examples):
  found = measured(task, perfect(task, examples), examples)
  assert found["map50"] == pytest.approx(1) and found["map"] > 0.99 and found["rows"] == 5
  assert found["map50/red"] == found["map50/green"] == pytest.approx(1)
  assert found["loss"] < 0.1
  assert "mAP@0.5 100.0% (red 100.0%, green 100.0%), loss" in task.line(found)
  blind = measured(task, perfect(task, examples), examples, weight=0.0)
  assert blind["loss"] > 1 and blind["map50"] < 0.9


def test_figures_are_those_of_pycocotools_own_summary(tmp_path):
  """Detections that are moved, missing and wrong, against COCOeval.summarize on files."""
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  rng = np.random.default_rng(0)
  truths, detections, rows = [], [], []
  for n in range(12):
    true = np.concatenate([rng.uniform(0, 60, (5, 2)), rng.uniform(20, 60, (5, 2))], axis=1)
    kinds = rng.integers(0, 2, 5)
    moved = (true + rng.normal(0, 5, true.shape))[rng.uniform(size=5) < 0.8]
    labels, scores = rng.integers(0, 2, len(moved)), rng.uniform(0, 1, len(moved))
    truths.append(coco_metrics.Boxes(true, kinds, kinds))
    detections.append(coco_metrics.Boxes(moved, labels, scores))
    rows += [
      {"image_id": n, "category_id": int(k), "bbox": box.tolist(), "score": float(score)}
      for box, k, score in zip(moved, labels, scores, strict=True)
    ]
  annotations = [
    {
      "id": 1 + 5 * n + k,
      "image_id": n,
      "category_id": int(each.classes[k]),
      "iscrowd": 0,
      "bbox": each.boxes[k].tolist(),
      "area": float(each.boxes[k, 2:].prod()),
    }
    for n, each in enumerate(truths)
    for k in range(5)
  ]
  fields = {
    "images": [{"id": n} for n in range(12)],
    "annotations": annotations,
    "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
  }
  (tmp_path / "true.json").write_text(json.dumps(fields))
  (tmp_path / "found.json").write_text(json.dumps(rows))
  with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(tmp_path / "true.json")
    run = COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
  found = coco_metrics.average_precision(truths, detections, ("a", "b"))
  assert found["map"] == pytest.approx(run.stats[0]) and found["map50"] == pytest.approx(
    run.stats[1]
  )
  assert 0.05 < found["map"] < found["map50"] < 0.9
  assert found["map50"] == pytest.approx((found["map50/a"] + found["map50/b"]) / 2)
  assert found["map"] == pytest.approx((found["map/a"] + found["map/b"]) / 2)


def test_a_class_that_does_not_occur_has_no_precision_and_nothing_found_is_zero():
  box = np.array([[0.0, 0, 10, 10]])
  none = coco_metrics.Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
  one = coco_metrics.Boxes(box, np.array([0]), np.array([0.5]))
  found = coco_metrics.average_precision([one, none], [one, none], ("a", "b"))
  assert found["map50/a"] == found["map50"] == pytest.approx(1) and np.isnan(found["map50/b"])
  assert coco_metrics.average_precision([one], [none], ("a", "b"))["map50"] == 0


def test_the_loss_of_a_batch_is_the_mean_over_its_real_rows(task, examples):
  apply = perfect(task, examples, confidence=2.0)
  losses = []
  for size in (2, 5, 8):
    objective = jax.jit(task.objective(apply))
    found = [objective(jnp.float32(1), batch) for batch in task.eval_batches(examples, size)]
    total = sum(float(loss) * float(count) for loss, count in found)
    losses.append(total / sum(float(count) for _, count in found))
  assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_answers_are_boxes_in_pixels_of_the_picture_as_it_is(task, folder, examples, tmp_path):
  own = tmp_path / "images"
  own.mkdir()
  for n in (1, 0):
    (own / f"{n}.png").write_bytes((folder / "images" / "test" / f"{n}.png").read_bytes())
  asked = task.asked(str(own))
  assert [x.name for x in asked] == [str(own / "0.png"), str(own / "1.png")]
  answers = task.predict(perfect(task, examples), jnp.float32(1), asked, batch_size=2)
  fields = json.loads((folder / "test.json").read_text())
  names = {each["id"]: each["name"] for each in fields["categories"]}
  for answer, image in zip(answers, fields["images"], strict=False):
    assert answer["size"] == [64, 48]
    wanted = sorted(
      [names[x["category_id"]], *x["bbox"]]
      for x in fields["annotations"]
      if x["image_id"] == image["id"]
    )
    found = sorted([x["label"], *x["box"]] for x in answer["boxes"])
    assert [x[0] for x in found] == [x[0] for x in wanted]
    np.testing.assert_allclose([x[1:] for x in found], [x[1:] for x in wanted], atol=0.2)
    assert all(x["score"] > 0.9 for x in answer["boxes"])
  assert json.loads(json.dumps(answers)) == answers


def test_an_answer_is_drawn_into_a_copy_of_its_picture(task, tmp_path):
  picture = np.full((200, 300, 3), 255, np.uint8)
  Image.fromarray(picture).save(tmp_path / "a.png")
  [asked] = task.asked(str(tmp_path / "a.png"))
  assert min(asked.picture.shape[:2]) < 200  # what the model reads is smaller
  box = {"label": "green", "score": 0.75, "box": [100.0, 60.0, 80.0, 90.0]}
  task.mark(asked)({"boxes": [box]}, tmp_path / "copy.png")
  with Image.open(tmp_path / "copy.png") as made:
    drawn = np.asarray(made).astype(int)
  assert drawn.shape == picture.shape
  rows, columns = np.nonzero((drawn != 255).any(axis=2))
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 149, 100, 179)
  np.testing.assert_array_equal(drawn[149, 140], box_drawings.colors(task.labels)["green"])


def test_the_page_has_a_picture_of_boxes_wanted_and_found(task, examples, tmp_path):
  samples = task.given(examples[:2])
  show = task.make_show(perfect(task, examples), examples[:2], put=lambda x: x, share=1)
  for sample, text in zip(samples, show(jnp.float32(1)), strict=True):
    sample["before"] = json.dumps({"boxes": []})
    sample["after"] = text
    assert len(json.loads(text)["boxes"]) == len(json.loads(sample["wanted"])["boxes"])
  task.draw(examples[:2], samples)(tmp_path / "grid.png")
  with Image.open(tmp_path / "grid.png") as made:
    assert made.format == "PNG" and made.width > 600
  assert task.draw([], []) is None
  for text in (
    '{"boxes": 7}',
    '{"boxes": [{"label": "blue", "box": [1, 2, 3, 4]}]}',
    "{}",
    '{"boxes": [{"label": "red", "box": [1, 2, 3]}]}',
    '{"boxes": [7]}',
  ):
    with pytest.raises(ValueError, match=r"eval\.json: a sample has the boxes"):
      box_drawings.parse(text, task.labels)


def test_it_says_what_it_read(task, folder, examples):
  train = task.examples(parts.load_records(config_of(folder).data, task)["train"])
  described = json.loads(json.dumps(task.describe(training=train, held_out=examples)))
  lines = task.lines(described)
  assert lines[1].startswith("held_out: 5 images, resized to 64 pixels a side, with 7 boxes: ")
  for damaged in ({}, described | {"labels": 3}, described | {"images": {}}):
    with pytest.raises(ValueError, match="data is"):
      task.lines(damaged)
  unseen = [x._replace(labels=np.zeros_like(x.labels)) for x in train]
  with pytest.raises(ValueError, match="held_out: has boxes of green, of which there are none"):
    task.describe(training=unseen, held_out=examples)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"task__labels": ()}, "task.labels is .*; it must be"),
    ({"task__labels": ("red", "red")}, "give different names"),
    ({"task__labels": ("red",)}, "'green', which is not in task.labels"),
    ({"task__scales": ((0.1,),)}, "task.scales .* 2 to 6 feature maps"),
    ({"task__scales": ((0.1,), (9.0,))}, "task.scales must be numbers from 0.001 to 2"),
    ({"task__ratios": ()}, "task.ratios is .*; it must be|ratios are missing"),
    ({"task__nms": 1.5}, "task.nms is 1.5; it must be from 0 to 1"),
    ({"task__negatives": 0}, "task.negatives is 0; it must be 1 or more"),
    ({"task__most": 0}, "task.most is 0; it must be 1 or more"),
    ({"data__annotations": ""}, "data.annotations is ''"),
    ({"data__images": 7}, "data.images is 7; it must be a text"),
    ({"data__leave_out": ("x.png",)}, "data.leave_out names 'x.png', which is no picture"),
    ({"data__mean": (0.5,)}, "data.mean has 1 value"),
    ({"train__loss_chunk": 4}, "train.loss_chunk 4: is for logits of many tokens"),
  ],
)
def test_what_cannot_be_is_refused_by_its_field(folder, fields, words):
  own = config_of(folder, **fields)

  def start():
    config_checks.check_run(own)
    parts.load_records(own.data, parts.make_task(own))

  with pytest.raises(ValueError, match=words):
    start()


def test_a_folder_of_one_s_own_is_a_config_by_its_name(tmp_path):
  boxed_sets.write(tmp_path, counts=(20, 2))
  with pytest.raises(ValueError, match=r"has no annotations\.json"):
    detect.get_config(f"data={tmp_path}")
  (tmp_path / "train.json").rename(tmp_path / "annotations.json")
  config = detect.get_config(f"data={tmp_path}")
  assert config.task.labels == boxed_sets.LABELS
  found = parts.load_records(config.data, parts.make_task(config))
  assert sum(map(len, found.values())) == 20 and found.keys() == {"train", "validation", "test"}
  (tmp_path / "annotations.json").write_text("[1]")
  with pytest.raises(ValueError, match="has no categories with names"):
    detect.get_config(f"data={tmp_path}")


def test_it_reads_and_writes_no_texts(task):
  with pytest.raises(ValueError, match="the task detection reads no texts"):
    task.tokens(None)
  with pytest.raises(ValueError, match="the task detection writes no texts"):
    task.write()
  assert box_batches.most_boxes([]) == 1
