r"""The references of each prompt, for data sets with several completions per prompt.

by_prompt(records, prompt="{mr}\nText:", completion=" {ref}")
# {"name[Aromi], eatType[pub]\nText:": ["Aromi is a pub.", "There is a pub, Aromi."], ...}
"""

from collections.abc import Sequence

from lora_jax.data import templates
from lora_jax.data.records import Record


def by_prompt(records: Sequence[Record], prompt: str, completion: str) -> dict[str, list[str]]:
  """Returns {prompt: its completions}, both in the order in which they first appear.

  Args:
    records: from `lora_jax.data.records.read`.
    prompt: template of the prompt, see `lora_jax.data.templates`.
    completion: template of the completion; white space around completions is stripped.

  Raises:
    ValueError: as `lora_jax.data.templates.check`.
  """
  templates.check(prompt, records, "prompt")
  templates.check(completion, records, "completion")
  found: dict[str, list[str]] = {}
  for record in records:
    reference = templates.fill(completion, record).strip()
    found.setdefault(templates.fill(prompt, record), []).append(reference)
  return found
