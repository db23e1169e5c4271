"""Tasks of encoders, on a tiny random BERT: classes of pairs, scores, embeddings."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoder
from main_programs import imported
from peers import peft, torch, transformers

import lora_jax
from configs import quickstart
from experiments import methods, parts, planning
from lora_jax import exchange, families
from lora_jax.io import export, pretrained, safetensors
from lora_jax.models import gpt2
from lora_jax.run import workdir
from lora_jax.tasks import embedding
from lora_jax.train import evaluation

train = imported("experiments.train")

TASKS = ("classification", "regression", "embedding")
PAIRS = (("a fine film, number 3", "a review"), ("dull", "number 7, a long and dull review"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny")
  tiny_encoder.write(folder)
  return folder


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
  """What a run of a task's config leaves: its config, its workdir, and its parts, by the task."""

  @functools.cache
  def make(task):
    config = tiny_encoder.config_of(folder, task)
    with workdir.open_workdir(tmp_path_factory.mktemp(task), config.to_dict()) as opened:
      train.train(config, opened)
    base = methods.load_base(config)
    axes = parts.trace_axes(parts.make_model(base.config), base.params)
    adapters = exchange.load(opened.adapter, base.params, axes, table=base.table)
    return config, opened, base, adapters

  return make


def batch_of(base, pairs=PAIRS):
  """The pairs as one padded batch: tokens, mask and types."""
  each = [base.tokenizer.encode_whole(*pair, max_length=24) for pair in pairs]
  shape = (len(each), max(len(x.ids) for x in each))
  tokens, mask, types = (np.zeros(shape, np.int32) for _ in range(3))
  for row, x in enumerate(each):
    tokens[row, : len(x.ids)], types[row, : len(x.ids)] = x.ids, x.types
    mask[row, : len(x.ids)] = 1
  return tokens, mask, types


def ours(base, weights, tokens, mask, types, **options):
  apply = lora_jax.adapt(parts.make_model(base.config).apply)
  found = apply({"params": weights}, tokens, mask_BT=mask, types_BT=types, **options)
  return jax.tree.map(np.asarray, found)


def theirs(model, tokens, mask, types):
  names = ("input_ids", "attention_mask", "token_type_ids")
  arrays = (torch.tensor(x.astype(np.int64)) for x in (tokens, mask, types))
  with torch.no_grad():
    return model.eval()(**dict(zip(names, arrays, strict=True)))


@pytest.mark.parametrize(
  ("task", "share", "figure", "least"),
  [
    ("classification", 0.1, "matthews", 0.9),
    # Of two scores 0.866 is the most.
    pytest.param("regression", 0.5, "spearman", 0.85, marks=pytest.mark.slow),
    pytest.param("embedding", 0.8, "spearman", -1.0, marks=pytest.mark.slow),
  ],
)
def test_a_run_learns_its_task_and_shows_answers(trained, task, share, figure, least):
  _, opened, _, _ = trained(task)
  results = json.loads(opened.evaluation.read_text())
  assert results["after"]["loss"] < share * results["before"]["loss"]
  assert results["after"][figure] > least
  assert len(results["samples"]) == 2
  for sample in results["samples"]:
    text, other = sample["prompt"].split("\n")
    assert "film" in text and "review" in other and sample["wanted"] and sample["after"]
  if task == "classification":
    assert all(sample["wanted"] == sample["after"] for sample in results["samples"])


@pytest.mark.parametrize("task", TASKS)
def test_the_figures_of_a_run_are_those_of_its_folder(trained, task):
  config, opened, base, adapters = trained(task)
  bound = parts.make_task(config)
  rows = parts.load_records(config.data, bound)["test"]
  bound = bound.of_model(base)
  weights = lora_jax.attach(base.params, adapters)
  eval_step = bound.make_eval_step(lora_jax.adapt(parts.make_model(base.config).apply))
  data = bound.eval_batches(bound.examples(rows), 8)
  found = evaluation.evaluate(eval_step, weights, data, bound.metrics)
  assert found == pytest.approx(json.loads(opened.evaluation.read_text())["after"], rel=1e-4)
  assert found["rows"] == len(rows)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_peft_loads_a_run_as_a_classifier_with_the_same_logits(trained, task):
  config, opened, base, adapters = trained(task)
  settings = json.loads((opened.adapter / "adapter_config.json").read_text())
  assert settings["task_type"] == "SEQ_CLS"
  assert settings["modules_to_save"] == ["bert.pooler.dense", "classifier"]
  outputs = 2 if task == "classification" else 1
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    config.model.source, num_labels=outputs
  )
  model = peft.PeftModel.from_pretrained(model, opened.adapter)
  inputs = batch_of(base)
  got = ours(base, lora_jax.attach(base.params, adapters), *inputs)
  assert got.shape == (2, outputs)
  np.testing.assert_allclose(got, theirs(model, *inputs).logits, atol=1e-4)


def test_peft_loads_an_embedding_run_with_the_same_vectors(trained):
  config, opened, base, adapters = trained("embedding")
  settings = json.loads((opened.adapter / "adapter_config.json").read_text())
  assert settings["task_type"] == "FEATURE_EXTRACTION" and "pooler" not in base.params
  model = transformers.AutoModel.from_pretrained(config.model.source)
  model = peft.PeftModel.from_pretrained(model, opened.adapter)
  tokens, mask, types = batch_of(base)
  hidden = theirs(model, tokens, mask, types).last_hidden_state.numpy()
  mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
  expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
  weights = lora_jax.attach(base.params, adapters)
  got = embedding.mean_pooled(ours(base, weights, tokens, mask, types, method="hidden"), mask)
  np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_merged_classifier_is_transformers_own(trained, tmp_path):
  _, _, base, adapters = trained("classification")
  merged = lora_jax.merge(base.params, adapters)
  export.save(tmp_path / "merged", merged, base.config, base.tokenizer)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
  assert model.config.id2label == {0: "negative", 1: "positive"}
  assert type(model).__name__ == "BertForSequenceClassification"
  inputs = batch_of(base)
  np.testing.assert_allclose(ours(base, merged, *inputs), theirs(model, *inputs).logits, atol=1e-4)
  again = pretrained.load(tmp_path / "merged", scan_layers=True)
  assert again.config.classes == ("negative", "positive")
  jax.tree.map(np.testing.assert_array_equal, again.params, merged)


@pytest.mark.parametrize("task", TASKS)
def test_a_plan_has_the_shapes_that_a_run_has(trained, task):
  config, _, base, adapters = trained(task)
  case = planning.read(config)
  assert jax.tree.map(lambda x: x.shape, case.params) == jax.tree.map(
    lambda x: x.shape, base.params
  )
  assert case.specs.keys() == adapters.keys()
  batch = next(iter(case.task.train_batches(case.task.examples(_train(config)), 8, seed=0)))
  planned = case.task.batch_of(case.largest, 8)
  assert {x: y.shape for x, y in batch.items()} == {x: y.shape for x, y in planned.items()}
  assert {x: y.dtype for x, y in batch.items()} == {x: y.dtype for x, y in planned.items()}


def _train(config):
  return parts.load_records(config.data, parts.make_task(config))["train"]


@pytest.mark.slow
def test_a_member_of_a_sweep_over_seeds_becomes_what_a_run_of_it_becomes(folder, tmp_path):
  """Its head starts from its own seed, as that of a run does."""
  config = tiny_encoder.config_of(folder, "classification", "sweep")
  # A large epsilon: Adam divides by gradients, of which those near zero are rounding alone.
  config.update_from_flattened_dict(
    {"train.steps": 3, "evaluation.samples": 0, "optimizer.eps": 1e-4}
  )
  alone = config.copy_and_resolve_references()
  config.sweep.grid, alone.sweep.grid, alone.seed = (("seed", (0, 1)),), (), 1
  weights = {}
  for name, each in (("sweep", config), ("alone", alone)):
    with workdir.open_workdir(tmp_path / name, each.to_dict()) as opened:
      train.train(each, opened)
    path = opened.path / "members" / "1" if name == "sweep" else opened.path
    file = path / "adapter" / "adapter_model.safetensors"
    weights[name] = {x: y.load() for x, y in safetensors.open_file(file).items()}
  assert weights["sweep"].keys() == weights["alone"].keys()
  for name, tensor in weights["alone"].items():
    np.testing.assert_allclose(weights["sweep"][name], tensor, atol=2e-5, err_msg=name)
  [classifier] = [x for name, x in weights["alone"].items() if name.endswith("classifier.weight")]
  assert classifier.shape == (2, 32)


# ---- the loss of embeddings


def contrastive(pairs_B2D, temperature, weight_B):
  """The mean over rows that count, by torch's cross-entropy on the rows that are there."""
  there = torch.tensor(weight_B > 0)
  a, b = (torch.tensor(pairs_B2D[:, n])[there] for n in (0, 1))
  return torch.nn.functional.cross_entropy(a @ b.T / temperature, torch.arange(len(a))).item()


def test_the_loss_of_embeddings_is_the_cross_entropy_of_a_pair_among_its_batch(trained):
  config, _, base, _ = trained("embedding")
  task = parts.make_task(config).of_model(base)
  found = task.examples(_train(config))
  batch = next(iter(task.train_batches(found, 8, seed=3)))
  batch["weights"][6:] = 0  # as a batch that is not full has them
  apply = parts.make_model(base.config).apply
  loss, count = task.objective(apply)(base.params, batch)
  vectors = np.asarray(task.vectors(apply)(base.params, batch)).reshape(8, 2, -1)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
  assert count == 6
  assert float(loss) == pytest.approx(contrastive(vectors, 0.05, batch["weights"][:, 0]), abs=1e-4)
  changed = batch | {"tokens": batch["tokens"].copy()}
  changed["tokens"][6:] = 7
  assert task.objective(apply)(base.params, changed)[0] == pytest.approx(float(loss), abs=1e-5)


def test_only_pairs_that_are_alike_are_trained_on_and_all_are_measured(trained):
  config, opened, base, _ = trained("embedding")
  task = parts.make_task(config).of_model(base)
  found = task.examples(_train(config))
  alike = [example for example in found if example.target >= 1]
  assert 0 < len(alike) < len(found)
  assert task.summary(found, 8)["examples"] == len(alike)
  results = json.loads(opened.evaluation.read_text())
  assert 0 < results["after"]["pairs"] < results["after"]["rows"]
  told = f"training: {len(alike)} pairs have a score of 1 or more, and are learned"
  assert told in task.lines(results["data"]) and told in opened.readme.read_text()
  with pytest.raises(ValueError, match="data alike is None"):
    task.lines(results["data"] | {"alike": None})


def test_mean_pooling_has_a_gradient_where_a_row_has_no_token():
  hidden, mask = jnp.ones((2, 3, 4)), jnp.array([[True, False, False], [False] * 3])
  found, gradient = jax.value_and_grad(lambda x: jnp.sum(embedding.mean_pooled(x, mask)))(hidden)
  assert float(found) == pytest.approx(2.0) and np.isfinite(gradient).all()
  assert not np.any(gradient[0, 1:]) and not np.any(gradient[1])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("task", "arguments", "fields"),
  [
    ("classification", "", {"model.quantize": "nf4"}),
    pytest.param("embedding", "method=eva", {}, marks=pytest.mark.slow),
    pytest.param("classification", "method=eva", {}, marks=pytest.mark.slow),
    pytest.param("embedding", "method=loftq", {}, marks=pytest.mark.slow),
    pytest.param("regression", "method=head", {}, marks=pytest.mark.slow),
    pytest.param(
      "classification", "method=adalora,rank=4", {"adapter.target_rank": 2}, marks=pytest.mark.slow
    ),
    pytest.param("embedding", "method=full", {"train.accumulate": 2}, marks=pytest.mark.slow),
    pytest.param("classification", "", {"train.quantize_merge": "nf4"}, marks=pytest.mark.slow),
  ],
)
def test_other_methods_and_bases_train_and_are_read_back(folder, tmp_path, task, arguments, fields):
  config = tiny_encoder.config_of(folder, task, arguments)
  config.update_from_flattened_dict({"train.steps": 6, "evaluation.samples": 0} | fields)
  with workdir.open_workdir(tmp_path / "run", config.to_dict()) as opened:
    train.train(config, opened)
  results = json.loads(opened.evaluation.read_text())
  assert results["after"]["loss"] != results["before"]["loss"]
  base = methods.load_base(config)
  axes = parts.trace_axes(parts.make_model(base.config), base.params)
  adapters = exchange.load(opened.adapter, base.params, axes, table=base.table)
  weights = methods.finish(config, base.params, adapters, axes)
  bound = parts.make_task(config).of_model(base)
  rows = parts.load_records(config.data, bound)["test"]
  eval_step = bound.make_eval_step(lora_jax.adapt(parts.make_model(base.config).apply))
  data = bound.eval_batches(bound.examples(rows), 8)
  found = evaluation.evaluate(eval_step, weights, data, bound.metrics)
  assert found["loss"] == pytest.approx(results["after"]["loss"], rel=1e-3)


@pytest.mark.slow
def test_a_classifier_teaches_another_by_its_logits_and_hidden_states(folder, trained, tmp_path):
  _, _, base, adapters = trained("classification")
  teacher = tmp_path / "teacher"
  export.save(teacher, lora_jax.merge(base.params, adapters), base.config, base.tokenizer)
  config = tiny_encoder.config_of(folder, "classification")
  config.update_from_flattened_dict(
    {
      "distill.teacher": str(teacher),
      "distill.hard": 0.0,
      "distill.hidden": 0.1,
      "evaluation.samples": 0,
    }
  )
  with workdir.open_workdir(tmp_path / "run", config.to_dict()) as opened:
    train.train(config, opened)
  results = json.loads(opened.evaluation.read_text())
  assert results["after"]["accuracy"] > 0.9  # by what the teacher says alone
  config.distill.teacher = config.model.source
  with (
    pytest.raises(ValueError, match=r"task.labels .*: .* has no head"),
    workdir.open_workdir(tmp_path / "other", config.to_dict()) as opened,
  ):
    train.train(config, opened)


# ---- what is refused


@pytest.mark.parametrize(
  ("task", "fields", "words"),
  [
    ("classification", {"task.labels": ("negative", "fine")}, "record 0: its label 'positive'"),
    ("classification", {"task.labels": ("a",)}, "task.labels .*two or more different"),
    ("classification", {"task.pair": "{body}"}, "no column 'body'"),
    ("classification", {"data.max_length": 65}, "up to 65 tokens .* which has 64 positions"),
    ("classification", {"train.loss_chunk": 8}, "loss_chunk 8"),
    ("regression", {"task.label": "{label}"}, "record 0: its label 'positive' is not a finite"),
    ("regression", {"train.loss_chunk": 8}, "loss_chunk 8"),
    ("embedding", {"task.positive": 9.0}, "task.positive 9: no pair to train on"),
    ("embedding", {"task.temperature": 0.0}, "task.temperature is 0.0; it must be above 0"),
    ("embedding", {"task.pair": ""}, "task.pair is ''; it must be a text that is not empty"),
    ("classification", {"evaluation.split": "dev"}, "evaluation.split 'dev' is no split"),
  ],
)
def test_what_cannot_be_learned_is_refused_before_weights_are_loaded(
  folder, tmp_path, monkeypatch, task, fields, words
):
  config = tiny_encoder.config_of(folder, task)
  config.update_from_flattened_dict(fields)
  monkeypatch.setattr(parts, "load_model", None)
  with (
    pytest.raises(ValueError, match=words),
    workdir.open_workdir(tmp_path / "run", config.to_dict()) as opened,
  ):
    train.train(config, opened)


@pytest.mark.parametrize(
  ("record", "words"),
  [
    ({"label": "neither"}, r"bad.jsonl: record 160: its label 'neither' is not one of task.labels"),
    ({"label": None}, "column 'label' of record 160 holds a NoneType"),
    ({"text": " "}, r"bad.jsonl: record 160: its text is empty; add some text"),
    ({"other": ""}, r"bad.jsonl: record 160: its pair is empty"),
    ({"text": "\u0000"}, r"record \d+: the text '.x00' has no tokens; add some text"),
  ],
)
def test_a_bad_record_is_named_before_weights_are_loaded(
  folder, tmp_path, monkeypatch, record, words
):
  config = tiny_encoder.config_of(folder, "classification")
  rows = (folder / "data.jsonl").read_text()
  bad = json.loads(rows.splitlines()[0]) | record
  (tmp_path / "bad.jsonl").write_text(rows + json.dumps(bad) + "\n")
  config.data.source = str(tmp_path / "bad.jsonl")
  config.data.update({"train": 0.998, "validation": 0.001, "test": 0.001})
  monkeypatch.setattr(parts, "load_model", None)
  with (
    pytest.raises(ValueError, match=words),
    workdir.open_workdir(tmp_path / "run", config.to_dict()) as opened,
  ):
    train.train(config, opened)


@pytest.mark.parametrize("task", TASKS)
def test_the_tokens_of_an_example_are_shown_with_what_is_wanted_as_learnt(folder, task):
  config = tiny_encoder.config_of(folder, task)
  bound = parts.make_task(config)
  rows = parts.load_records(config.data, bound)["test"]
  bound = parts.task_of_model(bound, config)
  special = {token: text for text, token in bound.model.tokenizer.special_tokens.items()}
  for example in bound.examples(rows)[:3]:
    *shown, wanted = bound.tokens(example)
    ids = [token for text in example.texts for token in text.ids]
    assert sum(x.count for x in shown) == len(ids)
    assert [x.text for x in shown if x.special] == [special[n] for n in ids if n in special]
    text = "".join(x.text for x in shown if not x.special)
    assert "film" in text and "review" in text and not any(x.learnt for x in shown)
    assert wanted == (bound.words(example.target), 1, False, True)
  with pytest.raises(ValueError, match=f"the task {bound.NAME} writes no texts"):
    _ = bound.chat_format


def test_an_encoder_writes_no_text_and_a_decoder_is_no_encoder(folder, trained):
  _, _, base, _ = trained("embedding")
  with pytest.raises(ValueError, match=r"this task writes texts, and .* is a 'bert', which writes"):
    parts.make_task(quickstart.get_config()).of_model(base)
  with pytest.raises(ValueError, match="a 'bert' generates no text"):
    base.new_cache(1, 8)
  config = gpt2.GPT2Config(
    vocab_size=40, width=8, mlp_width=8, num_layers=1, num_heads=2, head_dim=4, max_length=64
  )
  decoder = dataclasses.replace(base, config=config, family=families.FAMILIES["gpt2"])
  task = parts.make_task(tiny_encoder.config_of(folder, "regression"))
  with pytest.raises(ValueError, match=r"task.name 'regression' is for encoders, .* is a 'gpt2'"):
    task.of_model(decoder)
  task = parts.make_task(tiny_encoder.config_of(folder, "classification"))
  with pytest.raises(ValueError, match=r"task.pair '\{other\}': .* reads one text"):
    task.of_model(decoder)


def test_rows_of_new_tokens_train_alongside(folder):
  config = tiny_encoder.config_of(folder, "classification")
  config.model.new_tokens = ("<movie>",)
  case = planning.read(config)
  assert "embed/embedding" in case.specs
  assert "<movie>" in case.task.model.tokenizer.vocabulary
