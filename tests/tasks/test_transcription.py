"""Transcription: runs on a tiny random Whisper, their figures, their page, and what is refused."""

import copy
import dataclasses
import json
import pathlib
import re

import jax
import main_programs
import numpy as np
import pytest
import soundfile
import speech_models
import tiny_speech
import whisper_normalizer
from main_programs import imported
from peers import peft, torch, transformers

import lora_jax
from configs import speech
from experiments import methods, parts, planning
from lora_jax import exchange
from lora_jax.data import log_mel
from lora_jax.io import pretrained
from lora_jax.run import report, word_marks, workdir
from lora_jax.tasks import transcripts
from lora_jax.train import evaluation, plan

train = imported("experiments.train")
command = imported("experiments.plan")


def run_of(config, folder):
  with workdir.open_workdir(folder, config.to_dict()) as opened:
    train.train(config, opened)
  return opened


def changed(config, **fields):
  own = config.copy_and_resolve_references()
  with own.ignore_type(), own.unlocked():
    own.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
  return own


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  return tiny_speech.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  return run_of(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(config, run):
  """The base, its axes, and the adapters of the run's folder."""
  base = methods.load_base(config)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  return base, axes, exchange.load(run.adapter, base.params, axes, table=base.table)


@pytest.fixture(scope="module")
def bound(config, trained):
  """The task on its model, and the records of the test."""
  task = parts.make_task(config)
  return task.of_model(trained[0]), parts.load_records(config.data, task)["test"]


def test_a_run_learns_and_keeps_its_figures(config, run, trained, bound):
  results = json.loads(run.evaluation.read_text())
  before, after = results["before"], results["after"]
  assert after["loss"] < 0.9 * before["loss"]
  assert after.keys() == {"loss", "wer", "cer", "slots", "whole", "rows"} and after["rows"] == 10
  base, _, adapters = trained
  task, rows = bound
  apply = lora_jax.adapt(task.forward(parts.make_model(base.config)))
  weights = lora_jax.attach(base.params, adapters)
  data = task.eval_batches(task.examples(rows), 4)
  found = evaluation.evaluate(task.make_eval_step(apply), weights, data, task.metrics)
  assert found == pytest.approx(after, rel=1e-4)


def test_the_loss_covers_the_text_and_its_end_and_not_the_prompt(bound):
  task, rows = bound
  [clip] = task.examples(rows[:1])
  tokenizer = task.model.tokenizer
  arrays = task.row(clip)
  learnt = arrays["weights"] > 0
  assert tokenizer.decode(arrays["targets"][learnt]) == " " + rows[0]["text"]
  assert arrays["targets"][learnt][-1] == tokenizer.eos_id
  assert arrays["tokens"][:2].tolist() == tokenizer.encode(
    speech_models.PROMPT, add_special_tokens=False
  )
  # The first learned target is the token after the prompt.
  assert learnt.nonzero()[0][0] == 1 and arrays["audio"].shape == (128, 80)
  shown = task.tokens(clip)
  assert [token.learnt for token in shown[:3]] == [False, False, True]
  assert "".join(token.text for token in shown[2:-1]) == " " + rows[0]["text"]


def test_the_metrics_are_those_of_the_transcripts(bound):
  """With a model that writes what it is given: the metrics of known texts."""
  task, rows = bound
  rows = [dict(row) for row in rows[:4]]
  clips = task.examples(rows)
  said = [row["text"] for row in rows]
  cut = next(n for n, text in enumerate(said) if len(set(text.split())) == 2)
  said[cut] = said[cut].split()[0]  # one of two words is missing
  outputs = []
  for batch in task.eval_batches(clips, 3):
    written = np.full((3, 20), task.model.tokenizer.eos_id)
    for place, index in enumerate(batch["index"]):
      ids = task.model.tokenizer.encode(said[index], add_special_tokens=False)
      written[place, : len(ids)] = ids
    given = {name: batch[name] for name in ("targets", "weights", "phrases", "index")}
    outputs.append({"loss": 6.0, "count": 3.0, "written": written} | given)
  found = task.metrics(outputs)
  assert found["wer"] == pytest.approx(1 / 8) and found["rows"] == 4 and found["loss"] == 2.0
  words = [row["slots"].values() for row in rows]
  hits = [[x in text.split() for x in own] for own, text in zip(words, said, strict=True)]
  assert found["slots"] == pytest.approx(np.mean([x for own in hits for x in own]))
  assert found["whole"] == pytest.approx(np.mean([all(own) for own in hits])) and found["whole"] < 1


def test_the_page_has_a_table_of_clips_with_marked_words(run):
  page = run.readme.read_text()
  assert "held_out: 10 clips, 0.1 minutes, the longest 0.8 s, in windows of 1.28 s" in page
  assert "| clip | reference | before | after |" in page
  samples = report.read_results(run.evaluation)["samples"]
  assert len(samples) == 3 and all(sample["marks"] == "words" for sample in samples)
  for sample in samples:
    marked = word_marks.marked(sample["wanted"], sample["after"])
    assert f"| {word_marks.plain(sample['prompt'])} | {sample['wanted']} |" in page
    assert marked in page


def test_words_that_differ_are_marked():
  marked = word_marks.marked
  assert marked("a small latte", "a small latte") == "a small latte"
  assert marked("a small latte", "a tall latte now") == "a ~~small~~ **tall** latte **now**"
  assert marked("one", "") == "~~one~~" and marked("", "*x|y") == r"**\*x\|y**"


def test_normalizers_are_whisper_s():
  from transformers.models.whisper import english_normalizer

  normalize = transcripts.NORMALIZERS["english"]()
  folder = pathlib.Path(whisper_normalizer.__file__).parent
  spellings = json.loads((folder / "normalizers" / "english.json").read_text())
  expected = english_normalizer.EnglishTextNormalizer(spellings)
  for text in (
    "I'd like a twenty-two ounce Cappuccino, please!",
    "um, five dollars [laughs]",
    "won't, colour",
    "two shots of espresso; 2 SHOTS",
    "one hundred and one",
  ):
    assert normalize(text) == expected(text)
  basic = transcripts.NORMALIZERS["basic"]()
  assert basic("Ünï, (x) A!") == english_normalizer.BasicTextNormalizer()("Ünï, (x) A!")
  assert transcripts.NORMALIZERS["none"]()("  A  b ") == "A b"


def test_phrases_are_whole_words_one_after_another():
  assert transcripts.has_phrase("brown sugar", "with brown sugar")
  assert not transcripts.has_phrase("brown sugar", "brown the sugar")
  assert not transcripts.has_phrase("milk", "milks")


# ---- adapters, from and to peft


def theirs(model, mels, tokens):
  with torch.no_grad():
    return model(
      input_features=torch.tensor(mels.transpose(0, 2, 1)),
      decoder_input_ids=torch.tensor(tokens, dtype=torch.long),
    ).logits.numpy()


INPUTS = speech_models.mels(), np.array([[257, 258, 40, 41], [257, 258, 50, 51]], np.int32)


def ours(base, weights):
  apply = jax.jit(lora_jax.adapt(parts.make_model(base.config).apply))
  return np.asarray(apply({"params": weights}, *INPUTS))


def shaken(adapters):
  leaves, treedef = jax.tree.flatten(adapters)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(treedef, moved)


@pytest.mark.parametrize("targets", ["attention", "all-linear", "full"])
def test_adapters_of_a_whisper_give_the_same_logits_in_peft(config, trained, tmp_path, targets):
  """Of full fine-tuning too, with the head that is tied to the embedding.

  Without convolutions and positions: transformers reads their stride and number, which PEFT's
  whole layers lack.
  """
  base, axes, _ = trained
  rules = {"full": [("encoder/conv.*|.*/positions/.*", None), (".*", lora_jax.Full())]}.get(
    targets, [(targets, lora_jax.LoRA(rank=3, alpha=2.0))]
  )
  specs = lora_jax.match(base.params, rules, axes)
  kinds = {path.split("/")[-3] for path in specs if path.endswith("kernel")}
  assert kinds == {"attn", "cross_attn"} | (set() if targets == "attention" else {"mlp"})
  adapters = shaken(lora_jax.init(jax.random.key(1), base.params, specs, axes))
  exchange.save(
    tmp_path, adapters, base.params, axes, base_model="tiny", table=base.table, task_type=None
  )
  expected = ours(base, lora_jax.attach(base.params, adapters))
  assert np.abs(expected - ours(base, base.params)).max() > 0.05
  model = transformers.WhisperForConditionalGeneration.from_pretrained(config.model.source)
  model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
  np.testing.assert_allclose(theirs(model, *INPUTS), expected, atol=1e-4)
  again = exchange.load(tmp_path, base.params, axes, table=base.table)
  np.testing.assert_allclose(ours(base, lora_jax.attach(base.params, again)), expected, atol=1e-4)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_of_peft_give_the_same_logits_here(config, trained, tmp_path, targets):
  base, axes, _ = trained
  model = transformers.WhisperForConditionalGeneration.from_pretrained(config.model.source)
  torch.manual_seed(1)
  made = peft.get_peft_model(
    model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
  ).eval()
  made.save_pretrained(tmp_path)
  expected = theirs(made, *INPUTS)
  adapters = exchange.load(tmp_path, base.params, axes, table=base.table)
  count = 2 * 6 + 2 * 10 if targets == "all-linear" else 2 * 2 + 2 * 4
  assert len(adapters) == count
  found = ours(base, lora_jax.attach(base.params, adapters))
  assert np.abs(found - ours(base, base.params)).max() > 0.05
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_what_the_presets_leave_out_is_told(trained):
  base, axes, _ = trained
  linear = lora_jax.match(base.params, [("all-linear", lora_jax.LoRA(rank=1, alpha=1.0))], axes)
  assert {"encoder/conv1/kernel", "encoder/conv2/kernel"} <= linear.left_out.keys()
  convolved = lora_jax.match(
    base.params, [("convolutions", lora_jax.LoRA(rank=1, alpha=1.0))], axes
  )
  assert {*convolved} == {"encoder/conv1/kernel", "encoder/conv2/kernel"}


# ---- the commands


def test_predict_prints_transcripts_with_times(run, config, tmp_path):
  speech_models.write_clips(tmp_path, 3, seed=4)
  soundfile.write(tmp_path / "long.wav", speech_models.tone(1, 1.9, 8_000), 8_000)
  printed = main_programs.run("predict", f"--workdir={run.path}", f"--input={tmp_path}")
  answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
  names = ["4-0.flac", "4-1.flac", "4-2.flac", "long.wav"]
  assert [answer["file"] for answer in answers] == [str(tmp_path / name) for name in names]
  assert [answer["seconds"] for answer in answers] == [0.8, 0.8, 0.8, 1.9]
  assert all(answer["computed_in"] > 0 and isinstance(answer["text"], str) for answer in answers)


@pytest.mark.slow
def test_predict_draws_nothing_into_clips(run, tmp_path):
  speech_models.write_clips(tmp_path, 1, seed=4)
  arguments = [f"--workdir={run.path}", f"--input={tmp_path}", f"--draw={tmp_path / 'copies'}"]
  printed = main_programs.run("predict", *arguments, fails=True)
  assert "--draw: the task transcribe draws nothing into its inputs" in printed


def test_a_tokenizer_without_an_end_is_refused(config, trained):
  tokenizer = copy.copy(trained[0].tokenizer)
  tokenizer.eos_id = None
  found = dataclasses.replace(trained[0], tokenizer=tokenizer)
  with pytest.raises(ValueError, match="the tokenizer names no token that ends a text"):
    parts.make_task(config).of_model(found)


@pytest.mark.slow
def test_the_same_clip_is_transcribed_alike_alone_and_among_others(bound, trained, tmp_path):
  task, _ = bound
  base, _, adapters = trained
  speech_models.write_clips(tmp_path, 3, seed=5)
  apply = lora_jax.adapt(task.forward(parts.make_model(base.config)))
  weights = lora_jax.attach(base.params, adapters)
  several = task.predict(apply, weights, task.asked(str(tmp_path)), batch_size=2)
  alone = task.predict(apply, weights, task.asked(str(tmp_path / "5-2.flac")), batch_size=2)
  assert several[2]["text"] == alone[0]["text"]


def test_a_plan_knows_batches_of_clips(config):
  case = planning.read(config)
  assert case.largest == (20480, 24)
  mesh = planning.abstract_mesh(config.mesh, 1)
  made = plan.make_plan(planning.whole_run(config, case, mesh))
  assert made.batch == 8 * 4 * (128 * 80 + 3 * 24) and made.flops > 1e6
  assert "8 rows of 1.28 s of speech, 24 tokens at most" in command.describe_data(config, case)


REFUSED = [
  ({"data__window": 3.0}, "data.window 3: the model hears 2 s at most"),
  ({"data__window": 0.33}, "data.window 0.33: give a multiple of 0.02 seconds"),
  ({"data__window": 0.64}, "lasts 0.80 s, over the limit of 0.64 s; cut it"),
  ({"data__max_length": 8}, "over data.max_length 8; raise it"),
  ({"data__max_length": 100}, "data.max_length 100: the model has 64 positions"),
  ({"data__text": "words"}, "has no column 'words'"),
  ({"data__audio": "clip"}, "has no column 'clip'"),
  ({"data__audio": "text"}, "no such file"),
  ({"data__slots": "text"}, "must be an object or a list of phrases"),
  ({"task__prompt": "listen"}, "task.prompt 'listen' is no row of special tokens"),
  ({"task__normalizer": "latin"}, "task.normalizer 'latin' is unknown"),
  ({"train__loss_chunk": 4}, "train.loss_chunk 4"),
  ({"model__scan_layers": True}, "cannot be stacked; set scan_layers to False"),
  ({"model__source": pretrained.DEFAULT, "data__window": 1.28}, "takes no audio"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(config, tmp_path, fields, words):
  own = changed(config, **fields)
  with (
    pytest.raises((ValueError, FileNotFoundError), match=words.replace(".", r"\.")),
    workdir.open_workdir(tmp_path, own.to_dict()) as opened,
  ):
    train.train(own, opened)


def test_a_damaged_clip_is_refused_by_its_name(config, tmp_path):
  speech_models.write_clips(tmp_path, 4, seed=6)
  (tmp_path / "6-2.flac").write_bytes(b"fLaC" + b"\0" * 50)
  own = changed(config, data__source=str(tmp_path / "clips.jsonl"))
  with pytest.raises(ValueError, match=r"6-2\.flac: is no audio that can be read"):
    parts.load_records(own.data, parts.make_task(own))


def test_a_record_without_words_is_refused_by_its_name(config, tmp_path):
  speech_models.write_clips(tmp_path, 4, seed=6)
  rows = [json.loads(line) for line in (tmp_path / "clips.jsonl").read_text().splitlines()]
  rows[2]["text"] = "[noise]"
  (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  own = changed(config, data__source=str(tmp_path / "clips.jsonl"))
  with pytest.raises(ValueError, match=r"clips\.jsonl: record 2, 6-2\.flac: nothing of its text"):
    parts.load_records(own.data, parts.make_task(own))


def test_it_takes_no_prompts_and_no_teacher(config, bound):
  task, _ = bound
  for refused in (task.prompts, task.longest_choice, task.check_room, lambda: task.chat_format):
    with pytest.raises(ValueError, match="the task transcribe has no"):
      refused()
  with pytest.raises(ValueError, match="is for tasks on text; set it to none"):
    task.reading(None, hidden=False)


# ---- stops, sweeps, devices


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(config, run, tmp_path):
  with workdir.open_workdir(tmp_path, config.to_dict()) as opened:
    loop = train.loop
    original = loop.Checkpoints.save

    def save(self, state, data_state):
      original(self, state, data_state)
      if int(state.step) == 3:
        self.wait()
        raise KeyboardInterrupt

    loop.Checkpoints.save = save
    try:
      with pytest.raises(KeyboardInterrupt):
        train.train(config, opened)
    finally:
      loop.Checkpoints.save = original
  again = run_of(config, tmp_path)
  for name in ("adapter/adapter_model.safetensors", "eval.json"):
    assert (run.path / name).read_bytes() == (again.path / name).read_bytes()


@pytest.mark.slow
def test_a_sweep_of_learning_rates_trains_in_one_program(config, run, tmp_path):
  own = changed(config, sweep__grid=(("optimizer.peak_learning_rate", (1e-3, 1e-2)),))
  swept = run_of(own, tmp_path / "sweep")
  found = json.loads((swept.path / "results.json").read_text())["members"]
  assert [row["outcome"] for row in found] == ["finished"] * 2
  alone = json.loads(run.evaluation.read_text())["after"]
  assert found[1]["loss"] == pytest.approx(alone["loss"], rel=1e-3)


@pytest.mark.slow
def test_two_devices_make_what_one_makes(config, tmp_path):
  path, losses = tiny_speech.write_config(config, tmp_path), {}
  meshes = {
    "one": {},
    "rows": {"data": 2},
    "layers": {"data": 1, "fsdp": 2},
    "columns": {"data": 1, "tensor": 2},
  }
  for label, mesh in meshes.items():
    folder = tmp_path / label
    how = [f"--config.mesh.{axis}={count}" for axis, count in mesh.items()]
    main_programs.run(
      "train",
      f"--config={path}",
      f"--workdir={folder}",
      "--config.train.steps=3",
      *how,
      JAX_NUM_CPU_DEVICES="2" if mesh else "1",
    )
    found = json.loads((folder / "eval.json").read_text())
    losses[label] = [found["before"]["loss"], found["after"]["loss"]]
  for label in losses:
    assert losses[label] == pytest.approx(losses["one"], rel=1e-4), label


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Whisper"])
def test_a_family_is_planned_trained_evaluated_and_exported_by_commands(tmp_path, name):
  path = tiny_speech.write_config(tiny_speech.write(tmp_path, name), tmp_path)
  folder = tmp_path / "run"
  assert "it fits" in main_programs.run("plan", f"--config={path}")
  main_programs.run("train", f"--config={path}", f"--workdir={folder}")
  assert "adapter  slots" in main_programs.run("evaluate", f"--workdir={folder}")
  merged = f"--output={tmp_path / 'merged'}"
  main_programs.run("export", f"--workdir={folder}", "--to=merged", merged)
  transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "merged")
  artifact = f"--output={tmp_path / 'artifact'}"
  printed = main_programs.run(
    "export", f"--workdir={folder}", "--to=artifact", artifact, fails=True
  )
  assert "a Whisper with a decoder is no program of one input" in printed
  assert "learned: " in main_programs.run("preview", f"--config={path}", "--examples=1")
  printed = main_programs.run("generate", f"--workdir={folder}", "--prompt=a", fails=True)
  assert "generates no text" in printed


@pytest.mark.slow
def test_the_plan_of_a_real_run_is_within_a_tenth_of_the_compiler(public_data):
  printed = main_programs.run("plan", "--config=configs/speech.py:coffee", "--topology=here")
  assert 90 <= int(re.search(r"the plan's .* are (\d+)%", printed)[1]) <= 110


def test_configs_say_what_they_take():
  assert speech.get_config("coffee,method=lora_all").adapter.targets == ("all-linear",)
  assert speech.get_config("coffee").adapter.targets == ("attention",)
  assert speech.get_config("coffee,method=full").adapter.method == "full"
  for text in ("", "coffee,data=a.jsonl", "coffee,digits"):
    with pytest.raises(ValueError, match="give one of :coffee"):
      speech.get_config(text)
  with pytest.raises(ValueError, match="a transcription has no new layer"):
    speech.get_config("coffee,method=head")
  with pytest.raises(ValueError, match="the task 'sing' is unknown"):
    speech.get_config("data=a.jsonl,task=sing")


def test_a_clip_of_a_window_is_what_the_model_hears(bound):
  task, rows = bound
  [clip] = task.examples(rows[:1])
  np.testing.assert_array_equal(
    task.heard(clip, 20480), log_mel.features(rows[0]["samples"], 80, 20480)
  )
  assert dataclasses.replace(clip, name="x").seconds == pytest.approx(0.8)
