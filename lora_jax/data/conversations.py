r"""Reads conversations from tables of several layouts.

  chats, words = read(records)                            # by the columns, if one reading fits
  chats, words = read(records, reading="instruction")     # as config.data.conversation says
  chats[0]["messages"]       # [{"role": "user", "content": "…"}, {"role": "assistant", …}]

| reading         | columns                                                                       |
| --------------- | ----------------------------------------------------------------------------- |
| "messages"      | `messages`, a list of {"role", "content"}, perhaps with "tool_calls"          |
| "conversations" | `conversations`, a list of {"from", "value"}                                  |
| "prompt"        | `prompt` and `completion`, each a text or a list of messages                  |
| "instruction"   | `instruction`, perhaps `input`, and `output`                                  |
| "text"          | `text`: not a conversation, so it is refused with a remedy                    |

With each of them a column `system` has the system message, and a column `tools` has the tools that
the assistant may call, a list of JSON schemas or that list as text. Other columns are ignored, but
with "auto" no column may belong to another reading. A column that is null in every record does not
count.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from lora_jax.checks import shown
from lora_jax.data import messages
from lora_jax.data.records import Record, from_json

Message = dict[str, Any]

AUTO = "auto"
"""The reading that the columns tell."""

# Roles in {"from", "value"}. In LLaMA-Factory's files tools are "function_call" and "observation".
_SPEAKERS = {
  "system": "system", "human": "user", "user": "user", "gpt": "assistant",
  "assistant": "assistant", "tool": "tool", "observation": "tool",
}  # fmt: skip
_CALL = "function_call"
# The format of tool calls within the assistant's text in Hermes and Qwen.
_OPENED, _CLOSED = "<tool_call>", "</tool_call>"
_SHOWN = 20  # columns listed in a message


def read(records: Sequence[Record], reading: str = AUTO) -> tuple[list[Record], str]:
  """Returns the conversations of records, in order, and a message on how they were read.

  Args:
    records: from `lora_jax.data.records.read`.
    reading: a name in `READINGS`, or "auto" to choose by the columns.

  Returns:
    For each record {"messages": …} and, if it has tools, "tools", as from `messages.check`; and a
    readable line.

  Raises:
    ValueError: for an unknown reading; for columns that fit none or more than one, with the config
      line of each; for a record without a valid conversation, by its number: a value of a wrong
      type, and as in `messages.check`.
  """
  columns = _columns(records)
  name = _by_columns(columns) if reading == AUTO else reading
  if name not in READINGS:
    known = ", ".join(map(repr, (AUTO, *READINGS)))
    raise ValueError(f"data.conversation {shown(reading)} is unknown; use one of {known}")
  found = []
  for number, record in enumerate(records):
    try:
      found.append(_conversation(record, READINGS[name]))
    except ValueError as error:
      raise ValueError(f"record {number}: {error}") from None
  return found, _words(name, columns, found)


class Reading(NamedTuple):
  """The columns of a layout, and the conversion of a record to messages.

  Attributes:
    needs: the columns that every record has.
    may: optional columns.
    words: describes the columns in messages.
    messages: maps a record to its messages.
  """

  needs: tuple[str, ...]
  may: tuple[str, ...]
  words: str
  messages: Callable[[Record], list[Message]]


def _conversation(record: Record, reading: Reading) -> Record:
  for column in reading.needs:
    if record.get(column) is None:
      raise ValueError(f"has no {column!r}; add it, or leave the record out")
  found = reading.messages(record)
  if system := _text(record, "system", may_lack=True):
    if found and found[0].get("role") in ("system", "developer"):
      raise ValueError(
        "has a system message in its column 'system' and one in its conversation; keep one of them"
      )
    found = [{"role": "system", "content": system}, *found]
  chat = {"messages": found}
  if record.get("tools"):
    tools = record["tools"]
    chat["tools"] = from_json("its tools", tools) if isinstance(tools, str) else tools
  checked = messages.check(chat)
  for n, message in enumerate(checked.messages):
    if message.get("weight", 1) != 1:
      raise ValueError(
        f"message {n}: its weight {shown(message['weight'])} would be ignored; take the field out "
        "where its turn is to be learned, else leave the record out"
      )
  return {"messages": checked.messages} | ({"tools": checked.tools} if checked.tools else {})


# ---- the readings


def _of_messages(record: Record) -> list[Message]:
  return _list(record, "messages")


def _of_conversations(record: Record) -> list[Message]:
  given = _list(record, "conversations")
  found = []
  for n, turn in enumerate(given):
    if turn.get("from") is None and turn.get("role") is not None:
      found.append(turn)
      continue
    where, speaker, text = f"message {n}", turn.get("from"), turn.get("value")
    if speaker not in (*_SPEAKERS, _CALL):
      known = ", ".join([*_SPEAKERS, _CALL])
      raise ValueError(f"{where}: its 'from' {shown(speaker)} is not one of {known}; rename it")
    if not isinstance(text, str):
      raise ValueError(f"{where}: its 'value' {shown(text)} is no text")
    if speaker == _CALL:
      found.append(_calling("", [text], where))
      continue
    heard = n + 1 < len(given) and given[n + 1].get("from") in ("tool", "observation")
    content, *calls = text.split(_OPENED)
    if heard and _SPEAKERS[speaker] == "assistant" and calls:
      found.append(_calling(content.strip(), [_closed(each, where) for each in calls], where))
    else:
      found.append({"role": _SPEAKERS[speaker], "content": text})
  return found


def _closed(call: str, where: str) -> str:
  inside, closed, after = call.partition(_CLOSED)
  if not closed or after.strip():
    raise ValueError(
      f"{where}: its text goes on after a tool call, {shown(call, 80)}; each must end by "
      f"{_CLOSED}, and the text come before them"
    )
  return inside


def _calling(content: str, calls: Sequence[str], where: str) -> Message:
  """The assistant's turn with tool calls; each item is a call or a list of calls as JSON."""
  parsed = []
  for call in calls:
    found = from_json(f"{where}: its tool call", call)
    parsed += found if isinstance(found, list) else [found]
  return {
    "role": "assistant",
    "content": content,
    "tool_calls": [{"type": "function", "function": each} for each in parsed],
  }


def _of_prompt(record: Record) -> list[Message]:
  found = []
  for column, role in (("prompt", "user"), ("completion", "assistant")):
    if isinstance(record[column], str):
      found.append({"role": role, "content": record[column]})
    else:
      found += _list(record, column, "a text or a list of messages")
  return found


def _of_instruction(record: Record) -> list[Message]:
  asked, more = _text(record, "instruction"), _text(record, "input", may_lack=True)
  return [
    {"role": "user", "content": f"{asked}\n\n{more}" if more.strip() else asked},
    {"role": "assistant", "content": _text(record, "output")},
  ]


def _of_text(record: Record) -> NoReturn:
  del record
  raise ValueError(
    "its 'text' is plain text and no conversation; to learn it as it is, set\n"
    '  config.task.name = "completion"\n'
    '  config.data.prompt = "\\n"\n'
    '  config.data.completion = "{text}"\n'
    "or make it a conversation, with a column 'messages' or 'prompt' and 'completion'"
  )


READINGS = {
  "messages": Reading(("messages",), (), "lists of role and content", _of_messages),
  "conversations": Reading(("conversations",), (), "lists of from and value", _of_conversations),
  "prompt": Reading(("prompt", "completion"), (), "texts or lists of messages", _of_prompt),
  "instruction": Reading(("instruction", "output"), ("input",), "texts", _of_instruction),
  "text": Reading(("text",), (), "plain text, no conversation", _of_text),
}
"""By `data.conversation` of a config."""

# Columns of preference pairs, which no reading supports.
_PAIRS = ("chosen", "rejected")


# ---- values


def _list(record: Record, column: str, wanted: str = "a list of messages") -> list[Message]:
  found = record[column]
  if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
    hint = "; parse its JSON first" if isinstance(found, str) and found[:1] == "[" else ""
    raise ValueError(f"its {column} {shown(found)} is not {wanted}, each an object{hint}")
  return found


def _text(record: Record, column: str, *, may_lack: bool = False) -> str:
  found = record.get(column)
  if found is None and may_lack:
    return ""
  if not isinstance(found, str):
    raise ValueError(f"its {column} {shown(found)} is a {type(found).__name__} and no text")
  return found


# ---- which reading


def _columns(records: Sequence[Record]) -> list[str]:
  found: dict[str, None] = {}
  for record in records:
    found |= dict.fromkeys(name for name, value in record.items() if value is not None)
  return list(found)


def _by_columns(columns: Sequence[str]) -> str:
  """Returns the only reading that fits the columns.

  Raises:
    ValueError: if none or more than one fits, or a column belongs to another.
  """
  fit = [name for name, each in READINGS.items() if set(each.needs) <= set(columns)]
  own = {name: {*each.needs, *each.may} & set(columns) for name, each in READINGS.items()}
  touched = [name for name in READINGS if own[name]]
  pairs = [column for column in _PAIRS if column in columns]
  if len(fit) == 1 and touched == fit and not pairs:
    return fit[0]
  more = f" and {len(columns) - _SHOWN:,} more" if len(columns) > _SHOWN else ""
  listed = ", ".join(shown(column, 60) for column in columns[:_SHOWN]) + more
  if not fit:
    said = f"no reading of conversations fits the columns {listed}; rename them to those of one:"
  elif len(fit) > 1:
    said = f"several readings of conversations fit the columns {listed}; say which is meant:"
  else:
    others = sorted(set().union(*(own[name] for name in touched if name != fit[0]), pairs))
    said = (
      f"the columns {listed} fit the reading {fit[0]!r} of conversations, but "
      f"{', '.join(map(repr, others))} may be meant for another; say which is meant:"
    )
  lines = [said, *(_line(name, columns) for name in (touched if fit else READINGS))]
  if pairs:
    lines.append(
      "  'chosen' and 'rejected' are pairs of answers; to learn the chosen ones, rename 'chosen' "
      "to 'completion' and take 'rejected' out"
    )
  lines.append(
    '  config.task.name = "completion"   # by data.prompt and data.completion, of any columns'
  )
  raise ValueError("\n".join(lines))


def _line(name: str, columns: Sequence[str]) -> str:
  """The config line for a reading, with a description."""
  reading = READINGS[name]
  wanted = [*reading.needs, *(f"perhaps {column}" for column in reading.may)]
  lacking = [column for column in reading.needs if column not in columns]
  note = f"; not there: {', '.join(lacking)}" if lacking else ""
  return f'  config.data.conversation = "{name}"   # {", ".join(wanted)}: {reading.words}{note}'


def _words(name: str, columns: Sequence[str], chats: Sequence[Record]) -> str:
  reading = READINGS[name]
  used = [
    column for column in (*reading.needs, *reading.may, "system", "tools") if column in columns
  ]
  left_out = [column for column in columns if column not in used]
  calls = sum(any("tool_calls" in each for each in chat["messages"]) for chat in chats)
  begun = sum(chat["messages"][0]["role"] != "user" for chat in chats)
  words = f"conversations: read as {name!r}, from {', '.join(used)}: {len(chats):,} records"
  words += f", {begun:,} with a system message" if begun else ""
  words += f", {calls:,} with tool calls" if calls else ""
  if left_out:
    words += "; not read: " + ", ".join(shown(column, 60) for column in left_out[:_SHOWN])
  return words
