"""The tokens of an example as a person reads them: the text of each, and whether it is learnt.

token_texts(tokenizer, ids, learnt={5, 6})
# [TokenText("<|im_start|>", 1, special=True, learnt=False), TokenText("user", 1, …), …]
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from lora_jax.io.text_stream import TextStream
from lora_jax.io.tokenizer import Tokenizer


class TokenText(NamedTuple):
  """The text of a token, or of several where they are parts of one character.

  text: of the tokens.
  count: how many tokens it is the text of.
  special: whether it is a special token, and not text that reads like one.
  learnt: whether the loss covers it.
  """

  text: str
  count: int
  special: bool
  learnt: bool


def token_texts(
  tokenizer: Tokenizer, ids: Sequence[int], learnt: Collection[int]
) -> list[TokenText]:
  """Returns the text of each token, in their order.

  Args:
    tokenizer: of the ids.
    ids: the tokens.
    learnt: the indices in `ids` of those that the loss covers.
  """
  special = set(tokenizer.special_tokens.values())
  stream = TextStream(tokenizer, skip_special_tokens=False)
  found: list[TokenText] = []
  waiting: list[int] = []

  def close(text: str) -> None:
    covered = any(n in learnt for n in waiting)
    found.append(TokenText(text, len(waiting), ids[waiting[0]] in special, covered))
    waiting.clear()

  for n, token in enumerate(ids):
    if waiting and token in special:
      close(stream.end())  # half a character
    waiting.append(n)
    text = stream.add(token)
    if not stream.held:
      close(text)
  if waiting:
    close(stream.end())
  return found
