r"""Detection with LoRA: blood cells or your own objects, by SSDLite on MobileNetV2.

    python -m experiments.train --config=configs/detect.py --workdir=runs/cells

The backbone is torchvision's MobileNetV2, trained on ImageNet, with LoRA on its convolutions. The
detection head is new and trains in full. The data are BCCD: 205 photographs of blood smears with
boxes around red cells, white cells and platelets, and 87 held out. On two CPU cores it takes less
than ten minutes. The mean average precision at an overlap of 0.5 on the held-out ones is then
73.3 % (red cells 79.6, white cells 99.3, platelets 41.1; seed 0). By full fine-tuning it is 74.1 %,
by the head alone 61.4 %; see benchmarks/results.md.

    :data=folder    your own: a folder with annotations.json in COCO's format, and the pictures in
                    its folder images; a tenth is for validation and a tenth for the test
    :method=head    the head alone; lora (the default); full; or another of configs/adapters.py
    :rank=4         another rank
    :smoke          a few steps on little data: everything runs, nothing is learned
    :sweep          three learning rates in one program

Needs the extra `vision`: `pip install -e ".[vision]"`. The data are read from the folder
LORA_JAX_DATA, or from ../shared/data if that is not set.
"""

import json
import pathlib

import ml_collections

from configs import adapters, arguments, images, quickstart, rates

_CELLS = ("RBC", "WBC", "Platelets")
_ANNOTATIONS = "annotations.json"
_HEAD_RATE = 3e-3  # the learning rate of the new head, at the optimizer's peak


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, data="", method="lora", rank=0, smoke=False, sweep=False)
  method = args["method"]
  # The rest is as in the quickstart: most of the optimizer, the mesh.
  known = "full" if method == "head" else method
  config = quickstart.get_config(f"method={known},rank={args['rank']}")

  model = config.model
  model.source = images.MOBILENET
  model.scan_layers = False  # its layers differ in shape
  if method == "head":
    config.adapter.targets = ()  # the task's own leaves always train
  elif adapters.METHODS[known].targets == ("all-linear",):
    config.adapter.targets = images.CONVOLUTIONS

  task = config.task
  task.name = "detection"
  task.labels = _categories(pathlib.Path(args["data"])) if args["data"] else _CELLS
  # Anchors of each feature map, the first of stride 16: square roots of their areas, as fractions
  # of the image. Platelets have 0.07, red cells 0.19, white cells 0.2 to 0.5.
  task.scales = ((0.07, 0.13, 0.19), (0.28, 0.4), (0.6,))
  task.ratios = (1.0, 0.6, 1.6)  # widths over heights, once resized to a square
  task.overlap = 0.5  # intersection over union of an anchor with the box that it predicts
  task.negatives = 3  # anchors of background in the loss, for each with a box
  # Detections of a class that overlap more are one object. Red cells touch: 4.7 % of the true ones
  # overlap another by more than 0.3, 0.8 % by more than 0.5, and 0.4 % by more than 0.6.
  task.nms = 0.6
  task.least_score = 0.01  # of detections that count in the metrics
  task.shown_score = 0.5  # of detections in answers and pictures
  task.most = 100  # detections of an image

  config.data = data = ml_collections.ConfigDict()
  data.source = data.test_source = str(arguments.data_folder() / "bccd")  # folders; "" for none
  data.annotations, data.test_annotations = "train.json", "val.json"  # in the folders
  data.images = "images"  # the pictures' folder in both; "" for the folders themselves
  data.leave_out = ("BloodImage_00038.jpg",)  # nearly the held-out BloodImage_00037
  data.split_by = "digest"  # duplicates of a picture are in the same split
  data.train, data.validation, data.test = 0.9, 0.1, 0.0  # fractions of the pictures
  data.size = 320  # pixels per side; pictures are resized to a square, as SSD does
  data.mean, data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
  data.crop_area = 0.5  # smallest area of a random crop in training, as a fraction
  data.flip = 0.5  # probability that a picture is flipped in training
  if args["data"]:
    data.source, data.test_source = args["data"], ""
    data.annotations, data.test_annotations = _ANNOTATIONS, ""
    data.leave_out = ()
    data.train, data.validation, data.test = 0.8, 0.1, 0.1

  train = config.train
  train.steps = 200
  train.batch_size = 8
  train.checkpoint_every = 50

  optimizer = config.optimizer
  optimizer.warmup_steps = 20
  optimizer.schedule = "cosine"
  rates.choose(optimizer, method, {"head": _HEAD_RATE, "lora": 3e-3, "full": 3e-4}, _HEAD_RATE)
  optimizer.clip_norm = 10.0  # the loss is a sum over offsets

  evaluation = config.evaluation
  evaluation.examples = 0  # all
  evaluation.batch_size = 8
  evaluation.samples = 4  # pictures on the run's page

  if args["sweep"]:
    rates.sweep(config)

  if args["smoke"]:
    train.steps, train.batch_size, train.checkpoint_every = 4, 4, 2
    optimizer.warmup_steps = 1
    data.size = 64
    evaluation.examples, evaluation.batch_size, evaluation.samples = 8, 8, 2
  return config


def _categories(folder: pathlib.Path) -> tuple[str, ...]:
  """The names of the categories in a folder's annotations, which training checks in full."""
  path = folder / _ANNOTATIONS
  if not path.is_file():
    raise ValueError(f"data={folder}: has no {_ANNOTATIONS}; give a folder that has one")
  try:
    return tuple(str(each["name"]) for each in json.loads(path.read_text())["categories"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: has no categories with names ({error!r:.80})") from None
