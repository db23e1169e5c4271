"""Main programs as modules, for tests of the functions in them."""

import importlib
import types

from absl import flags


def imported(name: str) -> types.ModuleType:
  """A main program's module, less its flags: several programs have flags of one name."""
  module = importlib.import_module(name)
  for flag in list(flags.FLAGS.flags_by_module_dict().get(name, [])):  # the list is the live one
    delattr(flags.FLAGS, flag.name)
  return module
