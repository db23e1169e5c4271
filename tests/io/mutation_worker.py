"""Reads damaged files in a process of its own, under a limit of memory and of time for each.

    python tests/io/mutation_worker.py FOLDER KIND[,KIND...] SEED COUNT

For each kind COUNT damages; a line of JSON for each kind: how many were refused, accepted as the
same and accepted as another, and a list of what is wrong. A process that hangs or is out of memory
in a library ends, which is wrong too, and says where.
"""

import faulthandler
import json
import os
import random
import resource
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mutated_samples
import mutations
import numpy as np

from lora_jax.models import llama

SECONDS = 30
MEMORY = 3 << 30
ALLOWED = (ValueError, FileNotFoundError, PermissionError)
_LONGEST = 2500  # characters of a message


def main(folder: str, kinds: str, seed: str, count: str) -> None:
  samples = mutated_samples.write(Path(folder), kinds.split(","))
  for kind in kinds.split(","):
    sample = samples[kind]
    whole = sample.observe(sample.path)
    _limit_memory()
    print(json.dumps({"kind": kind} | _try(sample, kind, whole, int(seed), int(count))), flush=True)


def _limit_memory() -> None:
  pages = int(Path("/proc/self/statm").read_text().split()[0])
  limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _try(sample, kind: str, whole: dict, seed: int, count: int) -> dict:
  result = {"refused": 0, "same": 0, "other": 0, "wrong": []}
  target = sample.path.with_name(f"damaged.{sample.path.name}")
  log = open(sample.path.parent / "current", "w", encoding="utf-8")  # noqa: SIM115, to the end
  for n in range(count):
    rng = random.Random(f"{kind} {seed} {n}")
    name = rng.choice(sample.damaged)
    damage = mutations.mutate(
      name or sample.path.name, (sample.path / name if name else sample.path).read_bytes(), rng
    )
    what = f"{kind} {seed} {n}: {name}: {damage.words}"
    print(what, file=log, flush=True)
    _write(sample.path, target, name, damage.content)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    came = outcome(sample, whole, target, damage)
    faulthandler.cancel_dump_traceback_later()
    if came in ("refused", "same", "other"):
      result[came] += 1
    else:
      result["wrong"].append(f"{what}: {came}")
  return result


def _write(whole: Path, target: Path, name: str, content: bytes) -> None:
  if not name:
    target.write_bytes(content)
    return
  if not target.exists():
    shutil.copytree(whole, target)
  for path in whole.iterdir():
    if path.is_file():
      (target / path.name).write_bytes(path.read_bytes() if path.name != name else content)


def outcome(sample, whole: dict, target: Path, damage: mutations.Damage) -> str:
  """refused, same or other; else what is wrong."""
  try:
    found = sample.observe(target)
  except ALLOWED as error:
    message = str(error)
    if len(message) > _LONGEST:
      return f"a message of {len(message)} characters: {message[:200]}"
    return "refused" if target.name in message else f"names no file: {message[:200]}"
  except BaseException as error:
    return f"{type(error).__name__}: {str(error)[:300]}"
  return compare(sample, whole, found, damage.edits)


def compare(sample, whole: dict, found: dict, edits: int) -> str:
  """same or other; else what differs and should not."""
  names = [
    name
    for name in whole.keys() | found.keys()
    if name not in whole or name not in found or not mutated_samples.same(whole[name], found[name])
  ]
  if not names:
    return "same"
  groups = {mutated_samples.group(name) for name in names}
  # What is there under another name is one thing, not two.
  gone, new = (sum(name not in x for name in names) for x in (found, whole))
  # An adapter's other kind, setting or rows change what its parts are.
  if groups & {"kinds", "settings", "rows"}:
    groups = {x for x in groups if not x.startswith("params/")}
  if sample.shares:
    groups = {x.split("/")[0] for x in groups}
  beyond = {
    x for x in groups if x not in sample.may_differ and x.split("/")[0] not in sample.may_differ
  }
  if beyond:
    return f"differs in {sorted(beyond)[:4]}"
  if len(groups) - min(gone, new, len(groups) // 2) > edits:
    return f"differs in {len(groups)} things, {sorted(groups)[:4]}, by {edits} edits"
  if not all(map(mutated_samples.finite, found.values())):
    return "holds values that are not finite"
  if any(name.startswith("config/") for name in names) and "params/norm/scale" in found:
    return _computes(found) or "other"
  return "other"


def _computes(found: dict) -> str | None:
  """What is wrong with the logits of a model, if anything."""
  fields = {name.partition("/")[2]: x for name, x in found.items() if name.startswith("config/")}
  params: dict = {}
  for name, x in found.items():
    if name.startswith("params/"):
      *outer, last = name.split("/")[1:]
      at = params
      for part in outer:
        at = at.setdefault(part, {})
      at[last] = x
  if any(isinstance(x, tuple) for x in jax.tree.leaves(params, is_leaf=_is_tuple)):
    return None  # parts of compressed weights, which are not put together here
  logits = llama.Llama(llama.LlamaConfig(**fields)).apply(
    {"params": params}, jnp.asarray([[1, 5, 9]])
  )
  if not np.isfinite(logits).all():
    return "computes logits that are not finite"
  return None if np.ptp(np.asarray(logits)) > 1e-6 else "computes logits that are all the same"


def _is_tuple(value: object) -> bool:
  return isinstance(value, tuple)


if __name__ == "__main__":
  main(*sys.argv[1:])
