"""The circumstances of a measurement, for the head of a report."""

import datetime
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import jax


def describe_circumstances(program: str, packages: Iterable[str]) -> list[str]:
  """Two lines of Markdown: device and versions, date and command.

  Args:
    program: the program's name after `python -m`.
    packages: the packages whose versions matter.
  """
  versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
  return [
    f"- {describe_device()}; Python {platform.python_version()}, {versions}",
    f"- {datetime.date.today()}, `python -m {program} {' '.join(sys.argv[1:])}`",
  ]


def describe_device() -> str:
  """The accelerator, or the CPU and its cores."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  info = Path("/proc/cpuinfo")
  found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
  return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"
