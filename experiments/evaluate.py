r"""Evaluates a run: the base against the base with the run's adapter, on a split of its data.

    python -m experiments.evaluate --workdir=runs/quickstart --split=validation
    python -m experiments.evaluate --workdir=runs/e2e --nobase --beams=1 --beams=4

Prints a line for each loss and each BLEU, and a JSON object with all of them, which is also kept in
the workdir, as eval_test.json. BLEU is that of the texts that are generated for the split's
prompts, against all completions that its records have for them; the texts are kept too, in
generated/test_adapter_beams4.jsonl for example.
"""

import functools
import json
import time

from absl import app, flags, logging
from tqdm import tqdm

import lora_jax
from experiments import methods, parts
from lora_jax import exchange
from lora_jax.compress import merging
from lora_jax.data import batches
from lora_jax.data.examples import choice_ids
from lora_jax.data.references import by_prompt
from lora_jax.models import decode, llama
from lora_jax.train import evaluation, generation, workdir

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
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
  run, config = parts.open_run(_WORKDIR.value)
  records = parts.load_records(config.data)
  split = parts.pick(records, _SPLIT.value, "--split")

  pretrained = methods.load_base(config)
  model = llama.Llama(pretrained.config)
  axes = parts.trace_axes(model, pretrained.params)
  adapters = exchange.load(run.adapter, pretrained.params, axes)
  held_out = parts.encode(config.data, split, pretrained.tokenizer)
  data = batches.eval_batches(
    held_out[: _EXAMPLES.value or None],
    config.evaluation.batch_size,
    buckets=config.data.buckets,
    pad_id=pretrained.tokenizer.pad_id,
  )
  eval_step = evaluation.make_eval_step(
    lora_jax.adapt(model.apply), choice_ids(pretrained.tokenizer, config.data.choices)
  )

  candidates = {"base": pretrained.params} if _BASE.value else {}
  candidates["adapter"] = methods.finish(config, pretrained.params, adapters, axes)
  results = {"split": _SPLIT.value}
  if _BEAMS.value:
    results |= {"length_penalty": _LENGTH_PENALTY.value, "max_tokens": _MAX_TOKENS.value}
  for name, weights in candidates.items():
    results[name] = evaluation.evaluate(eval_step, weights, tqdm(data, desc=name))
    print(f"{name:8} {parts.describe(results[name])}")
    for beams in _BEAMS.value:
      started = time.perf_counter()
      texts = write_texts(
        config,
        pretrained,
        merging.keep_smaller(weights),  # once, and not at each token
        split,
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
      file = run.path / "generated" / f"{_SPLIT.value}_{name}_beams{beams}.jsonl"
      file.parent.mkdir(exist_ok=True)
      file.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts))
  workdir.write_json(run.path / f"eval_{_SPLIT.value}.json", results)
  print(json.dumps(results))


def write_texts(
  config, pretrained, params, split, *, beams, length_penalty, max_tokens, limit, desc
):
  """A dict for each prompt of a split: `prompt`, the `text` that follows it, its `references`."""
  tokenizer = pretrained.tokenizer
  references = by_prompt(split, config.data.prompt, config.data.completion)
  prompts = list(references)[:limit]
  generate_step = generation.make_generate_step(
    lora_jax.adapt(llama.Llama(pretrained.config).apply),
    functools.partial(llama.init_cache, pretrained.config, dtype=pretrained.config.dtype),
    max_tokens=max_tokens,
    beams=beams,
    penalty=decode.power(length_penalty),
    eos_id=tokenizer.eos_id,
  )
  data = generation.prompt_batches(
    [tokenizer.encode(prompt) for prompt in prompts],
    config.evaluation.batch_size,
    buckets=config.data.buckets,
    pad_id=tokenizer.pad_id,
  )
  found = generation.generate(generate_step, params, tqdm(data, desc=desc), tokenizer.eos_id)
  return [
    {"prompt": p, "text": tokenizer.decode(tokens).strip(), "references": references[p]}
    for p, tokens in zip(prompts, found, strict=True)
  ]


if __name__ == "__main__":
  app.run(main)
