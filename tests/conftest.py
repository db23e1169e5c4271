"""What several rooms' tests share: the real model, loaded once."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_let_go():
  """Thousands of small programs are compiled; kept to the end they would take gigabytes."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def smollm2():
  """SmolLM2-135M-Instruct in float32, a `lora_jax.io.pretrained.Pretrained`."""
  # Imported here, for the tests of the transform run without what io needs.
  from lora_jax.io import pretrained

  return pretrained.load(pretrained.DEFAULT)
