"""JAX's cache of compiled programs, kept for the next start of a main program.

    compilation_cache.begin()        # before anything is compiled

The entries lie in `compiled/` of `assets.cache_folder()`, one folder for each kind of processor. A
start removes the entries that were used longest ago once all are over `MOST_BYTES`, and those that
a killed process left half written: an entry is whole when it can be decompressed to its end, and is
looked at once. JAX reads what it finds there as programs, so the folder is the user's alone.

It stays off where the environment says something of JAX's cache itself; for several CPU devices,
since XLA aborts when it reads a CPU's program for them; and for several processes.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import pathlib
import platform
import re
import zlib

import jax

from lora_jax.io import assets, json_files, outputs

MOST_BYTES = 2 * 10**9
"""The limit for all entries together, applied at each start."""

_OWN_SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
_SUFFIX = "-cache"  # of an entry's file; JAX's own
_WHOLE = "whole.json"
_MOST_LISTED = 1 << 26  # bytes
_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")


def begin() -> bool:
  """Enables JAX's cache of compiled programs; returns whether it is enabled."""
  if any(name in os.environ for name in _OWN_SETTINGS) or _has_several_cpus():
    return False
  folder = assets.cache_folder() / "compiled" / _processor()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    folder.parent.chmod(0o700)
    clean(folder.parent)
  except (OSError, ValueError):  # no home, a full disk, another user's folder
    return False
  jax.config.update("jax_compilation_cache_dir", str(folder))
  # Hundreds of small programs take as long as one large one.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return True


def clean(folder: pathlib.Path, most: int = MOST_BYTES) -> None:
  """Removes what is half written, and the oldest entries until the others take `most` bytes.

  Another process that is writing an entry meanwhile loses it from the cache, and nothing else.
  """
  known, whole = _known(folder / _WHOLE), {}
  for path in folder.glob(f"*/*{_SUFFIX}"):
    with contextlib.suppress(FileNotFoundError):
      found = path.stat()
      name, stamp = f"{path.parent.name}/{path.name}", [found.st_size, found.st_mtime_ns]
      if known.get(name) == stamp or _is_whole(path):
        whole[name] = (stamp, max(found.st_mtime_ns, found.st_atime_ns))
      else:
        _remove(path)
  together = sum(stamp[0] for stamp, _ in whole.values())
  for name in sorted(whole, key=lambda name: whole[name][1]):
    if together <= most:
      break
    together -= whole.pop(name)[0][0]
    _remove(folder / name)
  stamps = {name: stamp for name, (stamp, _) in sorted(whole.items())}
  if stamps != known:
    outputs.write_text(folder / _WHOLE, outputs.as_json(stamps))


def _known(path: pathlib.Path) -> dict:
  """The entries that earlier starts found complete; empty if the list cannot be read."""
  try:
    return json_files.read_json(path, most=_MOST_LISTED)
  except (OSError, ValueError):
    return {}


def _remove(path: pathlib.Path) -> None:
  for each in (path, path.with_name(path.name.removesuffix(_SUFFIX) + "-atime")):
    each.unlink(missing_ok=True)


def _is_whole(path: pathlib.Path) -> bool:
  """Whether an entry can be decompressed to its end, by the compression that JAX chose."""
  content = path.read_bytes()
  if content[:1] == b"x":  # the first byte of zlib's header
    stream, damaged = zlib.decompressobj(), zlib.error
  elif importlib.util.find_spec("zstandard"):
    zstandard = importlib.import_module("zstandard")
    stream, damaged = zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
  else:  # JAX could not read it either
    return False
  try:
    stream.decompress(content)
  except damaged:
    return False
  return stream.eof


def _has_several_cpus() -> bool:
  """Whether CPU devices are more than one, or asked for; a GPU or a TPU may be several."""
  forced = _DEVICES.search(os.environ.get("XLA_FLAGS", ""))
  asked = jax.config.jax_num_cpu_devices > 1 or (forced is not None and int(forced[1]) > 1)
  return asked or (jax.default_backend() == "cpu" and jax.device_count() > 1)


def _processor() -> str:
  """A name for what a program is compiled for: where a home is shared, its machines may differ."""
  features = [platform.machine()]
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    features += [line for line in lines if line.startswith(("flags", "Features"))][:1]
  return hashlib.sha256("\n".join(features).encode()).hexdigest()[:16]
