"""An adapter of peft's becomes a run, and a run what peft, transformers and llama.cpp load."""

import json

import gguf
import numpy as np
import pytest
import tiny_experiment
from main_programs import run
from peers import peft, torch, transformers

from lora_jax.io import safetensors

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, smollm2):
  return tiny_experiment.write(tmp_path_factory.mktemp("tiny"), smollm2.tokenizer)


def base(config_file):
  return transformers.AutoModelForCausalLM.from_pretrained(config_file.parent / "model")


def logits(model) -> np.ndarray:
  with torch.no_grad():
    return model.eval()(TOKENS).logits.numpy()


@pytest.fixture(scope="module")
def made_by_peft(config_file, tmp_path_factory):
  """A DoRA with numbers as if it were trained: its folder, and the logits that peft has with it."""
  folder = tmp_path_factory.mktemp("peft")
  model = peft.get_peft_model(
    base(config_file),
    peft.LoraConfig(
      r=4,
      lora_alpha=6,
      use_dora=True,
      target_modules=["q_proj", "down_proj"],
      task_type="CAUSAL_LM",
    ),
  )
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.requires_grad:
        parameter += 0.3 * torch.randn(parameter.shape)
  model.save_pretrained(folder)
  return folder, logits(model)


@pytest.fixture(scope="module")
def imported(config_file, made_by_peft, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("runs") / "imported"
  printed = run(
    "import_adapter",
    f"--adapter={made_by_peft[0]}",
    f"--workdir={workdir}",
    f"--config={config_file}",
  )
  return workdir, printed


def test_an_imported_adapter_is_a_run_that_says_what_it_changes(imported):
  workdir, printed = imported
  assert "blocks/attn/query/kernel  1       DoRA  576" in printed
  assert "imported the adapters of 2 leaves" in printed
  assert json.loads((workdir / "config.json").read_text())["adapter"]["method"] == "imported"


@pytest.mark.slow
def test_it_is_evaluated(imported):
  workdir, _ = imported
  printed = run("evaluate", f"--workdir={workdir}", "--examples=8")
  scores = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
  assert scores["base"]["loss"] != scores["adapter"]["loss"]


@pytest.mark.slow
def test_merged_it_gives_the_logits_that_peft_gave(imported, made_by_peft, config_file, tmp_path):
  run("export", f"--workdir={imported[0]}", "--to=merged", f"--output={tmp_path / 'merged'}")
  merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
  np.testing.assert_allclose(logits(merged), made_by_peft[1], atol=1e-4)
  assert abs(logits(base(config_file)) - made_by_peft[1]).max() > 1e-2  # the adapter does something


@pytest.mark.slow
def test_for_peft_it_is_what_peft_wrote(imported, made_by_peft, tmp_path):
  run("export", f"--workdir={imported[0]}", "--to=peft", f"--output={tmp_path / 'copy'}")
  before, after = (
    safetensors.load_file(folder / "adapter_model.safetensors")
    for folder in (made_by_peft[0], tmp_path / "copy")
  )
  assert before.keys() == after.keys()
  for name in before:
    np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.slow
def test_as_a_plain_lora_of_full_rank_it_loses_nothing(
  imported, made_by_peft, config_file, tmp_path
):
  printed = run(
    "export", f"--workdir={imported[0]}", "--to=peft", "--rank=32", f"--output={tmp_path / 'lora'}"
  )
  assert "at most 0.00% is lost" in printed
  config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
  assert config["peft_type"] == "LORA" and not config["use_dora"]
  model = peft.PeftModel.from_pretrained(base(config_file), tmp_path / "lora")
  np.testing.assert_allclose(logits(model), made_by_peft[1], atol=1e-4)


@pytest.mark.slow
def test_gguf_has_no_dora_but_takes_the_lora_that_is_nearest(imported, config_file, tmp_path):
  workdir, output = imported[0], tmp_path / "adapter.gguf"
  printed = run("export", f"--workdir={workdir}", "--to=gguf", f"--output={output}", fails=True)
  assert "llama.cpp supports only products of two factors" in printed
  assert not output.exists()

  run("export", f"--workdir={workdir}", "--to=peft", "--rank=4", f"--output={tmp_path / 'lora'}")
  run(
    "import_adapter",
    f"--adapter={tmp_path / 'lora'}",
    f"--workdir={tmp_path / 'run'}",
    f"--config={config_file}",
  )
  run("export", f"--workdir={tmp_path / 'run'}", "--to=gguf", f"--output={output}")
  names = sorted(tensor.name for tensor in gguf.GGUFReader(output).tensors)
  assert names[:2] == ["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"]
  assert len(names) == 8


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["--to=gguf", "--rank=4"], "--rank has no meaning for --to=gguf"),
    (["--to=peft", "--dtype=bfloat16"], "--dtype has no meaning for --to=peft"),
  ],
)
def test_options_without_a_meaning_are_refused(imported, tmp_path, arguments, words):
  output = tmp_path / "out"
  assert words in run(
    "export", f"--workdir={imported[0]}", f"--output={output}", *arguments, fails=True
  )


@pytest.mark.slow
def test_what_is_there_is_not_written_over(imported, made_by_peft, config_file):
  workdir, _ = imported
  there = workdir / "adapter"
  assert "holds something already" in run(
    "export", f"--workdir={workdir}", "--to=peft", f"--output={there}", fails=True
  )
  other = [f"--adapter={made_by_peft[0]}", f"--workdir={workdir}", f"--config={config_file}"]
  assert "is there already" in run("import_adapter", *other, fails=True)


def test_a_damaged_adapter_is_refused_before_anything_is_written(
  made_by_peft, config_file, tmp_path
):
  folder, workdir = tmp_path / "cut", tmp_path / "run"
  folder.mkdir()
  for file in made_by_peft[0].iterdir():
    content = file.read_bytes()
    (folder / file.name).write_bytes(content[:-7] if file.suffix == ".safetensors" else content)
  printed = run(
    "import_adapter",
    f"--adapter={folder}",
    f"--workdir={workdir}",
    f"--config={config_file}",
    fails=True,
  )
  assert "adapter_model.safetensors" in printed and "ValueError" in printed
  assert not workdir.exists()
