import csv
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.records import read, require


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
    ("a.txt", "x", {}, "does not tell the format; give format= one of jsonl, csv, tsv"),
    ("a.csv", "x", {"format": "xml"}, "unknown format 'xml'; use one of jsonl, csv, tsv"),
    ("a.jsonl", "{}", {"columns": ["x"]}, "a JSONL line names its own fields"),
    ("a.jsonl", "{}", {"quoted": True}, "a JSONL line names its own fields"),
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
