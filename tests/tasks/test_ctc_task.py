"""CTC: runs on a tiny Whisper's encoder and a tiny wav2vec2, and what is refused."""

import json

import jax
import numpy as np
import pytest
import soundfile
import speech_models
import tiny_speech
from main_programs import imported
from peers import torch

import lora_jax
from configs import speech
from experiments import methods, parts, planning
from lora_jax import exchange
from lora_jax.io import pretrained
from lora_jax.run import workdir
from lora_jax.tasks import ctc_decoding
from lora_jax.train import evaluation, plan

train = imported("experiments.train")

LETTERS = "".join(speech_models.WORDS)


def run_of(config, folder):
  with workdir.open_workdir(folder, config.to_dict()) as opened:
    train.train(config, opened)
  return opened


def changed(config, **fields):
  copy = config.copy_and_resolve_references()
  with copy.ignore_type(), copy.unlocked():
    copy.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
  return copy


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return tiny_speech.write(tmp_path_factory.mktemp("tiny"), task="ctc")


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  return run_of(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def bound(config):
  """The task on its model, the model, and the records of the test."""
  task = parts.make_task(config)
  base = methods.load_base(config)
  return task.of_model(base), base, parts.load_records(config.data, task)["test"]


def test_the_alphabet_is_that_of_the_texts(config):
  assert config.task.alphabet[:2] == ("<pad>", "|")
  assert "".join(config.task.alphabet[2:]) == "".join(sorted(set(LETTERS)))


def test_a_run_learns_and_its_adapter_has_the_new_layer(config, run, bound):
  results = json.loads(run.evaluation.read_text())
  before, after = results["before"], results["after"]
  assert after["loss"] < 0.7 * before["loss"]
  assert after.keys() == {"loss", "wer", "cer", "whole", "rows"} and after["rows"] == 10
  settings = json.loads((run.adapter / "adapter_config.json").read_text())
  assert settings["modules_to_save"] == ["ctc_head"]
  task, base, rows = bound
  assert "decoder" not in base.params and base.params["head"]["kernel"].shape[1] == 2 + len(
    set(LETTERS)
  )
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  adapters = exchange.load(run.adapter, base.params, axes, table=base.table)
  assert {"head/kernel", "head/bias"} <= adapters.keys()
  apply = lora_jax.adapt(task.forward(parts.make_model(base.config)))
  weights = lora_jax.attach(base.params, adapters)
  data = task.eval_batches(task.examples(rows), 4)
  found = evaluation.evaluate(task.make_eval_step(apply), weights, data, task.metrics)
  assert found == pytest.approx(after, rel=1e-3)
  assert "| clip | reference | before | after |" in run.readme.read_text()


def test_the_loss_is_that_of_pytorch_over_the_clip_s_own_frames(bound):
  task, base, rows = bound
  clips = task.examples(rows[:3])
  [batch] = task.eval_batches(clips, 4)  # one row is padding
  apply = task.forward(parts.make_model(base.config))
  logits = apply({"params": base.params}, batch["audio"])
  loss, count = task.objective(apply)(base.params, batch)
  assert float(count) == 3
  log_p = torch.tensor(np.asarray(jax.nn.log_softmax(logits))[:3].transpose(1, 0, 2))
  labels = torch.tensor([x for clip in clips for x in clip.tokens])
  expected = torch.nn.functional.ctc_loss(
    log_p,
    labels,
    torch.tensor(batch["frames"][:3]),
    torch.tensor([len(clip.tokens) for clip in clips]),
    blank=0,
    reduction="sum",
  )
  assert float(loss) == pytest.approx(float(expected) / 3, rel=1e-4)
  assert batch["frames"][:3].tolist() == [40] * 3 and logits.shape[1] == 64


def test_greedy_and_searched_texts_are_spelled(config, bound):
  task, base, rows = bound
  clips = task.examples(rows[:2])
  apply = task.forward(parts.make_model(base.config))
  for beams in (1, 4):
    own = parts.make_task(changed(config, task__beams=beams)).of_model(base)
    [batch] = own._windows(clips, 2, own.window)
    output = np.asarray(own.transcribe(apply)(base.params, batch))
    assert output.ndim == (2 if beams == 1 else 3)
    assert all(set(own.text_of(row)) <= set(LETTERS + " ") for row in output)
  names = base.config.classes
  assert task.text_of(np.array([0, 3, 3, 1, 0, 1, 2])) == f"{names[3]} {names[2]}"


def test_the_layer_alone_lora_and_everything_train_as_one_may_choose(bound):
  _, base, _ = bound
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  counts = {}
  for method in ("head", "lora", "lora_all", "full"):
    own = speech.get_config(f"digits,method={method}")
    task = parts.make_task(own)
    specs = methods.specs_of(base, own.model, methods.all_rules(own.adapter, task), axes)
    assert {"head/kernel", "head/bias"} <= specs.keys()
    counts[method] = len(specs)
  assert counts["head"] == 2 and counts["lora"] == 2 + 2 * 4 and counts["lora_all"] == 2 + 2 * 6
  assert counts["full"] == len(axes)


def test_a_plan_knows_batches_of_clips(config):
  case = planning.read(config)
  assert case.largest == (20480, len("latte latte"))
  mesh = planning.abstract_mesh(config.mesh, 1)
  made = plan.make_plan(planning.whole_run(config, case, mesh))
  assert made.batch == 8 * 4 * (128 * 80 + 2 * 11 + 2) and made.flops > 1e6


def test_a_text_that_is_longer_than_its_frames_is_refused_by_the_clip_s_name(config, tmp_path):
  """One of 20 equal characters needs 39 frames, and the clip of 0.5 s has 25."""
  soundfile.write(tmp_path / "fast.wav", speech_models.tone(0, 0.5), 16_000)
  (tmp_path / "clips.jsonl").write_text(json.dumps({"file": "fast.wav", "text": "o" * 20}) + "\n")
  own = changed(config, data__source=str(tmp_path / "clips.jsonl"), data__test_source="")
  task = parts.make_task(own)
  rows = task.read(task.open(tmp_path / "clips.jsonl", own.data, held_out=False))[0]
  task = task.of_model(parts.extend(parts.read_shapes(own.model), task, own))
  words = r"record 0, fast\.wav: its text of 20 characters needs 39 frames .* has 25"
  with pytest.raises(ValueError, match=words):
    task.examples(rows)
  assert ctc_decoding.frames_needed([1] * 20) == 39
  rows[0]["text"] = "zoo"
  with pytest.raises(ValueError, match=r"fast\.wav: its text has 'z', which is not in the alphab"):
    task.examples(rows)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"task__alphabet": ("a", "b")}, "must begin with '<pad>' and '|'"),
    ({"task__alphabet": ("<pad>", "|", "a", "a")}, "name no character twice"),
    ({"task__alphabet": ("<pad>", "|", "ab")}, "'ab' is no single character"),
    ({"task__alphabet": ()}, "has no layer of characters on its frames"),
    ({"data__join": (3,)}, "give the least and the most words"),
    ({"data__slots": "slots"}, "data.slots: the task ctc reads no such field"),
    ({"task__beams": 0}, "task.beams is 0"),
    ({"model__source": pretrained.DEFAULT}, "takes no audio"),
  ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(config, tmp_path, fields, words):
  own = changed(config, **fields)
  with (
    pytest.raises(ValueError, match=words.replace(".", r"\.").replace("|", r"\|")),
    workdir.open_workdir(tmp_path, own.to_dict()) as opened,
  ):
    train.train(own, opened)


@pytest.mark.slow
def test_a_pretrained_wav2vec2_keeps_its_layer_or_gets_a_new_one(config, tmp_path):
  name = speech_models.WAV2VEC2S[1]
  speech_models.write(tmp_path / "model", name)
  new = changed(config, model__source=str(tmp_path / "model"), train__steps=3)
  with new.unlocked():
    new.train.checkpoint_every = 3
  results = json.loads(run_of(new, tmp_path / "run").evaluation.read_text())
  assert results["after"]["loss"] < results["before"]["loss"]
  settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
  assert settings["modules_to_save"] == ["lm_head"]
  kept = changed(new, task__alphabet=())
  task = parts.make_task(kept)
  found = parts.read_shapes(kept.model)
  assert task.extend(found, jax.random.key(0)).config.classes[:2] == ("<pad>", "<1>")


@pytest.mark.slow
def test_joined_digits_train_by_the_command_s_config(public_data, tmp_path):
  config = speech.get_config("digits,smoke")
  with config.unlocked():
    config.model.source = str(tmp_path / "model")
  speech_models.write(tmp_path / "model", size={"max_source_positions": 250})
  results = json.loads(run_of(config, tmp_path / "run").evaluation.read_text())
  assert results["after"]["loss"] < results["before"]["loss"] and results["after"]["rows"] == 4
