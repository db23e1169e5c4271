"""The output of a benchmark's report: standard output, and the end of the file in --output.

_OUTPUT = define_output()        # at the head of a main program
publish(report, _OUTPUT.value)   # after the measurements
"""

from pathlib import Path

from absl import flags

flags.disclaim_key_flags()  # the flag is the main program's, not this module's


def define_output() -> flags.FlagHolder[str | None]:
  """Defines --output for the calling program; a path in a missing folder is refused at once."""
  output = flags.DEFINE_string("output", None, "A Markdown file to append the table to.")
  flags.register_validator(
    output,
    lambda path: path is None or Path(path).absolute().parent.is_dir(),
    "--output names a file in a folder that exists",
  )
  return output


def publish(report: str, path: str | None) -> None:
  """Prints a report and, if there is a path, appends it to that file."""
  print(report)
  if path:
    with open(path, "a", encoding="utf-8") as file:
      file.write(f"\n{report}\n")
