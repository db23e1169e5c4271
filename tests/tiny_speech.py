"""A config of a tiny random model of speech and of tones that stand for words."""

import pathlib

import speech_models

from configs import speech

FIELDS = {
  "data.window": 1.28, "train.steps": 6, "train.batch_size": 8,
  "train.log_every": 1, "train.checkpoint_every": 3, "optimizer.warmup_steps": 1,
  "optimizer.peak_learning_rate": 1e-2, "optimizer.rates": (), "evaluation.batch_size": 8,
  "evaluation.samples": 3,
}  # fmt: skip


def write(folder: pathlib.Path, name: str = "Whisper", task: str = "transcribe"):
  """Writes the model and its data; returns the config of a task on both."""
  speech_models.write(folder / "model", name)
  speech_models.write_clips(folder / "train", 28, seed=0)
  speech_models.write_clips(folder / "test", 10, seed=1)
  config = speech.get_config(f"data={folder / 'train' / 'clips.jsonl'},task={task}")
  own = {"data.max_length": 24, "data.slots": "slots"} if task == "transcribe" else {}
  config.update_from_flattened_dict(
    FIELDS
    | own
    | {
      "model.source": str(folder / "model"),
      "data.split_by": "file",
      "data.test_source": str(folder / "test" / "clips.jsonl"),
      "data.train": 0.9,
      "data.validation": 0.1,
      "data.test": 0.0,
    }
  )
  return config


_FILE = """
import pathlib, sys

sys.path.insert(0, {tests!r})
from configs import speech

def get_config(text=""):
  config = speech.get_config({argument!r})
  config.update_from_flattened_dict({fields!r})
  return config
"""


def write_config(config, folder: pathlib.Path) -> pathlib.Path:
  """Writes the file of a config as `write` makes it; returns its path."""
  fields = {
    f"{section}.{name}": value
    for section in ("model", "data", "train", "evaluation", "adapter")
    for name, value in config[section].to_dict().items()
  }
  fields |= {
    "optimizer.peak_learning_rate": config.optimizer.peak_learning_rate,
    "optimizer.warmup_steps": 1,
  }
  fields = {name: value for name, value in fields.items() if value is not None}
  path, tests = folder / "config.py", str(pathlib.Path(__file__).parent)
  path.write_text(_FILE.format(tests=tests, argument=f"data={config.data.source}", fields=fields))
  return path
