"""Scalings of rotary frequencies for contexts longer than those of pretraining.

    LlamaConfig(..., rope_scaling=LinearRope(factor=4.0))

Two of the scalings depend on the length of a text, which must be static. A model uses the longest
text that a call can hold: the number of slots of its cache, or without a cache the number of tokens
in a row, padding included. Up to `original_length` the frequencies do not depend on it.

R: the rotations of a head, half of its rotated features.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from lora_jax.models.limits import LARGEST, is_number

_MOST = 1_000_000


def rotary_frequencies(theta: float, features: int) -> np.ndarray:
  """Returns frequencies_R, theta ** (-2 r / features), in radians per token (Su et al. 2021)."""
  return theta ** -(np.arange(0, features, 2) / features)


class _Fixed(abc.ABC):
  """A scaling that does not depend on the length and does not multiply cos and sin."""

  attention_factor: ClassVar[float] = 1.0
  changes_after: ClassVar[int | None] = None

  def frequencies(self, theta: float, features: int, length: int) -> np.ndarray:
    del length
    return self.scale(rotary_frequencies(theta, features))

  @abc.abstractmethod
  def scale(self, frequencies_R: np.ndarray) -> np.ndarray:
    """Returns the frequencies as they are scaled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope(_Fixed):
  """Position interpolation: every frequency divided by `factor` (Chen et al. 2023, section 3).

  Raises ValueError for a factor outside 1 to 1,000,000.
  """

  factor: float

  def __post_init__(self):
    _check_factor("LinearRope", self.factor)

  def scale(self, frequencies_R: np.ndarray) -> np.ndarray:
    return frequencies_R / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(_Fixed):
  """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, a ramp in between.

  factor: the ratio of the new context length to the original one.
  low_freq_factor: wavelengths over `original_length / low_freq_factor` tokens are scaled in full.
  high_freq_factor: wavelengths under `original_length / high_freq_factor` tokens are kept.
  original_length: the original context length, in tokens.

  Raises ValueError for a factor outside 1 to 1,000,000, unless 0 < low_freq_factor <
  high_freq_factor, and for a length that is not a positive integer.
  """

  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192

  def __post_init__(self):
    _check_factor("Llama3Rope", self.factor)
    _check_pair("Llama3Rope", self, "low_freq_factor", "high_freq_factor")
    _check_length("Llama3Rope", self.original_length)

  def scale(self, frequencies_R: np.ndarray) -> np.ndarray:
    turns_R = self.original_length * frequencies_R / (2 * np.pi)
    ramp = (turns_R - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    kept_R = np.clip(ramp, 0, 1)
    return kept_R * frequencies_R + (1 - kept_R) * frequencies_R / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRope:
  """Dynamic NTK scaling: theta grows with the length of texts beyond the original context.

      theta' = theta * (factor * length / original_length - factor + 1) ** (H / (H - 2))

  Cached keys keep the rotation of the length at which they were written, so a cache of more than
  `original_length` slots is refused.

  factor: the largest ratio of a context length to the original one, at least 1.
  original_length: the context length that the model was trained for, in tokens.

  Raises ValueError for a factor outside 1 to 1,000,000, and for a length that is not a positive
  integer. Source: bloc97 and emozilla 2023; Peng et al. 2023, YaRN, section 3.3.
  """

  attention_factor: ClassVar[float] = 1.0
  factor: float
  original_length: int

  def __post_init__(self):
    _check_factor("DynamicRope", self.factor)
    _check_length("DynamicRope", self.original_length)

  @property
  def changes_after(self) -> int:
    return self.original_length

  def frequencies(self, theta: float, features: int, length: int) -> np.ndarray:
    stretch = self.factor * max(length / self.original_length, 1) - (self.factor - 1)
    return rotary_frequencies(theta * stretch ** (features / (features - 2)), features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope:
  """YaRN: low frequencies divided by `factor`, high ones kept, a ramp over the features between.

  factor: the ratio of the new context length to the original one.
  original_length: the original context length, in tokens.
  attention_factor: multiplies cos and sin; its square multiplies the scores. See
    `yarn_attention_factor`.
  beta_fast: features with more rotations than this in the original context are kept.
  beta_slow: features with fewer rotations than this are scaled in full.
  truncate: whether the ends of the ramp are rounded to whole features.

  Raises ValueError for a factor outside 1 to 1,000,000, unless 0 < beta_slow < beta_fast, and for
  values of another type. Source: Peng et al. 2023, sections 3.2 and 3.4.
  """

  changes_after: ClassVar[int | None] = None
  factor: float
  original_length: int
  attention_factor: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True

  def __post_init__(self):
    _check_factor("YarnRope", self.factor)
    _check_length("YarnRope", self.original_length)
    _check_number("YarnRope", "attention_factor", self.attention_factor)
    _check_pair("YarnRope", self, "beta_slow", "beta_fast")
    if type(self.truncate) is not bool:
      raise ValueError(f"YarnRope: truncate must be True or False, not {self.truncate!r:.40}")

  def frequencies(self, theta: float, features: int, length: int) -> np.ndarray:
    del length

    def turning(times: float) -> float:
      """The (fractional) feature with this many rotations in the original context."""
      turns = math.log(self.original_length / (times * 2 * math.pi))
      return features * turns / (2 * math.log(theta))

    low, high = turning(self.beta_fast), turning(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, features - 1)
    if low == high:
      high += 0.001
    scaled_R = np.clip((np.arange(features // 2) - low) / (high - low), 0, 1)
    frequencies_R = rotary_frequencies(theta, features)
    return (1 - scaled_R) * frequencies_R + scaled_R * frequencies_R / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
  """LongRoPE: each frequency has its own divisor, from one of two lists by the length of a text.

  The long factors apply if a text may exceed `original_length`: with a cache of more slots, or rows
  of more tokens. Cached keys keep their rotation, so the factors do not change while a text grows.

  short_factors, long_factors: R values each.
  original_length: the original context length, in tokens.
  attention_factor: multiplies cos and sin at every length; see `longrope_attention_factor`.

  Raises ValueError for factors that are not positive and finite, and for a length below 2. Source:
  Ding et al. 2024, LongRoPE, arXiv 2402.13753, section 3.
  """

  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  original_length: int
  attention_factor: float

  def __post_init__(self):
    for name in ("short_factors", "long_factors"):
      factors = getattr(self, name)
      if not (isinstance(factors, tuple) and 0 < len(factors) <= LARGEST["head_dim"]):
        raise ValueError(f"LongRope: {name} must be a tuple of numbers, not {factors!r:.40}")
      for factor in factors:
        _check_number("LongRope", f"each of {name}", factor)
    _check_length("LongRope", self.original_length, least=2)
    _check_number("LongRope", "attention_factor", self.attention_factor)

  @property
  def changes_after(self) -> int:
    return self.original_length

  def frequencies(self, theta: float, features: int, length: int) -> np.ndarray:
    factors_R = self.long_factors if length > self.original_length else self.short_factors
    return rotary_frequencies(theta, features) / np.asarray(factors_R)


RopeScaling = LinearRope | Llama3Rope | DynamicRope | YarnRope | LongRope


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
  """Returns the `attention_factor` that YaRN recommends, 0.1 ln(factor) + 1 (section 3.4).

  mscale, mscale_all_dim: DeepSeek's weights of the logarithm, in numerator and denominator.
  """
  _check_factor("YarnRope", factor)
  if not (mscale and mscale_all_dim):
    return 0.1 * math.log(factor) + 1
  for name, value in (("mscale", mscale), ("mscale_all_dim", mscale_all_dim)):
    _check_number("YarnRope", name, value)
  return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)


def longrope_attention_factor(factor: float, original_length: int) -> float:
  """Returns the `attention_factor` that LongRoPE recommends, √(1 + ln(factor) / ln(length)).

  factor: the ratio of the longest context to the original one; up to 1 the result is 1.
  """
  _check_length("LongRope", original_length, least=2)
  _check_number("LongRope", "factor", factor)
  return math.sqrt(1 + max(math.log(factor), 0) / math.log(original_length))


def check_fits(scaling: Any, theta: float, features: int) -> None:
  """Raises ValueError if a scaling does not fit heads with this many rotated features."""
  if not isinstance(scaling, RopeScaling):
    raise ValueError(f"rope_scaling must be a scaling of lora_jax.models.rope, not {scaling!r:.40}")
  if isinstance(scaling, DynamicRope) and features < 4:
    raise ValueError(f"DynamicRope: needs 4 rotated features of a head or more, not {features}")
  if isinstance(scaling, YarnRope) and theta <= 1:
    raise ValueError(f"YarnRope: needs a rope_theta above 1, not {theta!r:.40}")
  if isinstance(scaling, LongRope):
    for name in ("short_factors", "long_factors"):
      if (count := len(getattr(scaling, name))) != features // 2:
        raise ValueError(
          f"LongRope: {name} has {count} numbers, and heads of {features} rotated features need "
          f"{features // 2}"
        )


def _check_factor(kind: str, factor: Any) -> None:
  if not (is_number(factor) and 1 <= factor <= _MOST):
    raise ValueError(f"{kind}: factor must be a number from 1 to {_MOST:,}, not {factor!r:.40}")


def _check_number(kind: str, name: str, value: Any) -> None:
  if not (is_number(value) and 1 / _MOST <= value <= _MOST):
    raise ValueError(
      f"{kind}: {name} must be a number from 1/{_MOST:,} to {_MOST:,}, not {value!r:.40}"
    )


def _check_pair(kind: str, scaling: Any, low_name: str, high_name: str) -> None:
  low, high = getattr(scaling, low_name), getattr(scaling, high_name)
  if not (is_number(low) and is_number(high) and 0 < low < high <= _MOST):
    raise ValueError(
      f"{kind}: {low_name} {low!r:.40} and {high_name} {high!r:.40} must be "
      f"numbers, the first above 0, the second above the first and up to {_MOST:,}"
    )


def _check_length(kind: str, length: Any, least: int = 1) -> None:
  if type(length) is not int or not least <= length < 1 << 31:
    raise ValueError(
      f"{kind}: original_length must be an integer from {least} and below 2**31, not {length!r:.40}"
    )
