r"""Depthwise convolutions by shifts against `lax.conv_general_dilated`, within MobileNetV2.

    python -m benchmarks.depthwise --output=benchmarks/results.md
    python -m benchmarks.depthwise --size=32 --batch=2 --rounds=2

Random weights and images in float32. Gradient: of the mean squared output with respect to LoRA of
rank 8 on all convolutions, of rank 1 on depthwise ones, as configs/images.py has them; frozen: the
same without adapters on depthwise kernels.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
from absl import app, flags

import lora_jax
from benchmarks.circumstances import describe_circumstances
from benchmarks.reporting import define_output, publish
from benchmarks.turns import ratio, run_in_turns, timed
from lora_jax import tables
from lora_jax.models import depthwise
from lora_jax.models.mobilenet import MobileNetV2, MobileNetV2Config

_SIZE = flags.DEFINE_integer("size", 224, "Pixels per side.", lower_bound=32)
_BATCH = flags.DEFINE_integer("batch", 8, "Images.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Measurements of each row.", lower_bound=1)
_OUTPUT = define_output()

_DEPTHWISE = ".*/depthwise/conv/kernel"
_LORA = lora_jax.LoRA(rank=8, alpha=16.0)
_RULES = {
  "gradient": [(_DEPTHWISE, lora_jax.LoRA(rank=1, alpha=2.0)), ("convolutions", _LORA)],
  "gradient, depthwise frozen": [(_DEPTHWISE, None), ("convolutions", _LORA)],
}


def main(_):
  lines = [
    f"## Depthwise convolutions in MobileNetV2, {_BATCH.value} × {_SIZE.value}²",
    "",
    *describe_circumstances("benchmarks.depthwise", ["jax", "flax"]),
    "",
    table(_SIZE.value, _BATCH.value, _ROUNDS.value),
  ]
  publish("\n".join(lines), _OUTPUT.value)


def table(size: int, batch: int, rounds: int) -> str:
  """The times of a forward pass and of the gradients by each way, as Markdown."""
  models = {way: MobileNetV2(MobileNetV2Config(depthwise=way)) for way in depthwise.WAYS}
  images = jax.random.normal(jax.random.key(0), (batch, size, size, 3))
  first = models["convolution"]
  params = jax.jit(first.init)(jax.random.key(1), images)["params"]
  axes = lora_jax.trace_axes(lambda p, x: first.apply({"params": p}, x), params, images)
  rows = {}
  for way, model in models.items():
    apply = lora_jax.adapt(model.apply)
    rows["forward", way] = jax.jit(lambda p, x, model=model: model.apply({"params": p}, x))
    rows["forward", way] = timed(functools.partial(rows["forward", way], params, images))
    for name, rules in _RULES.items():
      adapters = lora_jax.init(jax.random.key(2), params, lora_jax.match(params, rules, axes))

      def loss(adapters, params, x, apply=apply):
        return jnp.mean(apply({"params": lora_jax.attach(params, adapters)}, x) ** 2)

      gradient = jax.jit(jax.grad(loss))
      rows[name, way] = timed(functools.partial(gradient, adapters, params, images))
  for run in rows.values():
    run()  # compiles
  seconds = run_in_turns(rows, rounds)
  cells = [
    (
      name,
      *(f"{1e3 * statistics.median(seconds[name, way]):,.1f}" for way in models),
      ratio(seconds[name, "shifts"], seconds[name, "convolution"]),
    )
    for name in ("forward", *_RULES)
  ]
  return tables.markdown(("", *(f"{way}, ms" for way in models), "shifts / convolution"), cells)


if __name__ == "__main__":
  app.run(main)
