"""The house itself: what imports what, what stays light, and what nothing may touch."""

import ast
import configparser
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata

import flax.linen as nn
import jax
import pytest
import setuptools
from packaging import requirements

import lora_jax

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("lora_jax", "experiments", "configs", "benchmarks", "notebooks", "tests")
SOURCES = [
  path
  for room in ROOMS
  for path in sorted((ROOT / room).rglob("*"))
  if path.suffix in {".py", ".ipynb"}
]


def python(code: str) -> str:
  """What a fresh interpreter prints."""
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
  )
  return result.stdout


def test_no_private_part_of_jax_is_used():
  assert len(SOURCES) > 50
  private = re.compile(
    r"\b(jax|jaxlib|flax)(\.\w+)*\._" + r"\w+|from (jax|jaxlib|flax)\S* import _"
  )
  assert private.search("from jax._" + "src import core")
  found = [
    f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
    for path in SOURCES
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if private.search(line)
  ]
  assert not found


def test_nothing_is_pickled():
  word = "pick" + "le"
  loads = re.compile(rf"\b(import|from) {word}|{word}\.loads?|allow_{word}=True")
  assert loads.search(f"import {word}")
  assert not [str(path) for path in SOURCES if loads.search(path.read_text())]


def test_the_version_of_jax_is_looked_at_in_one_room_only():
  version = re.compile(r"jax\.__version__|jax\.version")
  readers = {path.relative_to(ROOT) for path in SOURCES if version.search(path.read_text())}
  core = {path for path in readers if path.parts[0] == "lora_jax"}
  assert core <= {pathlib.Path("lora_jax/compat.py")}


def test_importing_the_package_imports_nothing_heavy():
  loaded = python("import sys, lora_jax; print(*sys.modules)").split()
  heavy = {"optax", "orbax", "torch", "grain", "chex", "transformers", "tokenizers", "flax", "peft"}
  assert heavy.isdisjoint(name.partition(".")[0] for name in loaded)


def test_importing_the_package_adds_little_to_importing_jax_and_flax():
  code = (
    "import time, jax, flax; start = time.process_time(); import lora_jax;"
    "print(time.process_time() - start)"
  )
  assert min(float(python(code)) for _ in range(5)) <= 0.3, "seconds"


def test_importing_the_package_starts_no_backend():
  """A user may still choose devices, or call jax.distributed.initialize."""
  code = (
    "import lora_jax, jax; jax.config.update('jax_platforms', 'cpu');"
    "jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
  )
  assert python(code).strip() == "3"


@pytest.mark.slow
def test_every_module_of_the_core_can_be_imported_first():
  """No module counts on another's having been imported before it."""
  core = ROOT / "lora_jax"
  paths = [*core.glob("*.py"), *core.glob("weights/*.py"), *core.glob("adapters/*.py")]
  names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
  code = f"""
import importlib, sys
for name in {names}:
  for module in [m for m in sys.modules if m.startswith("lora_jax")]:
    del sys.modules[module]
  importlib.import_module(name)
  print(name)
"""
  assert python(code).split() == names


def test_the_rooms_import_each_other_in_their_order():
  lint = pathlib.Path(sys.executable).with_name("lint-imports")
  result = subprocess.run(
    [lint, "--config", "setup.cfg", "--no-cache"], capture_output=True, text=True, cwd=ROOT
  )
  assert result.returncode == 0, result.stdout
  assert "0 broken" in result.stdout


def test_every_module_says_what_it_is_and_is_read_in_one_sitting():
  rooms = {"lora_jax", "experiments", "configs", "benchmarks"}
  modules = [p for p in SOURCES if p.relative_to(ROOT).parts[0] in rooms and p.suffix == ".py"]
  texts = {str(path.relative_to(ROOT)): path.read_text() for path in modules}
  assert not [
    name for name, text in texts.items() if text and not ast.get_docstring(ast.parse(text))
  ]
  assert not [name for name, text in texts.items() if len(text.splitlines()) > 400]


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
def test_a_warning_of_jax_about_our_own_code_is_an_error(category):
  for module in ("lora_jax.rules", "experiments.train"):
    with pytest.raises(category):
      warnings.warn_explicit("jax.old is deprecated", category, "rules.py", 1, module=module)


def test_the_public_names_are_there_and_say_what_they_are():
  public = [name for name in vars(lora_jax) if not name.startswith("_")]
  expected = {
    "LoRA", "adapt", "attach", "init", "join", "match", "materialize", "merge", "partition",
    "summary", "trainable_mask", "trace_axes", "unmerge",
  }  # fmt: skip
  assert expected <= set(public)
  assert not [name for name in expected if not getattr(lora_jax, name).__doc__]


def test_public_functions_are_fully_typed():
  functions = dict(_public_functions())
  assert len(functions) > 800
  assert {"lora_jax.attachment.attach", "lora_jax.weights.adapted.Adapted.attach"} <= set(functions)
  lacking = {name: found for name, f in functions.items() if (found := _untyped(f))}
  assert not lacking


def test_a_parameter_or_a_result_without_a_type_is_found():
  def function(typed: int, bare, *rest, **others: int):
    del typed, bare, rest, others

  assert _untyped(function) == ["bare", "rest", "return"]


# One function per primitive of JAX; its signature is the list of the primitive's parameters.
_OF_PRIMITIVES = ("lora_jax.rules", "lora_jax.control_flow", "lora_jax.steps")
# Of a Weight, in addition to those of the names of `jax.lax`.
_OPERATIONS = {"astype", "scaled", "times", "plus", "minus"}


def _public_functions() -> Iterator[tuple[str, Callable]]:
  """The functions of all modules, and the methods of classes that are not of a base's type."""
  for module in pkgutil.walk_packages(lora_jax.__path__, "lora_jax."):
    if module.name in _OF_PRIMITIVES:
      continue
    for name, value in vars(importlib.import_module(module.name)).items():
      if name.startswith("_") or getattr(value, "__module__", None) != module.name:
        continue
      if inspect.isclass(value):
        yield from ((f"{module.name}.{name}.{each}", f) for each, f in _methods(value))
      elif inspect.isfunction(inspect.unwrap(value)):
        yield f"{module.name}.{name}", inspect.unwrap(value)


def _methods(kind: type) -> Iterator[tuple[str, Callable]]:
  if issubclass(kind, nn.Module):  # Flax calls them; the names of the arguments have their axes
    return
  is_weight = issubclass(kind, lora_jax.Weight)
  for name, value in vars(kind).items():
    if name.startswith("_") and name not in ("__init__", "__call__"):
      continue
    if is_weight and (hasattr(jax.lax, name) or name in _OPERATIONS):
      continue
    if any(_is_typed_method(base, name) for base in kind.__mro__[1:]):
      continue
    f = _function(value)
    # A Protocol adds a method, and a function may be the default of a typed field.
    if f and f.__module__ == kind.__module__ and f.__name__ == name:
      yield name, f


def _is_typed_method(kind: type, name: str) -> bool:
  f = _function(vars(kind).get(name))
  return f is not None and not _untyped(f)


def _function(value: object) -> Callable | None:
  value = getattr(value, "fget", None) or getattr(value, "__func__", value)
  value = inspect.unwrap(value) if callable(value) else value
  return value if inspect.isfunction(value) else None


def _untyped(f: Callable) -> list[str]:
  """The parameters without a type, and "return" for a result without one."""
  signature = inspect.signature(f)
  own = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
  found = [p.name for p in own if p.annotation is p.empty]
  has_result = f.__name__ == "__init__" or signature.return_annotation is not signature.empty
  return found if has_result else [*found, "return"]


def test_a_wheel_holds_the_library_alone_and_says_that_it_is_typed():
  packages = setuptools.find_packages(str(ROOT), include=_wheel_packages())
  assert {package.split(".")[0] for package in packages} == {"lora_jax"}
  folders = {path.parent for path in (ROOT / "lora_jax").rglob("*.py")}
  assert folders == {ROOT / package.replace(".", "/") for package in packages}
  assert (ROOT / "lora_jax" / "py.typed").exists()


def _wheel_packages() -> list[str]:
  return _setup()["options.packages.find"]["include"].split()


def _setup() -> configparser.ConfigParser:
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  return setup


def test_what_is_installed_is_what_is_imported():
  """The names of packages and modules, where they differ."""
  modules = {
    "absl-py": "absl",
    "huggingface_hub": "huggingface_hub",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "pypi-simple": "pypi_simple",
    "whisper-normalizer": "whisper_normalizer",
  }
  setup = _setup()
  extras = setup["options.extras_require"]
  core = _names(setup["options"]["install_requires"])
  offered = core | {
    name
    for extra in ("experiments", "vision", "eval", "speech", "onnx")
    for name in _names(extras[extra])
  }
  imported = set()
  for room in ("lora_jax", "experiments", "configs"):
    for path in (ROOT / room).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
          imported.add(node.module.split(".")[0])
  imported -= {"lora_jax", "experiments", "configs", "google"} | sys.stdlib_module_names
  installed = {modules.get(name, name) for name in offered}
  # jax.export imports flatbuffers when it serializes.
  assert imported == installed - {"flatbuffers"}


def _names(requirements: str) -> set[str]:
  return {re.split(r"[<>=;\[ ]", line)[0] for line in requirements.split("\n") if line} - {
    "lora_jax"
  }


def test_everything_that_the_tests_compare_with_is_installed():
  """Otherwise tests would skip in silence, in CI too, where the extra `test` is installed."""
  extras = _setup()["options.extras_require"]
  named, waiting = [], ["test"]
  while waiting:
    for line in filter(None, extras[waiting.pop()].split("\n")):
      requirement = requirements.Requirement(line)
      if requirement.name == "lora_jax":
        waiting += requirement.extras
      elif requirement.marker is None or requirement.marker.evaluate():
        named.append(requirement)
  assert {"soundfile", "ctranslate2", "onnxruntime", "pycocotools"} <= {x.name for x in named}
  for requirement in named:
    assert requirement.specifier.contains(metadata.version(requirement.name)), requirement
