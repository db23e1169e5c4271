"""PyTorch and the libraries on top of it, which tests hold lora_jax to.

    from peers import peft, torch, transformers

`torch==2.13.0` is a small CPU build for Python 3.11 alone; any other pin brings gigabytes. Where
one of these is not installed, its name here skips whatever uses it: the test, or the module that
uses it at its top. Tests of the same file that do without it run.
"""

import importlib
from typing import Any

import pytest

REASON = "needs {name}, which the README's test command installs on Python 3.11 alone"


class _Missing:
  """Stands for a module that is not installed; any use of it skips the test."""

  def __init__(self, name: str):
    self.__name = name

  def __getattr__(self, attribute: str) -> Any:
    if attribute.startswith("__"):  # what pytest itself asks of the names of a module
      raise AttributeError(attribute)
    pytest.skip(REASON.format(name=self.__name), allow_module_level=True)


class _WithoutTorch:
  """`transformers` where PyTorch is not installed: its tokenizers and configs, and no model."""

  def __init__(self, module):
    self.__module = module

  def __getattr__(self, attribute: str) -> Any:
    if attribute == "modeling_rope_utils":
      pytest.skip(REASON.format(name="torch"), allow_module_level=True)
    found = getattr(self.__module, attribute)
    if "dummy" in str(getattr(found, "__module__", "")):
      pytest.skip(REASON.format(name="torch"), allow_module_level=True)
    return found


def _imported(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    if error.name not in ("torch", "peft", "transformers"):
      raise
    return _Missing(name)


torch = _imported("torch")
peft = _imported("peft")
if not isinstance(peft, _Missing):
  importlib.import_module("peft.optimizers")  # which peft itself does not
torch_files = _imported("safetensors.torch")
transformers = _imported("transformers")
if isinstance(torch, _Missing) and not isinstance(transformers, _Missing):
  transformers = _WithoutTorch(transformers)
