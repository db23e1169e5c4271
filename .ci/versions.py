"""Records the versions of an environment that passed, and writes the README's table of them.

python .ci/versions.py record FILE NAME WHAT
python .ci/versions.py write FILE README
"""

import importlib.metadata
import json
import pathlib
import platform
import re
import sys

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")
START, END = "<!-- versions: written by .ci/run -->\n", "<!-- end of versions -->\n"


def record(file: str, name: str, what: str) -> None:
  """Adds this interpreter and its packages to a JSON file."""
  path = pathlib.Path(file)
  rows = json.loads(path.read_text()) if path.exists() else {}
  versions = {package: importlib.metadata.version(package) for package in PACKAGES}
  rows[name] = {"Python": platform.python_version(), **versions, "tested": what}
  path.write_text(json.dumps(rows, indent=2))
  print(f"+ {name} passed:", *(f"{package} {version}" for package, version in versions.items()))


def write(file: str, readme: str) -> None:
  """Puts the recorded rows into the README, between its two marks."""
  rows = json.loads(pathlib.Path(file).read_text())
  path = pathlib.Path(readme)
  text = path.read_text()
  marked = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
  if len(marked.findall(text)) != 1:
    sys.exit(f"{readme}: has no place for the table of versions, between {START!r} and {END!r}")
  path.write_text(marked.sub(lambda _: START + table(rows) + END, text))


def table(rows: dict[str, dict[str, str]]) -> str:
  """The rows as Markdown."""
  columns = ("Python", *PACKAGES, "tested")
  lines = [f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |"]
  lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows.values()]
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  {"record": record, "write": write}[sys.argv[1]](*sys.argv[2:])
