r"""Generates text with a pretrained or a compressed model, or with that of a run and its adapter.

    python -m experiments.generate --source=hf://HuggingFaceTB/SmolLM2-135M-Instruct \
        --prompt="The capital of France is"
    python -m experiments.generate --workdir=runs/quickstart \
        --prompt="Review: A joy from start to finish.
    Sentiment:"
    python -m experiments.generate --workdir=runs/mine \
        --chat='[{"role": "user", "content": "What is the capital of France?"}]'

Several --prompt flags are decoded together. Each text is printed as a JSON object on a line of its
own, with the keys prompt and completion. A text ends where the model ends it, or at --max_tokens.
A run that chooses among `data.choices` has learned to answer and not to end, so it makes as many
tokens as the longest of them has.

--chat is a conversation that the model is to answer, its messages as JSON, or an object with
`messages` and `tools`, or a file of either (JSONL, a JSON array or Parquet). The model's chat
template writes it as text. The keys are then messages and completion.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags, logging

import lora_jax
from experiments import deployment, programs, speakers
from lora_jax import checks
from lora_jax.data import messages, records
from lora_jax.models import decode
from lora_jax.tasks import texts
from lora_jax.train import generation

PyTree = Any

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder: its model with its adapter.")
_SOURCE = flags.DEFINE_string("source", None, "Or a pretrained model alone, by its address.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to go on from.")
_CHAT = flags.DEFINE_multi_string(
  "chat", [], "Or a conversation to answer: its messages as JSON, or a file of several."
)
_TEMPLATE = flags.DEFINE_string(
  "template",
  None,
  "Of --chat: a template's name or file; by default the run's, or the model's own.",
)
_DATE = flags.DEFINE_string(
  "date", None, "Of --chat: the day that templates are told; by default the run's, or today."
)
_MAX_TOKENS = flags.DEFINE_integer(
  "max_tokens", None, "The most tokens to make: by default 64, or a run's longest choice.", 1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", 0.0)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Samples from this fraction of the probability.", 0.0, 1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "The seed of sampling.", 0, checks.MAX_SEED)
_FETCH = flags.DEFINE_bool(
  "fetch", False, "Download what the run's config.json names, where it is not on this machine."
)
_RESIDENT = deployment.define_resident()
_CACHE = flags.DEFINE_bool("cache", True, "Keep keys and values; without, the same but slow.")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  if (_WORKDIR.value is None) == (_SOURCE.value is None):
    raise app.UsageError("give either --workdir or --source")
  if bool(_PROMPT.value) == bool(_CHAT.value):
    raise app.UsageError("give either --prompt or --chat")
  if _PROMPT.value and (_TEMPLATE.value or _DATE.value):
    raise app.UsageError("--template and --date are for --chat; a --prompt is taken as it stands")
  if _SOURCE.value and _FETCH.value:
    raise app.UsageError("--fetch is for a --workdir; a --source is fetched as it stands")
  if _TEMPERATURE.value == 0 and _TOP_P.value != 1:
    raise app.UsageError("--top_p has no meaning at --temperature=0; give a temperature")
  logging.set_verbosity(logging.WARNING)
  choose = decode.greedy
  if _TEMPERATURE.value:
    choose = decode.nucleus(_TEMPERATURE.value, _TOP_P.value)

  chats = read_chats(_CHAT.value)
  if _SOURCE.value:
    speaker = speakers.of_source(_SOURCE.value)
  else:
    speaker = speakers.of_run(_WORKDIR.value, fetch=_FETCH.value)
  tokenizer, stop_ids = speaker.shapes.tokenizer, speaker.shapes.tokenizer.stop_ids
  longest_choice = speaker.task.longest_choice() if speaker.task else None
  given: list[dict[str, Any]] = [{"prompt": prompt} for prompt in _PROMPT.value]
  asked = [tokenizer.encode(prompt) for prompt in _PROMPT.value]
  if chats:
    with speaker.prompts(_TEMPLATE.value, _DATE.value) as written:
      stop_ids = written.stop_ids
      for where, chat in chats:
        try:
          asked.append(written.ask(chat))
        except ValueError as error:
          raise ValueError(f"{where}: {error}") from None
        given.append({"messages": chat.messages})
  max_tokens = _MAX_TOKENS.value or longest_choice or 64
  prompts, lengths = decode.pad_prompts(asked, tokenizer.pad_id)
  texts.check_generation(asked, max_tokens, speaker.shapes.config)

  found, adapted = speaker.load()
  weights = found.params if adapted is None else adapted
  weights = deployment.deploy(weights, _RESIDENT.value)
  model = found.family.make_model(found.config)
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
      eos_id=stop_ids,
      cache=cache,
    )

  made = generate(weights, prompts, lengths, cache).tolist()
  for line, ids, tokens in zip(given, asked, made, strict=True):
    text = tokenizer.decode(generation.until_end(tokens, stop_ids), after=ids)
    print(json.dumps(line | {"completion": text}, ensure_ascii=False))


def read_chats(values: Sequence[str]) -> list[tuple[str, messages.Conversation]]:
  """The conversations of the flag, each with where it stands.

  Raises:
    ValueError: for what is no JSON, or no conversation that ends with a question.
    FileNotFoundError: for a file that is not there.
  """
  found = []
  for value in values:
    if value.lstrip()[:1] in ("[", "{"):
      chat = records.from_json("--chat", value)
      rows = {"--chat": {"messages": chat} if isinstance(chat, list) else chat}
    else:
      read = records.read(value)
      rows = {f"{value}: record {n}": row for n, row in enumerate(read)}
      if all("role" in row for row in read):
        rows = {value: {"messages": read}}
    for where, row in rows.items():
      try:
        found.append((where, messages.check_asked(row)))
      except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
  return found


if __name__ == "__main__":
  programs.run(main)
