"""The main programs as a user runs them, on a tiny Llama and a small file of records."""

import functools
import json
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny_experiment
from main_programs import imported, run
from peers import peft, torch, transformers

import lora_jax
from experiments import parts
from lora_jax import exchange
from lora_jax.io import safetensors
from lora_jax.models import llama
from lora_jax.run import workdir as workdir_lib
from lora_jax.train import evaluation, loop

train = imported("experiments.train")

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, smollm2):
  return tiny_experiment.write(
    tmp_path_factory.mktemp("tiny"), smollm2.tokenizer, evaluation={"samples": 4}
  )


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
  """The workdir of a run that has come to its end."""
  workdir = tmp_path_factory.mktemp("runs") / "tiny"
  printed = run("train", f"--config={config_file}", f"--workdir={workdir}")
  return workdir, printed


def test_a_run_leaves_the_folder_that_the_readme_promises(finished):
  workdir, printed = finished
  assert {path.name for path in workdir.iterdir()} == {
    "README.md", "adapter", "checkpoints", "config.json", "eval.json", "lock", "loss.png",
    "metrics.jsonl", "tensorboard",
  }  # fmt: skip
  assert re.search(r"before: accuracy .*\n", printed)
  assert re.search(r"after:  accuracy .*\n", printed)
  assert "parameters train" in printed
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert lines[-1]["loss"] < lines[0]["loss"]
  result = json.loads((workdir / "eval.json").read_text())
  assert result["after"]["loss"] < result["before"]["loss"]
  assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_a_run_tells_what_was_done_and_what_came_of_it(finished, config_file):
  workdir, printed = finished
  page = (workdir / "README.md").read_text()
  result = json.loads((workdir / "eval.json").read_text())
  assert page.startswith("# tiny\n\nFinished: 6 steps.")
  command = f"python -m experiments.train --config={config_file} --workdir={workdir}"
  assert command in page
  assert f"| loss | {result['before']['loss']:.4f} | {result['after']['loss']:.4f} |" in page
  assert "![the losses over the steps](loss.png)" in page
  assert "blocks/attn/query/kernel" in page and "parameters train" in page
  assert printed.count(f"\neverything is in {workdir}: README.md tells of it") == 1

  samples = result["samples"]
  assert len(samples) == 4
  for sample in samples:
    assert list(sample) == ["prompt", "wanted", "before", "after"]
    assert re.fullmatch(r"Review: (fine|dull) film number \d+\nSentiment:", sample["prompt"])
    assert sample["wanted"] == (" positive" if "fine" in sample["prompt"] else " negative")
    assert sample["prompt"] in page and f"after:   {sample['after']}" in page


def test_a_checkpoint_of_a_run_is_as_large_as_what_trains_and_its_two_moments(finished):
  workdir, printed = finished
  trained, base = re.search(r"([\d,]+) of ([\d,]+) parameters train", printed).groups()
  trained, base = int(trained.replace(",", "")), int(base.replace(",", ""))
  latest = workdir / "checkpoints" / "6"
  arrays = json.loads((latest / "record" / "metadata").read_text())["arrays"].values()
  counters = [x for x in arrays if x["dtype"] == "int32" and x["shape"] == []]
  assert sum(np.prod(x["shape"]) for x in arrays) == 3 * trained + len(counters)
  size = sum(path.stat().st_size for path in latest.rglob("*") if path.is_file())
  assert 0.8 * 3 * 4 * trained < size < 3 * 4 * trained + 100_000 < 0.1 * 4 * base


def test_all_that_takes_long_is_told_of(finished):
  _, printed = finished
  stages = [
    "read the data",
    "make the examples",
    "start the adapters",
    "answer",
    "save the adapter",
  ]
  bars = ["load: ", "evaluate: ", "compiling for 8 × 16 tokens", "train: ", "saving"]
  for words in [f"{stage} ... " for stage in stages] + bars:
    assert words in printed, words


def test_the_same_command_again_resumes_and_changes_nothing(finished, config_file):
  workdir, _ = finished
  before = (workdir / "adapter" / "adapter_model.safetensors").read_bytes()
  printed = run("train", f"--config={config_file}", f"--workdir={workdir}")
  assert "restored: step 6 of 6" in printed
  assert (workdir / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_another_config_in_the_workdir_is_refused_by_field(finished, config_file):
  workdir, _ = finished
  arguments = [f"--config={config_file}", f"--workdir={workdir}"]
  printed = run("train", *arguments, "--config.adapter.rank=4", fails=True)
  assert "adapter.rank: 8 there, 4 now" in printed


def test_evaluate_repeats_the_numbers_of_the_run(finished):
  workdir, _ = finished
  printed = run("evaluate", f"--workdir={workdir}", "--examples=16")
  result = json.loads(printed.splitlines()[-1] if printed.endswith("}\n") else _json_line(printed))
  recorded = json.loads((workdir / "eval.json").read_text())
  assert result["base"]["loss"] == pytest.approx(recorded["before"]["loss"], rel=1e-5)
  assert result["adapter"]["loss"] == pytest.approx(recorded["after"]["loss"], rel=1e-5)
  assert result["adapter"]["accuracy"] == recorded["after"]["accuracy"]


@pytest.mark.slow
def test_a_run_is_evaluated_on_its_mesh_and_in_chunks_of_positions_with_the_same_numbers(
  finished, tmp_path
):
  """Four devices, and prompts that are cut to what training cut them to."""
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  config = json.loads((workdir / "config.json").read_text())
  config["train"]["loss_chunk"] = 1
  config["data"]["max_length"], config["data"]["buckets"] = 4, [4]
  (workdir / "config.json").write_text(json.dumps(config))
  arguments = f"--workdir={workdir}", "--examples=16", "--nobase", "--beams=1", "--max_tokens=2"
  found = [
    json.loads(_json_line(run("evaluate", *arguments, *mesh, JAX_NUM_CPU_DEVICES=devices)))
    for mesh, devices in (([], "1"), (["--mesh"], "4"))
  ]
  one, four = (each["adapter"] for each in found)
  assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
  assert four["accuracy"] == one["accuracy"]
  assert four["beams 1"]["bleu"] == one["beams 1"]["bleu"]


@pytest.mark.slow
def test_a_model_that_no_run_trained_is_evaluated_on_the_data_of_a_config(config_file, finished):
  arguments = f"--config={config_file}", "--examples=16"
  found = json.loads(_json_line(run("evaluate", *arguments)))
  recorded = json.loads((finished[0] / "eval.json").read_text())
  assert found.keys() == {"split", "base"}
  assert found["base"]["loss"] == pytest.approx(recorded["before"]["loss"], rel=1e-5)
  assert "give either --workdir or --config" in run("evaluate", fails=True)


def _json_line(printed):
  (line,) = [line for line in printed.splitlines() if line.startswith("{")]
  return line


@pytest.mark.slow
def test_generate_makes_the_same_text_with_a_cache_and_without(finished):
  workdir, _ = finished
  prompts = ["--prompt=fine film", "--prompt=a"]
  arguments = [f"--workdir={workdir}", "--max_tokens=8", *prompts]
  with_cache = run("generate", *arguments)
  assert len(with_cache.splitlines()) >= 2
  assert [json.loads(x) for x in with_cache.splitlines() if x.startswith("{")] == [
    json.loads(x) for x in run("generate", *arguments, "--nocache").splitlines() if x[:1] == "{"
  ]


def test_the_exported_model_and_the_adapter_agree_in_transformers_and_peft(
  finished, config_file, tmp_path
):
  workdir, _ = finished
  run("export", f"--workdir={workdir}", "--to=merged", f"--output={tmp_path / 'merged'}")
  merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
  base = transformers.AutoModelForCausalLM.from_pretrained(config_file.parent / "model")
  adapted = peft.PeftModel.from_pretrained(base, workdir / "adapter")
  tokens = torch.tensor([[5, 6, 7, 8, 9]])
  with torch.no_grad():
    ours, theirs = merged(tokens).logits, adapted(tokens).logits
    with adapted.disable_adapter():
      plain = adapted(tokens).logits
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
  assert abs(plain - theirs).max() > 1e-3  # the adapter does something
  names = safetensors.tensor_names(workdir / "adapter" / "adapter_model.safetensors")
  assert len(names) == 2 * 7 * 2


def test_an_unknown_field_is_refused_by_name(config_file, tmp_path):
  arguments = [f"--config={config_file}", f"--workdir={tmp_path}"]
  printed = run("train", *arguments, "--config.adapter.ranks=4", fails=True)
  assert "ranks" in printed
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("field", "value", "words"),
  [
    ("adapter.rank", 64, r"block.*: rank 64 exceeds min\(32, 16\); use rank <= 16"),
    ("adapter.targets", (".*/attn/querry/kernel",), "matches no leaf.*blocks/attn/query/kernel"),
    ("adapter.also_train", ("normal/scale",), "'normal/scale' matches no leaf"),
    ("data.prompt", "Review: {txt}", "no column 'txt'.*text"),
    ("data.source", "/nowhere/data.jsonl", "no such file"),
    ("model.source", "/nowhere/model", "no such file"),
    ("model.remat", "some", "model.remat 'some' is unknown"),
    ("evaluation.split", "dev", "evaluation.split 'dev'.*train, validation, test"),
    ("optimizer.warmup_steps", 50, "warm-up"),
    (
      "train.accumulate",
      3,
      "train.batch_size 8 is no multiple of 1 devices .* times train.accumulate 3",
    ),
    ("train.loss_chunk", -1, "train.loss_chunk is -1; it must be 0 or more"),
    ("train.checkpoint_every", 0, "train.checkpoint_every is 0; it must be 1 or more"),
    ("train.max_to_keep", 0, "train.max_to_keep is 0; it must be 1 or more"),
    ("seed", -1, "seed is -1; it must be 0 or more"),
    ("data.packed_length", 2, "more than a row of 2; make rows of at least"),
  ],
)
def test_bad_input_is_refused_with_its_name_before_training(
  config_file, tmp_path, field, value, words
):
  config = runpy.run_path(str(config_file))["get_config"]()
  config.update_from_flattened_dict({field: value})
  with workdir_lib.open_workdir(tmp_path / "run", config.to_dict()) as workdir:
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){words}"):
      train.train(config, workdir)
    assert not workdir.metrics.exists()
    assert not workdir.evaluation.exists()


@pytest.mark.slow
def test_the_adapter_of_a_run_of_another_method_is_read_back_from_its_file(config_file, tmp_path):
  config = runpy.run_path(str(config_file))["get_config"]("method=adalora,rank=12")
  config.adapter.also_train = ("norm/scale",)
  config.optimizer.rates = ((".*/b", 2.0), ("norm/.*", 0.5))
  with workdir_lib.open_workdir(tmp_path / "run", config.to_dict()) as run:
    train.train(config, run)
  scores = json.loads(run.evaluation.read_text())
  assert scores["after"]["loss"] < scores["before"]["loss"]

  pretrained = parts.load_model(config.model)
  model = llama.Llama(pretrained.config)
  axes = parts.trace_axes(model, pretrained.params)
  adapters = exchange.load(run.adapter, pretrained.params, axes, table=pretrained.table)
  assert len(adapters) == 7 + 1
  ranks = {path: int((x.e != 0).sum()) for path, x in adapters.items() if path != "norm/scale"}
  assert sum(ranks.values()) == 8 * 7 * 2
  assert np.any(adapters["norm/scale"].dw)
  trained = lora_jax.attach(pretrained.params, adapters)

  # The same number as the run's own, from the file alone.
  task = parts.make_task(config)
  held_out = parts.pick(parts.load_records(config.data, task), "test", "test")
  task = task.of_model(pretrained)
  data = task.eval_batches(task.examples(held_out)[:16], config.evaluation.batch_size)
  eval_step = evaluation.make_eval_step(lora_jax.adapt(model.apply), ())
  loss = evaluation.evaluate(eval_step, trained, data)["loss"]
  assert loss == pytest.approx(scores["after"]["loss"], rel=1e-4)


@pytest.mark.slow
def test_what_trains_is_in_memory_once_while_it_trains(config_file, tmp_path, monkeypatch):
  config = runpy.run_path(str(config_file))["get_config"]()
  config.adapter.also_train, config.train.steps = ("embed/embedding",), 2
  fit, held = loop.fit, []

  def bytes_of(arrays):
    return sum(x.nbytes for x in arrays)

  def watched_fit(state, frozen, *args, **options):
    held.append(bytes_of(jax.live_arrays()) - before - bytes_of(jax.tree.leaves((state, frozen))))
    return fit(state, frozen, *args, **options)

  monkeypatch.setattr(loop, "fit", watched_fit)
  before = bytes_of(jax.live_arrays())
  with workdir_lib.open_workdir(tmp_path / "run", config.to_dict()) as run:
    train.train(config, run)
  assert held[0] < 1e6 < 4 * 49152 * 32  # the batches that are read ahead; less than the embedding


@pytest.mark.slow
def test_a_diverging_run_stops_at_the_step_and_keeps_its_checkpoint(config_file, tmp_path):
  workdir = tmp_path / "run"
  arguments = [f"--config={config_file}", f"--workdir={workdir}"]
  printed = run("train", *arguments, "--config.optimizer.peak_learning_rate=1e30", fails=True)
  assert re.search(r"step \d: the loss is nan|step \d: the loss is inf|gradient norm", printed)


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_saves_says_so_and_goes_on_from_there(config_file, tmp_path):
  command = [
    *(sys.executable, "-m", "experiments.train", f"--config={config_file}"),
    *(f"--workdir={tmp_path / 'run'}", "--config.train.steps=5000"),
  ]
  metrics = tmp_path / "run" / "metrics.jsonl"
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
      time.sleep(0.1)
    second = run("train", *command[3:], fails=True)
    process.terminate()
    printed, _ = process.communicate(timeout=300)
  assert f"another run is at work here (process {process.pid})" in second
  assert process.returncode == 0
  step = int(re.search(r"stopped by SIGTERM at step (\d+) of 5000; saved in", printed)[1])
  checkpoints = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
  assert str(step) in checkpoints
  page = (tmp_path / "run" / "README.md").read_text()
  assert f"Not finished: {step:,} of 5,000 steps were logged" in page


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_before_its_first_step_ends_without_an_error(
  config_file, tmp_path, number
):
  command = [
    *(sys.executable, "-m", "experiments.train", f"--config={config_file}"),
    f"--workdir={tmp_path / 'run'}",
  ]
  # Ctrl-C says nothing to what a shell started in the background, as these tests may have been.
  heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
  with subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed
  ) as process:
    next(line for line in process.stdout if line.startswith("data: "))
    process.send_signal(number)
    printed, _ = process.communicate(timeout=300)
  assert process.returncode == 0, printed
  assert "stopped at once; the checkpoints stay" in printed and "Traceback" not in printed


@pytest.mark.slow
def test_an_unfinished_run_is_named_by_the_programs_that_need_its_adapter(config_file, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  printed = run("evaluate", f"--workdir={tmp_path}", fails=True)
  assert "has not come to its end" in printed
  assert "is not the workdir of a run" in run(
    "evaluate", f"--workdir={tmp_path / 'nothing'}", fails=True
  )
