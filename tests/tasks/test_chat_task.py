"""The task chat: a run on conversations, on a tiny random Llama, and its loss against PyTorch's."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chat_peers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from main_programs import imported
from peers import torch, transformers

import lora_jax
from configs import sft
from experiments import parts
from lora_jax import tasks
from lora_jax.io import pretrained
from lora_jax.run import workdir
from lora_jax.train import evaluation

train = imported("experiments.train")

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
  "data.train": 0.6, "data.validation": 0.0, "data.test": 0.4, "data.test_source": "",
  "data.max_length": 61, "data.buckets": (60,), "data.packed_length": 0, "train.steps": 30,
  "train.batch_size": 8,
  "train.accumulate": 1, "train.log_every": 5, "train.checkpoint_every": 20,
  "optimizer.warmup_steps": 1, "optimizer.peak_learning_rate": 2e-2, "evaluation.batch_size": 8,
  "evaluation.samples": 2,
}  # fmt: skip
ENDLESS = 2e9  # a limit that lets a run come to its end
ANSWERS = {"red": "warm", "blue": "cold"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2_tokenizer):
  """A model, and conversations of two turns and one, one of which is long."""
  folder = tmp_path_factory.mktemp("tiny")
  tiny_experiment.write(folder, smollm2_tokenizer)
  rows = []
  for n in range(40):
    messages = [{"role": "system", "content": f"Talk {n}."}]
    for color in list(ANSWERS)[:: 1 if n % 4 < 2 else -1][: 1 + n % 2]:
      messages += [
        {"role": "user", "content": f"Is {color} warm?"},
        {"role": "assistant", "content": ANSWERS[color]},
      ]
    rows.append({"messages": messages})
  rows[7]["messages"][1]["content"] *= 20
  (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "chatml.jinja").write_text(chat_peers.CHATML)
  return folder


@pytest.fixture(scope="module")
def config(folder):
  config = sft.get_config(f"full,data={folder / 'mine.jsonl'},model={folder / 'model'}")
  config.update_from_flattened_dict(FIELDS)
  return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  with workdir.open_workdir(tmp_path_factory.mktemp("run"), config.to_dict()) as opened:
    train.train(config, opened)
  return opened


def task_and_examples(config, **options):
  task = dataclasses.replace(parts.make_task(config), **options)
  rows = [row for split in parts.load_records(config.data, task).values() for row in split]
  task = task.of_model(pretrained.inspect(config.model.source))
  return task, rows, task.examples(rows)


def test_a_run_learns_the_answers_and_stops_after_them(run):
  results = json.loads(run.evaluation.read_text())
  assert results["after"]["loss"] < 0.2 < 2 < results["before"]["loss"]
  for sample in results["samples"]:
    assert sample["prompt"].startswith("<|im_start|>system\nTalk ")
    assert sample["prompt"].endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert sample["after"] == sample["wanted"] != sample["before"]
    assert sample["wanted"] in ANSWERS.values()


def test_the_page_and_eval_json_say_what_was_left_out(run):
  data = json.loads(run.evaluation.read_text())["data"]
  counts = data["splits"].values()
  assert sum(each["left_out"] for each in counts) == 1
  assert sum(each["examples"] for each in counts) == 39
  # "warm" and "cold" are a token each, and so is the end of a turn.
  assert sum(each["learnt"] for each in counts) == 2 * (20 + 2 * 19)
  page = (run.path / "README.md").read_text()
  assert "of them cut to max_length 61; 1 longer ones left out; " in page


def test_the_loss_is_pytorchs_on_the_tokens_of_the_assistants_turns(config):
  task, _, examples = task_and_examples(config)
  found = pretrained.load(config.model.source)
  apply = lora_jax.adapt(parts.make_model(found.config).apply)
  data = task.eval_batches(examples, 8)
  loss = evaluation.evaluate(task.make_eval_step(apply), found.params, data, task.metrics)["loss"]

  model = transformers.AutoModelForCausalLM.from_pretrained(config.model.source)
  total, count = 0.0, 0
  for example in examples:
    labels = np.full(len(example.tokens), -100)
    labels[list(example.learnt)] = example.targets
    ids, labels = torch.tensor([example.tokens]), torch.tensor(labels[None])
    with torch.no_grad():
      total += float(model(ids, labels=labels).loss) * len(example.learnt)
    count += len(example.learnt)
  assert loss == pytest.approx(total / count, rel=1e-5)


def test_packed_rows_have_the_loss_and_the_gradient_of_rows_of_their_own(config):
  task, _, examples = task_and_examples(config)
  found = pretrained.load(config.model.source)
  apply = lora_jax.adapt(parts.make_model(found.config).apply)
  packed = dataclasses.replace(task, packed_length=120)
  examples = examples[:10]
  rows = packed.summary(examples, 1)["batches"]
  several = packed.train_batches(examples, rows, seed=0)[0]
  [alone] = list(task.eval_batches(examples, 10))
  assert several["tokens"].shape[0] < 8 and "segments" in several

  def both(task, batch):
    batch = {name: jnp.asarray(x) for name, x in batch.items() if name != "index"}
    value = jax.value_and_grad(lambda params: task.objective(apply)(params, batch)[0])
    return jax.jit(value)(found.params)

  (loss, gradient), (expected, wanted) = both(packed, several), both(task, alone)
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_template_of_ones_own_and_the_last_turn_alone(config, folder):
  task, _, examples = task_and_examples(config, template=str(folder / "chatml.jinja"))
  last, _, ends = task_and_examples(config, learn="last")
  tokenizer = task.model.tokenizer
  assert task.stop_ids == (tokenizer.special_tokens["<|im_end|>"],)
  assert max(len(example.targets) for example in examples) == 4
  assert all(len(example.targets) == 2 for example in ends)
  assert last.given(ends)[0]["wanted"] in ANSWERS.values()


def test_the_conversations_before_the_last_turn_are_prompts_with_their_answers(config):
  task, rows, examples = task_and_examples(config)
  asked = task.prompts(rows + rows, examples + examples, None)
  assert len(asked) == 39 and all(len(each["references"]) == 2 for each in asked)
  assert {x for each in asked for x in each["references"]} == set(ANSWERS.values())
  assert task.prompts(rows, examples, 3) == [
    x | {"references": x["references"][:1]} for x in asked[:3]
  ]


def test_a_table_of_instructions_is_read_as_conversations_and_said_to_be(config, tmp_path, capsys):
  path = tmp_path / "mine.csv"
  path.write_text("instruction,output\n" + "".join(f"say {n},{n}\n" for n in range(10)))
  changed = config.copy_and_resolve_references()
  changed.data.source = str(path)
  found = parts.load_records(changed.data, parts.make_task(changed))
  rows = sorted(row["messages"][1]["content"] for each in found.values() for row in each)
  assert rows == [str(n) for n in range(10)]
  said = "conversations: read as 'instruction', from instruction, output: 10 records"
  assert f"{path}: {said}" in capsys.readouterr().out
  changed.data.conversation = "messages"
  with pytest.raises(ValueError, match=r"mine\.csv: record 0: has no 'messages'"):
    parts.load_records(changed.data, parts.make_task(changed))


def test_bad_records_are_refused_with_file_and_number(config, tmp_path):
  for number, (row, words) in enumerate(
    [
      ({"text": "a"}, "several readings of conversations fit the columns 'messages', 'text'"),
      ({"other": "a"}, "record 1: has no 'messages'"),
      (
        {"messages": [{"role": "assistant", "content": "a"}]},
        "record 1: message 0 of the role ass",
      ),
    ]
  ):
    path = tmp_path / f"{number}.jsonl"
    good = {"messages": [{"role": r, "content": r} for r in ("user", "assistant")]}
    path.write_text("".join(json.dumps(x) + "\n" for x in (good, row)))
    changed = config.copy_and_resolve_references()
    changed.data.source = str(path)
    with pytest.raises(ValueError, match=rf"{number}\.jsonl: {words}"):
      parts.load_records(changed.data, parts.make_task(changed))


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"data.max_length": 10}, "all .* conversations are longer than max_length 10"),
    ({"data.too_long": "error"}, "1 of .* conversations are longer than max_length 61 .first: rec"),
    ({"data.max_length": 13, "data.too_long": "cut_right"}, "before the first answer fills max_l"),
    ({"task.template": "raises.jinja"}, "raises.jinja: raises 'not today' .its line 1."),
  ],
)
def test_what_the_template_refuses_is_told_before_the_model_is_loaded(
  config, folder, tmp_path, monkeypatch, fields, words
):
  (tmp_path / "raises.jinja").write_text("{{ raise_exception('not today') }}")
  changed = config.copy_and_resolve_references()
  with changed.ignore_type():
    changed.update_from_flattened_dict(fields)
  if changed.task.template:
    changed.task.template = str(tmp_path / changed.task.template)

  def load_model(*unused):
    raise AssertionError("the model is loaded")

  monkeypatch.setattr(parts, "load_model", load_model)
  with (
    workdir.open_workdir(tmp_path / "run", changed.to_dict()) as opened,
    pytest.raises(ValueError, match=words),
  ):
    train.train(changed, opened)


def test_fields_that_do_not_go_together_are_refused(config, folder):
  def make(**fields):
    task = config.task.to_dict() | fields
    return tasks.make(task, config.data, loss_chunk=0)

  assert make().template is None
  with pytest.raises(ValueError, match=r"task\.date 'today' is no day; write it as 2026-01-31"):
    make(date="today")
  with pytest.raises(FileNotFoundError, match=r"other\.jinja: no such chat template"):
    make(template=str(folder / "other.jinja"))
  with pytest.raises(ValueError, match=r"the model has no chat template 'mine'; it has default"):
    make(template="mine").of_model(pretrained.inspect(config.model.source))


def test_damaged_counts_are_named(config):
  task, _, examples = task_and_examples(config)
  described = task.describe(test=examples)
  assert task.lines(described)[0].startswith("test: 39 conversations, 0 of them cut")
  described["splits"]["test"]["learnt"] = "many"
  with pytest.raises(ValueError, match="data learnt is 'many'"):
    task.lines(described)
  with pytest.raises(ValueError, match="data splits is None"):
    task.lines({})


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(folder, tmp_path):
  fields = FIELDS | {"train.steps": 12, "train.checkpoint_every": 2, "train.log_every": 1}
  path = tmp_path / "config.py"
  arguments = f"rank=2,data={folder / 'mine.jsonl'},model={folder / 'model'}"
  path.write_text(
    "from configs import sft\n\n\ndef get_config(text=''):\n"
    f"  config = sft.get_config({arguments!r})\n"
    f"  config.update_from_flattened_dict({fields!r})\n  return config\n"
  )

  def start(name, limit):
    (tmp_path / f"{name}.limit").write_text(str(limit))
    return subprocess.Popen(
      [
        *(sys.executable, "tests/paced_run.py", str(tmp_path / f"{name}.limit")),
        *(f"--config={path}", f"--workdir={tmp_path / name}"),
      ],
      cwd=ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )

  whole = start("whole", ENDLESS)
  killed = start("killed", 5)
  until = time.monotonic() + 300
  while not (tmp_path / "killed" / "checkpoints" / "4").exists():
    assert time.monotonic() < until and killed.poll() is None
    time.sleep(0.1)
  killed.send_signal(signal.SIGKILL)
  killed.wait()
  assert start("killed", ENDLESS).wait(timeout=300) == 0 and whole.wait(timeout=300) == 0
  for file in ("adapter/adapter_model.safetensors", "eval.json"):
    assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
