"""Runs one reader on many damaged files, within so much memory and time; says what came out.

    python tests/hostile_worker.py READER SEED COUNT SECONDS FOLDER

Prints a JSON object: how many mutations were refused, accepted with the same content, and accepted
with another that is right for the file as it then was; and a list of faults, which is to be empty:
any other exception, any wrong content, more than SECONDS or more than MEMORY.
"""

import collections
import json
import pathlib
import random
import resource
import signal
import sys

import hostile_readers

MEMORY = 600 << 20  # beyond what the imports have taken
REFUSALS = (ValueError, FileNotFoundError, PermissionError, ConnectionError)
MESSAGE = 4000


class TooSlow(BaseException):
  """Raised by the alarm; no `except Exception` takes it."""


def limit_memory() -> None:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  most = pages * resource.getpagesize() + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (most, most))


def stop(*_):
  raise TooSlow


def main(name: str, seed: int, count: int, seconds: int, folder: pathlib.Path) -> dict:
  reader = hostile_readers.READERS[name](folder)
  outcomes, faults = collections.Counter(), []
  signal.signal(signal.SIGALRM, stop)
  limit_memory()
  for number in range(seed, seed + count):
    chance = random.Random(number)
    said = "?"
    try:
      signal.alarm(seconds)
      said = reader.damage(chance)
      outcomes[reader.outcome()] += 1
    except REFUSALS as error:
      outcomes["refused"] += 1
      if len(str(error)) > MESSAGE or isinstance(error, UnicodeError):
        faults.append([number, said, f"the message: {error!r:.300}"])
    except (Exception, TooSlow) as error:
      faults.append([number, said, f"{type(error).__name__}: {str(error)[:300]}"])
    finally:
      signal.alarm(0)
  return {"outcomes": outcomes, "faults": faults}


if __name__ == "__main__":
  name, *numbers, folder = sys.argv[1:]
  print(json.dumps(main(name, *map(int, numbers), pathlib.Path(folder))))
