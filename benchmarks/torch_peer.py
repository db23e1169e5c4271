"""PyTorch's full fine-tuning and `peft` on the same weights and batch, each in its own process.

    spec = write_case(case, folder)
    row = TorchRow("PyTorch + peft, rank 8", with_adapters(spec, case, adapters, folder))
    row.start()
    seconds = row.run(steps=1)

A separate process keeps PyTorch's threads and memory apart from JAX's. Eager mode, as many threads
as cores, fused AdamW. If other programs run at the same time, set OMP_WAIT_POLICY=passive:
PyTorch's threads spin while they wait, and a small step that shares its cores can otherwise take a
hundred times as long.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from flax import traverse_util

from benchmarks.models import Case
from benchmarks.rows import LEARNING_RATE, WEIGHT_DECAY, Adapters, trace_axes
from lora_jax import exchange
from lora_jax.io import configs, names, safetensors
from lora_jax.models import layers

_ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchSpec:
  """The settings of a worker.

  base: a folder that `transformers` loads.
  adapter: a folder that `peft` loads, or None to fine-tune in full.
  batch: a safetensors file with `inputs` and `targets`.
  dtype: the dtype of the base, by its name.
  device: "cpu" or "cuda".
  new_tokens: 0 to train; otherwise the number of tokens to decode after each row of the batch.
  """

  base: str
  adapter: str | None
  batch: str
  dtype: str
  device: str
  learning_rate: float = LEARNING_RATE
  weight_decay: float = WEIGHT_DECAY
  new_tokens: int = 0


def write_case(case: Case, folder: Path) -> TorchSpec:
  """Writes a language model and its batch; returns the spec of its full fine-tuning."""
  config = case.module.config
  params = layers.unstack_layers(case.params) if config.scan_layers else case.params
  flat = traverse_util.flatten_dict(params, sep="/")
  named = names.file_names(flat, names.LLAMA_HF)
  tensors = {
    named[path]: np.asarray(leaf).T if path.endswith("/kernel") else np.asarray(leaf)
    for path, leaf in flat.items()
  }
  safetensors.save_file(tensors, folder / safetensors.SINGLE, metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(configs.to_hugging_face(config)))
  batch = folder / "batch.safetensors"
  arrays = {"inputs": np.asarray(case.inputs), "targets": np.asarray(case.targets)}
  safetensors.save_file(arrays, batch)
  return TorchSpec(
    base=str(folder),
    adapter=None,
    batch=str(batch),
    dtype=np.dtype(config.dtype).name,
    device="cuda" if jax.default_backend() == "gpu" else "cpu",
  )


def with_adapters(spec: TorchSpec, case: Case, adapters: Adapters, folder: Path) -> TorchSpec:
  """Writes adapters; returns the spec of `peft` training them."""
  exchange.save(
    folder, adapters, case.params, trace_axes(case), base_model=spec.base, table=names.LLAMA_HF
  )
  return dataclasses.replace(spec, adapter=str(folder))


def decoding(spec: TorchSpec, new_tokens: int) -> TorchSpec:
  """The spec of the base that decodes this many tokens after each row of the batch."""
  return dataclasses.replace(spec, new_tokens=new_tokens)


class _Worker:
  """A process of PyTorch's that answers each line with one."""

  def __init__(self, label: str, spec: TorchSpec):
    self.label = label
    self._spec = spec

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait(timeout=60)

  def _start(self) -> dict:
    self._process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.torch_worker", json.dumps(dataclasses.asdict(self._spec))],
      cwd=_ROOT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    return self._answer()

  def _ask(self, line: str) -> dict:
    print(line, file=self._process.stdin, flush=True)
    return self._answer()

  def _answer(self) -> dict:
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(
        f"{self.label}: PyTorch's process ended with {self._process.wait()}, its message is above; "
        "repair it, or name the other rows with --rows"
      )
    return json.loads(line)


class TorchRow(_Worker):
  """A model that trains in its own process; the attributes and methods are those of a JaxRow."""

  def start(self) -> None:
    """Starts the process and waits until it has taken its two steps that are not timed."""
    ready = self._start()
    self.trainable, self.temporary = ready["trainable"], ready["temporary"]
    self.losses = ready["losses"]

  def run(self, steps: int) -> float:
    """Takes steps; returns the seconds per step."""
    answer = self._ask(str(steps))
    self.losses.append(answer["loss"])
    return answer["seconds"] / steps


class TorchText(_Worker):
  """A model that decodes in its own process; `tokens` are those of its first run."""

  def start(self) -> None:
    """Starts the process and waits until it has decoded once, which is not timed."""
    self.tokens = self._start()["tokens"]

  def run(self) -> float:
    """Decodes; returns the seconds."""
    return self._ask("")["seconds"]
