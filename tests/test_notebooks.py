"""The notebooks run from the first cell to the last, and are committed without what running leaves.

Each runs in its short form, on the CPU, in a folder of its own. The folder has the main programs,
as a clone does, except for `lora_from_scratch.ipynb`, which uses the installed library alone.
`.ci/run` runs the notebooks in the README's environment.
"""

import pathlib
import re

import nbformat
import pytest
from ipykernel import kernelspec
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(FOLDER / name, as_version=nbformat.NO_CONVERT)


def execute(name: str, tmp_path: pathlib.Path, monkeypatch) -> tuple[str, str, pathlib.Path]:
  """Runs a notebook and returns what it printed, its standard error and the folder it ran in.

  Raises `nbclient.exceptions.CellExecutionError`, with cell and traceback, where a cell fails.
  """
  # The kernel is this interpreter, whichever kernels the user has installed besides.
  kernelspec.write_kernel_spec(tmp_path / "jupyter/kernels/python3")
  monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("LORA_JAX_SMOKE", "1")
  folder = tmp_path / "content"
  folder.mkdir()
  if name.endswith("_colab.ipynb"):
    for package in ("configs", "experiments"):
      (folder / package).symlink_to(ROOT / package, target_is_directory=True)
  notebook = read(name)
  NotebookClient(
    notebook, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(folder)}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
  streams = {
    stream: "".join(output.text for output in outputs if output.get("name") == stream)
    for stream in ("stdout", "stderr")
  }
  return streams["stdout"], streams["stderr"], folder


def numbers(pattern: str, text: str) -> list[float]:
  """The groups of the one place where the pattern is found, as numbers."""
  (found,) = re.finditer(pattern, text)
  return [float(group) for group in found.groups()]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs_and_with_minimal_metadata(name):
  notebook = read(name)
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  assert notebook.metadata == {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  }
  ids = [cell.id for cell in notebook.cells]
  assert len(set(ids)) == len(ids)
  for cell in notebook.cells:
    assert cell.metadata == {}, cell.id
    if cell.cell_type == "code":
      assert cell.outputs == [], cell.id
      assert cell.execution_count is None, cell.id


@pytest.mark.slow
def test_the_quickstart_notebook_trains_a_real_model_and_keeps_the_adapter(tmp_path, monkeypatch):
  printed, errors, folder = execute("quickstart_colab.ipynb", tmp_path, monkeypatch)
  assert "2,442,240 of 134,515,008 parameters train (1.82%)" in printed
  # The first "before" is printed ahead of the training, the second beside the "after".
  before, again = re.findall(r"before: accuracy ([\d.]+)%, loss ([\d.]+) on 16 examples", printed)
  assert before == again
  accuracy, loss = numbers(r"after:  accuracy ([\d.]+)%, loss ([\d.]+) on 16 examples", printed)
  assert loss < float(before[1]) / 2
  merged_accuracy, merged_loss = numbers(r"merged: accuracy ([\d.]+)%, loss ([\d.]+) on", printed)
  assert merged_accuracy == accuracy
  assert merged_loss == pytest.approx(loss, abs=2e-3)
  (difference,) = numbers(r"unmerged: differs from the base by at most (\S+)", printed)
  assert difference < 1e-6
  assert len(re.findall(r"^ *\d+% → +\d+%  ", printed, re.MULTILINE)) == 4
  assert {path.name for path in (folder / "runs/notebook").rglob("*.*")} == {
    "adapter_config.json",
    "adapter_model.safetensors",
    "loss.png",
  }
  assert "arning" not in errors


@pytest.mark.slow
def test_the_notebook_on_own_data_previews_trains_talks_and_exports(tmp_path, monkeypatch):
  printed, errors, folder = execute("own_data_colab.ipynb", tmp_path, monkeypatch)
  printed = printed.replace("\r\n", "\n")
  assert "mine.jsonl: conversations: read as 'messages', from messages: 30 records" in printed
  assert re.search(r'^\+ "Arr" ","', printed, re.MULTILINE) and " <|im_end|>\n" in printed
  before, after = numbers(r"before: loss ([\d.]+) on[^$]*after:  loss ([\d.]+) on", printed)
  assert after < before / 2
  adapted, base = re.findall(r"^> How do I make coffee\?\n(.*)", printed, re.MULTILINE)
  assert adapted.startswith("Arr") and not base.startswith("Arr")
  assert "> /base\n(the base, without the adapter)\n" in printed
  assert {path.name for path in (folder / "runs/adapter").iterdir()} == {
    "adapter_config.json",
    "adapter_model.safetensors",
  }
  assert "Traceback" not in printed and "Error" not in printed and errors == ""


@pytest.mark.slow
def test_the_notebook_on_speech_trains_and_plays_a_clip_alongside_its_transcript(
  tmp_path, monkeypatch
):
  pytest.importorskip("soundfile", reason="needs soundfile, of the extra speech")
  printed, errors, folder = execute("speech_colab.ipynb", tmp_path, monkeypatch)
  assert "held_out: " in printed and "294,912 of 37,760,256 parameters train (0.78%)" in printed
  assert re.search(r"before: WER [\d.]+%, .*after:  WER [\d.]+%, ", printed, re.DOTALL)
  said, read = re.search(r"^said: (.*)\nread: (.*)", printed, re.MULTILINE).groups()
  assert set(said.split()) <= {"lungo", "ristretto"} and isinstance(read, str)
  assert (folder / "runs/tones/adapter/adapter_model.safetensors").exists()
  assert "Traceback" not in printed and errors == ""


@pytest.mark.slow
def test_the_notebook_on_images_learns_classes_and_boxes_and_shows_them(tmp_path, monkeypatch):
  printed, errors, folder = execute("images_colab.ipynb", tmp_path, monkeypatch)
  before, after = numbers(
    r"before: accuracy [^$]*?loss ([\d.]+) on[^$]*?after:  accuracy [^$]*?loss ([\d.]+) on", printed
  )
  assert after != before
  before, after = numbers(
    r"before: mAP [^$]*?loss ([\d.]+) on[^$]*?after:  mAP [^$]*?loss ([\d.]+) on", printed
  )
  assert after < before
  assert '"label": "' in printed and '"probabilities": {"circle": ' in printed
  assert '"size": [160, 120], "boxes": [' in printed
  for name in ("runs/shapes/samples.png", "runs/scenes/samples.png", "drawn/0_0.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")
  assert (folder / "runs/shapes_merged/model.safetensors").exists()
  assert "Traceback" not in printed and "Error" not in printed and errors == ""


@pytest.mark.slow
def test_the_notebook_from_scratch_builds_a_transform_that_agrees_with_the_library(
  tmp_path, monkeypatch
):
  printed, errors, _ = execute("lora_from_scratch.ipynb", tmp_path, monkeypatch)
  assert "the law holds" in printed
  assert "lora_jax.adapt gives the same value and the same gradients" in printed
  # What is of full size is seen where there is no rule, and is gone once there is one.
  formed = "['dot_general', 'add', 'dot_general', 'add']"
  assert f"adapted, no rules: {formed}" in printed
  sizes = re.findall(r"of full size: (\[.*\])", printed)
  assert sizes == ["[]", "[]", formed, "[]", "[]"]
  assert "ours:   []" in printed
  ours, naive = numbers(r"fine-tuning: ours ([\d.]+), W \+ A B materialized ([\d.]+)", printed)
  assert ours < 0.75 < naive
  before, after = numbers(r"loss before ([\d.]+), after ([\d.]+)", printed)
  assert after < before / 5
  assert len(re.findall(r"gradients .*: +[\d.]+ ms", printed)) == 4
  assert errors == ""
