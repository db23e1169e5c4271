"""What several rooms' tests share: how programs are compiled, the real model, the public data."""

import importlib.metadata
import importlib.util
import os
import pathlib

import pytest
from packaging.specifiers import SpecifierSet

# Releases of jaxlib that still have XLA's older compiler of fusions, which is the faster one. XLA
# aborts when it gets a flag that it does not know.
_OLD_EMITTERS = SpecifierSet(">=0.8,<0.11")
HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_configure(config):
  """Has XLA compile for tests, where each of thousands of programs runs once or twice.

  It optimises little, and a program that another test or day compiled is read from pytest's cache
  folder; `pytest --cache-clear` empties it. The environment's own settings have precedence.
  """
  worker = getattr(config, "workerinput", None)  # of xdist
  if worker is None and getattr(config.option, "numprocesses", None):
    return  # the controller: its workers, which inherit its environment, set theirs
  if hasattr(config, "cache"):
    # A folder for each worker: JAX does not write these files atomically.
    folder = config.cache.mkdir("compiled") / (worker["workerid"] if worker else "alone")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
  # PyTorch's threads spin while they wait, and every core has a worker of its own.
  os.environ.setdefault("OMP_NUM_THREADS", "1")
  if importlib.metadata.version("jaxlib") in _OLD_EMITTERS:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {flags}"
  import jax  # reads these

  del jax
  # Not in the processes that tests start: XLA aborts where it reads a CPU's program for several
  # devices, and one that is killed leaves half a file. `main_programs.run` allows it again.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"


def _needs_torch(error: BaseException | None) -> bool:
  """Whether an error comes down to PyTorch not being installed."""
  while error is not None and not HAS_TORCH:
    if isinstance(error, ImportError) and ("torch" in str(error) or "PyTorch" in str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False


def _skip_without_torch():
  try:
    return (yield)
  except Exception as error:
    if not _needs_torch(error):
      raise
    pytest.skip("needs torch, which the README's test command installs on Python 3.11 alone")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  """Skips a test that calls a part of transformers which needs PyTorch, where there is none."""
  return (yield from _skip_without_torch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
  """As above, for the fixtures of a test."""
  return (yield from _skip_without_torch())


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
  """Thousands of small programs are compiled; kept to the end they would take gigabytes."""
  import jax

  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2():
  """SmolLM2-135M-Instruct in float32, a `lora_jax.io.pretrained.Pretrained`."""
  # Imported here, for the tests of the transform run without what io needs.
  from lora_jax.io import pretrained

  return pretrained.load(pretrained.DEFAULT)


@pytest.fixture(scope="session")
def smollm2_tokenizer():
  """Its tokenizer alone."""
  from lora_jax.io import pretrained

  return pretrained.inspect(pretrained.DEFAULT).tokenizer


@pytest.fixture(scope="session")
def public_data():
  """The folder of public data sets; it is no part of the repository."""
  beside = pathlib.Path(__file__).parents[1] / ".." / "shared" / "data"
  folder = pathlib.Path(os.environ.get("LORA_JAX_DATA", beside))
  if not folder.is_dir():
    pytest.skip(f"no public data sets at {folder}; set LORA_JAX_DATA to their folder")
  return folder
