"""Pages of the documentation that lie elsewhere in the repository: the notebooks."""

from pathlib import Path

import nbformat
from mkdocs.structure.files import File

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def on_files(files, config):
  """Adds a page for each notebook: its text and its code. The notebooks hold no outputs."""
  for path in sorted(NOTEBOOKS.glob("*.ipynb")):
    files.append(File.generated(config, f"notebooks/{path.stem}.md", content=as_markdown(path)))
  return files


def as_markdown(path: Path) -> str:
  cells = nbformat.read(path, as_version=4).cells
  where = f"This page is the notebook `notebooks/{path.name}`, which CI runs."
  parts = [c.source if c.cell_type == "markdown" else f"```python\n{c.source}\n```" for c in cells]
  return "\n\n".join([parts[0], where, *parts[1:]])
