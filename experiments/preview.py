r"""Shows the tokens of a config's examples: which are learned, which are not, and the special ones.

    python -m experiments.preview --config=configs/sft.py:data=mine.jsonl --examples=3

The examples are spread evenly over the split. In a terminal, learned tokens have a green
background; two shades separate neighboring tokens, and special tokens are bold. Elsewhere each line
has a mark, + for learned tokens and . for others. Each token of text is in quotes. Special tokens
are not, which distinguishes them from text that looks the same:

    . <|im_start|> "user" "\n"
    . "Hi" <|im_end|> "\n"
    . <|im_start|> "assistant" "\n"
    + "Hello" "!" <|im_end|>

Only the model's configuration and tokenizer are read, not its weights.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import config_checks, parts, programs, samples
from lora_jax.data.token_texts import TokenText

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config.", lock_config=True)
_EXAMPLES = flags.DEFINE_integer("examples", 3, "How many examples to show.", 1)
_SPLIT = flags.DEFINE_string("split", "train", "The split: train, validation or test.")
_COLOR = flags.DEFINE_enum(
  "color",
  "auto",
  ["auto", "always", "never"],
  "Colors or marks; auto: colors in a terminal, unless NO_COLOR is set.",
)

# ECMA-48's "select graphic rendition"; 256 colors, as xterm has them.
_GROUNDS, _GREYS = ("48;5;22;97", "48;5;28;97"), ("38;5;252", "38;5;245")
_BOLD, _RESET = "1", "\033[0m"
_WIDTH = 90  # characters of a line of marks, unless one token has more


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  config_checks.check_run(config)
  task = parts.make_task(config)
  rows = parts.pick(parts.load_records(config.data, task), _SPLIT.value, "--split")
  task = parts.task_of_model(task, config)
  examples = task.examples(rows)
  print("\n".join(task.lines(task.describe(**{_SPLIT.value: examples}))))

  is_colored = _COLOR.value == "always"
  if _COLOR.value == "auto":
    is_colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
  draw: Callable[[Sequence[TokenText]], Iterator[str]] = colored if is_colored else marked
  print("learned: on a green ground" if is_colored else "learned: lines with +")
  for number, example in zip(
    samples.choose(range(len(examples)), _EXAMPLES.value),
    samples.choose(examples, _EXAMPLES.value),
    strict=True,
  ):
    tokens = task.tokens(example)
    count = sum(token.count for token in tokens)
    learnt = sum(token.count for token in tokens if token.learnt)
    cut = f", {example.cut:,} more are cut" if example.cut else ""
    print(
      f"\nexample {number + 1:,} of {len(examples):,}: {count:,} tokens, {learnt:,} of them "
      f"learned{cut}"
    )
    for line in draw(tokens):
      print(line)


def marked(tokens: Sequence[TokenText]) -> Iterator[str]:
  """Lines of tokens, each with a mark; see the module."""
  line, was_learnt = "", False
  for token in tokens:
    shown = quoted(token.text)
    shown = shown[1:-1] if token.special else shown
    shown += f"x{token.count}" if token.count > 1 else ""  # parts of one character
    if line and (was_learnt != token.learnt or len(line) + len(shown) > _WIDTH):
      yield line
      line = ""
    line = f"{line or '.+'[token.learnt]} {shown}"
    was_learnt = token.learnt
    if "\n" in token.text:
      yield line
      line = ""
  if line:
    yield line


def quoted(text: str) -> str:
  """A text in quotes as JSON has it, with what cannot be seen escaped."""
  return "".join(
    x if x.isprintable() else json.dumps(x)[1:-1] for x in json.dumps(text, ensure_ascii=False)
  )


def colored(tokens: Sequence[TokenText]) -> Iterator[str]:
  """The text of tokens as it is, in colors; see the module."""
  pieces = []
  for n, token in enumerate(tokens):
    codes = [(_GROUNDS if token.learnt else _GREYS)[n % 2]]
    codes += [_BOLD] if token.special else []
    for m, line in enumerate(token.text.split("\n")):
      shown = "".join(x if x.isprintable() else quoted(x)[1:-1] for x in line)
      # A color that lasts over the end of a line would fill the terminal's width.
      pieces.append(f"\033[{';'.join(codes)}m⏎{_RESET}\n" if m else "")
      pieces.append(f"\033[{';'.join(codes)}m{shown}{_RESET}" if shown else "")
  yield "".join(pieces)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  programs.run(main)
