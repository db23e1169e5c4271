"""Errors of the `tokenizers` library as ValueErrors.

Its Rust code raises a bare Exception for a file that is not a tokenizer. For inconsistent parts it
panics, which raises a BaseException that `except Exception` does not catch.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def as_value_errors(what: str) -> Iterator[None]:
  """Converts errors of the block to ValueError with the prefix `what`.

  TypeError, for arguments that are not text, and exceptions that end a program pass through.
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
