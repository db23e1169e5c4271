"""Classes of texts: heads of classes against transformers' and PEFT's, on a tiny random Llama."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_experiment
from main_programs import imported
from peers import peft, torch, transformers

import lora_jax
from configs import classify
from experiments import methods, parts, planning
from lora_jax import exchange
from lora_jax.io import export, pretrained
from lora_jax.run import workdir
from lora_jax.train import evaluation

train = imported("experiments.train")

TEXTS = ("a fine film", "dull", "a film that is neither fine nor dull, but long")


@pytest.fixture(scope="module")
def config(tmp_path_factory, smollm2):
  folder = tmp_path_factory.mktemp("tiny")
  tiny_experiment.write(folder, smollm2.tokenizer)
  config = classify.get_config()
  config.update_from_flattened_dict({
    "model.source": str(folder / "model"), "task.text": "{text}",
    "task.labels": ("negative", "positive"), "data.quoted": None,
    "data.source": str(folder / "data.jsonl"), "data.format": "jsonl", "data.split_by": "text",
    "data.train": 0.6, "data.validation": 0.2, "data.test": 0.2, "data.test_source": "",
    "data.buckets": (16,), "data.max_length": 17, "train.steps": 20, "train.batch_size": 8,
    "train.log_every": 5, "optimizer.warmup_steps": 1, "optimizer.peak_learning_rate": 2e-2,
    "evaluation.batch_size": 8, "evaluation.samples": 2,
  })  # fmt: skip
  return config


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
  with workdir.open_workdir(tmp_path_factory.mktemp("run"), config.to_dict()) as opened:
    train.train(config, opened)
  return opened


@pytest.fixture(scope="module")
def trained(config, run):
  """The base with its new head, its axes, and the adapters of the run's folder."""
  base = methods.load_base(config)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  return base, axes, exchange.load(run.adapter, base.params, axes, table=base.table)


def test_it_writes_no_texts(config):
  task = parts.make_task(config)
  with pytest.raises(ValueError, match="the task classification writes no texts; use experiments"):
    _ = task.chat_format


def logits_of(base, weights):
  """The logits of each text, padded on the right in one batch."""
  ids = [base.tokenizer.encode(text) for text in TEXTS]
  tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
  for row, each in zip(tokens, ids, strict=True):
    row[: len(each)] = each
  at = np.array([[len(each) - 1] for each in ids])
  apply = lora_jax.adapt(parts.make_model(base.config).apply)
  return np.asarray(apply({"params": weights}, tokens, at_BC=at))[:, 0]


def theirs(model, base):
  found = []
  for text in TEXTS:
    with torch.no_grad():
      found.append(model(torch.tensor([base.tokenizer.encode(text)])).logits[0].numpy())
  return np.stack(found)


def test_a_run_learns_the_classes_and_shows_them(run):
  results = json.loads(run.evaluation.read_text())
  assert results["after"]["accuracy"] > 0.95 > results["before"]["accuracy"]
  assert [sample["after"] for sample in results["samples"]] == [
    sample["wanted"] for sample in results["samples"]
  ]
  assert {sample["wanted"] for sample in results["samples"]} <= {"negative", "positive"}


def test_the_figures_of_a_run_are_those_of_its_folder(config, run, trained):
  base, _, adapters = trained
  task = parts.make_task(config)
  rows = parts.load_records(config.data, task)["test"]
  task = task.of_model(base)
  weights = lora_jax.attach(base.params, adapters)
  eval_step = task.make_eval_step(lora_jax.adapt(parts.make_model(base.config).apply))
  data = task.eval_batches(task.examples(rows), 8)
  found = evaluation.evaluate(eval_step, weights, data, task.metrics)
  kept = json.loads(run.evaluation.read_text())["after"]
  assert found == pytest.approx(kept, rel=1e-5)
  named = [row["label"] for row in rows]
  loss = task.objective(lora_jax.adapt(parts.make_model(base.config).apply))
  assert len(named) == found["rows"] and float(loss(weights, data[0])[0]) < 1


def test_peft_loads_a_run_as_a_classifier_with_the_same_logits(config, run, trained):
  base, _, adapters = trained
  settings = json.loads((run.adapter / "adapter_config.json").read_text())
  assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    config.model.source, num_labels=2, pad_token_id=0
  )
  model = peft.PeftModel.from_pretrained(model, run.adapter).eval()
  np.testing.assert_allclose(
    logits_of(base, lora_jax.attach(base.params, adapters)), theirs(model, base), atol=1e-4
  )


def test_a_merged_classifier_is_transformers_own(config, trained, tmp_path):
  base, _, adapters = trained
  merged = lora_jax.merge(base.params, adapters)
  export.save(tmp_path / "merged", merged, base.config, base.tokenizer)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
  assert model.config.id2label == {0: "negative", 1: "positive"}
  assert type(model).__name__ == "LlamaForSequenceClassification"
  model.config.pad_token_id = 0
  np.testing.assert_allclose(logits_of(base, merged), theirs(model, base), atol=1e-4)
  again = pretrained.load(tmp_path / "merged", scan_layers=True)
  assert again.config.classes == ("negative", "positive")
  jax.tree.map(np.testing.assert_array_equal, again.params, merged)


def test_a_plan_counts_the_head(config):
  case = planning.read(config)
  assert case.params["head"]["kernel"].shape == (32, 2)
  assert [path for path in case.specs if path.startswith("head")] == ["head/kernel"]


def test_the_end_of_a_long_text_is_cut_and_counted(config, trained):
  task = dataclasses.replace(parts.make_task(config), max_length=4).of_model(trained[0])
  [example] = task.examples([{"text": "one two three four five six", "label": "positive"}])
  whole = trained[0].tokenizer.encode("one two three four five six")
  assert example.inputs == tuple(whole[:3]) and example.cut == len(whole) - 3
  assert example.targets == (1,)


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"task.labels": ("a",)}, "task.labels .*two or more different"),
    (
      {"task.labels": ("negative", "good")},
      "record 0: its label 'positive' is not one of task.labels",
    ),
    ({"train.loss_chunk": 8}, "loss_chunk 8: is for logits of many tokens"),
    (
      {"task.name": "segmentation"},
      "task.name 'segmentation' is unknown; use completion, classification",
    ),
    ({"task.text": "{body}"}, "no column 'body'"),
  ],
)
def test_what_cannot_be_classified_is_refused_before_the_model_is_loaded(config, fields, words):
  config = config.copy_and_resolve_references()
  with config.ignore_type():
    config.update_from_flattened_dict(fields)
  config.model.source = "nowhere"
  with pytest.raises(ValueError, match=words):
    planning.read(config)


def test_a_field_that_the_task_does_not_read_is_refused(config):
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.prompt = "{text}"
  with pytest.raises(
    ValueError, match=r"data\.prompt: the task classification reads no such field"
  ):
    planning.read(config)
  with config.unlocked():
    del config.data.prompt
    config.task.prompt = "{text}"
  with pytest.raises(ValueError, match=r"task\.prompt: the task classification has no such field"):
    planning.read(config)


def test_the_published_files_of_sst_2_have_the_labels_of_the_config(public_data):
  config = classify.get_config()
  data = public_data / "glue" / "SST-2"
  config.data.source, config.data.test_source = str(data / "train.tsv"), str(data / "dev.tsv")
  records = parts.load_records(config.data, parts.make_task(config))
  assert len(records["test"]) == 872 and len(records["train"]) > 60_000
  train = {row["sentence"] for row in records["train"]}
  assert not train & {row["sentence"] for row in records["test"] + records["validation"]}


def test_a_new_head_starts_from_the_seed(config):
  base = parts.load_model(config.model)
  task = parts.make_task(config)
  heads = [task.extend(base, jax.random.key(seed)).params["head"]["kernel"] for seed in (0, 0, 1)]
  assert heads[0].shape == (32, 2) and jnp.array_equal(heads[0], heads[1])
  assert not jnp.array_equal(heads[0], heads[2]) and 0.01 < float(heads[0].std()) < 0.03
