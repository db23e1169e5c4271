r"""The time that factored kernels save: rank against time, and the forward pass of a whole model.

    python -m benchmarks.factored --model=smollm2 --batch=4 --length=256 --shares=0.8,0.5,0.25

A row is the model with every linear kernel of its blocks replaced by factors with this fraction of
its parameters; embedding and head stay dense. The factors are random, since time does not depend on
them. Dense and factored are timed in turn, and the ratio is that of the medians; `floor` is the
ratio of the floating-point operations.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import lora_jax
from benchmarks import models
from benchmarks.circumstances import describe_circumstances
from lora_jax import tables, tree
from lora_jax.compress import report
from lora_jax.weights import Factored

_MODEL = flags.DEFINE_enum("model", "smollm2", ["smollm2", "tiny"], "One of benchmarks/models.py.")
_BATCH = flags.DEFINE_integer("batch", 4, "Rows.", 1)
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens per row.", 1)
_SHARES = flags.DEFINE_list("shares", ["0.8", "0.5", "0.25"], "Fractions of a kernel's parameters.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Calls of each, in turn.", 1)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  case = models.MODELS[_MODEL.value].make(jnp.float32, _BATCH.value, _LENGTH.value, True)
  shares = [float(share) for share in _SHARES.value]
  candidates = {"dense": case.params} | {
    f"{share:.0%}": factored(case.params, share) for share in shares
  }
  apply = lora_jax.adapt(case.module.apply)
  times = timed(apply, candidates, case.inputs, _REPEATS.value)
  flops = {
    name: report.flops_per_token(apply, params, _LENGTH.value)
    for name, params in candidates.items()
  }
  rows = [
    (
      name,
      f"{report.count_parameters(params) / 1e6:.1f} M",
      f"{times[name]:.0f} ms",
      f"{times[name] / times['dense']:.2f}",
      f"{flops[name] / flops['dense']:.2f}",
    )
    for name, params in candidates.items()
  ]
  header = ("kernels", "parameters", "forward", "of dense", "floor")
  print(tables.markdown(header, rows))
  print("\n".join(describe_circumstances("benchmarks.factored", ["jax"])))


def factored(params, share: float):
  """The tree with linear kernels as random factors that have this fraction of their parameters."""
  specs = lora_jax.match(params, [("all-linear", lora_jax.LoRA(rank=1, alpha=1.0))])
  rng = np.random.default_rng(0)

  def leaf(path, w):
    if path not in specs:
      return w
    *stack, d, k = w.shape
    rank = max(round(share * d * k / (d + k)), 1)
    a = rng.standard_normal((*stack, d, rank), np.float32) / d**0.5
    b = rng.standard_normal((*stack, rank, k), np.float32) / rank**0.5
    return Factored(jnp.asarray(a, w.dtype), jnp.asarray(b, w.dtype), path=path)

  return tree.map_with_path(leaf, params)


def timed(apply, candidates, inputs, repeats: int) -> dict[str, float]:
  """The median milliseconds of a forward pass of each, taken in turn."""
  run = jax.jit(lambda params, inputs: apply({"params": params}, inputs))
  for params in candidates.values():
    jax.block_until_ready(run(params, inputs))
  times = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, params in candidates.items():
      start = time.perf_counter()
      jax.block_until_ready(run(params, inputs))
      times[name].append(1000 * (time.perf_counter() - start))
  return {name: float(np.median(found)) for name, found in times.items()}


if __name__ == "__main__":
  app.run(main)
