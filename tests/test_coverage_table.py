"""COVERAGE.md says what the tests run, no more and no less."""

from coverage_table import FILE, table


def test_the_file_is_what_the_tables_say():
  assert FILE.read_text() == table(), "run `python tests/coverage_table.py`"
