"""The text of tokens as they come, one by one.

stream = TextStream(tokenizer, after=prompt)
for token in tokens:
  print(stream.add(token), end="", flush=True)
print(stream.end())
"""

import itertools
from collections.abc import Sequence

from lora_jax.io.tokenizer import Tokenizer

_BEFORE = 16  # tokens by which the next one's text is told, for its space may depend on them
_HELD = 8  # tokens that wait for the rest of a character at most; a character has four bytes
_INCOMPLETE = "\ufffd"


class TextStream:
  """Turns tokens into text: joined, its pieces are `tokenizer.decode` of all the tokens.

  A token that ends within a character waits for those that complete it.

  held: the tokens that wait.
  """

  def __init__(
    self, tokenizer: Tokenizer, *, after: Sequence[int] = (), skip_special_tokens: bool = True
  ):
    """Starts a stream.

    Args:
      tokenizer: of the tokens.
      after: the tokens that they continue, whose own text is left out.
      skip_special_tokens: whether special tokens have no text.
    """
    self._tokenizer, self._skip = tokenizer, skip_special_tokens
    # In parts that begin at characters. Bytes that begin within one would be no text.
    self._before = [self._end_of(after)]
    self.held: list[int] = []

  def add(self, token: int) -> str:
    """Returns the text that one more token completes, "" where it completes none."""
    self.held.append(token)
    text = self._text()
    if text.endswith(_INCOMPLETE) and len(self.held) < _HELD:
      return ""
    self._before.append(self.held)
    while sum(map(len, self._before[1:])) >= _BEFORE:
      del self._before[0]
    self.held = []
    return text

  def end(self) -> str:
    """Returns the text of the tokens that still wait."""
    text = self._text() if self.held else ""
    self.held = []
    return text

  def _end_of(self, tokens: Sequence[int]) -> list[int]:
    """The last tokens, from where a character begins."""
    count = _BEFORE
    while count < len(tokens) and _INCOMPLETE in self._tokenizer.decode(tokens[-count:]):
      count *= 2
    return list(tokens[-count:])

  def _text(self) -> str:
    before = list(itertools.chain.from_iterable(self._before))
    return self._tokenizer.decode(self.held, skip_special_tokens=self._skip, after=before)
