r"""Compresses SmolLM2-135M-Instruct: the steps, their settings and the calibration text.

    python -m experiments.compress --config=configs/compress.py --workdir=runs/small

The text is newspaper sentences (Hutto and Gilbert 2014) in windows of 256 tokens: 64 for
calibration, 40 for evaluation, the rest for healing (configs/heal.py).

    :steps=factorize+prune+quantize   of channels, heads, value_heads, factorize, prune, quantize
    :budget=0.8                       fraction of the kernels' parameters, FLOPs or milliseconds
    :smoke                            few windows, no task: everything runs
"""

import ml_collections
from ml_collections import config_dict

from configs import arguments, quickstart

_EDITORIALS = (
  "pypi://vaderSentiment==3.3.2/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/"
  "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt"
)


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, steps="factorize", budget=0.8, smoke=False)
  reviews = quickstart.get_config()
  config = ml_collections.ConfigDict()
  config.steps = tuple(args["steps"].split("+"))  # in this order
  config.adapter = ""  # folder of a run whose adapter is merged first; "" for none
  config.keep_adapter = False  # compress only the base, and write the adapter alongside it

  config.model = reviews.model
  config.model.scan_layers = False  # each layer has its own ranks

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

  config.channels = ml_collections.ConfigDict({"mlp_width": 1152, "damping": 1e-3})
  config.heads = ml_collections.ConfigDict({"num_kv_heads": 2, "damping": 1e-3})
  config.value_heads = ml_collections.ConfigDict({"value_dim": 48, "damping": 1e-3})

  config.factorize = factorize = ml_collections.ConfigDict()
  factorize.targets = ("all-linear",)  # presets, or patterns that match whole paths
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
  prune.targets = ("all-linear",)
  prune.score = "wanda"  # or magnitude; factors are always pruned by magnitude
  prune.share = 0.5  # fraction of each output's weights that is pruned
  prune.n, prune.of = 2, 0  # keep n of every `of` inputs; 0 uses `share`

  config.quantize = quantize = ml_collections.ConfigDict()
  quantize.targets = ("all-linear",)
  quantize.method = "nearest"  # or gptq, which calibrates dense kernels
  quantize.damping = 0.01  # of gptq, as a fraction of the mean of the moments' diagonals
  quantize.levels = "int8"  # nf4, int4, int8 or fp8
  quantize.block = 0  # inputs that share a scale; 0 for a whole column
  quantize.double = False  # quantize the scales of blocks too

  config.task = task = ml_collections.ConfigDict()  # its accuracy is reported
  task.name = reviews.task.name
  task.data = reviews.data
  task.split = "test"
  task.examples = 400  # at most, as in the quickstart; 0 for no task
  task.batch_size = 32

  config.report = report = ml_collections.ConfigDict()
  report.prompt = 128  # tokens
  report.batches = (1, 8)  # rows
  report.repeats = 5  # calls; the median is reported

  if args["smoke"]:
    source.calibration, source.held_out = 8, 4
    task.examples = 0
    report.batches, report.repeats = (1,), 1
  return config
