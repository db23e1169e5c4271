"""JSON from strangers: what is read, and what is refused in words."""

import os
import stat

import pytest

from lora_jax.io import files, json_files


def _write(tmp_path, content):
  path = tmp_path / "fields.json"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_values_of_every_kind_are_read_as_python_has_them(tmp_path):
  values = '{"a": [1, -2.5e3, true, null, "\\ud83d\\ude00"], "b": {}, "n": ' + f"{int(1e30)}}}"
  path = _write(tmp_path, values)

  fields = json_files.read_json(path)

  assert fields == {"a": [1, -2500.0, True, None, "\U0001f600"], "b": {}, "n": int(1e30)}


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("", "not JSON: Expecting value"),
    ('{"a": 1', "not JSON: Expecting ',' delimiter"),
    ("[1]", "not a JSON object, but a list"),
    ("3", "not a JSON object, but a int"),
    (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ('{"a": 1}'.encode("utf-16"), "byte 0 is not UTF-8"),
    ('{"a": 1, "b": 2, "a": 3}', "'a' is there twice"),
    ('{"x": {"a": 1, "a": 1}}', "'a' is there twice"),
    ('{"a": NaN}', "NaN is no JSON number"),
    ('{"a": -Infinity}', "-Infinity is no JSON number"),
    ('{"a": 1e400}', "1e400 is beyond what a float holds"),
    ('{"a": ' + "9" * 5000 + "}", "integer of 5000 digits"),
    ('{"a": ' + "9" * 41 + "}", "integer of 41 digits"),
    ('{"a": "\\ud83d"}', "half of a surrogate pair"),
    ('{"\\udc00": 1}', "half of a surrogate pair"),
    ('{"a": ' + "[" * 64 + "]" * 64 + "}", "not JSON: nested more than 64 deep"),
    ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON: nested more than 64 deep"),
    ('{"a":' * 100_000, "not JSON: nested more than 64 deep"),
    ('{"' + "k" * 1_000_000 + '": 1, "' + "k" * 1_000_000 + '": 1}', "is there twice"),
  ],
)
def test_what_is_no_plain_object_is_refused_by_a_short_message_with_the_path(
  tmp_path, content, words
):
  path = _write(tmp_path, content)

  with pytest.raises(ValueError, match="is not a model's configuration") as caught:
    json_files.read_json(path, what="a model's configuration")

  message = str(caught.value)
  assert words in message
  assert message.startswith(f"{path}: ")
  assert len(message) < len(str(path)) + 250


def test_nesting_up_to_the_bound_is_read(tmp_path):
  path = _write(tmp_path, '{"a": ' + "[" * 63 + "]" * 63 + "}")

  assert list(json_files.read_json(path)) == ["a"]


def test_a_file_over_the_bound_is_refused_unread(tmp_path):
  path = _write(tmp_path, b"")
  os.truncate(path, 1 << 40)

  with pytest.raises(ValueError, match="larger than the 16,777,216 bytes"):
    json_files.read_json(path)


def test_a_missing_file_and_one_below_a_file_are_not_found(tmp_path):
  path = _write(tmp_path, "{}")

  for missing in (tmp_path / "other.json", path / "below.json"):
    with pytest.raises(FileNotFoundError, match="no such file"):
      json_files.read_json(missing)


def test_a_file_that_may_not_be_read_is_said(tmp_path, monkeypatch):
  def refuse(*arguments):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(files.os, "open", refuse)  # root may read everything

  with pytest.raises(PermissionError, match="may not be read"):
    json_files.read_json(_write(tmp_path, "{}"))


def test_a_pipe_a_device_a_folder_and_a_link_to_itself_are_refused_without_a_wait(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "loop").symlink_to("loop")
  assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)

  for path, words in (
    (tmp_path / "pipe", "a pipe, a socket or a device"),
    ("/dev/zero", "a pipe, a socket or a device"),
    (tmp_path, "a folder"),
    (tmp_path / "loop", "no file that can be read"),
    (tmp_path / ("x" * 300), "no file that can be read"),
    ("a\0b", "no path of a file"),
  ):
    with pytest.raises(ValueError, match=words):
      json_files.read_json(path)
