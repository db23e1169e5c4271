"""Where a benchmark's report goes: to the standard output, and to the end of the file of --output.

_OUTPUT = define_output()        # at the head of a main program
publish(report, _OUTPUT.value)   # when all is measured
"""

from pathlib import Path

from absl import flags

flags.disclaim_key_flags()  # the flag is the main program's, not this module's


def define_output() -> flags.FlagHolder[str | None]:
  """Defines --output of the program that calls it; what is in no folder is refused at once."""
  output = flags.DEFINE_string("output", None, "A markdown file that the table is appended to.")
  flags.register_validator(
    output,
    lambda path: path is None or Path(path).absolute().parent.is_dir(),
    "--output names a file in a folder that exists",
  )
  return output


def publish(report: str, path: str | None) -> None:
  """Prints a report and, where there is a path, appends it to the file of it."""
  print(report)
  if path:
    with open(path, "a", encoding="utf-8") as file:
      file.write(f"\n{report}\n")
