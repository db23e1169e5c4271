import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.templates import check, fields, fill

PROMPT = "Review: {text}\nSentiment:"


def test_fields_are_replaced_by_the_records_values():
  assert fill(PROMPT, {"text": "A joy.", "label": "positive"}) == "Review: A joy.\nSentiment:"
  assert fill("{a b} {#1 String} {a.b}", {"a b": 1, "#1 String": 0.5, "a.b": "x"}) == "1 0.5 x"


def test_a_template_without_fields_is_itself():
  assert fill("", {}) == ""
  assert fields("Say something:") == ()


def test_doubled_braces_are_literal():
  assert fill('{{"text": "{text}"}}', {"text": "{x}"}) == '{"text": "{x}"}'


def test_fields_come_in_order_of_appearance():
  assert fields("{b} {a} {b}") == ("b", "a", "b")


@given(values=st.lists(st.text(), min_size=1, max_size=4), literal=st.text())
def test_literals_and_values_come_through_whatever_they_hold(values, literal):
  record = dict(zip(string.ascii_letters, values, strict=False))
  escaped = literal.replace("{", "{{").replace("}", "}}")
  template = escaped.join("{" + name + "}" for name in record)
  assert fill(template, record) == literal.join(values)


@pytest.mark.parametrize("template", ["{text", "text}", "{}", "{text!r}", "{text:>9}", "{{text}"])
def test_a_malformed_template_is_refused(template):
  with pytest.raises(ValueError, match="write a literal brace twice"):
    fields(template)
  with pytest.raises(ValueError, match="write a literal brace twice"):
    check(template, [{"text": ""}], "prompt")


def test_a_field_that_is_no_column_is_refused_with_the_columns_there_are():
  with pytest.raises(ValueError, match=r"prompt template .*'txt'.* has text, label.*'text'"):
    check("{txt}", [{"text": "", "label": ""}], "prompt")


def test_a_column_missing_in_one_record_only_is_found():
  with pytest.raises(ValueError, match=r"completion template .*record 2 has no column 'label'"):
    check("{label}", [{"label": "a"}, {"label": "b"}, {"text": "c"}], "completion")


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (["a"], "list"), ({}, "dict")])
def test_a_value_that_is_no_text_is_refused(value, kind):
  with pytest.raises(ValueError, match=f"column 'text' of record 1 holds a {kind}"):
    check("{text}", [{"text": "a"}, {"text": value}], "prompt")
