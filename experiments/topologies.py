"""A training step compiled for TPUs that are not there, and what the compiler says of it.

    devices = devices_of("v5e:2x2")                   # with libtpu installed; no TPU is needed
    found = compile_run(run)                          # of planning.whole_run on a mesh of them
    print(found)                                      # memory, largest arrays, collectives

The compiler is the one that a TPU's program comes from, so what it refuses for want of memory is
refused there. Its own memory of a device is a little less than the chip's.
"""

import collections
import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from lora_jax import hlo, tables
from lora_jax.train import plan

HERE = "here"
ALL = "all"
TABLE = ("v5e:1x1", "v5e:2x4", "v5e:4x4", "v6e:2x2", "v5p:2x2x1")
"""The slices of `--topology=all`: a chip of Colab's, Kaggle's eight, and larger ones."""

# GiB of a chip, or of the half of one that is a device, by the name that JAX has for it. Google
# Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e".
_MEMORY = {"TPU v4": 16, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}
_CHIP = re.compile(r"(?P<kind>[^:]+):1x1(?P<third>x1)?")
_LARGEST = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
  """A compiler's report of a step; its `str` is readable.

  Attributes:
    arguments, temporaries: bytes on a device; None where the compiler refused it.
    peak: of both and of the results that take no argument's place.
    seconds: that it took.
    values: the largest arrays that are made.
    collectives: {kind: (operations, bytes)} of what devices send each other.
    refused: the compiler's words where there is too little memory; "" where there is enough.
  """

  seconds: float
  arguments: int | None = None
  temporaries: int | None = None
  peak: int | None = None
  values: tuple[hlo.Value, ...] = ()
  collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
  refused: str = ""

  def fits(self, memory: int) -> bool:
    """Whether it runs on devices of so many bytes."""
    return not self.refused and self.peak <= memory

  def __str__(self) -> str:
    if self.refused:
      return f"the compiler refused it after {self.seconds:,.0f} s: {self.refused}"
    sizes = [("arguments", self.arguments), ("temporaries", self.temporaries), ("peak", self.peak)]
    made = [(f"{x.bytes / 1e6:>10,.1f}", x.array, f"{x.count}", _end(x.where)) for x in self.values]
    sent = [(kind, f"{n}", f"{size / 1e6:,.1f}") for kind, (n, size) in self.collectives.items()]
    parts = [
      f"compiled in {self.seconds:,.0f} s",
      tables.rendered(
        ("memory of a device", f"{'MB':>12}"), [(x, f"{n / 1e6:>12,.1f}") for x, n in sizes]
      ),
      tables.rendered(("largest arrays, MB", "array", "number", "made by"), made) if made else "",
      tables.rendered(("sent between devices", "operations", "MB a step"), sent) if sent else "",
    ]
    return "\n\n".join(filter(None, parts))


def _end(where: str) -> str:
  """The end of an op_name, which says most."""
  return where if len(where) <= 70 else f"…{where[-69:]}"


def devices_of(name: str) -> list[Any]:
  """The devices of a TPU slice by its name, such as "v5e:2x4"; "v5e:1x1" is one chip.

  Raises:
    ValueError: where libtpu is not installed, and for a name that it does not know.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      f'--topology={name}: needs the compiler for TPUs; pip install "lora_jax[tpu]" brings it, and '
      "no TPU is needed"
    )
  # Without these libtpu locks the TPU that it takes to be there, and asks a service about it.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  chip = _CHIP.fullmatch(name)
  whole = f"{chip['kind']}:2x2{chip['third'] or ''}" if chip else name
  try:
    devices = topologies.get_topology_desc(whole, platform="tpu").devices
  except (RuntimeError, ValueError, NotImplementedError) as error:
    raise ValueError(
      f"--topology={name}: libtpu knows no such slice ({str(error).splitlines()[0]}); names are as "
      "v5e:2x2, v6e:2x4 or v5p:2x2x1"
    ) from None
  return list(devices[:1] if chip else devices)


def memory_of(device: Any) -> int:
  """Bytes of a TPU device.

  Raises:
    ValueError: for a chip that is not known here.
  """
  if device.device_kind not in _MEMORY:
    raise ValueError(
      f"the memory of a {device.device_kind} is not known here; give --device_memory, as 16GB"
    )
  return _MEMORY[device.device_kind] * 2**30


def compile_run(run: plan.Run) -> Compiled:
  """Compiles a step whose arrays say on which devices they lie."""
  started = time.perf_counter()
  lowered = run.train_step.lower(run.state, run.frozen, run.batch)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    words = " ".join(str(error).split())
    return Compiled(seconds=time.perf_counter() - started, refused=words[:300])
  seconds, report, text = (
    time.perf_counter() - started,
    compiled.memory_analysis(),
    compiled.as_text(),
  )
  given, made = report.argument_size_in_bytes, report.temp_size_in_bytes
  sent: dict[str, list[int]] = collections.defaultdict(list)
  for op in hlo.collectives(text):
    sent[op.kind].append(op.bytes)
  return Compiled(
    seconds=seconds,
    arguments=given,
    temporaries=made,
    # The report's own peak counts the core's memory as well.
    peak=given + made + report.output_size_in_bytes - report.alias_size_in_bytes,
    values=tuple(hlo.largest(text, _LARGEST)),
    collectives={kind: (len(sizes), sum(sizes)) for kind, sizes in sorted(sent.items())},
  )
