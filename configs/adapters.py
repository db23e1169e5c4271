"""The adapter methods by name, each with all of its settings: `--config=file.py:method=dora`.

    config.adapter.update(adapters.METHODS["dora"].settings)      # then --config.adapter.rank=4

A method's own settings are those of its spec in `lora_jax.adapters`, whose file says what they
mean, and, for AdaLoRA, EVA and LoftQ, those of how it trains or starts.
"""

from typing import Any, NamedTuple

from ml_collections import config_dict


class Method(NamedTuple):
  """How a method enters a config.

  Attributes:
    settings: `config.adapter.method`, and the settings of that method.
    targets: presets or regular expressions for whole paths.
    peak: a learning rate that suits it, on the quickstart's task.
    rates: (pattern, factor) pairs: what trains at a multiple of the learning rate.
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
  "dropout": 0.0,  # share of the inputs of A that a step drops
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
      "iterations": config_dict.placeholder(int),  # of a randomised decomposition; None: exact
    },
    peak=5e-4,
  ),
  "olora": Method({"method": "olora", "rank": 8, "alpha": 8.0, "rslora": False}, peak=5e-4),
  "eva": Method(
    _LORA
    | {
      "method": "eva",
      "rho": 2.0,  # times the rank that a kernel may get at most
      "batches": 8,  # of the training data, that it starts from
      "iterations": 8,  # of a randomised decomposition; None: exact
    },
    peak=2.5e-4,
  ),
  "loftq": Method(
    _LORA
    | {
      "method": "loftq",
      "format": "nf4",  # of the base that it makes: nf4, int4, int8 or fp8
      "iterations": 5,  # times that each kernel is quantised
    }
  ),
  "vera": Method(
    {
      "method": "vera",
      "rank": 256,
      "seed": 0,  # of the matrices that all layers share
      "d_initial": 0.1,
      "fan_in": config_dict.placeholder(int),  # that A is drawn for; None: the rank
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
      "factor": config_dict.placeholder(int),  # inputs and outputs of C; None: near the root
      "channels": False,  # split the channels of a convolution alone
    }
  ),
  "adalora": Method(
    {
      "method": "adalora",
      "rank": 12,  # at the start
      "alpha": 24.0,  # scale = alpha / rank
      "deviation": 0.02,  # of the numbers that the singular vectors start with
      "target_rank": 8,  # on average, at the end
      "first_steps": 0.1,  # before the budget shrinks, as a share of all steps
      "last_steps": 0.3,  # with the last budget, as a share of all steps
      "every": 5,  # steps between two choices
      "beta1": 0.85,  # decay of the mean of the sensitivity
      "beta2": 0.85,  # decay of the mean of the uncertainty
      "orthogonality": 0.1,  # weight of the penalty
    },
    peak=4e-3,
  ),
  "bias": Method(_FULL, targets=("bias",)),
  "norm": Method(_FULL, targets=("norm",), peak=1e-2),
  "full": Method(_FULL, targets=(".*",), peak=1e-4),
}


def find(name: str, rank: int) -> Method:
  """The method of that name, with another rank if that is not 0.

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
