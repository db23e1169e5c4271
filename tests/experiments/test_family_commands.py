"""The main programs on tiny models of other families than Llama's, as a user runs them."""

import json
import shutil

import families
import numpy as np
import pytest
import tiny_encoder
import tiny_experiment
from main_programs import run
from peers import peft, torch, transformers

from lora_jax.io import pretrained, safetensors

WORDS = {"buckets": (32, 96), "max_length": 97}  # a token is about a letter


def write(folder, name):
  """A config's file, with a model of a kind and records."""
  families.write(folder, name)
  words = pretrained.inspect(folder).tokenizer
  folder = folder / "experiment"
  folder.mkdir()
  # A Gemma 4's layers are not stacked.
  model = {"scan_layers": name != "Gemma 4"}
  config = tiny_experiment.write(folder, words, data=WORDS, model=model)
  shutil.rmtree(folder / "model")
  (folder / "model").mkdir()
  families.write(folder / "model", name)
  return config


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    "Qwen 2",
    "Gemma 3",
    "Gemma 4",
    "Qwen 3, experts",
    "gpt-oss",
    "GPT-2",
  ],
)
def test_a_family_is_planned_trained_evaluated_and_exported(tmp_path, name):
  config, workdir = write(tmp_path, name), tmp_path / "run"
  assert "it fits" in run("plan", f"--config={config}")
  assert "it fits" in run("plan", f"--config={config}", "--config.mesh.tensor=2", "--devices=2")
  run("train", f"--config={config}", f"--workdir={workdir}")
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = [line["loss"] for line in lines if "loss" in line]
  assert losses[-1] < losses[0]
  run("evaluate", f"--workdir={workdir}")
  run("generate", f"--workdir={workdir}", "--prompt=fine film", "--max_tokens=4")
  run("export", f"--workdir={workdir}", "--to=merged", f"--output={tmp_path / 'merged'}")
  merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
  base = transformers.AutoModelForCausalLM.from_pretrained(config.parent / "model")
  adapted = peft.PeftModel.from_pretrained(base, workdir / "adapter").eval()
  tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
  with torch.no_grad():
    torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4)
  refused = {
    "Gemma 3": "llama.cpp's architecture 'gemma3' has no local_layers=(True, True, False)",
    "Gemma 4": "GGUF files of the family 'gemma4_text' are not supported",
  }
  if name in refused:
    printed = run(
      "export", f"--workdir={workdir}", "--to=gguf", f"--output={tmp_path / 'a.gguf'}", fails=True
    )
    assert refused[name] in printed


@pytest.mark.slow
def test_members_of_a_sweep_on_experts_are_what_each_is_alone(tmp_path):
  config = write(tmp_path, "Qwen 3, experts")
  common = (f"--config={config}", "--config.data.buckets=(96,)")
  run(
    "train", *common, f"--workdir={tmp_path / 'sweep'}", "--config.sweep.grid=(('seed', (1, 2)),)"
  )
  run("train", *common, f"--workdir={tmp_path / 'alone'}", "--config.seed=2")
  ours, alone = (
    safetensors.load_file(folder / "adapter" / "adapter_model.safetensors")
    for folder in (tmp_path / "sweep" / "members" / "1", tmp_path / "alone")
  )
  assert ours.keys() == alone.keys()
  for name in alone:
    np.testing.assert_allclose(ours[name], alone[name], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "DistilBERT"])
def test_an_encoder_is_planned_trained_evaluated_asked_and_exported(tmp_path, name):
  config, workdir = write_encoder(tmp_path, name), tmp_path / "run"
  assert "it fits" in run("plan", f"--config={config}")
  assert "it fits" in run("plan", f"--config={config}", "--config.mesh.tensor=2", "--devices=2")
  run("train", f"--config={config}", f"--workdir={workdir}")
  results = json.loads((workdir / "eval.json").read_text())
  assert results["after"]["loss"] < results["before"]["loss"]
  assert f"loss {results['after']['loss']:.3f}" in run("evaluate", f"--workdir={workdir}")
  pairs = {"text": "a fine film", "other": "number 3"}, {"text": "dull", "other": "a review"}
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
  printed = run("predict", f"--workdir={workdir}", f"--input={tmp_path / 'pairs.jsonl'}")
  answers = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
  refused = run("generate", f"--workdir={workdir}", "--prompt=fine film", fails=True)
  assert f"a '{families.ENCODERS[name].family}' generates no text; experiments.predict" in refused
  run("export", f"--workdir={workdir}", "--to=merged", f"--output={tmp_path / 'merged'}")
  merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
  base = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "model", num_labels=2, ignore_mismatched_sizes=True
  )
  adapted = peft.PeftModel.from_pretrained(base, workdir / "adapter").eval()
  words = pretrained.inspect(tmp_path / "merged").tokenizer
  for pair, answer in zip(pairs, answers, strict=True):
    whole = words.encode_whole(*pair.values(), max_length=24)
    types = {"token_type_ids": torch.tensor([whole.types])} if name == "BERT" else {}
    tokens = torch.tensor([whole.ids])
    with torch.no_grad():
      logits = merged.eval()(tokens, **types).logits
      torch.testing.assert_close(logits, adapted(tokens, **types).logits, atol=1e-4, rtol=1e-4)
    expected = torch.softmax(logits[0], -1).tolist()
    assert list(answer["probabilities"].values()) == pytest.approx(expected, abs=1e-4)
    assert merged.config.id2label[int(logits.argmax())] == answer["label"]


def write_encoder(folder, name):
  """A config's file, with a body of a kind of encoder and records of pairs."""
  families.write(folder / "model", name, "Model")
  tiny_encoder.write(folder / "tiny")
  source = {"model.source": str(folder / "model")}
  return tiny_encoder.write_config(folder / "tiny", "classification", source)
