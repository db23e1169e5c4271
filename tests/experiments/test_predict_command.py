"""`python -m experiments.predict`: answers for a text and for files, and what it refuses."""

import json

import numpy as np
import pytest
import tiny_encoder
from main_programs import imported, run

from configs import compress as compress_config
from configs import quickstart
from experiments import methods, parts
from lora_jax.run import workdir

train = imported("experiments.train")
compress = imported("experiments.compress")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  tiny_encoder.write(folder)
  return folder


@pytest.fixture(scope="module")
def embedded(folder, tmp_path_factory):
  """The workdir of a run of embeddings."""
  config = tiny_encoder.config_of(folder, "embedding")
  config.update_from_flattened_dict({"train.steps": 3, "evaluation.samples": 0})
  with workdir.open_workdir(tmp_path_factory.mktemp("run"), config.to_dict()) as opened:
    train.train(config, opened)
  return opened


def answers(printed):
  return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_text_and_the_lines_of_a_file_have_the_same_embedding(embedded, tmp_path):
  texts = ["a fine film, number 3", "dull"]
  (tmp_path / "texts.txt").write_text(f"{texts[0]}\n\n{texts[1]}\n")
  (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
  found = {}
  for name in ("texts.txt", "texts.jsonl"):
    printed = run("predict", f"--workdir={embedded.path}", f"--input={tmp_path / name}")
    found[name] = answers(printed)
    assert [each["index"] for each in found[name]] == [0, 1]
  [alone] = answers(run("predict", f"--workdir={embedded.path}", f"--input={texts[1]}"))
  vectors = np.array([each["embedding"] for each in found["texts.txt"]])
  assert vectors.shape == (2, 32)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  np.testing.assert_allclose(vectors, [x["embedding"] for x in found["texts.jsonl"]], atol=1e-6)
  np.testing.assert_allclose(vectors[1], alone["embedding"], atol=1e-5)


@pytest.fixture(scope="module")
def bound(folder):
  """`task -> the task on its model`."""

  def make(task):
    config = tiny_encoder.config_of(folder, task)
    return parts.make_task(config).of_model(methods.load_base(config))

  return make


@pytest.mark.parametrize(
  ("name", "content", "words"),
  [
    ("a.jsonl", '{"text": "fine"}\n', "a.jsonl: --input template .* no column 'other'"),
    (
      "a.jsonl",
      '{"text": "fine", "other": " "}\n',
      "record 0: the text ' ' has no tokens",
    ),
    ("a.jsonl", '{"text": null, "other": "x"}\n', "column 'text' of record 0 holds a NoneType"),
    ("a.jsonl", "not JSON\n", "is not JSON"),
    ("a.csv", "text,other\n", "no records"),
    (None, "a fine film", "a text has one column, and the task asks for text, other"),
  ],
)
def test_an_input_that_cannot_be_answered_is_refused(bound, tmp_path, name, content, words):
  given = content
  if name:
    (tmp_path / name).write_text(content)
    given = str(tmp_path / name)
  with pytest.raises(ValueError, match=words):
    bound("classification").asked(given)


def test_a_file_of_no_lines_is_refused(bound, tmp_path):
  (tmp_path / "empty.txt").write_text("\n \n")
  with pytest.raises(ValueError, match=r"empty\.txt: has no line with a text"):
    bound("embedding").asked(str(tmp_path / "empty.txt"))


def test_a_run_that_writes_texts_is_sent_to_generate():
  task = parts.make_task(quickstart.get_config())
  with pytest.raises(ValueError, match=r"use experiments\.generate"):
    task.asked("a text")


def test_an_encoder_is_not_asked_to_generate(folder, tmp_path):
  printed = run("generate", f"--source={folder / 'model'}", "--prompt=a fine film", fails=True)
  assert "a 'bert' generates no text; experiments.predict answers by a run of it" in printed


def test_an_encoder_is_not_compressed_by_the_text_that_it_would_write(folder, tmp_path):
  config = compress_config.get_config()
  config.model.source = str(folder / "model")
  with pytest.raises(ValueError, match=r"a 'bert' generates no text; .*set text.source to ''"):
    compress.compress(config, tmp_path)
