"""Messages: what is a conversation, and the words for what is none."""

import copy
import json

import pytest

from lora_jax.data import messages, records

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "2"}


def record(*given, **fields):
  return {"messages": list(given)} | fields


def test_the_conversations_of_real_files_are_what_the_files_say(public_data):
  count = 0
  for name in ("chat_sft", "chat_tools"):
    for row in records.read(public_data / name / "dev.jsonl"):
      conversation = messages.check(row)
      assert conversation.messages == row["messages"]
      assert conversation.tools == (row.get("tools") or None)
      count += 1
  assert count == 85


def test_arguments_that_are_text_become_an_object_and_fields_of_none_go():
  call = copy.deepcopy(CALL)
  call["function"]["arguments"] = '{"a": [1, "ü"]}'
  given = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
  found = messages.check(record(USER, given, RESULT, ANSWER, tools=[]))
  assert found.messages[1] == {
    "role": "assistant",
    "tool_calls": [CALL | {"function": {"name": "add", "arguments": {"a": [1, "ü"]}}}],
  }
  assert found.tools is None
  flat = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": "{}"}]}
  [_, found, *_] = messages.check(record(USER, flat, RESULT, ANSWER)).messages
  assert found["tool_calls"] == [{"name": "add", "arguments": {}}]


def test_thoughts_have_the_names_that_transformers_gives_them():
  from transformers.utils import chat_template_utils

  for name in ("reasoning_content", "thinking", "reasoning"):
    given = [USER, ANSWER | {name: "Well."}]
    theirs = chat_template_utils._alias_reasoning_fields(given)
    assert messages.check(record(*given)).messages == theirs


def test_what_is_asked_ends_with_a_question_or_the_answer_of_a_tool():
  for given in ([USER], [USER, ANSWER, USER], [USER, CALLS, RESULT]):
    assert messages.check_asked(record(*given)).messages[-1] == given[-1]
    with pytest.raises(ValueError, match=r"assistant, so nothing to learn|nothing answers it"):
      messages.check(record(*given))
  for given, role in (
    ([USER, ANSWER], "assistant"),
    ([{"role": "system", "content": "a"}], "system"),
  ):
    with pytest.raises(
      ValueError, match=f"last message is of the role {role}, so nothing is asked"
    ):
      messages.check_asked(record(*given))
  with pytest.raises(ValueError, match="message 1 of the role user follows user; join the two"):
    messages.check_asked(record(USER, USER))


def test_a_record_is_not_changed():
  given = record(USER, CALLS | {"name": None}, RESULT, ANSWER | {"thinking": "Well."})
  before = json.dumps(given)
  messages.check(given)
  assert json.dumps(given) == before


@pytest.mark.parametrize(
  ("given", "words"),
  [
    ({"text": "a", "label": "b"}, r"has no messages; it has \['label', 'text'\]"),
    ({"messages": []}, "is no list with a message"),
    ({"messages": "Hi"}, "messages 'Hi' is no list"),
    (record("Hi"), "message 0 'Hi' is no object with role and content"),
    (record(USER, {"role": "gpt", "content": "a"}), "message 1: its role 'gpt' is not one of"),
    (record(USER, {"role": ["user"], "content": "a"}), "its role .* is not one of"),
    (record(USER), "no message is of the role assistant, so nothing to learn"),
    (record(ANSWER, USER), "message 0 of the role assistant follows the beginning; a user's must"),
    (record(USER, USER, ANSWER), "message 1 of the role user follows user; join the two"),
    (record(USER, ANSWER, USER), "the last message is of the role user, and nothing answers it"),
    (record(USER, RESULT, ANSWER), "message 1 of the role tool follows user; it must follow the"),
    (record(USER, CALLS, USER, ANSWER), "the tool's answer must come between"),
    (record(USER, {"role": "system", "content": "x"}, ANSWER), "it may only be the first"),
    (
      record(USER, {"role": "assistant", "content": " \n"}),
      "message 1: the assistant's turn is",
    ),
    (record(USER, {"role": "assistant"}), "the assistant's turn is empty"),
    (record(USER | {"content": None}, ANSWER), "message 0: a message of the role user has no cont"),
    (record(USER | {"content": 3}, ANSWER), "message 0: its content .* is neither a text nor"),
    (
      record({"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER),
      "images and the like are not read",
    ),
    (record(USER | {"content": "a\ud800"}, ANSWER), r"message 0: holds U\+D800 in"),
    (record(USER, ANSWER | {"content": "a\ufdd1b"}), r"message 1: holds U\+FDD1 in"),
    (record(USER, ANSWER, tools="add"), "tools 'add' is no list of objects"),
    (
      record(USER | {"tool_calls": [CALL]}, ANSWER),
      "role user has tool_calls; only the ass",
    ),
    (record(USER, ANSWER | {"tool_calls": {}}), "its tool_calls {} are no list"),
    (record(USER, ANSWER | {"tool_calls": ["add"]}), 'its tool call 0 .* is no {"function"'),
    (
      record(USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "{a: 1}"}}]}),
      "message 1: its tool call 0: its text of arguments '{a: 1}' is not JSON",
    ),
    (
      record(USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]}),
      "its text of arguments .* names 'a' twice",
    ),
    (
      record(USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "[" * 70 + "]" * 70}]}),
      "its text of arguments .* is nested deeper than 64",
    ),
    (
      record(USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": '{"a": "\\ud800"}'}]}),
      r"message 1: its tool call 0: its arguments: holds U\+D800",
    ),
    (
      record(USER, ANSWER | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
      r"its arguments \[1\] are no object of JSON",
    ),
  ],
)
def test_what_is_no_conversation_is_refused_with_the_message_and_the_remedy(given, words):
  with pytest.raises(ValueError, match=words) as caught:
    messages.check(given)
  assert len(str(caught.value)) < 500
