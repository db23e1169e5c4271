"""The tokens of an example as texts, and whether each is learned.

`token_texts(tokenizer, ids, learnt={5, 6})`
`# [TokenText("<|im_start|>", 1, special=True, learnt=False), TokenText("user", 1, …), …]`
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from lora_jax.io.text_stream import TextStream
from lora_jax.io.tokenizer import Tokenizer


class TokenText(NamedTuple):
  """The text of a token, or of several tokens that are parts of one character.

  text: of the tokens.
  count: the number of tokens.
  special: whether it is a special token, rather than text that looks like one.
  `learnt`: whether the loss covers it.
  """

  text: str
  count: int
  special: bool
  learnt: bool


def token_texts(
  tokenizer: Tokenizer, ids: Sequence[int], learnt: Collection[int]
) -> list[TokenText]:
  """Returns the text of each token, in order.

  Args:
    tokenizer: of the ids.
    ids: the tokens.
    `learnt`: the indices in `ids` of the tokens that the loss covers.
  """
  special = {token: text for text, token in tokenizer.special_tokens.items()}
  stream = TextStream(tokenizer, skip_special_tokens=False)
  found: list[TokenText] = []
  waiting: list[int] = []

  def close(text: str) -> None:
    covered = any(n in learnt for n in waiting)
    # A decoder may put a space before a special token, which is not part of it.
    name = special.get(ids[waiting[0]])
    found.append(TokenText(name or text, len(waiting), name is not None, covered))
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
