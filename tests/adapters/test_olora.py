"""OLoRA against PEFT's, and against the QR decomposition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from starts import peft_start, start
from tolerances import assert_close

from lora_jax import LowRank, OLoRA, merge


@pytest.mark.parametrize(("alpha", "rslora"), [(8.0, False), (3.0, True)])
def test_the_start_is_peft_s_on_a_pretrained_weight(smollm2, alpha, rslora):
  w = smollm2.params["block_7"]["attn"]["key"]["kernel"]
  residual, a, b, scale = peft_start(w, "olora", 8, alpha, rslora)
  ours = start(w, OLoRA(rank=8, alpha=alpha, rslora=rslora))
  assert ours.scale == pytest.approx(scale)
  signs = np.sign(np.sum(np.asarray(ours.b) * b, axis=1))
  assert_close(ours.a, jnp.asarray(a * signs))
  assert_close(ours.b, jnp.asarray(b * signs[:, None]))
  assert_close(ours.attach(w, "w").w, jnp.asarray(residual))


@pytest.mark.parametrize(
  ("roles", "shape"),
  [("io", (11, 13)), ("io", (13, 11)), ("ioo", (11, 3, 5)), ("iio", (3, 5, 11)),
   ("iiio", (3, 3, 4, 11)), ("sio", (3, 11, 13)), ("iso", (11, 3, 13))],
)  # fmt: skip
def test_the_rows_of_b_are_orthonormal_and_span_the_first_outputs_of_the_kernel(roles, shape):
  w = normal(*shape)
  adapter = start(w, OLoRA(rank=3, alpha=6.0), roles)
  part = LowRank(jnp.zeros(shape), adapter.a, adapter.b, 1.0, roles=adapter.roles).materialize()
  order = [n for role in "sio" for n, x in enumerate(roles) if x == role]
  sizes = [
    np.prod([n for n, x in zip(shape, roles, strict=True) if x == y], dtype=int) for y in "sio"
  ]
  matrices, parts = (
    np.transpose(np.asarray(x, np.float64), order).reshape(sizes) for x in (w, part)
  )
  for matrix, found, b in zip(matrices, parts, adapter.b.reshape(sizes[0], 3, -1), strict=True):
    assert_close(b @ b.T, jnp.eye(3))
    # W on the span of its first rows (Wᵀ = Q R is Gram and Schmidt's order) and nothing beside it.
    q = np.linalg.qr(matrix.T)[0][:, :3]
    np.testing.assert_allclose(found, matrix @ q @ q.T, atol=1e-5)
    np.testing.assert_allclose(found[:3], matrix[:3], atol=1e-5)
  assert_close(merge({"w": w}, {"w": adapter})["w"], w)


def test_a_rank_that_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="OLoRA: rank -1 is below 1"):
    OLoRA(rank=-1, alpha=1.0)
  with pytest.raises(ValueError, match=r"w: rank 12 exceeds min\(11, 13\)"):
    start(normal(11, 13), OLoRA(rank=12, alpha=1.0))
  with pytest.raises(ValueError, match="w: OLoRA starts from the values"):
    start(jax.ShapeDtypeStruct((11, 13), jnp.float32), OLoRA(rank=2, alpha=1.0))
