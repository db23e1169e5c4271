r"""Generates text with a pretrained or a compressed model, or with that of a run and its adapter.

    python -m experiments.generate --source=hf://HuggingFaceTB/SmolLM2-135M-Instruct \
        --prompt="The capital of France is"
    python -m experiments.generate --workdir=runs/quickstart --temperature=0 --max_tokens=1 \
        --prompt="Review: A joy from start to finish.
    Sentiment:"

Several --prompt flags are decoded together. Each text is printed as a JSON object on a line of its
own, with the keys prompt and completion.
"""

import json
from typing import Any

import jax
from absl import app, flags, logging

import lora_jax
from experiments import methods, parts
from lora_jax import exchange
from lora_jax.compress import merging
from lora_jax.io.tokenizer import Tokenizer
from lora_jax.models import decode, llama

PyTree = Any

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder: its model with its adapter.")
_SOURCE = flags.DEFINE_string("source", None, "Or a pretrained model alone, by its address.")
_PROMPT = flags.DEFINE_multi_string("prompt", None, "A text to go on from.", required=True)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 64, "The most tokens to make.", 1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", 0.0)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Samples from this share of the probability.", 0.0, 1.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
_CACHE = flags.DEFINE_bool("cache", True, "Keep keys and values; without, the same but slow.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  if (_WORKDIR.value is None) == (_SOURCE.value is None):
    raise app.UsageError("give either --workdir or --source")
  if _TEMPERATURE.value == 0 and _TOP_P.value != 1:
    raise app.UsageError("--top_p has no meaning at --temperature=0; give a temperature")
  logging.set_verbosity(logging.WARNING)
  choose = decode.greedy
  if _TEMPERATURE.value:
    choose = decode.nucleus(_TEMPERATURE.value, _TOP_P.value)

  model_config, tokenizer, weights = load()
  model = llama.Llama(model_config)
  prompts, lengths = decode.pad_prompts(
    [tokenizer.encode(prompt) for prompt in _PROMPT.value], tokenizer.pad_id
  )
  cache = None
  if _CACHE.value:
    slots = prompts.shape[1] + _MAX_TOKENS.value
    cache = llama.init_cache(model_config, len(prompts), slots, model_config.dtype)

  @jax.jit
  def generate(weights, prompts, lengths, cache):
    return decode.decode(
      lora_jax.adapt(model.apply),
      weights,
      prompts,
      lengths,
      steps=_MAX_TOKENS.value,
      choose=choose,
      key=jax.random.key(_SEED.value),
      eos_id=tokenizer.eos_id,
      cache=cache,
    )

  for prompt, tokens in zip(
    _PROMPT.value, generate(weights, prompts, lengths, cache).tolist(), strict=True
  ):
    if tokenizer.eos_id in tokens:
      tokens = tokens[: tokens.index(tokenizer.eos_id)]
    completion = tokenizer.decode(tokens)
    print(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False))


def load() -> tuple[llama.LlamaConfig, Tokenizer, PyTree]:
  """The config, the tokenizer and the weights of what the flags name, as they are used."""
  if _SOURCE.value:
    found = parts.load_source(_SOURCE.value)
    weights = found.params
  else:
    run, config = parts.open_run(_WORKDIR.value)
    found = methods.load_base(config)
    axes = parts.trace_axes(llama.Llama(found.config), found.params)
    adapters = exchange.load(run.adapter, found.params, axes)
    weights = methods.finish(config, found.params, adapters, axes)
  return found.config, found.tokenizer, merging.keep_smaller(weights)


if __name__ == "__main__":
  app.run(main)
