r"""Evaluates a run: the base against the base with the run's adapter, on a split of its data.

    python -m experiments.evaluate --workdir=runs/quickstart --split=validation
    python -m experiments.evaluate --workdir=runs/e2e --nobase --beams=1 --beams=4

Or a model that no run has trained, a compressed one say, on the data of a config:

    python -m experiments.evaluate --config=configs/quickstart.py \
        --config.model.source=runs/small/model --config.model.scan_layers=False

Prints a line for each loss and each BLEU, and a JSON object with all of them, which is also kept in
the workdir, as eval_test.json. BLEU is that of the texts that are generated for the split's
prompts, against all completions that its records have for them; the texts are kept in the workdir
too, in generated/test_adapter_beams4.jsonl for example.
"""

import functools
import json
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tqdm import tqdm

import lora_jax
from experiments import methods, parts
from lora_jax import exchange, sharding
from lora_jax.compress import merging
from lora_jax.data import batches, templates
from lora_jax.data.examples import choice_ids
from lora_jax.data.references import by_prompt
from lora_jax.models import decode, llama
from lora_jax.train import evaluation, generation, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Or the config of a model and its data.", lock_config=True
)
_MESH = flags.DEFINE_bool("mesh", False, "On the config's mesh, and not on one device.")
_SPLIT = flags.DEFINE_string("split", "test", "The split: train, validation or test.")
_EXAMPLES = flags.DEFINE_integer(
  "examples", 0, "At most so many examples, and prompts to generate from; 0 for all.", 0
)
_BASE = flags.DEFINE_bool("base", True, "Evaluate the base alone too.")
_BEAMS = flags.DEFINE_multi_integer(
  "beams", [], "Generate with so many beams (1: greedy) and report BLEU; may be repeated."
)
_LENGTH_PENALTY = flags.DEFINE_float(
  "length_penalty", 1.0, "A beam search ranks texts by log-probability / length ** this."
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "The most tokens of a generated text.", 1)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  if any(beams < 1 for beams in _BEAMS.value):
    raise app.UsageError(f"--beams {_BEAMS.value} must be at least 1 each")
  logging.set_verbosity(logging.WARNING)
  if (_WORKDIR.value is None) == (_CONFIG.value is None):
    raise app.UsageError("give either --workdir or --config")
  if _CONFIG.value and not _BASE.value:
    raise app.UsageError("--nobase leaves nothing of a --config, which has no adapter")
  run, config = (None, _CONFIG.value) if _CONFIG.value else parts.open_run(_WORKDIR.value)
  mesh = sharding.make_mesh(**config.mesh) if _MESH.value else None
  if mesh:
    parts.process_rows(config, mesh)
  records = parts.load_records(config.data)
  split = parts.pick(records, _SPLIT.value, "--split")

  # A config alone tells of no adapter that was trained, LoftQ's base among these.
  pretrained = methods.load_base(config, mesh) if run else parts.load_model(config.model, mesh)
  model = llama.Llama(pretrained.config)
  candidates = {"base": pretrained.params} if _BASE.value else {}
  if run:
    axes = parts.trace_axes(model, pretrained.params)
    adapters = exchange.load(run.adapter, pretrained.params, axes)
    candidates["adapter"] = methods.finish(config, pretrained.params, adapters, axes)
  held_out = parts.encode(config.data, split, pretrained.tokenizer)
  data = batches.eval_batches(
    held_out[: _EXAMPLES.value or None],
    config.evaluation.batch_size,
    buckets=config.data.buckets,
    pad_id=pretrained.tokenizer.pad_id,
  )
  if mesh:
    data = data.map(functools.partial(sharding.put_rows, mesh=mesh))
  eval_step = evaluation.make_eval_step(
    lora_jax.adapt(model.apply),
    choice_ids(pretrained.tokenizer, config.data.choices),
    config.train.loss_chunk,
  )

  results = {"split": _SPLIT.value}
  if _BEAMS.value:
    results |= {"length_penalty": _LENGTH_PENALTY.value, "max_tokens": _MAX_TOKENS.value}
  for name, weights in candidates.items():
    if mesh:
      weights = jax.device_put(weights, parts.lay_out(weights, mesh).shardings)
    results[name] = evaluation.evaluate(eval_step, weights, tqdm(data, desc=name))
    print(f"{name:8} {parts.describe(results[name])}")
    keep(run, results)
    for beams in _BEAMS.value:
      started = time.perf_counter()
      texts = write_texts(
        config,
        pretrained,
        merging.keep_smaller(weights),  # once, and not at each token
        split,
        held_out,
        beams=beams,
        length_penalty=_LENGTH_PENALTY.value,
        max_tokens=_MAX_TOKENS.value,
        limit=_EXAMPLES.value or None,
        desc=f"{name}, beams {beams}",
      )
      score = generation.bleu(
        [text["text"] for text in texts], [text["references"] for text in texts]
      )
      results[name][f"beams {beams}"] = score | {"seconds": time.perf_counter() - started}
      print(f"{name:8} BLEU {score['bleu']:.2f} of {score['texts']} texts, beams {beams}")
      keep(run, results, texts, f"{name}_beams{beams}")
  print(json.dumps(results))


def keep(run: workdir.Workdir | None, results, texts=(), name: str = ""):
  """Writes what is known by now into the workdir, if there is one."""
  if not run:
    return
  workdir.write_json(run.path / f"eval_{results['split']}.json", results)
  if texts:
    file = run.path / "generated" / f"{results['split']}_{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts))


def write_texts(
  config, pretrained, params, split, examples, *, beams, length_penalty, max_tokens, limit, desc
):
  """A dict for each prompt of a split: `prompt`, the `text` that follows it, its `references`.

  examples: of the split's records; their prompts are cut as they were for training.
  """
  tokenizer = pretrained.tokenizer
  references = by_prompt(split, config.data.prompt, config.data.completion)
  prompts: dict[str, tuple[int, ...]] = {}
  for record, example in zip(split, examples, strict=True):
    text = templates.fill(config.data.prompt, record)
    prompts.setdefault(text, example.tokens[: example.prompt_length])
  asked = list(prompts)[:limit]
  generate_step = generation.make_generate_step(
    lora_jax.adapt(llama.Llama(pretrained.config).apply),
    functools.partial(llama.init_cache, pretrained.config, dtype=pretrained.config.dtype),
    max_tokens=max_tokens,
    beams=beams,
    penalty=decode.power(length_penalty),
    eos_id=tokenizer.eos_id,
  )
  data = generation.prompt_batches(
    [prompts[text] for text in asked],
    config.evaluation.batch_size,
    buckets=config.data.buckets,
    pad_id=tokenizer.pad_id,
  )
  found = generation.generate(generate_step, params, tqdm(data, desc=desc), tokenizer.eos_id)
  return [
    {"prompt": p, "text": tokenizer.decode(tokens).strip(), "references": references[p]}
    for p, tokens in zip(asked, found, strict=True)
  ]


if __name__ == "__main__":
  app.run(main)
