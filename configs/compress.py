r"""Compresses a model: the steps, their settings, and what they calibrate and measure by.

    python -m experiments.compress --config=configs/compress.py --workdir=runs/small
    python -m experiments.compress --workdir=runs/small_sst2 \
        --config=configs/compress.py:model=minilm,source=runs/sst2_merged,steps=factorize+quantize

    :model=smollm2   SmolLM2-135M-Instruct, by newspaper sentences (Hutto and Gilbert 2014) in
                     windows of 256 tokens: 64 for calibration, 40 for evaluation, the rest for
                     healing (configs/heal.py)
    :model=minilm    MiniLM-L6 on SST-2, by 512 of its training sentences (configs/glue.py)
    :model=vit       ViT-S/14 on CIFAR-10, by 256 of its training images (configs/images.py)
    :model=detector  SSDLite on blood cells, by 160 of its training pictures (configs/detect.py)
    :model=whisper   Whisper tiny.en on spoken orders, by 128 of its clips (configs/speech.py)
    :source=folder   the model, instead of SmolLM2's file. Encoders and image models need one that
                     was trained on the task: the output of `experiments.export --to=merged`, or the
                     base with --config.adapter=runs/sst2
    :steps=factorize+prune+quantize   of channels, heads, value_heads, factorize, prune, quantize;
                     the first three are for decoders
    :budget=0.8      fraction of the kernels' parameters, FLOPs or milliseconds
    :smoke           little data: everything runs
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_collections
from ml_collections import config_dict

from configs import arguments, detect, glue, images, quickstart, speech

_EDITORIALS = (
  "pypi://vaderSentiment==3.3.2/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/"
  "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
)
_BLOCKS = r"block_\d+/(attn|mlp)/.*/kernel"


class Model(NamedTuple):
  """A model and the task that it is measured by.

  config: the text to the config of a run that trains it.
  first: what that text starts with.
  targets: what is compressed: blocks alone, without what trains in full while the model is healed.
  calibration: examples of its training split.
  """

  config: Callable[[str], ml_collections.ConfigDict]
  first: str
  targets: tuple[str, ...]
  calibration: int


MODELS = {
  "smollm2": Model(quickstart.get_config, "", ("all-linear",), 0),
  "minilm": Model(glue.get_config, "sst2,", (_BLOCKS,), 512),
  "vit": Model(images.get_config, "cifar,", (_BLOCKS,), 256),
  "detector": Model(detect.get_config, "", (r"block_\d+/(expand|project)/conv/kernel",), 160),
  "whisper": Model(speech.get_config, "coffee,", (rf"(encoder|decoder)/{_BLOCKS}",), 128),
}


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(
    text, model="smollm2", source="", steps="factorize", budget=0.8, smoke=False
  )
  if args["model"] not in MODELS:
    raise ValueError(f"the model {args['model']!r} is unknown; there are {', '.join(MODELS)}")
  model = MODELS[args["model"]]
  run = run_of(args["model"], smoke=args["smoke"])
  config = ml_collections.ConfigDict()
  config.steps = tuple(args["steps"].split("+"))  # in this order
  config.adapter = ""  # folder of a run whose adapter is merged first; "" for none
  config.keep_adapter = False  # compress only the base, and write the adapter alongside it

  config.model = run.model
  config.model.source = args["source"] or run.model.source
  config.model.scan_layers = False  # each layer has its own ranks

  config.task = task = ml_collections.ConfigDict()  # its metrics are reported
  task.name = run.task.name
  task.fields = {name: x for name, x in run.task.items() if name != "name"}
  task.data = run.data
  task.split = "test"
  config.report = report = ml_collections.ConfigDict()
  report.batches = (1, 8)  # rows
  report.repeats = 5  # turns; the median is reported
  # True: quantized values are dequantized once, as fast and as large as dense ones. False: at each
  # use, as small as they are, and slower where the device has no product of such values.
  report.resident = False
  report.onnx = False  # True: time ONNX Runtime as well; needs pip install -e ".[onnx]"
  if args["model"] == "smollm2":
    _by_running_text(config, args["smoke"])
  else:
    config.text = ml_collections.ConfigDict({"source": ""})  # calibrate by the task's batches
    task.calibration = model.calibration  # examples of its training split
    task.examples = 0  # all
    task.batch_size = 32
    if args["smoke"]:
      task.calibration, task.examples, task.batch_size = 64, 16, 8
      report.batches, report.repeats = (1,), 1
      if args["model"] in ("minilm", "vit"):
        task.calibration = 160  # enough tokens or patches for kernels of 1,536 inputs
      if args["model"] == "detector":
        task.data.size = 128  # enough positions for kernels of 960 inputs

  config.channels = ml_collections.ConfigDict({"mlp_width": 1152, "damping": 1e-3})
  config.heads = ml_collections.ConfigDict({"num_kv_heads": 2, "damping": 1e-3})
  config.value_heads = ml_collections.ConfigDict({"value_dim": 48, "damping": 1e-3})

  config.factorize = factorize = ml_collections.ConfigDict()
  factorize.targets = model.targets  # presets, or patterns that match whole paths
  factorize.method = "whitened"  # or svd, randomized, qr, which need no calibration
  factorize.gradients = True  # weight errors by their effect on the loss
  factorize.damping = 1e-3  # as a fraction of the mean of the moments' diagonals
  factorize.budget = args["budget"]  # fraction of the targets' cost, or 0
  factorize.unit = "parameters"  # of the budget; or flops, milliseconds (measured here)
  factorize.rows = 1024  # batch of inputs for flops and milliseconds
  factorize.energy = 0.0  # alternative: fraction of each kernel's energy that is kept
  factorize.multiple = 1  # every rank is a multiple of it; 4 to prune the factors 2:4 afterwards
  factorize.updates = 1  # how often second factors are refitted to the inputs that they now have

  config.prune = prune = ml_collections.ConfigDict()
  prune.targets = model.targets
  prune.score = "wanda"  # or magnitude; factors are always pruned by magnitude
  prune.share = 0.5  # fraction of each output's weights that is pruned
  prune.n, prune.of = 2, 0  # keep n of every `of` inputs; 0 uses `share`

  config.quantize = quantize = ml_collections.ConfigDict()
  quantize.targets = model.targets
  quantize.method = "nearest"  # or gptq, which calibrates dense kernels
  quantize.damping = 0.01  # of gptq, as a fraction of the mean of the moments' diagonals
  quantize.levels = "int8"  # nf4, int4, int8 or fp8
  quantize.block = 0  # inputs that share a scale; 0 for a whole column
  quantize.double = False  # quantize the scales of blocks too
  return config


def run_of(model: str, smoke: bool = False, rank: int = 0) -> ml_collections.ConfigDict:
  """The config of a run that trains a model of `MODELS` on its task."""
  found = MODELS[model]
  # SmolLM2 compresses and heals on other text than the quickstart's, which has a short form here.
  short = ",smoke" if smoke and found.calibration else ""
  return found.config(f"{found.first}rank={rank}{short}")


def _by_running_text(config: ml_collections.ConfigDict, smoke: bool) -> None:
  config.text = source = ml_collections.ConfigDict()
  source.source = config_dict.FieldReference(_EDITORIALS, field_type=object)  # or several
  source.format, source.columns = "tsv", ("id", "rating", "text")
  source.encoding = "utf-8-sig"  # of the file; others are utf-16 or latin-1
  source.quoted = config_dict.placeholder(bool)  # as in configs/quickstart.py
  source.special_tokens = False  # parse special tokens in the text
  source.column = "text"  # its values are joined by spaces
  source.length = 256  # tokens per window
  source.calibration, source.held_out = 64, 40  # windows, from the beginning
  source.batch_size = 4  # windows at a time
  config.task.examples = 400  # at most, as in the quickstart; 0 for no task
  config.task.batch_size = 32
  config.report.prompt = 128  # tokens
  if smoke:
    source.calibration, source.held_out = 8, 4
    config.task.examples = 0
    config.report.batches, config.report.repeats = (1,), 1
