"""Pages of the documentation that lie elsewhere in the repository: the notebooks."""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


def on_files(files, config):
  for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
    name = f"notebooks/{notebook.name}"
    files.append(File.generated(config, name, abs_src_path=str(notebook)))
  return files
