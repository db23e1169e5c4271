r"""Combines several LoRA adapters with weights into one, in PEFT's layout.

    python -m experiments.combine --adapters=runs/a/adapter,runs/b/adapter --weights=0.7,0.3 \
        --method=cat --output=runs/both
    python -m experiments.combine --adapters=runs/a/adapter,runs/b/adapter --weights=0.7,0.3 \
        --method=ties --density=0.2 --output=runs/both

The methods have PEFT's names and results; `lora_jax.combiners` describes them. Only `cat` and `svd`
give the weighted sum of the adapters' updates. `svd` and the methods that end in `_svd` take
--rank; the others keep the adapters' rank, which must be the same. --density is the fraction of
values that are kept, for the methods that drop some.

The base is the one named in the adapters' configs, if it is on this machine. Adapters are
untrusted, so nothing is downloaded by default: --base names a model, and --fetch allows the
download.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging

import lora_jax
from experiments import inputs, parts, programs
from lora_jax import checks, exchange
from lora_jax.compose import combiners
from lora_jax.exchange import peft_files
from lora_jax.io import outputs
from lora_jax.io import pretrained as pretrained_lib

ELECT = {"total": combiners.by_total, "frequency": combiners.by_frequency}
MIXES: dict[str, tuple[Callable, tuple[str, ...]]] = {
  "magnitude_prune": (combiners.magnitude_prune, ("density",)),
  "ties": (combiners.ties, ("density", "elect")),
  "dare_linear": (combiners.dare_linear, ("density", "seed")),
  "dare_ties": (combiners.dare_ties, ("density", "elect", "seed")),
}
"""The combiner of each mix, with its options."""
METHODS = ("cat", "svd", "linear", *MIXES, *(f"{name}_svd" for name in MIXES))

_ADAPTERS = flags.DEFINE_list("adapters", None, "Folders of adapters, at least two.", required=True)
_WEIGHTS = flags.DEFINE_list("weights", None, "A number for each, of either sign.", required=True)
_METHOD = flags.DEFINE_enum("method", None, METHODS, "As PEFT names them.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write.", required=True)
_BASE = flags.DEFINE_string("base", None, "The model, where the adapters do not say it.")
_FETCH = flags.DEFINE_bool(
  "fetch", False, "Download the model that the adapters name, where it is not on this machine."
)
_RANK = flags.DEFINE_integer(
  "rank", None, "The rank of an SVD's result, by default the largest one.", 1
)
_DENSITY = flags.DEFINE_float("density", None, "The fraction of values that are kept.")
_ELECT = flags.DEFINE_enum("elect", None, list(ELECT), "How TIES elects a sign, by default total.")
_SEED = flags.DEFINE_integer("seed", None, "Of DARE's dropping, by default 0.", 0, checks.MAX_SEED)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.WARNING)
  options = {"density": _DENSITY.value, "elect": _ELECT.value, "seed": _SEED.value}
  try:
    weights = [checks.finite("--weights:", float(weight)) for weight in _WEIGHTS.value]
    method = make_combiner(_METHOD.value, _RANK.value, **options)
  except ValueError as error:
    raise app.UsageError(str(error)) from None
  if len(weights) != len(_ADAPTERS.value):
    raise app.UsageError(
      f"there are {len(weights)} --weights for {len(_ADAPTERS.value)} --adapters; give one for each"
    )
  if _BASE.value and _FETCH.value:
    raise app.UsageError("--fetch is for the model that the adapters name; --base names another")
  outputs.new_folder(_OUTPUT.value)
  base = _BASE.value or common_base(_ADAPTERS.value, fetch=_FETCH.value)

  # Every layer is a leaf of its own: it may be adapted in one layer and not in another.
  pretrained = pretrained_lib.load(base)
  params = pretrained.params
  axes = parts.trace_axes(parts.make_model(pretrained.config), params)
  table = pretrained.table
  adapters = [exchange.load(folder, params, axes, table=table) for folder in _ADAPTERS.value]
  combined = lora_jax.combine(adapters, weights, method, key=jax.random.key(_SEED.value or 0))
  exchange.save(_OUTPUT.value, combined, params, axes, base_model=base, table=table)
  print(f"combined {len(adapters)} adapters of {len(combined)} kernels into {_OUTPUT.value}")


def make_combiner(method: str, rank: int | None, **options: Any) -> combiners.Combiner:
  """Returns the combiner with PEFT's name.

  Args:
    method: one of METHODS.
    rank: of the result, for the methods that make one of their own.
    options: `density`, `elect` and `seed`; None for what was not given.

  Raises:
    ValueError: when an option is given that the method has not, or the density is missing.
  """
  name = method.removesuffix("_svd")
  make, takes = MIXES.get(name, (None, ()))
  given = {option: value for option, value in options.items() if value is not None}
  if rank is not None:
    given["rank"] = rank
    takes += ("rank",) if method.endswith("svd") else ()
  for option in given:
    if option not in takes:
      raise ValueError(f"--{option} has no meaning for --method={method}")
  if make is None:
    return {
      "cat": combiners.cat,
      "svd": combiners.svd(rank),
      "linear": combiners.on_factors(combiners.linear),
    }[method]
  if "density" not in given:
    raise ValueError(f"--method={method} needs a --density")
  elect = {"elect": ELECT[given["elect"]]} if "elect" in given else {}
  mix = make(given["density"], **elect)
  return combiners.on_factors(mix) if method == name else combiners.on_delta(mix, rank)


def common_base(folders: list[str], *, fetch: bool = False) -> str:
  """Returns the model that all adapters name as their base.

  Args:
    folders: of the adapters.
    fetch: whether it may be downloaded, where it is not on this machine.

  Raises:
    ValueError: when they do not, or say nothing.
    FileNotFoundError: when it is not on this machine.
  """
  bases = {folder: peft_files.read(folder).config["base_model_name_or_path"] for folder in folders}
  base = bases[folders[0]]
  if len(set(bases.values())) != 1 or not base:
    each = ", ".join(f"{folder}: {base!r:.200}" for folder, base in bases.items())
    raise ValueError(f"the adapters name no common model ({each}); give it, --base=...")
  file = pathlib.Path(folders[0]) / peft_files.CONFIG
  try:
    inputs.require(file, {"base_model_name_or_path": base}, fetch=fetch)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{error}; or name the model, --base=... (hf://owner/name for one of the Hugging Face hub)"
    ) from None
  return base


if __name__ == "__main__":
  programs.run(main)
