"""The adapter methods by name, each with all of its settings: `--config=file.py:method=dora`.

    config.adapter.update(adapters.METHODS["dora"].settings)      # then --config.adapter.rank=4

The settings of a method are the fields of its spec in `lora_jax.adapters`, which documents them.
AdaLoRA, EVA and LoftQ also have settings for how they train or start.
"""

from typing import Any, NamedTuple

from ml_collections import config_dict


class Method(NamedTuple):
  """How a method enters a config.

  Attributes:
    settings: `config.adapter.method`, and the settings of that method.
    targets: presets, or regular expressions that match whole paths.
    peak: a learning rate that works well on the quickstart's task.
    rates: (pattern, factor) pairs: matching leaves train at `factor` times the learning rate.
  """

  settings: dict[str, Any]
  targets: tuple[str, ...] = ("all-linear",)
  peak: float = 2e-3
  rates: tuple[tuple[str, float], ...] = ()


_LORA = {
  "method": "lora",
  "rank": 8,
  "alpha": 16.0,  # scale = alpha / rank
  "rslora": False,  # scale = alpha / sqrt(rank)
  "train_a": True,
  "dropout": 0.0,  # fraction of the inputs of A that is dropped at each step
}
_FULL = {"method": "full"}

METHODS = {
  "lora": Method(_LORA),
  "rslora": Method(_LORA | {"rslora": True}, peak=1e-3),
  "lora_plus": Method(_LORA, peak=2.5e-4, rates=((".*/b", 16.0),)),
  "lora_fa": Method(_LORA | {"train_a": False}),
  "dora": Method(
    {
      "method": "dora",
      "rank": 8,
      "alpha": 16.0,  # scale = alpha / rank
      "rslora": False,
      "constant_norm": True,  # in the backward pass
    }
  ),
  "pissa": Method(
    {
      "method": "pissa",
      "rank": 8,
      "alpha": 8.0,  # the paper's scale of 1
      "rslora": False,
      "iterations": config_dict.placeholder(int),  # of a randomized SVD; None: an exact SVD
    },
    peak=5e-4,
  ),
  "olora": Method({"method": "olora", "rank": 8, "alpha": 8.0, "rslora": False}, peak=5e-4),
  "eva": Method(
    _LORA
    | {
      "method": "eva",
      "rho": 2.0,  # largest rank of a kernel, as a multiple of `rank`
      "batches": 8,  # of training data, for the initialization
      "iterations": 8,  # of a randomized SVD; None: an exact SVD
    },
    peak=2.5e-4,
  ),
  "loftq": Method(
    _LORA
    | {
      "method": "loftq",
      "format": "nf4",  # of the quantized base: nf4, int4, int8 or fp8
      "iterations": 5,  # how often each kernel is quantized
    }
  ),
  "vera": Method(
    {
      "method": "vera",
      "rank": 256,
      "seed": 0,  # of the matrices shared by all layers
      "d_initial": 0.1,
      "fan_in": config_dict.placeholder(int),  # scales the initialization of A; None: the rank
    },
    peak=1e-2,
  ),
  "loha": Method({"method": "loha", "rank": 4, "alpha": 8.0}),
  "lokr": Method(
    {
      "method": "lokr",
      "rank": 8,
      "alpha": 16.0,  # scale = alpha / rank
      "decompose_both": False,
      "factor": config_dict.placeholder(int),  # size of C; None: the factor nearest the square root
      "channels": False,  # factor only the channels of a convolution
    }
  ),
  "adalora": Method(
    {
      "method": "adalora",
      "rank": 12,  # at the start
      "alpha": 24.0,  # scale = alpha / rank
      "deviation": 0.02,  # standard deviation of the initial singular vectors
      "target_rank": 8,  # on average, at the end
      "first_steps": 0.1,  # fraction of all steps before the budget shrinks
      "last_steps": 0.3,  # fraction of all steps at the final budget
      "every": 5,  # steps between two rank allocations
      "beta1": 0.85,  # decay of the moving average of the sensitivity
      "beta2": 0.85,  # decay of the moving average of the uncertainty
      "orthogonality": 0.1,  # weight of the orthogonality penalty
    },
    peak=4e-3,
  ),
  "bias": Method(_FULL, targets=("bias",)),
  "norm": Method(_FULL, targets=("norm",), peak=1e-2),
  "full": Method(_FULL, targets=(".*",), peak=1e-4),
}


def find(name: str, rank: int) -> Method:
  """Returns the method of that name; a `rank` other than 0 replaces its rank.

  Raises:
    ValueError: when there is no such method, or it has no rank.
  """
  if name not in METHODS:
    raise ValueError(f"the method {name!r} is unknown; there are {', '.join(METHODS)}")
  method = METHODS[name]
  if not rank:
    return method
  if "rank" not in method.settings:
    raise ValueError(f"the method {name} has no rank, and rank={rank} was asked for")
  return method._replace(settings=method.settings | {"rank": rank})
