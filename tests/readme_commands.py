"""Commands of the README and the docs, and each in a form that ends in seconds on a tiny model."""

import pathlib
import re
import shlex

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# In the order in which a reader meets them: what one trains, the next one exports.
DOCS = [
  ROOT / "docs" / f"{name}.md"
  for name in (
    "tutorials/linen", "tutorials/nnx", "tutorials/checkpoint", "tutorials/own_data",
    "tutorials/own_images", "tutorials/own_detection", "tutorials/own_speech", "tutorials/colab",
    "tutorials/compress",
    "tutorials/many_adapters", "tutorials/devices",
    "guide/how_it_works", "guide/methods", "guide/quantized", "guide/low_rank_attention",
    "guide/commands", "guide/models",
  )
]  # fmt: skip

# What reads as another model or another run than the page's, in order of replacement.
_NAMES = {
  "runs/a/adapter": "runs/quickstart/adapter",
  "runs/b/adapter": "runs/quickstart/adapter",
  "=from_peft": "=runs/quickstart/adapter",
  "=model.gguf": "=runs/model.gguf",
  "/shared/runs/": "runs/",
}

_FILES = (
  "mine.jsonl", "more.jsonl", "photographs", "more_photographs", "smears", "more_smears",
  "clips.jsonl", "clip.flac",
)  # fmt: skip
_OWN = ("heal.py", "glue.py", "images.py", "detect.py", "speech.py", "compress.py:model=")


def blocks(language: str, page: str = README) -> list[str]:
  """The code of a page in a language, but for a block with a title, which needs other files."""
  return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands() -> list[list[str]]:
  """The arguments of every `python -m ...` in order, less what starts it on other machines."""
  found = []
  for block in [x for page in pages() for x in blocks("bash", page)]:
    for line in block.replace("\\\n", " ").splitlines():
      if "python -m" in line:
        tail = line.partition("python -m ")[2].removesuffix('"') if "gcloud" in line else line
        words = shlex.split(tail.partition("python -m ")[2] or tail)
        found.append(words)
  return found


def exported_program(title: str) -> str:
  """The program of a title that runs what was exported, without this package."""
  page = (ROOT / "docs" / "tutorials" / "compress.md").read_text()
  (code,) = re.findall(rf'```python title="{title}"\n(.*?)```', page, flags=re.DOTALL)
  return code


def pages() -> list[str]:
  """The README and the pages of the docs."""
  return [README, *(page.read_text() for page in DOCS)]


def parsed(name: str) -> list[list[str]]:
  """The arguments of the commands of one program."""
  return [words[1:] for words in commands() if words[0] == name]


def short(words: list[str], runs: pathlib.Path, model: pathlib.Path) -> list[str]:
  """A command on a tiny model, in smoke form, below a folder of its own.

  runs: takes the place of runs/.
  model: a tiny decoder's folder; next to it the same as a GGUF file, conversations in mine.jsonl
    and more.jsonl, pictures in photographs/ and more_photographs/, and with boxes in smears/ and
    more_smears/, and speech in clips.jsonl and clip.flac. Configs of other models take their own.
  """
  program, *arguments = words
  made = []
  for argument in arguments:
    own = {mark + x: f"{mark}{model.parent / x}" for x in _FILES for mark in "='"}
    for old, new in (_NAMES | own).items():
      argument = argument.replace(old, new)
    name, equals, value = argument.partition("=")
    if name == "--config":
      value += ",smoke" if ":" in value else ":smoke"
    made.append(f"{name}{equals}{value}".replace("runs/", f"{runs}/"))
  has_config = any(x.startswith("--config=") and not any(y in x for y in _OWN) for x in made)
  if has_config and not any(x.startswith("--config.model.source=") for x in made):
    source = model if "--config.model.quantize=gguf" not in made else f"{model}.gguf"
    made.append(f"--config.model.source={source}")
  return [program, *made]
