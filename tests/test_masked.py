"""A LoRA whose rank and scale are data: the same function as the LoRA, and as quick."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from jaxprs import full_size_values
from tolerances import assert_close
from weight_table import factors

from lora_jax import LowRank, adapt, materialize
from lora_jax.weights.masked import Masked


def convolve(w, x):
  return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


PROGRAMS = {
  "matmul": (lambda w, x: x @ w, (16, 12), "io", normal(5, 16)),
  "weight on the left": (lambda w, x: w.T @ x.T, (16, 12), "io", normal(5, 16)),
  "heads": (lambda w, x: jnp.einsum("bd,dhk->bhk", x, w), (16, 4, 3), "ioo", normal(5, 16)),
  "scan": (
    lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
    (3, 16, 16),
    "sio",
    normal(5, 16),
  ),
  "convolution": (convolve, (3, 4, 6), "iio", normal(2, 7, 4)),
  "embedding": (lambda w, ids: w[ids], (16, 12), "io", jnp.array([3, 0, 3])),
}


def pair(shape, roles, rank=2, filled=5):
  a, b = factors(shape, roles, rank=rank)
  plain = LowRank(normal(*shape), a, b, scale=0.3, roles=roles.lstrip("s"), path="w")
  return plain, Masked.of(plain, filled)


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_computes_what_the_lora_does_and_so_does_its_gradient(name):
  f, shape, roles, x = PROGRAMS[name]
  plain, masked = pair(shape, roles)
  assert masked.rank == 5 and plain.rank == 2
  assert_close(materialize(masked), materialize(plain))
  assert_close(materialize(masked.as_low_rank().attach(plain.w, "w")), materialize(plain))

  def loss(weight):
    return jnp.sum(jnp.square(adapt(f, strict=True)(weight, x)))

  found, wanted = (jax.jit(jax.value_and_grad(loss))(weight) for weight in (masked, plain))
  assert_close(found[0], wanted[0])
  rank_axis = wanted[1].b.shape.index(2, roles.count("s"))
  assert_close(found[1].a[..., :2], wanted[1].a)
  assert_close(jnp.take(found[1].b, jnp.arange(2), axis=rank_axis), wanted[1].b)
  assert not np.any(found[1].a[..., 2:])
  assert not np.any(jnp.take(found[1].b, jnp.arange(2, 5), axis=rank_axis))


def test_its_gate_alone_keeps_it_from_using_more_than_its_rank():
  _, masked = pair((16, 12), "io")
  noisy = Masked(
    masked.w, masked.a.at[:, 2:].set(7.0), masked.b.at[2:].set(7.0), gate=masked.gate, path="w"
  )
  x = normal(5, 16)
  assert_close(adapt(jnp.dot)(x, noisy), adapt(jnp.dot)(x, masked))
  grads = jax.grad(lambda w: jnp.sum(jnp.square(adapt(jnp.dot)(x, w))))(noisy)
  assert not np.any(grads.a[:, 2:]) and not np.any(grads.b[2:])


def test_only_its_factors_train():
  mask = pair((16, 12), "io")[1].trainable()
  assert (mask.w, mask.a, mask.b, mask.gate) == (False, True, True, False)


def test_a_vmap_over_members_forms_no_array_of_the_kernels_shape():
  members = [pair((16, 12), "io", rank=rank, filled=4)[1].detach() for rank in (1, 3, 4)]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
  w, x = normal(16, 12), normal(3, 5, 16)

  def loss(adapter, x):
    return jnp.sum(jnp.square(adapt(jnp.dot, strict=True)(x, adapter.attach(w, "w"))))

  gradient = jax.vmap(jax.grad(loss))
  for n, member in enumerate(members):
    assert_close(
      jax.tree.map(lambda g, n=n: g[n], gradient(stacked, x)), jax.grad(loss)(member, x[n])
    )
  assert full_size_values(gradient, (stacked, x), {(16, 12)}) == 0
