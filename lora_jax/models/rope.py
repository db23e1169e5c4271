"""How rotary frequencies are scaled for a longer context than a model was first trained on.

    LlamaConfig(..., rope_scaling=LinearRope(factor=4.0))

R: the rotations of a head, half its features.
"""

import dataclasses

import numpy as np


def rotary_frequencies(theta: float, head_dim: int) -> np.ndarray:
  """Returns frequencies_R, theta ** (-2 r / head_dim), in radians a token (Su et al. 2021)."""
  return theta ** -(np.arange(0, head_dim, 2) / head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
  """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, section 3)."""

  factor: float

  def scale(self, frequencies_R: np.ndarray) -> np.ndarray:
    return frequencies_R / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
  """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, a ramp in between.

  factor: by how much the context was lengthened.
  low_freq_factor: a wavelength over `original_length / low_freq_factor` tokens is scaled in full.
  high_freq_factor: a wavelength under `original_length / high_freq_factor` tokens is kept.
  original_length: the context length before, in tokens.
  """

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192

  def scale(self, frequencies_R: np.ndarray) -> np.ndarray:
    turns_R = self.original_length * frequencies_R / (2 * np.pi)
    ramp = (turns_R - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    kept_R = np.clip(ramp, 0, 1)
    return kept_R * frequencies_R + (1 - kept_R) * frequencies_R / self.factor
