import csv
import gzip
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data import records, text_files
from lora_jax.data.records import check_values, read, require


def write(folder, name, contents):
  path = folder / name
  path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
  return path


def test_the_three_formats_give_the_same_records(tmp_path):
  expected = [{"text": "good, really", "label": "1"}, {"text": "bad", "label": "0"}]
  jsonl = write(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, expected)) + "\n")
  table = write(tmp_path, "a.csv", 'text,label\n"good, really",1\n\nbad,0\n')
  tabs = write(tmp_path, "a.tsv", "text\tlabel\ngood, really\t1\nbad\t0")
  assert read(jsonl) == read(table) == read(tabs) == expected


def test_an_explicit_format_overrules_the_name(tmp_path):
  path = write(tmp_path, "a.csv", "text\tlabel\na,b\t1\n")
  assert read(path, format="tsv") == [{"text": "a,b", "label": "1"}]


def test_columns_name_the_fields_of_a_file_without_header(tmp_path):
  path = write(tmp_path, "a.tsv", "7\t-0.5\tso so\n")
  assert read(path, columns=("id", "rating", "text")) == [
    {"id": "7", "rating": "-0.5", "text": "so so"}
  ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, name):
  text = "text\nfine\n" if name.endswith("csv") else '{"text": "fine"}\n'
  assert read(write(tmp_path, name, text.encode("utf-8-sig"))) == [{"text": "fine"}]


def test_gzip_is_recognised_by_content_whatever_the_name(tmp_path):
  packed = gzip.compress(b"text\nfine\n", mtime=0)
  assert read(write(tmp_path, "a.csv.gz", packed)) == [{"text": "fine"}]
  assert read(write(tmp_path, "b.csv", packed)) == [{"text": "fine"}]


def test_double_quotes_are_plain_characters_in_tsv_unless_asked_for(tmp_path):
  path = write(tmp_path, "a.tsv", 'text\tlabel\n"Fine" he said\t1\n')
  assert read(path) == [{"text": '"Fine" he said', "label": "1"}]
  path = write(tmp_path, "b.tsv", 'text\tlabel\n"two\tfields"\t1\n')
  assert read(path, quoted=True) == [{"text": "two\tfields", "label": "1"}]


def test_a_quoted_field_may_hold_line_breaks_and_keeps_them(tmp_path):
  path = write(tmp_path, "a.csv", 'text,label\r\n"one\r\ntwo",1\r\n')
  assert read(path) == [{"text": "one\r\ntwo", "label": "1"}]


def test_jsonl_keeps_types_and_unusual_line_separators(tmp_path):
  record = {"text": "a\u2028b\x85c", "score": 0.5, "tags": ["x"], "none": None}
  path = write(tmp_path, "a.jsonl", json.dumps(record, ensure_ascii=False) + "\r\n")
  assert read(path) == [record]


ROWS = st.lists(
  st.fixed_dictionaries({"a": st.text(), "b": st.text()}).filter(lambda r: r["a"] or r["b"]),
  min_size=1,
)


@given(rows=ROWS)
def test_what_the_csv_module_writes_is_read_back(tmp_path_factory, rows):
  path = tmp_path_factory.mktemp("csv") / "a.csv"
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, ["a", "b"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
  assert read(path) == rows


@given(rows=ROWS)
def test_what_the_json_module_writes_is_read_back(tmp_path_factory, rows):
  path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
  path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
  assert read(path) == rows


def test_a_missing_file_is_named_together_with_its_neighbour(tmp_path):
  write(tmp_path, "train.jsonl", "{}")
  with pytest.raises(FileNotFoundError, match=r"trian\.jsonl.*did you mean 'train\.jsonl'"):
    read(tmp_path / "trian.jsonl")
  with pytest.raises(FileNotFoundError, match="no such data file"):
    read(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize(
  ("name", "contents", "options", "message"),
  [
    ("a.txt", "x", {}, "does not tell the format; give format= .* one of jsonl, json, csv"),
    ("a.csv", "x", {"format": "xml"}, "unknown format 'xml'; use one of jsonl, json, csv, tsv, p"),
    ("a.jsonl", "{}", {"columns": ["x"]}, "a record of jsonl names its own fields"),
    ("a.jsonl", "{}", {"quoted": True}, "a record of jsonl names its own fields"),
    ("a.json", "[{}]", {"columns": ["x"]}, "a record of json names its own fields"),
    ("a.parquet", "x", {"quoted": False}, "a record of parquet names its own fields"),
    ("a.jsonl", '{"x": 1}\n{"x": \n', {}, "line 2 is not JSON"),
    ("a.jsonl", '\n\n{"x": 1}\n[1]\n', {}, "line 4 holds a list; every line must be one object"),
    ("a.jsonl", "", {}, "the data set is empty"),
    ("a.csv", "text,label\n", {}, "the data set is empty"),
    ("a.csv", "text,label\n\n\na,b,c\n", {}, "line 4 has 3 fields, not the 2 of text, label"),
    ("a.tsv", "text\tlabel\na\n", {}, r"line 2 has 1 fields, .*quoted=True"),
    ("a.csv", 'text\n"never closed\nand on', {}, r"line 3: unexpected end.*quoted=False"),
    ("a.csv", 'text\n"so" it goes\n', {}, "line 2: ',' expected"),
    ("a.csv", "x,x\n1,2\n", {}, "'x' is named more than once.*columns="),
    ("a.csv", "x,y\n1,2\n", {"columns": ["x", "y"]}, "first line is a header that repeats"),
    ("a.csv", "x,y\n1,2\n", {"columns": ["y", "y"]}, "'y' is named more than once"),
    ("a.csv", "text\nfine\ncaf\xe9\n".encode("latin-1"), {}, "line 3 is not utf-8.* 0xe9 .*latin"),
    ("a.csv.gz", gzip.compress(b"text\nfine\n" * 99, mtime=0)[:-12], {}, "damaged gzip"),
    ("a.csv.gz", b"\x1f\x8b no gzip", {}, "damaged gzip"),
  ],
)
def test_a_damaged_file_is_refused_with_place_and_remedy(
  tmp_path, name, contents, options, message
):
  with pytest.raises(ValueError, match=message):
    read(write(tmp_path, name, contents), **options)


def test_a_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="is a folder"):
    read(tmp_path, format="csv")


def test_another_encoding_can_be_given(tmp_path):
  path = write(tmp_path, "a.csv", "text\ncafé\n".encode("latin-1"))
  assert read(path, encoding="latin-1") == [{"text": "café"}]


def test_a_missing_column_is_reported_with_those_there_are():
  with pytest.raises(ValueError, match=r"prompt: record 1 has no column 'text'; it has txt, label"):
    require([{"text": ""}, {"txt": "", "label": ""}], ["text"], "prompt")
  with pytest.raises(ValueError, match=r"did you mean 'txt'"):
    require([{"txt": "", "label": ""}], ["text"], "prompt")
  with pytest.raises(ValueError, match="prompt: the data set is empty"):
    require([], ["text"], "prompt")


@pytest.mark.parametrize(
  ("name", "options", "count", "columns"),
  [
    ("glue/SST-2/train.tsv", {}, 67_349, ["sentence", "label"]),
    ("glue/SST-2/train_sentences_only.tsv", {"columns": ["sentence", "label"]}, 6_920, None),
    ("glue/CoLA/in_domain_train.tsv", {"columns": ["source", "label", "mark", "s"]}, 8_551, None),
    ("glue/MRPC/msr_paraphrase_train.txt", {"format": "tsv"}, 4_076, ["Quality", "#1 ID"]),
    ("glue/RTE/train.tsv", {}, 2_490, ["sentence1", "sentence2", "label", "idx"]),
    ("glue/STS-B/stsb-en-train.csv", {"columns": ["s1", "s2", "score"]}, 5_749, None),
    ("e2e/trainset_tokenized.csv.gz", {}, 42_061, ["mr", "ref"]),
    ("gsm8k/train.jsonl", {}, 7_473, ["question", "answer"]),
  ],
)
def test_public_data_sets_have_all_their_records(public_data, name, options, count, columns):
  records = read(public_data / name, **options)
  assert len(records) == count
  expected = columns or options["columns"]
  assert list(records[0])[: len(expected)] == expected


@pytest.mark.parametrize(
  ("name", "count"),
  [
    ("movieReviewSnippets", 10_605),
    ("amazonReviewSnippets", 3_708),
    ("tweets", 4_200),
    ("nytEditorialSnippets", 5_190),
  ],
)
def test_the_rated_sets_have_all_their_records(ratings_file, name, count):
  records = read(ratings_file(name), format="tsv", columns=("id", "rating", "text"))
  assert len(records) == count
  assert all(record["text"].strip() and -4 <= float(record["rating"]) <= 4 for record in records)


@pytest.mark.parametrize("name", ["long.csv", "long.tsv"])
def test_a_field_may_be_longer_than_the_csv_modules_limit(tmp_path, name):
  limit = csv.field_size_limit()
  long = "a" * (limit + 1)
  delimiter = "," if name.endswith("csv") else "\t"
  (tmp_path / name).write_text(f"text{delimiter}label\n{long}{delimiter}x\n")
  assert read(tmp_path / name) == [{"text": long, "label": "x"}]
  assert csv.field_size_limit() == limit


def test_utf_16_is_read_where_it_is_named_and_proposed_where_it_is_not(tmp_path):
  path = tmp_path / "a.csv"
  for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
    mark = "" if encoding == "utf-16" else "\ufeff"
    path.write_bytes((mark + "text,label\né,x\n").encode(encoding))
    assert read(path, encoding=encoding) == [{"text": "é", "label": "x"}]
    with pytest.raises(ValueError, match=r"a.csv: line 1 .*data.encoding.* 'utf-16'"):
      read(path)
  with pytest.raises(ValueError, match=r"a.csv: unknown encoding: utf-61"):
    read(path, encoding="utf-61")


@pytest.mark.parametrize(
  ("value", "kind", "words"),
  [
    (float("nan"), ValueError, "column 'a' of record 1 holds nan, .*leave the record out"),
    (float("inf"), ValueError, "column 'a' of record 1 holds inf"),
    ("x\ud83d y", ValueError, r"column 'a' of record 1 holds U\+D83D .*half of a surrogate pair"),
    (None, ValueError, "column 'a' of record 1 holds a NoneType"),
  ],
)
def test_a_value_without_a_text_is_refused_with_its_record(value, kind, words):
  rows = [{"a": "b", "c": None}, {"a": value, "c": float("nan")}]
  with pytest.raises(kind, match="prompt: " + words):
    check_values(rows, ["a", "absent"], "prompt")
  check_values([{"a": "\U0001f600"}, {"a": 1.5}, {"a": True}], ["a"], "prompt")


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / "data.jsonl")
  with pytest.raises(ValueError, match=r"data.jsonl: is a pipe, a socket or a device"):
    read(tmp_path / "data.jsonl")
  with pytest.raises(ValueError, match="/dev/zero: is a pipe, a socket or a device"):
    read("/dev/zero", format="csv")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.csv.gz"])
@pytest.mark.parametrize("change", ["cut", "grown"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, name, change):
  row = '{"text": "fine"}\n' if "jsonl" in name else "fine\n"
  contents = (row * 200_000).encode()
  contents = gzip.compress(contents) if name.endswith("gz") else contents
  path = write(tmp_path, name, contents)
  os.utime(path, ns=(0, 0))
  opened = records.text_files._lines

  def meanwhile(*arguments):
    for number, line in enumerate(opened(*arguments)):
      if number == 1000:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if change == "cut" else data * 2)
      yield line

  monkeypatch.setattr(records.text_files, "_lines", meanwhile)
  with pytest.raises(ValueError, match=r"changed while it was read|grew while it was read"):
    read(path)


def test_a_file_that_never_stops_growing_is_not_read_for_ever(tmp_path):
  path = write(tmp_path, "a.csv", "text\n" + "fine\n" * 1000)
  with (
    path.open("ab", buffering=0) as file,
    pytest.raises(ValueError, match=r"a.csv: (grew|changed) while it was read"),
    text_files.lines(path, "utf-8", newline="\n") as (found, _),
  ):
    for _ in found:
      file.write(b"fine\n" * 2)  # two more for each that is read


@pytest.mark.parametrize(
  ("line", "words"),
  [
    ("1" * 5000, "holds a whole number of thousands of digits"),
    ("[" * 100_000, "is nested deeper than 64 objects and lists"),
    ("[" * 70 + "]" * 70, "is nested deeper than 64"),
    ('{"x": 1, "y": 2, "x": 3}', "names 'x' twice"),
  ],
)
def test_json_that_python_reads_wrongly_or_not_at_all_is_refused(tmp_path, line, words):
  path = write(tmp_path, "a.jsonl", f'{{"a": 1}}\n{{"a": {line}}}\n')
  with pytest.raises(ValueError, match=rf"a.jsonl: line 2 {words}"):
    read(path)


def test_nesting_and_brackets_within_reason_are_read(tmp_path):
  record = {"a": [[[{"b": [1]}]]] * 40, "text": "[" * 1000}
  assert read(write(tmp_path, "a.jsonl", json.dumps(record))) == [record]


@pytest.mark.parametrize("wide", [3, 100_000])
def test_messages_are_short_however_many_and_long_the_columns_are(tmp_path, wide):
  names = [f"{n}" + "x" * 500 for n in range(wide)]
  path = write(tmp_path, "a.csv", ",".join(names) + "\n1\n")
  with pytest.raises(ValueError, match="line 2 has 1 fields") as error:
    read(path)
  assert len(str(error.value)) < 2000
  with pytest.raises(ValueError, match="has no column") as error:
    require([dict.fromkeys(names)], ["y"], "prompt")
  assert len(str(error.value)) < 2000
  with pytest.raises(ValueError, match="named more than once") as error:
    read(write(tmp_path, "a.csv", ",".join(names * 2) + "\n"))
  assert len(str(error.value)) < 2000


def test_gzip_that_holds_fifty_times_its_size_is_read_up_to_64_mib(tmp_path):
  row = b"the same\n"
  assert len(read(write(tmp_path, "a.csv.gz", gzip.compress(b"text\n" + row * 10_000)))) == 10_000
  bomb = gzip.compress(b"text\n" + row * (1 << 23))
  with pytest.raises(ValueError, match=r"holds more than 67,108,864 bytes, .*gunzip"):
    read(write(tmp_path, "a.csv.gz", bomb))


def test_the_place_of_a_wrong_byte_is_found_in_a_large_file(tmp_path):
  path = write(tmp_path, "a.csv", b"text\n" + "é\n".encode() * 1_000_000 + b"caf\xe9\n")
  words = rf"line 1000002 is not utf-8-sig: byte 0xe9 at {5 + 3_000_000 + 3} "
  with pytest.raises(ValueError, match=words):
    read(path)


def test_records_that_do_not_fit_into_memory_are_said_to(tmp_path, monkeypatch):
  def fill_memory(*_, **__):
    raise MemoryError

  monkeypatch.setattr(records.json, "loads", fill_memory)
  with pytest.raises(ValueError, match=r"a.jsonl: its records do not fit into memory"):
    read(write(tmp_path, "a.jsonl", "{}"))


def test_more_records_than_memory_is_meant_for_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "_MAX_RECORDS", 3)
  assert len(read(write(tmp_path, "a.csv", "text\n" + "fine\n" * 3))) == 3
  for name, text in (("a.csv", "text\n" + "fine\n" * 4), ("a.jsonl", '{"a": 1}\n' * 4)):
    with pytest.raises(ValueError, match=rf"{name}: has more than 3 records"):
      read(write(tmp_path, name, text))
