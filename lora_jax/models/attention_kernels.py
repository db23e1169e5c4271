"""Selects the implementation of attention, and wraps the external kernels.

    BY_DEVICE                                      # by device, dtype and length
    Choice("blockwise")                            # this one, if there is no cache
    chosen(BY_DEVICE, call)                        # -> "plain"
    refusal("cudnn", Choice(platform="gpu"), call) # -> the reason it cannot, or None

name        runs on   memory of scores  it is
plain       anywhere  grows with T²     JAX's `dot_product_attention`
blockwise   anywhere  grows with T      `lora_jax.models.blockwise`
cudnn       GPU       grows with T      cuDNN's, through `jax.nn.dot_product_attention`
splash      TPU       grows with T      `jax.experimental.pallas.ops.tpu.splash_attention`

Shapes have the letters of `lora_jax.models.llama`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

AUTO = "auto"
NAMES = ("plain", "blockwise", "cudnn", "splash")

_LONG = 512 * 512  # scores per head; below this, "plain" is as fast and takes little memory
_KERNELS = {"gpu": "cudnn", "tpu": "splash"}
_LANES = 128  # of a TPU's vector; splash attention requires multiples of it
_SPLASH_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Choice:
  """How attention is computed; a field of a model's config.

  name: "auto" or one of `NAMES`. Decoding with a cache does not use the kernels: it uses "plain",
    or "blockwise" for a long cache.
  platform: "cpu", "gpu" or "tpu", which the program is for; None: JAX's default backend.
  mesh: the mesh that rows and heads are sharded over, with the axis names of `lora_jax.sharding`;
    None: one device.

  Raises ValueError for an unknown name.
  """

  name: str = AUTO
  platform: str | None = None
  mesh: Mesh | None = None

  def __post_init__(self):
    if self.name not in (AUTO, *NAMES):
      raise ValueError(f"attention {self.name!r} is unknown; use {', '.join((AUTO, *NAMES))}")

  @property
  def device(self) -> str:
    """The platform, as "cpu", "gpu" or "tpu"."""
    platform = self.platform or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


BY_DEVICE = Choice()
"""The implementation that suits the device, the dtype and the length."""


class Call(NamedTuple):
  """The static properties of a call of `attend`.

  length, slots, features, value_features: T, S, H and G.
  dtype: of queries, keys and values.
  is_causal, segments, softcap, sinks: whether the call uses these.
  window: an integer; None: no window; "traced": the layer decides at run time.
  mask: whether there is any other mask.
  cached: whether queries have positions of their own in a cache.
  """

  length: int
  slots: int
  features: int
  value_features: int
  dtype: Any
  is_causal: bool = True
  segments: bool = False
  softcap: bool = False
  sinks: bool = False
  window: int | str | None = None
  mask: bool = False
  cached: bool = False


def call_of(config: Any, length: int, *, segments: bool, is_causal: bool = True) -> Call:
  """The call that a model's layers make in training; if layers differ, the most demanding one.

  config: of the model. length: T. segments: whether rows hold several texts. is_causal: True for a
  decoder; an encoder's texts are padded.
  """
  window, local = getattr(config, "window", None), getattr(config, "local_layers", ())
  if window is not None and config.scan_layers and len(set(local)) > 1:
    window = "traced"
  return Call(
    length=length,
    slots=length,
    features=config.head_dim,
    value_features=getattr(config, "value_dim", None) or config.head_dim,
    dtype=jnp.dtype(config.dtype),
    is_causal=is_causal,
    mask=not is_causal,
    segments=segments,
    softcap=getattr(config, "attn_softcap", None) is not None,
    sinks=getattr(config, "attn_sinks", False),
    window=window,
  )


def refusal(name: str, choice: Choice, call: Call) -> str | None:
  """The reason why an implementation cannot compute a call, or None if it can."""
  if name in ("plain", "blockwise"):
    return None
  runs_on = next(platform for platform, kernel in _KERNELS.items() if kernel == name)
  if choice.device != runs_on:
    return f"it runs on a {runs_on.upper()}, and the program is for a {choice.device.upper()}"
  for unfit, what in (
    (call.mask, "it takes no mask of any other kind than causal ones"),
    (call.sinks, "it has no attention sinks"),
    (call.cached, "it takes no cache"),
    (not call.is_causal, "it is used for causal attention alone"),
    (call.length != call.slots, "it takes as many keys as queries"),
    (call.window == "traced", "scanned layers differ in their window; model.scan_layers=False"),
  ):
    if unfit:
      return what
  if name == "splash":
    return None
  if call.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it takes bfloat16 and float16, not {call.dtype}"
  if call.segments:
    return "it does not tell texts of one row apart"
  if call.softcap:
    return "it has no soft cap"
  if call.features > 128 or call.features % 8:
    return f"it takes heads of up to 128 features, in steps of 8, not {call.features}"
  return None


def chosen(choice: Choice, call: Call) -> str:
  """The implementation of a call.

  Raises:
    ValueError: if the chosen one cannot compute it.
  """
  long = call.length * call.slots >= _LONG
  if call.cached:
    return "blockwise" if long else "plain"
  if choice.name != AUTO:
    if reason := refusal(choice.name, choice, call):
      raise ValueError(f"attention {choice.name!r}: {reason}; use 'auto', or 'blockwise'")
    return choice.name
  kernel = _KERNELS.get(choice.device)
  if not long:
    return "plain"
  return kernel if kernel and not refusal(kernel, choice, call) else "blockwise"


def cudnn(
  query_BTNH: jax.Array,
  key_BSKH: jax.Array,
  value_BSKG: jax.Array,
  *,
  window: int | None,
  scale: float | None,
) -> jax.Array:
  """cuDNN's flash attention, causal."""
  return jax.nn.dot_product_attention(
    query_BTNH,
    key_BSKH,
    value_BSKG,
    is_causal=True,
    scale=scale,
    local_window_size=None if window is None else (window - 1, 0),
    implementation="cudnn",
  )


def splash(
  query_BTNH: jax.Array,
  key_BSKH: jax.Array,
  value_BSKG: jax.Array,
  *,
  window: int | None,
  segments_BT: jax.Array | None,
  scale: float | None,
  softcap: float | None,
  mesh: Mesh | None,
) -> jax.Array:
  """JAX's kernel for TPUs, causal; each device of a mesh computes its rows and heads."""
  length, features = query_BTNH.shape[1], value_BSKG.shape[-1]
  factor = query_BTNH.shape[-1] ** -0.5 if scale is None else scale
  query_BTNH = (query_BTNH * factor).astype(query_BTNH.dtype)
  inputs = [_to_lanes(x) for x in (query_BTNH, key_BSKH, value_BSKG)]
  if segments_BT is not None:
    # Queries that were added see the keys that were added.
    inputs.append(jnp.pad(segments_BT, ((0, 0), (0, -length % _LANES)), constant_values=-1))
  run = functools.partial(_splash_of_rows, window=window, softcap=softcap)
  if mesh is not None and mesh.size > 1:
    heads = "tensor" if key_BSKH.shape[2] % mesh.shape["tensor"] == 0 else None
    rows = ("data", "fsdp")
    specs = [jax.P(rows, None, heads, None)] * 3 + [jax.P(rows, None)] * (len(inputs) - 3)
    run = jax.shard_map(run, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
  return run(*inputs)[:, :length, :, :features]


def _splash_of_rows(query_BTNH, key_BSKH, value_BSKG, segments_BT=None, *, window, softcap):
  # Imported here, since Pallas takes a second to import and few programs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  length, heads = query_BTNH.shape[1:3]
  block = max(size for size in range(_LANES, _SPLASH_BLOCK + 1, _LANES) if length % size == 0)
  shape = (length, length)
  one = kernels.CausalMask(shape)
  if window is not None and window < length:
    one = kernels.LocalMask(shape, window_size=(window - 1, 0), offset=0)
  made = kernels.make_splash_mha_single_device(
    kernels.MultiHeadMask([one] * heads),
    block_sizes=kernels.BlockSizes(
      **dict.fromkeys(
        (
          "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
          "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
        ),
        block,
      )
    ),
    attn_logits_soft_cap=softcap,
  )  # fmt: skip
  # Without `save_residuals` it returns one array.
  kernel = cast(Callable[..., jax.Array], made)
  query, key, value = (x.transpose(0, 2, 1, 3) for x in (query_BTNH, key_BSKH, value_BSKG))
  if segments_BT is None:
    out = jax.vmap(kernel)(query, key, value)
  else:
    out = jax.vmap(
      lambda q, k, v, ids: kernel(q, k, v, segment_ids=kernels.SegmentIds(q=ids, kv=ids))
    )(query, key, value, segments_BT)
  return out.transpose(0, 2, 1, 3)


def _to_lanes(x_BTNH):
  """Pads positions and features to the multiples that the kernel requires."""
  more_T, more_H = -x_BTNH.shape[1] % _LANES, -x_BTNH.shape[3] % _LANES
  return jnp.pad(x_BTNH, ((0, 0), (0, more_T), (0, 0), (0, more_H)))
