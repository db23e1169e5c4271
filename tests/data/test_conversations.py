"""Conversations of tables of each layout, of the public sets, and tables that are none."""

import json

import pytest

from lora_jax.data import conversations
from lora_jax.data.conversations import read
from lora_jax.data.records import read as read_file

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL = {"type": "function", "function": {"name": "area", "arguments": {"side": 5}}}
CALLED = [
  {"role": "user", "content": "How large?"},
  {"role": "assistant", "content": "", "tool_calls": [CALL]},
  {"role": "tool", "content": "25"},
  {"role": "assistant", "content": "It is 25."},
]


def turns(*pairs):
  return [{"from": speaker, "value": text} for speaker, text in pairs]


# {reading: (a record, its messages)}
TABLES = {
  "messages": [
    ({"messages": HELLO}, HELLO),
    ({"messages": CALLED, "tools": [{"name": "area"}]}, CALLED),
    ({"messages": HELLO, "system": "Be kind"}, [{"role": "system", "content": "Be kind"}, *HELLO]),
    ({"messages": HELLO, "system": "", "id": 7}, HELLO),
  ],
  "conversations": [
    ({"conversations": turns(("human", "Hi"), ("gpt", "Hello"))}, HELLO),
    ({"conversations": turns(("user", "Hi"), ("assistant", "Hello"))}, HELLO),
    ({"conversations": HELLO}, HELLO),
    (
      {"conversations": turns(("system", "Be kind"), ("human", "Hi"), ("gpt", "Hello"))},
      [{"role": "system", "content": "Be kind"}, *HELLO],
    ),
    (
      {
        "conversations": turns(
          ("human", "How large?"),
          ("function_call", json.dumps(CALL["function"])),
          ("observation", "25"),
          ("gpt", "It is 25."),
        )
      },
      CALLED,
    ),
    (
      {
        "conversations": turns(
          ("human", "How large?"),
          ("gpt", f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call>"),
          ("tool", "25"),
          ("gpt", "It is 25."),
        )
      },
      CALLED,
    ),
  ],
  "prompt": [
    ({"prompt": "Hi", "completion": "Hello"}, HELLO),
    ({"prompt": HELLO[:1], "completion": HELLO[1:]}, HELLO),
    (
      {"prompt": [{"role": "system", "content": "Be kind"}, HELLO[0]], "completion": "Hello"},
      [{"role": "system", "content": "Be kind"}, *HELLO],
    ),
    ({"prompt": "How large?", "completion": CALLED[1:]}, CALLED),
  ],
  "instruction": [
    ({"instruction": "Hi", "output": "Hello"}, HELLO),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, HELLO),
    ({"instruction": "Hi", "input": None, "output": "Hello"}, HELLO),
    (
      {"instruction": "Translate", "input": "Hej", "output": "Hello"},
      [{"role": "user", "content": "Translate\n\nHej"}, HELLO[1]],
    ),
  ],
}


@pytest.mark.parametrize("reading", TABLES)
def test_each_layout_is_recognised_and_read(reading):
  for record, wanted in TABLES[reading]:
    for given in (reading, "auto"):
      [found], words = read([record], given)
      assert found["messages"] == wanted
      assert set(found) == {"messages"} | ({"tools"} & set(record))
      assert words.startswith(f"conversations: read as {reading!r}, from ")


def test_the_public_chats_are_read_as_they_are(public_data):
  for name, count, words in (
    ("chat_sft/train", 422, "from messages: 422 records, 260 with a system message"),
    ("chat_sft/dev", 60, "from messages: 60 records, 40 with a system message"),
    ("chat_tools/train", 157, "from messages, tools: 157 records, 87 with tool calls"),
    ("chat_tools/dev", 25, "from messages, tools: 25 records, "),
  ):
    rows = read_file(public_data / f"{name}.jsonl")
    found, said = read(rows)
    assert len(found) == count and words in said
    assert [each["messages"] for each in found] == [row["messages"] for row in rows]
    tools = [each.get("tools", []) for each in found]
    assert tools == [row.get("tools", []) for row in rows]


def test_public_tables_of_other_layouts_become_conversations(public_data):
  rows = read_file(public_data / "gsm8k/train.jsonl")
  found, words = read([{"prompt": x["question"], "completion": x["answer"]} for x in rows])
  assert words == "conversations: read as 'prompt', from prompt, completion: 7,473 records"
  assert [x["content"] for x in found[5]["messages"]] == [rows[5]["question"], rows[5]["answer"]]

  rows = read_file(public_data / "pref_orca/train.jsonl")
  found, words = read([{"prompt": x["prompt"], "completion": x["chosen"]} for x in rows])
  assert words.endswith("204 records, 204 with a system message")
  assert found[3]["messages"] == rows[3]["prompt"] + rows[3]["chosen"]

  tasks = read_file(public_data / "instruct/seed_tasks.jsonl")
  rows = [{"instruction": x["instruction"]} | each for x in tasks for each in x["instances"]]
  found, words = read(rows)
  assert (
    words == "conversations: read as 'instruction', from instruction, output, input: 175 records"
  )
  for row, chat in zip(rows, found, strict=True):
    asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    assert [x["content"] for x in chat["messages"]] == [asked, row["output"]]


def test_the_two_spellings_of_the_public_chats_are_one(public_data):
  names = {"system": "system", "user": "human", "assistant": "gpt"}
  chats = [x["messages"] for x in read_file(public_data / "chat_sft/dev.jsonl")]
  rows = [
    {"conversations": [{"from": names[x["role"]], "value": x["content"]} for x in chat]}
    for chat in chats
  ]
  assert [x["messages"] for x in read(rows)[0]] == chats


@pytest.mark.parametrize(
  ("name", "words"),
  [
    (
      "gsm8k/train",
      r"(?s)no reading .* fits the columns 'question', 'answer'; rename them .*"
      r'config.data.conversation = "prompt"   # prompt, completion: .*not there: prompt, completion'
      r'.*config.task.name = "completion"',
    ),
    (
      "pref_orca/dev",
      r"(?s)fits the columns 'prompt', 'chosen', 'rejected'.*"
      r"to learn the chosen ones, rename 'chosen' to 'completion' and take 'rejected' out",
    ),
    (
      "instruct/seed_tasks",
      r"(?s)fits the columns 'id', 'name', 'instruction', 'instances', .*"
      r'conversation = "instruction"   # instruction, output, perhaps input: .*not there: output',
    ),
  ],
)
def test_a_table_of_none_is_refused_with_its_columns_and_each_reading(public_data, name, words):
  with pytest.raises(ValueError, match=words) as error:
    read(read_file(public_data / f"{name}.jsonl"))
  for reading in conversations.READINGS:
    assert f'config.data.conversation = "{reading}"' in str(error.value)


AMBIGUOUS = {"messages": HELLO, "prompt": "Hi", "id": 3}


def test_an_ambiguous_table_is_read_as_the_config_says_alone():
  words = (
    r"the columns 'messages', 'prompt', 'id' fit the reading 'messages' .* but 'prompt' may be "
    r"meant for another; say which is meant:\n"
    r'  config.data.conversation = "messages"   # messages: .*\n'
    r'  config.data.conversation = "prompt"   # prompt, completion: .*; not there: completion\n'
  )
  with pytest.raises(ValueError, match=words):
    read([AMBIGUOUS])
  found, said = read([AMBIGUOUS], "messages")
  assert found == [{"messages": HELLO}] and said.endswith("; not read: 'prompt', 'id'")
  both = {"prompt": "a", "completion": "b", "instruction": "c", "output": "d"}
  with pytest.raises(
    ValueError, match="several readings of conversations fit the columns 'prompt'"
  ):
    read([both])
  assert read([both], "prompt")[0][0]["messages"][0]["content"] == "a"
  with pytest.raises(ValueError, match="but 'chosen', 'rejected' may be meant for another"):
    read([{"messages": HELLO, "chosen": "a", "rejected": "b"}])


def test_a_column_that_is_null_everywhere_is_none():
  """As where several files were made one table of Parquet."""
  row = {"messages": HELLO, "prompt": None, "tools": None, "system": None}
  found, words = read([row])
  assert found == [{"messages": HELLO}] and "not read" not in words
  with pytest.raises(ValueError, match="'prompt' may be meant"):
    read([row, row | {"prompt": "a"}])


def test_fields_that_parquet_fills_with_null_are_none():
  row = [each | {"tool_calls": None, "from": None, "value": None} for each in HELLO]
  assert read([{"messages": row}])[0] == read([{"conversations": row}])[0] == [{"messages": HELLO}]


@pytest.mark.parametrize("reading", ["auto", "text"])
def test_plain_text_is_refused_with_what_to_do(reading):
  words = (
    r"(?s)record 0: its 'text' is plain text and no conversation"
    r'.*config.task.name = "completion".*"\{text\}"'
  )
  with pytest.raises(ValueError, match=words):
    read([{"text": "Once upon a time", "id": 1}], reading)


def test_an_unknown_reading_is_refused():
  words = "data.conversation 'chat' is unknown; use one of 'auto', 'messages', 'conversations'"
  with pytest.raises(ValueError, match=words):
    read([{"messages": HELLO}], "chat")


@pytest.mark.parametrize(
  ("record", "words"),
  [
    ({"messages": "Hi"}, "its messages 'Hi' is not a list of messages, each an object"),
    ({"messages": json.dumps(HELLO)}, r"each an object; parse its JSON first"),
    ({"messages": ["Hi", "Hello"]}, "is not a list of messages"),
    ({"messages": {"role": ["user"], "content": ["Hi"]}}, "is not a list of messages"),
    ({"messages": []}, "no list with a message"),
    ({"messages": None}, "has no 'messages'; add it, or leave the record out"),
    ({"messages": HELLO[::-1]}, "message 0 of the role assistant follows the beginning; a user's"),
    ({"messages": HELLO[:1]}, "no message is of the role assistant"),
    ({"messages": [*HELLO, HELLO[0]]}, "the last message is of the role user.*take it out, or add"),
    ({"messages": [HELLO[0], {"role": "assistant", "content": " "}]}, "assistant's turn is empty"),
    ({"messages": [HELLO[0], {"role": "gpt", "content": "a"}]}, "its role 'gpt' is not one of"),
    ({"messages": [HELLO[0], {"role": "assistant", "content": 3}]}, "its content 3 is neither"),
    ({"messages": [HELLO[0], HELLO[1] | {"weight": 0}]}, "message 1: its weight 0 would be"),
    ({"messages": HELLO, "system": ["a"]}, r"its system \['a'\] is a list and no text"),
    ({"messages": HELLO, "tools": "[1"}, "its tools is not JSON: .*column 3"),
    ({"messages": HELLO, "tools": '"a"'}, "tools 'a' is no list of objects"),
    ({"messages": HELLO, "tools": "[" * 100_000}, "its tools is nested deeper than 64"),
    ({"messages": [{"role": "system", "content": "a"}, *HELLO], "system": "b"},
     "has a system message in its column 'system' and one in its conversation"),
    ({"conversations": turns(("bing", "a"))}, "message 0: its 'from' 'bing' is not one of sys"),
    ({"conversations": [{"from": ["a"], "value": "a"}]}, r"its 'from' \['a'\] is not one of"),
    ({"conversations": [{"value": "a"}]}, "message 0: its 'from' None is not one of"),
    ({"conversations": [{"from": "human", "value": None}]}, "its 'value' None is no text"),
    ({"conversations": turns(("gpt", "a"), ("human", "b"))}, "message 0 of the role assistant"),
    ({"conversations": turns(("human", "a"), ("function_call", "area(5)"))},
     "message 1: its tool call is not JSON"),
    ({"conversations": turns(("human", "a"), ("function_call", "[3]"))},
     "message 1: its tool call 0"),
    ({"conversations": turns(("human", "a"), ("gpt", "<tool_call>{}"), ("tool", "b"))},
     "message 1: its text goes on after a tool call, '{}'; each must end by </tool_call>"),
    ({"prompt": 3, "completion": "a"}, "its prompt 3 is not a text or a list of messages"),
    ({"prompt": "a", "completion": ""}, "the assistant's turn is empty"),
    ({"prompt": HELLO, "completion": [HELLO[0]]}, "the last message is of the role user"),
    ({"instruction": "a", "output": 3}, "its output 3 is a int and no text"),
    ({"instruction": ["a"], "output": "a"}, "its instruction .* is a list and no text"),
    ({"instruction": "a", "input": 1.5, "output": "a"}, "its input 1.5 is a float and no text"),
  ],
)  # fmt: skip
def test_a_record_that_is_no_conversation_is_refused_by_its_number(record, words):
  [reading] = {"messages", "conversations", "prompt", "instruction"} & set(record)
  good = TABLES[reading][0][0]
  with pytest.raises(ValueError, match=rf"^record 1: .*{words}") as error:
    read([good, record], reading)
  assert len(str(error.value)) < 1000


def test_messages_are_short_however_many_and_long_the_columns_are():
  with pytest.raises(ValueError, match=r"and 99,980 more; rename") as error:
    read([{f"{n}" + "x" * 500: 1 for n in range(100_000)}])
  assert len(str(error.value)) < 3500
