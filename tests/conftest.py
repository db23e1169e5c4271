"""What several rooms' tests share: the real model, loaded once."""

import pytest

from lora_jax.io import pretrained


@pytest.fixture(scope="session")
def smollm2() -> pretrained.Pretrained:
  """SmolLM2-135M-Instruct in float32."""
  return pretrained.load(pretrained.DEFAULT)
