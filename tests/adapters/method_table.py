"""The table of adapter methods and the table of kernels; `test_product.py` crosses them.

A new method is one row here: its spec, its formula for one matrix, and the kernels that it is
defined for.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from functions import IDS, normal
from jax import lax

from lora_jax import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, OLoRA, PiSSA, TokenRows, VeRA
from lora_jax.adapters import Method


class Kernel(NamedTuple):
  """A leaf and a function that uses it; 11, 13 and 143 are the sizes of nothing else.

  f: (params, x) -> result, for params {"w": leaf}.
  shape, roles: of the leaf.
  x: the input.
  """

  f: Callable
  shape: tuple[int, ...]
  roles: str
  x: Any


def _matrix(p, x):
  return jnp.sin(x @ p["w"])


def _several_outputs(p, x):
  return jnp.sin(jnp.einsum("nd,dhk->nhk", x, p["w"]))


def _several_inputs(p, x):
  return jnp.sin(jnp.einsum("nhd,hdk->nk", x, p["w"]))


def _layers(p, x):
  def layer(x, w):
    return jnp.sin(x @ w) @ w.T, None

  return lax.scan(layer, x, p["w"])[0]


def _experts(p, x):
  return jnp.sin(jnp.einsum("end,edk->enk", x, p["w"]))


def _convolution(p, x):
  return jnp.sin(
    lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  )


def _embedding(p, ids):
  return jnp.sin(p["w"][ids]) @ p["w"].T


KERNELS = {
  "matrix": Kernel(_matrix, (11, 13), "io", normal(3, 11)),
  "several_outputs": Kernel(_several_outputs, (11, 13, 5), "ioo", normal(3, 11)),
  "several_inputs": Kernel(_several_inputs, (5, 11, 13), "iio", normal(3, 5, 11)),
  "layers": Kernel(_layers, (3, 11, 13), "sio", normal(4, 11)),
  "experts": Kernel(_experts, (3, 11, 13), "sio", normal(3, 4, 11)),
  "convolution": Kernel(_convolution, (3, 3, 11, 13), "iiio", normal(2, 4, 4, 11)),
  "embedding": Kernel(_embedding, (17, 11), "io", IDS),
}


class Row(NamedTuple):
  """A method.

  spec: with a rank of at most 2, which every kernel can have.
  formula: (w, parts, weight) -> the effective matrix, all in float64: w is [d, k], a part is
    [d, r], [r, k], [k] or [r] by its layout, and weight is there for its settings.
  undefined: `{kernel: words of the error}` where the method is not defined.
  exact_start: a fresh adapter is the identity to the bit, not only to rounding.
  dense: the change of the base is no product of thin factors, so it is formed.
  """

  spec: Method
  formula: Callable[[jax.Array, dict[str, jax.Array], Any], jax.Array]
  undefined: Mapping[str, str] = MappingProxyType({})
  exact_start: bool = True
  dense: bool = False


def _lora(w, parts, weight):
  return w + weight.scale * parts["a"] @ parts["b"]


def _dora(w, parts, weight):
  directions = _lora(w, parts, weight)
  norm = jnp.linalg.norm(directions, axis=0)
  if weight.constant_norm:
    norm = lax.stop_gradient(norm)
  return parts["magnitude"] * directions / norm


def _loha(w, parts, weight):
  return w + weight.scale * (parts["a1"] @ parts["b1"]) * (parts["a2"] @ parts["b2"])


def _lokr(w, parts, weight):
  w1 = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
  w2 = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"]
  return w + weight.scale * jnp.kron(w1, w2)


def _vera(w, parts, weight):
  d, b = (jnp.diag(parts[name]) for name in ("lambda_d", "lambda_b"))
  return w + parts["a"] @ d @ parts["b"] @ b


def _recentred(w, parts, weight):
  return w + weight.scale * (parts["a"] @ parts["b"] - parts["a0"] @ parts["b0"])


METHODS = {
  "LoRA": Row(LoRA(rank=2, alpha=3.0), _lora),
  "rsLoRA": Row(LoRA(rank=2, alpha=3.0, rslora=True), _lora),
  "LoRA-FA": Row(LoRA(rank=2, alpha=3.0, train_a=False), _lora),
  "DoRA": Row(DoRA(rank=2, alpha=3.0), _dora),
  "DoRA, the norm not constant": Row(DoRA(rank=2, alpha=3.0, constant_norm=False), _dora),
  "LoHa": Row(LoHa(rank=2, alpha=3.0), _loha),
  "LoKr": Row(LoKr(rank=2, alpha=3.0), _lokr),
  "LoKr, both decomposed": Row(LoKr(rank=1, alpha=3.0, decompose_both=True), _lokr),
  "VeRA": Row(VeRA(rank=2), _vera),
  "PiSSA": Row(PiSSA(rank=2, alpha=3.0), _recentred, exact_start=False),
  "PiSSA, randomised": Row(PiSSA(rank=2, alpha=3.0, iterations=2), _recentred, exact_start=False),
  "OLoRA": Row(OLoRA(rank=2, alpha=3.0), _recentred, exact_start=False),
  "AdaLoRA": Row(
    AdaLoRA(rank=2, alpha=3.0, deviation=0.3),
    lambda w, parts, weight: w + weight.scale * parts["a"] @ jnp.diag(parts["e"]) @ parts["b"],
  ),
  "Full": Row(Full(), lambda w, parts, weight: w + parts["dw"], dense=True),
  "TokenRows": Row(
    TokenRows(ids=(9, 3)),
    lambda w, parts, weight: w.at[jnp.array(weight.ids)].add(parts["dw"]),
    undefined=dict.fromkeys(
      ("several_inputs", "layers", "experts", "convolution"), "does not count the tokens"
    ),
  ),
}
