r"""Generates text with a pretrained or a compressed model, or with that of a run and its adapter.

    python -m experiments.generate --source=hf://HuggingFaceTB/SmolLM2-135M-Instruct \
        --prompt="The capital of France is"
    python -m experiments.generate --workdir=runs/quickstart \
        --prompt="Review: A joy from start to finish.
    Sentiment:"

Several --prompt flags are decoded together. Each text is printed as a JSON object on a line of its
own, with the keys prompt and completion. A text ends where the model ends it, or at --max_tokens.
A run that chooses among `data.choices` has learnt to answer and not to end, so it makes as many
tokens as the longest of them has.
"""

import json
from typing import Any

import jax
from absl import app, flags, logging

import lora_jax
from experiments import inputs, methods, parts, programs
from lora_jax import checks, exchange
from lora_jax.compress import merging
from lora_jax.io import pretrained
from lora_jax.models import decode
from lora_jax.tasks import texts
from lora_jax.train import generation

PyTree = Any

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder: its model with its adapter.")
_SOURCE = flags.DEFINE_string("source", None, "Or a pretrained model alone, by its address.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "A text to go on from.", required=True)
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", None, "The most tokens to make: by default 64, or a run's longest choice.", 1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", 0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Samples from this share of the probability.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", 0, checks.MAX_SEED)
_FETCH = flags.DEFINE_bool(
  "fetch", False, "Download what the run's config.json names, where it is not on this machine."
)
_INSTEAD = "experiments.predict answers by a run of it"

_CACHE = flags.DEFINE_bool("cache", True, "Keep keys and values; without, the same but slow.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  if (_WORKDIR.value is None) == (_SOURCE.value is None):
    raise app.UsageError("give either --workdir or --source")
  if _SOURCE.value and _FETCH.value:
    raise app.UsageError("--fetch is for a --workdir; a --source is fetched as it stands")
  if _TEMPERATURE.value == 0 and _TOP_P.value != 1:
    raise app.UsageError("--top_p has no meaning at --temperature=0; give a temperature")
  logging.set_verbosity(logging.WARNING)
  choose = decode.greedy
  if _TEMPERATURE.value:
    choose = decode.nucleus(_TEMPERATURE.value, _TOP_P.value)

  found, weights, longest_choice = load()
  tokenizer = found.tokenizer
  max_tokens = _MAX_TOKENS.value or longest_choice or 64
  model = found.family.make_model(found.config)
  asked = [tokenizer.encode(prompt) for prompt in _PROMPT.value]
  prompts, lengths = decode.pad_prompts(asked, tokenizer.pad_id)
  texts.check_generation(asked, max_tokens, found.config)
  cache = None
  if _CACHE.value:
    # The last token of a text, after which nothing is made, may be beyond the positions.
    slots = min(prompts.shape[1] + max_tokens, found.config.max_length)
    cache = found.new_cache(len(prompts), slots)

  @jax.jit
  def generate(weights, prompts, lengths, cache):
    return decode.decode(
      lora_jax.adapt(model.apply),
      weights,
      prompts,
      lengths,
      steps=max_tokens,
      choose=choose,
      key=jax.random.key(_SEED.value),
      eos_id=tokenizer.stop_ids,
      cache=cache,
    )

  written = generate(weights, prompts, lengths, cache).tolist()
  for prompt, ids, tokens in zip(_PROMPT.value, asked, written, strict=True):
    tokens = generation.until_end(tokens, tokenizer.stop_ids)
    text = tokenizer.decode(tokens, after=ids)
    print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False))


def load() -> tuple[pretrained.Pretrained, PyTree, int | None]:
  """What the flags name, its weights as they are used, and the tokens of a run's longest choice."""
  if _SOURCE.value:
    parts.check_writes(_SOURCE.value, _INSTEAD)
    found = parts.load_source(_SOURCE.value)
    weights, longest_choice = found.params, None
  else:
    run, config = parts.open_run(_WORKDIR.value)
    inputs.require_of(run, config, ["model.source"], fetch=_FETCH.value)
    inputs.warn_of_changes(run, config, ["model.source"])
    parts.check_writes(config.model.source, _INSTEAD)
    found = methods.load_base(config)
    axes = parts.trace_axes(parts.make_model(found.config), found.params)
    table = found.table
    adapters = exchange.load(run.adapter, found.params, axes, table=table)
    weights = methods.finish(config, found.params, adapters, axes)
    longest_choice = parts.make_task(config).of_model(found).longest_choice()
  return found, merging.keep_smaller(weights), longest_choice


if __name__ == "__main__":
  programs.run(main)
