r"""The cost of `adapt` in Python: tracing a deep unrolled model, and calling a function eagerly.

    python -m benchmarks.tracing --layers=48

The model has seven products per layer and no scan, so each product is traced. The gradient is
traced; an eager call runs four layers, operation by operation. Times are processor times, the
minimum over repeats, of the bare and the adapted model in turn.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

import lora_jax
from benchmarks.circumstances import describe_circumstances
from lora_jax import tables

_LAYERS = flags.DEFINE_integer("layers", 48, "Layers to trace.", 1)
_WIDTH = flags.DEFINE_integer("width", 64, "Their width.", 2)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each, in turn.", 1)

EAGER_LAYERS = 4


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  params = layers(_LAYERS.value, _WIDTH.value)
  x = jnp.ones((8, _WIDTH.value))
  specs = lora_jax.match(params, [(".*", lora_jax.LoRA(rank=2, alpha=1.0))])
  adapters = lora_jax.init(jax.random.key(0), params, specs)
  few = params[:EAGER_LAYERS]
  weights = lora_jax.attach(params, adapters)[:EAGER_LAYERS]

  def adapted_loss(adapters):
    return lora_jax.adapt(loss)(lora_jax.attach(params, adapters), x)

  # New functions each time, since JAX caches the traces of those that it has seen.
  def traced_bare():
    jax.make_jaxpr(jax.grad(lambda params: loss(params, x)))(params)

  def traced_adapted():
    jax.make_jaxpr(jax.grad(lambda adapters: adapted_loss(adapters)))(adapters)

  rows = [
    ("trace of the gradient", traced_bare, traced_adapted),
    (
      f"an eager call, {EAGER_LAYERS} layers",
      lambda: jax.block_until_ready(loss(few, x)),
      lambda: jax.block_until_ready(lora_jax.adapt(loss)(weights, x)),
    ),
  ]
  cells = []
  for name, bare, adapted in rows:
    first, second = least_seconds([bare, adapted], _REPEATS.value)
    cells.append((name, f"{1e3 * first:.1f}", f"{1e3 * second:.1f}", f"{second / first:.1f}"))
  print(tables.markdown(("", "bare, ms", "adapted, ms", "ratio"), cells))
  print("\n".join(describe_circumstances("benchmarks.tracing", ["jax"])))


def layers(count: int, width: int) -> list[dict[str, jax.Array]]:
  """The parameters: seven square kernels per layer."""
  return [{name: jnp.ones((width, width)) / width for name in "qkvogud"} for _ in range(count)]


def loss(params, x: jax.Array) -> jax.Array:
  """A stack of blocks with the products of a transformer's."""
  for p in params:
    q, k, v = (x @ p[name] for name in "qkv")
    x = x + (jnp.tanh(q * k) * v) @ p["o"]
    x = x + (jax.nn.silu(x @ p["g"]) * (x @ p["u"])) @ p["d"]
  return jnp.mean(x**2)


def least_seconds(calls: list[Callable[[], None]], repeats: int) -> list[float]:
  """The minimum processor time of each call, taken in turn after one that is not counted."""
  for call in calls:
    call()
  times = [[] for _ in calls]
  for _ in range(repeats):
    for call, found in zip(calls, times, strict=True):
      start = time.process_time()
      call()
      found.append(time.process_time() - start)
  return [min(found) for found in times]


if __name__ == "__main__":
  app.run(main)
