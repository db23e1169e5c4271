"""Detection by the main programs, on a tiny MobileNetV2 and pictures of rectangles."""

import json
import re

import main_programs
import numpy as np
import pytest
import tiny_pictures
from PIL import Image

from lora_jax.io import pretrained, safetensors


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  fields = {"train.steps": 8, "train.checkpoint_every": 4, "evaluation.batch_size": 8}
  return tiny_pictures.write_boxes(tmp_path_factory.mktemp("boxes"), fields)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "run"
  main_programs.run("train", f"--config={config}", f"--workdir={folder}")
  return folder


def answers(printed):
  return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_run_lowers_its_loss_and_shows_boxes_on_its_page(run):
  results = json.loads((run / "eval.json").read_text())
  before, after = results["before"], results["after"]
  assert after["loss"] < 0.8 * before["loss"] and after["rows"] == 8
  assert {"map", "map50", "map50/red", "map50/green", "map/red", "map/green"} < after.keys()
  page = (run / "README.md").read_text()
  assert "![the samples](samples.png)" in page and "| map50/green |" in page
  assert "held_out: 8 images, resized to 64 pixels a side, with 12 boxes" in page
  with Image.open(run / "samples.png") as picture:
    assert picture.format == "PNG" and picture.width > 600
  logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  assert len(logged) == 8 and all(np.isfinite(line["loss"]) for line in logged)


@pytest.mark.slow
def test_its_adapter_has_the_head_in_full_and_factors_of_the_backbone(run):
  names = set(safetensors.open_file(run / "adapter" / "adapter_model.safetensors"))
  assert any("head.logits.0.depthwise.weight" in name for name in names)
  assert any("mobilenet_v2.layer.3.expand_1x1.convolution.lora_A" in name for name in names)
  assert not any("running_mean" in name for name in names)


@pytest.mark.slow
def test_predict_answers_for_a_folder_and_draws_copies(run, config, tmp_path):
  folder = config.parent / "set" / "images" / "test"
  arguments = [f"--workdir={run}", f"--input={folder}", f"--draw={tmp_path / 'copies'}"]
  found = answers(main_programs.run("predict", *arguments))
  assert [x["image"] for x in found] == [str(folder / f"{n}.png") for n in range(8)]
  assert all(x["size"] == [64, 48] and isinstance(x["boxes"], list) for x in found)
  copies = sorted((tmp_path / "copies").iterdir())
  assert [path.name for path in copies] == [f"{n}_{n}.png" for n in range(8)]
  with Image.open(copies[0]) as picture:
    assert picture.size == (64, 48)
  assert "holds something already" in main_programs.run("predict", *arguments, fails=True)
  (tmp_path / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:200])
  printed = main_programs.run(
    "predict", f"--workdir={run}", f"--input={tmp_path / 'damaged.png'}", fails=True
  )
  assert "damaged.png: is a damaged picture" in printed and "load:" not in printed


@pytest.mark.slow
def test_it_is_planned_evaluated_and_exported_by_commands(run, config, tmp_path):
  assert "64 × 64 pixels and 2 boxes" in main_programs.run("plan", f"--config={config}")
  assert "adapter  mAP" in main_programs.run("evaluate", f"--workdir={run}")
  merged = tmp_path / "merged"
  main_programs.run("export", f"--workdir={run}", "--to=merged", f"--output={merged}")
  found = pretrained.load(merged)
  assert found.config.family == "ssdlite_mobilenet_v2" and found.config.classes == ("red", "green")
  # Taken as the base of another run, it has the same figures: the head is kept.
  printed = main_programs.run(
    "evaluate", f"--config={config}", f"--config.model.source={merged}", "--split=test"
  )
  own = json.loads((run / "eval.json").read_text())["after"]
  loss = float(re.search(r"base +mAP .* loss ([\d.]+) on 8 images", printed)[1])
  assert loss == pytest.approx(own["loss"], abs=2e-3)
  artifact = f"--output={tmp_path / 'artifact'}"
  main_programs.run("export", f"--workdir={run}", "--to=artifact", artifact, "--length=64")


@pytest.mark.slow
def test_a_sweep_of_learning_rates_trains_in_one_program(config, tmp_path):
  steps = "--config.train.steps=3"  # roundings grow by every step of a deep network
  folder = tmp_path / "run"
  grid = "--config.sweep.grid=(('optimizer.peak_learning_rate', (1e-3, 3e-3, 1e-2)),)"
  main_programs.run("train", f"--config={config}", f"--workdir={folder}", steps, grid)
  found = json.loads((folder / "results.json").read_text())["members"]
  assert [row["outcome"] for row in found] == ["finished"] * 3
  alone = tmp_path / "alone"
  peak = "--config.optimizer.peak_learning_rate=0.003"
  main_programs.run("train", f"--config={config}", f"--workdir={alone}", steps, peak)
  one = json.loads((alone / "eval.json").read_text())["after"]
  assert found[1]["loss"] == pytest.approx(one["loss"], rel=1e-3)
  assert (folder / "members" / "1" / "samples.png").exists()


@pytest.mark.slow
def test_the_plan_of_a_real_run_is_within_a_tenth_of_the_compiler(public_data):
  printed = main_programs.run("plan", "--config=configs/detect.py", "--topology=here")
  assert 90 <= int(re.search(r"the plan's .* are (\d+)%", printed)[1]) <= 110


@pytest.mark.slow
def test_data_that_cannot_be_are_refused_before_the_model_is_loaded(config, tmp_path):
  own = config.parent / "set" / "train.json"
  fields = json.loads(own.read_text())
  fields["annotations"][3]["bbox"][2] = 500
  (config.parent / "set" / "bad.json").write_text(json.dumps(fields))
  command = ("train", f"--config={config}", f"--workdir={tmp_path / 'run'}")
  printed = main_programs.run(*command, "--config.data.annotations=bad.json", fails=True)
  assert re.search(r"bad\.json: annotations\[3\]: bbox .* is outside of its picture", printed)
  assert "load:" not in printed and not (tmp_path / "run" / "checkpoints").exists()
  # The folder is free for the corrected command.
  main_programs.run(*command, "--config.train.steps=2")
  assert (tmp_path / "run" / "eval.json").exists()
