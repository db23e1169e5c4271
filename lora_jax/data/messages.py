"""Checks the messages of a conversation before a model is loaded.

  check({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
  check_asked({"messages": [{"role": "user", "content": "Hi"}]})

A conversation begins with a user's message, optionally after a system message. It ends with one of
the assistant, or with another one if the assistant is to answer. A tool's message follows the call.
Content is a text, or texts in parts.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.checks import shown
from lora_jax.data.records import Record, from_json

ROLES = ("system", "developer", "user", "assistant", "tool")
# The names of an assistant's reasoning. `transformers` passes the first two to templates.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
# Half of a surrogate pair, and what `lora_jax.data.chat_templates` marks texts with.
_NO_CHARACTER = re.compile("[\ud800-\udfff\ufdd0-\ufdd4]")


Message = dict[str, Any]


class Conversation(NamedTuple):
  """The input of a template, as plain JSON; `tools` is None if there are none."""

  messages: list[Message]
  tools: list[Any] | None


def check(record: Record) -> Conversation:
  """Returns the conversation of a record, its `messages` and `tools`.

  Fields of a message that are None are omitted. If the arguments of a tool call are text, as in
  OpenAI's format, they are parsed to an object. Other fields are unchanged.

  Raises:
    ValueError: for an unknown role, roles out of order, an empty turn of the assistant, a tool call
      that is not JSON, and content that is not text. The error names the message and the remedy.
  """
  found = _read(record)
  roles = [message["role"] for message in found.messages]
  if "assistant" not in roles:
    raise ValueError("no message is of the role assistant, so nothing to learn; leave it out")
  if roles[-1] != "assistant":
    raise ValueError(
      f"the last message is of the role {roles[-1]}, and nothing answers it; take it out, or add "
      "the assistant's answer"
    )
  return found


def check_asked(record: Record) -> Conversation:
  """Returns the conversation of a record for the assistant to answer; see `check`.

  Raises:
    ValueError: as `check`, and for a last message of the assistant or the system.
  """
  found = _read(record)
  role = found.messages[-1]["role"]
  if role not in ("user", "tool"):
    raise ValueError(
      f"the last message is of the role {role}, so nothing is asked; end with a message of the "
      "role user, or of a tool"
    )
  return found


def _read(record: Record) -> Conversation:
  """Returns the conversation of a record, with a last message of any role."""
  if "messages" not in record:
    raise ValueError(
      f"has no messages; it has {shown(sorted(map(str, record)))}. A conversation is "
      '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    )
  given = record["messages"]
  if not isinstance(given, list) or not given:
    raise ValueError(f"messages {shown(given)} is no list with a message")
  messages = [_message(f"message {n}", each) for n, each in enumerate(given)]
  _check_order([message["role"] for message in messages], messages)
  tools = record.get("tools") or None
  if tools is not None and not (
    isinstance(tools, list) and all(isinstance(x, dict) for x in tools)
  ):
    raise ValueError(f"tools {shown(tools)} is no list of objects, each a tool's JSON schema")
  _check_texts("tools", tools)
  return Conversation(messages, tools)


def _message(where: str, given: Any) -> dict[str, Any]:
  if not isinstance(given, dict):
    raise ValueError(f"{where} {shown(given)} is no object with role and content")
  message = {name: value for name, value in given.items() if value is not None}
  role = message.get("role")
  if role not in ROLES:
    raise ValueError(f"{where}: its role {shown(role)} is not one of {', '.join(ROLES)}; rename it")
  _check_texts(where, message)
  if "tool_calls" in message:
    message["tool_calls"] = _tool_calls(where, role, message["tool_calls"])
    if not message["tool_calls"]:
      del message["tool_calls"]
  text = _content(where, message.get("content", ""))
  thoughts = next((message[x] for x in _THOUGHTS if x in message), None)
  if thoughts is not None:
    message = {"thinking": thoughts} | message | {"reasoning_content": thoughts}
  if role == "assistant" and not text.strip() and "tool_calls" not in message:
    raise ValueError(
      f"{where}: the assistant's turn is empty, so that it would learn to say nothing; write an "
      "answer, or leave the record out"
    )
  if "content" not in message and "tool_calls" not in message:
    raise ValueError(f"{where}: a message of the role {role} has no content; add it")
  return message


def _content(where: str, content: Any) -> str:
  """Returns the text of a message, which may be in parts."""
  if isinstance(content, str):
    return content
  if isinstance(content, list) and content:
    parts = [x.get("text") if isinstance(x, dict) else None for x in content]
    texts = [x for x in parts if isinstance(x, str)]
    if len(texts) == len(parts):
      return "".join(texts)
  raise ValueError(
    f"{where}: its content {shown(content)} is neither a text nor a list of "
    '{"type": "text", "text": "…"}; images and the like are not read'
  )


def _tool_calls(where: str, role: str, given: Any) -> list[dict[str, Any]]:
  if role != "assistant":
    raise ValueError(
      f"{where}: a message of the role {role} has tool_calls; only the assistant has"
    )
  if not isinstance(given, list):
    raise ValueError(f"{where}: its tool_calls {shown(given)} are no list; use [] for none")
  calls = []
  for n, call in enumerate(given):
    here = f"{where}: its tool call {n}"
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
      raise ValueError(
        f'{here} {shown(call)} is no {{"function": {{"name": "…", "arguments": {{…}}}}}}'
      )
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
      arguments = from_json(f"{here}: its text of arguments {shown(arguments)}", arguments)
      _check_texts(f"{here}: its arguments", arguments)
    if not isinstance(arguments, dict):
      raise ValueError(f"{here}: its arguments {shown(arguments)} are no object of JSON")
    inner = inner | {"arguments": arguments}
    calls.append(call | {"function": inner} if "function" in call else inner)
  return calls


def _check_order(roles: Sequence[str], messages: Sequence[Mapping[str, Any]]) -> None:
  """Raises ValueError for roles in an invalid order."""
  for n, role in enumerate(roles):
    before = roles[n - 1] if n else "the beginning"
    remedy = None
    if role in ("system", "developer") and n:
      remedy = "it may only be the first"
    elif role == "assistant" and before in ("the beginning", "system", "developer"):
      remedy = "a user's must come first"
    elif role == "user" and before == "user":
      remedy = "join the two, or put the answer between them"
    elif role == "tool" and not (before == "tool" or (n and messages[n - 1].get("tool_calls"))):
      remedy = "it must follow the assistant's tool_calls"
    elif role == "user" and n and messages[n - 1].get("tool_calls"):
      remedy = "the tool's answer must come between"
    if remedy:
      raise ValueError(f"message {n} of the role {role} follows {before}; {remedy}")


def _check_texts(where: str, value: Any) -> None:
  """Raises ValueError for invalid text in JSON."""
  if isinstance(value, str):
    if found := _NO_CHARACTER.search(value):
      raise ValueError(
        f"{where}: holds U+{ord(found[0]):04X} in {shown(value, 60)}, which is no character, or "
        "half of one; take it out"
      )
  elif isinstance(value, dict):
    for each in (*value, *value.values()):
      _check_texts(where, each)
  elif isinstance(value, list):
    for each in value:
      _check_texts(where, each)
