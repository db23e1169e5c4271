"""Errors of the `tokenizers` library as ValueErrors.

Its Rust side raises bare Exception for a file that is no tokenizer, and a panic, where a part of a
tokenizer contradicts another, as a BaseException, which no `except Exception` holds.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def as_value_errors(what: str) -> Iterator[None]:
  """Raises ValueError, which begins with `what`, for what the block raises.

  TypeError, which text that is none gets, and what ends a program pass.
  """
  try:
    yield
  except TypeError:
    raise
  except BaseException as error:
    # The class has no name that could be imported.
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
      raise ValueError(f"{what}: {str(error)[:200]}") from None
    raise
