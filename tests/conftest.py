"""What several rooms' tests share: the real model, loaded once."""

import pytest


@pytest.fixture(scope="session")
def smollm2():
  """SmolLM2-135M-Instruct in float32, a `lora_jax.io.pretrained.Pretrained`."""
  # Imported here, for the tests of the transform run without what io needs.
  from lora_jax.io import pretrained

  return pretrained.load(pretrained.DEFAULT)
