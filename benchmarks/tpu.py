r"""Which training steps of large Llamas fit on TPUs, by the TPU's compiler; no TPU is needed.

    pip install -e ".[experiments,tpu]"
    python -m benchmarks.tpu --results=runs/tpu.jsonl --output=benchmarks/results.md

Llamas of 1, 8 and 70 billion parameters, of shapes alone, with LoRA, with LoRA on an NF4 base
(QLoRA), and in full, each compiled for four slices. Every device has `--rows` rows of `--length`
tokens; the base lies over all devices (fsdp). The base is in bfloat16, a layer is recomputed in the
backward pass, and the loss takes 256 positions of a row at a time. A step whose arguments alone
exceed the memory of a device is not compiled. Each compilation takes minutes: `--results` keeps
what is done, and the same command continues; lines of other sizes of batch are ignored.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from jax.sharding import AxisType, Mesh, NamedSharding

import lora_jax
from benchmarks.circumstances import describe_circumstances
from benchmarks.reporting import define_output, publish
from experiments import planning, topologies
from lora_jax import compress, families, sharding
from lora_jax.models import attention_kernels, llama
from lora_jax.train import plan, step
from lora_jax.train.chunked_loss import chunked_completion_objective

_RANK, _CHUNK = 16, 256


def _shape(width: int, mlp_width: int, layers: int, heads: int, head_dim: int, tied: bool):
  return llama.LlamaConfig(
    vocab_size=128256,
    width=width,
    mlp_width=mlp_width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=8,
    head_dim=head_dim,
    max_length=8192,
    rope_theta=500000.0,
    tie_embeddings=tied,
    scan_layers=True,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
    remat_policy=jax.checkpoint_policies.nothing_saveable,
  )


MODELS = {
  "1B": _shape(2048, 8192, 16, 32, 64, tied=True),
  "8B": _shape(4096, 14336, 32, 32, 128, tied=False),
  "70B": _shape(8192, 28672, 80, 64, 128, tied=False),
}
"""The shapes of Llama 3.2 1B, and of 8B and 70B of Grattafiori et al. 2024, table 3."""

METHODS = ("lora", "qlora", "full")
SLICES = {"v5e-1": "v5e:1x1", "v5e-8": "v5e:2x4", "v5e-16": "v5e:4x4", "v5p-64": "v5p:2x4x4"}
"""libtpu's names of the slices. A v5p-64 has 64 cores, which are 32 chips and 32 devices."""

_MODELS = flags.DEFINE_multi_enum("model", list(MODELS), list(MODELS), "Which models.")
_METHODS = flags.DEFINE_multi_enum("method", list(METHODS), list(METHODS), "Which methods.")
_SLICES = flags.DEFINE_multi_enum("slice", list(SLICES), list(SLICES), "Which slices.")
_ROWS = flags.DEFINE_integer("rows", 1, "Rows of a device.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of a row.", lower_bound=1)
_RESULTS = flags.DEFINE_string("results", None, "A JSONL file, a line for each compilation.")
_OUTPUT = define_output()


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  devices = {name: topologies.devices_of(SLICES[name]) for name in _SLICES.value}
  path = Path(_RESULTS.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  size = {"rows": _ROWS.value, "length": _LENGTH.value}
  done = [found for line in lines if size.items() <= (found := json.loads(line)).items()]
  for model in _MODELS.value:
    for method in _METHODS.value:
      for name, of_slice in devices.items():
        key = size | {"model": model, "method": method, "slice": name}
        if any(key.items() <= each.items() for each in done):
          continue
        print(f"{model} {method} {name} ...", flush=True)
        done.append(key | measure(MODELS[model], method, of_slice, _ROWS.value, _LENGTH.value))
        print(outcome(done[-1]), flush=True)
        with path.open("a", encoding="utf-8") as file:
          file.write(json.dumps(done[-1]) + "\n")
  publish(report(done), _OUTPUT.value)


def measure(
  config: llama.LlamaConfig, method: str, devices: Sequence[Any], rows: int, length: int
) -> dict[str, Any]:
  """Returns the bytes of a device's memory, of the step's arguments on it and, if these fit, of its
  peak as the compiler reports it: None if the compiler refuses the step."""
  mesh = Mesh(np.reshape(devices, (1, -1, 1)), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
  run = step_on(config, method, mesh, rows * len(devices), length)
  arguments = plan.bytes_of_a_device((run.state, run.frozen, run.batch))
  found = {"memory": topologies.memory_of(devices[0]), "arguments": arguments}
  if arguments > found["memory"]:
    return found
  compiled = topologies.compile_run(run)
  return found | {"peak": compiled.peak, "seconds": round(compiled.seconds)}


def step_on(config: llama.LlamaConfig, method: str, mesh: Mesh, rows: int, length: int) -> plan.Run:
  """The step of a model by its shapes, on rows of tokens that are all learned."""
  choice = attention_kernels.Choice(platform="tpu", mesh=mesh)
  config = dataclasses.replace(config, constrain=sharding.keep_rows(mesh), attention=choice)
  model = llama.Llama(config)
  tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  few = jax.ShapeDtypeStruct((mesh.size, 8), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), few)["params"]
  axes = lora_jax.trace_axes(lambda p, t: model.apply({"params": p}, t), params, few)
  if method == "qlora":
    params = compress.quantize(
      params, lora_jax.match(params, [("all-linear", compress.NF4)], axes), axes
    )
  lora = ("all-linear", lora_jax.LoRA(rank=_RANK, alpha=2.0 * _RANK))
  rules = [(".*", lora_jax.Full())] if method == "full" else [lora]
  specs = lora_jax.match(params, rules, axes)
  adapters = jax.eval_shape(lambda p: lora_jax.init(jax.random.key(0), p, specs, axes), params)
  weights = lora_jax.attach(params, adapters)
  layout = sharding.lay_out(weights, mesh, families.DECODER_SHARDING)
  trainable, frozen = lora_jax.partition(
    planning.placed(weights, layout.shardings), lora_jax.trainable_mask(weights)
  )
  tx = optax.adamw(1e-4)
  state = jax.eval_shape(lambda x: step.init_state(x, tx), trainable)
  batch = dict.fromkeys(("tokens", "at", "targets"), tokens)
  batch["weights"] = tokens.update(dtype=jnp.float32)
  of_rows = jax.tree.map(lambda _: NamedSharding(mesh, sharding.ROWS), batch)
  objective = chunked_completion_objective(lora_jax.adapt(model.apply), _CHUNK)
  state, batch = planning.placed((state, batch), (layout.follow(state), of_rows))
  return plan.Run(step.make_train_step(objective, tx), state, frozen, batch)


def outcome(found: Mapping[str, Any]) -> str:
  """The memory that a step needs of each device, in words."""
  if "peak" not in found:
    return f"no: arguments {found['arguments'] / 1e9:.1f} GB"
  if found["peak"] is None:
    return "no: refused"
  fits = "yes" if found["peak"] <= found["memory"] else "no"
  return f"{fits}: {found['peak'] / 1e9:.1f} GB"


def report(done: Sequence[Mapping[str, Any]]) -> str:
  """The section of the results: circumstances and table."""
  return "\n".join(
    [
      "## Steps of large Llamas on TPUs, as their compiler reports them",
      "",
      *describe_circumstances("benchmarks.tpu", ("libtpu", "jax")),
      f"- No TPU was used. Memory of a device at the peak, with {_ROWS.value} × {_LENGTH.value:,} "
      f"tokens on each. Rank {_RANK}; the base lies on all devices; layers are recomputed.",
      "",
      *rows_of(done),
    ]
  )


def rows_of(done: Sequence[Mapping[str, Any]]) -> list[str]:
  """The table: a row for each model and method, a column for each slice."""
  slices = [name for name in SLICES if any(each["slice"] == name for each in done)]
  memory = {each["slice"]: each["memory"] / 1e9 for each in done}
  cells = {(each["model"], each["method"], each["slice"]): outcome(each) for each in done}
  rows = [
    ["model", "method", *(f"{name}, {memory[name]:.1f} GB" for name in slices)],
    ["---"] * (2 + len(slices)),
  ]
  for model, method in dict.fromkeys((each["model"], each["method"]) for each in done):
    rows.append([model, method, *(cells.get((model, method, name), "–") for name in slices)])
  return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
  flags.mark_flag_as_required("results")
  app.run(main)
