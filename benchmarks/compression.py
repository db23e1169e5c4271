r"""The cost of quantization: perplexity, and the bytes of the kernels.

    python -m benchmarks.compression --output=benchmarks/results.md
    python -m benchmarks.compression --rows=nf4,nf4-gptq

SmolLM2-135M-Instruct with all linear layers of its blocks quantized, on newspaper sentences (Hutto
and Gilbert 2014) joined by spaces, in windows of 256 tokens: the first 64 for calibration, the next
40 held out. The row `gguf` keeps the blocks of the file, including those of the embedding; `dense`
is the same model dequantized.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import lora_jax
from benchmarks.circumstances import describe_circumstances
from benchmarks.models import EDITORIALS
from benchmarks.reporting import define_output, publish
from lora_jax import compress, tree
from lora_jax.compress import gptq
from lora_jax.data import records
from lora_jax.io import assets, pretrained
from lora_jax.weights import Format, GGUFBlocks, is_weight

PyTree = Any

PLAIN_NF4 = Format(levels="nf4", block=64)

_CALIBRATION = flags.DEFINE_integer("calibration", 64, "Windows for calibration.", 1)
_HELD_OUT = flags.DEFINE_integer("held_out", 40, "Held-out windows for the measurement.", 1)
_OUTPUT = define_output()


class Case(NamedTuple):
  """The common start of all rows.

  Attributes:
    source: the model's source.
    model, params: the model with scanned layers.
    axes: the axes of its parameters.
    calibration: token ids [windows, tokens].
  """

  source: str
  model: nn.Module
  params: PyTree
  axes: Mapping[str, lora_jax.Axes]
  calibration: np.ndarray

  def formats(self, format: Format) -> dict[str, Format]:
    return lora_jax.match(self.params, [("all-linear", format)], self.axes)


def dense(case: Case) -> PyTree:
  return case.params


def nearest(format: Format) -> Callable[[Case], PyTree]:
  return lambda case: compress.quantize(case.params, case.formats(format), case.axes)


def calibrated(case: Case) -> PyTree:
  formats = case.formats(compress.NF4)
  moments = lora_jax.second_moments(
    lambda params, tokens_BT: case.model.apply({"params": params}, tokens_BT, method="hidden"),
    case.params,
    formats,
    np.split(case.calibration, range(8, len(case.calibration), 8)),
    axes=case.axes,
  )
  return gptq.quantize(case.params, formats, moments, case.axes)


def with_adapter(case: Case) -> PyTree:
  formats = case.formats(compress.NF4)
  specs = dict.fromkeys(formats, lora_jax.LoRA(rank=16, alpha=16.0))
  return lora_jax.attach(*lora_jax.loftq.start(case.params, specs, formats, axes=case.axes))


def gguf_blocks(case: Case) -> PyTree:
  return pretrained.load(case.source, scan_layers=True, keep_blocks=GGUFBlocks.of).params


ROWS: dict[str, Callable[[Case], PyTree]] = {
  "dense": dense,
  "gguf": gguf_blocks,
  "int8": nearest(compress.INT8),
  "fp8": nearest(compress.FP8),
  "int4": nearest(compress.INT4),
  "nf4-plain": nearest(PLAIN_NF4),
  "nf4": nearest(compress.NF4),
  "nf4-gptq": calibrated,
  "nf4-loftq": with_adapter,
}
_ROWS = flags.DEFINE_list("rows", list(ROWS), "The rows to measure, from those in ROWS.")
flags.register_validator(
  "rows", lambda rows: set(rows) <= set(ROWS), f"--rows takes some of {', '.join(ROWS)}"
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  case, held_out = load(pretrained.DEFAULT, _CALIBRATION.value, _HELD_OUT.value)
  apply = lora_jax.adapt(case.model.apply, strict=True)
  table = []
  for name in _ROWS.value:
    started = time.perf_counter()
    params = jax.block_until_ready(ROWS[name](case))
    made = time.perf_counter() - started
    found = compress.perplexity(apply, params, held_out)
    table.append((name, found, *kernel_bytes(case, params), made))
    print(format_table(table[-1:])[-1], flush=True)
  report = "\n".join(
    [
      "## Quantization: perplexity and bytes, SmolLM2-135M-Instruct",
      "",
      *describe_circumstances("benchmarks.compression", ["jax", "flax"]),
      f"- {len(case.calibration)} windows of 256 tokens for calibration, {len(held_out)} held out.",
      "",
      *format_table(table),
    ]
  )
  publish(report, _OUTPUT.value)


def load(source: str, calibration: int, held_out: int) -> tuple[Case, np.ndarray]:
  """The model with windows for calibration, and the held-out windows."""
  found = pretrained.load(source, scan_layers=True)
  model = found.family.make_model(found.config)
  axes = lora_jax.trace_axes(
    lambda params, tokens: model.apply({"params": params}, tokens),
    found.params,
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
  )
  rows = records.read(assets.resolve(EDITORIALS), format="tsv", columns=("id", "rating", "text"))
  text = " ".join(row["text"] for row in rows)
  windows_NT = compress.make_windows(text, found.tokenizer.encode, length=256)
  case = Case(source, model, found.params, axes, windows_NT[:calibration])
  return case, windows_NT[calibration : calibration + held_out]


def kernel_bytes(case: Case, params: PyTree) -> tuple[float, float]:
  """The bytes of the linear layers with their adapters: in megabytes, and relative to bfloat16."""
  paths = case.formats(compress.INT8)
  leaves = tree.flatten(params, is_leaf=is_weight)
  held = sum(x.nbytes for path in paths for x in jax.tree.leaves(leaves[path]))
  numbers = sum(np.prod(leaves[path].shape) for path in paths)
  return held / 1e6, held / (2 * numbers)


def format_table(rows: Sequence[tuple]) -> list[str]:
  """The table's lines in Markdown."""
  return [
    "| kernels | perplexity | MB | of bfloat16 | made in, s |",
    "| --- | ---: | ---: | ---: | ---: |",
    *(f"| {name} | {p:.2f} | {mb:.1f} | {share:.3f} | {s:.0f} |" for name, p, mb, share, s in rows),
  ]


if __name__ == "__main__":
  app.run(main)
