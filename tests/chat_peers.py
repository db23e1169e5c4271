"""Chat templates and a tokenizer with their special tokens, here and in `transformers`."""

import datetime
import json
import os
import pathlib
import re

import pytest
from peers import transformers

from lora_jax.data import chat_templates
from lora_jax.io import tokenizer

# As ChatML has it.
CHATML = r"""{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""

# Marks, of which some go through a macro and a variable; the day, tools, a loop that is left.
MARKED = r"""{%- macro told(message) -%}
  {{- message.content | trim }}
  {%- for call in message.tool_calls %}
    {%- set call = call.function %}
    {{- '\n[call] ' ~ {'name': call.name, 'arguments': call.arguments} | tojson(indent=2) }}
  {%- endfor %}
{%- endmacro %}
{%- set ns = namespace(system=none) %}
{%- for message in messages %}
  {%- if message.role == 'system' %}{% set ns.system = message.content %}{% break %}{% endif %}
{%- endfor %}
{{- bos_token }}<|system|>Today is {{ strftime_now('%d %B %Y') }}. {{ ns.system or 'No system.' }}
{%- if tools %}{% for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}{% endif %}<|end|>
{% for message in messages %}
  {%- if message.role == 'system' %}{% continue %}{% endif %}
  {{- '<|' + message.role + '|>' }}
  {%- if message.role == 'assistant' %}
    {%- generation %}{{ told(message) }}<|end|>{% endgeneration %}
  {%- else %}{{ told(message) }}<|end|>
  {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

# An EOS at the very end alone, as Phi-3 has it.
CLOSING = r"""{% for message in messages %}
{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

# In turns that must alternate, without a system message, as Mistral's first one.
ALTERNATING = r"""{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""

# It leaves out thoughts before the last question, as Qwen 3.
FORGETTING = r"""{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content and loop.last %}<think>{{ message.reasoning_content }}</think>
{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

OWN = {
  "chatml": CHATML,
  "marked": MARKED,
  "closing": CLOSING,
  "alternating": ALTERNATING,
  "forgetting": FORGETTING,
}

# Of the wheel trl==1.16.0, in `trl/chat_templates`; the others are tested on request.
STOCK = (
  "gemma3", "gemma4", "gptoss", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "qwen2_5",
  "qwen3", "qwen3_5_nothink", "qwen3_5_think",
  *(f"{x}_training" for x in ("gemma3", "gptoss", "llama3", "phi3", "qwen2_5", "qwen3")),
)  # fmt: skip

_SPECIAL = re.compile(
  r"<\|[a-zA-Z_]+\|>|<｜[^｜]+｜>|<[a-z]+_of_[a-z]+>|<bos>|<eos>|<\|?/?turn\|?>"
)


def stock_folder() -> pathlib.Path:
  """The folder of the templates that `trl` publishes; skips without it."""
  if "LORA_JAX_TRL" not in os.environ:
    pytest.skip("set LORA_JAX_TRL to the folder trl/chat_templates of the wheel trl==1.16.0")
  return pathlib.Path(os.environ["LORA_JAX_TRL"])


def write(folder: pathlib.Path, base) -> pathlib.Path:
  """Writes a tokenizer's files into a folder, the special tokens of all these templates among them.

  base: a tokenizer, as SmolLM2's.
  """
  fields = json.loads(base.to_json())
  sources = list(OWN.values())
  if "LORA_JAX_TRL" in os.environ:
    sources += [path.read_text() for path in stock_folder().glob("*.jinja")]
  known = {token["content"] for token in fields["added_tokens"]}
  found = {"<bos>", "<eos>"}.union(*map(_SPECIAL.findall, sources))
  found |= {"<|assistant|>", "<|user|>", "<|tool|>"}  # which templates put together
  rest = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  fields["added_tokens"] += [
    {"id": base.vocab_size + n, "content": token, "special": True} | rest
    for n, token in enumerate(sorted(found - known))
  ]
  (folder / "tokenizer.json").write_text(json.dumps(fields))
  named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
  settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | named
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))
  return folder


def both(folder: pathlib.Path):
  """The tokenizer of a folder, ours and `transformers`' own."""
  return tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


def today() -> str:
  return datetime.date.today().isoformat()


def template_of(ours, source: str) -> chat_templates.Template:
  """A template that is in no file."""
  special = sorted(ours.special_tokens, key=len, reverse=True)
  return chat_templates.Template(
    name="the template", source=source, variables=ours.named_tokens, special=tuple(special)
  )


def renderer(ours, source: str, **limits) -> chat_templates.Renderer:
  return chat_templates.Renderer(template_of(ours, source), date=today(), **limits)
