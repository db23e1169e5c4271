"""Parameters, and functions of them written without a thought of LoRA.

The axes of the adapted matrices have sizes that nothing else in a function has (11 and 13, mostly),
so that a full-size value is known by its shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def normal(*shape: int) -> jax.Array:
  scale = 1.0 if len(shape) < 2 else shape[-2] ** -0.5
  return jnp.asarray(np.random.default_rng(shape).standard_normal(shape) * scale, jnp.float32)


W, IO, X = {"w": normal(11, 13)}, {"w": "io"}, normal(3, 11)
STACK, STACK_ROLES = {"w": normal(3, 11, 13)}, {"w": "sio"}
LAYER = {"up": normal(11, 13), "down": normal(13, 11)}
LAYER_ROLES = {"up": "io", "down": "io"}
LAYERS = {"up": normal(3, 11, 13), "down": normal(3, 13, 11)}
LAYERS_ROLES = {"up": "sio", "down": "sio"}
NESTED = {"up": normal(2, 3, 11, 13), "down": normal(2, 3, 13, 11)}
NESTED_ROLES = {"up": "ssio", "down": "ssio"}
PAIR, PAIR_ROLES = (
  {"first": normal(11, 13), "second": normal(11, 13) + 1},
  {"first": "io", "second": "io"},
)
EMBED, EMBED_ROLES = {"embed": normal(17, 7)}, {"embed": "io"}
IDS = jnp.array([[3, 0, 16, 3, 5], [1, 2, 3, 4, 16]])
HEADS = {name: normal(11, 3, 5) for name in ("query", "key", "value")} | {"out": normal(3, 5, 11)}
HEADS_ROLES = {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}


def wrong_jvp(f):
  """f with a derivative that is visibly the author's: three times the true one."""
  g = jax.custom_jvp(f)
  g.defjvp(lambda xs, ts: (f(*xs), 3 * jax.jvp(f, xs, ts)[1]))
  return g


def wrong_vjp(f):
  """f with a gradient that is visibly the author's: minus twice the true one."""
  g = jax.custom_vjp(f)
  g.defvjp(
    lambda *xs: (f(*xs), xs),
    lambda xs, ct: jax.tree.map(lambda t: -2 * t, jax.vjp(f, *xs)[1](ct)),
  )
  return g


def dense(p, x):
  return jnp.sin(x @ p["w"])


def up_down(p, x):
  return x + 0.2 * jnp.sin(x @ p["up"]) @ p["down"]


def attention(p, x):
  q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) for name in ("query", "key", "value"))
  weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
  return jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), p["out"])


def scanned(p, x, body=up_down, **options):
  return lax.scan(lambda h, layer: (body(layer, h), jnp.sum(h)), x, p, **options)


def convolve(p, x, *, strides=1, dilation=1, groups=1):
  n = x.ndim - 2
  spatial = "DHW"[-n:]
  return lax.conv_general_dilated(
    x,
    p["w"].astype(x.dtype),
    (strides,) * n,
    "SAME",
    rhs_dilation=(dilation,) * n,
    feature_group_count=groups,
    dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
  )


def experts(p, x):
  return lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3], jnp.int32))


def on_mesh(p, x):
  mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
  specs = (jax.P(), jax.P("batch"))
  return jax.shard_map(dense, mesh=mesh, in_specs=specs, out_specs=jax.P("batch"))(p, x)


def constrained(p, x):
  """Parameters with a hint where they shall lie, as Linen's `with_partitioning` gives one."""
  mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.NamedSharding(mesh, jax.P(None, "model"))
  return x @ lax.with_sharding_constraint(p["w"], spec)


def trained_inside(p, x):
  """One step of gradient descent of its own, then the loss."""
  grads = jax.grad(lambda p: jnp.sum(dense(p, x)))(p)
  return dense(jax.tree.map(lambda w, g: w - 0.1 * g, p, grads), x)


def loop(p, x, body=dense, steps=3):
  return lax.fori_loop(0, steps, lambda _, h: body(p, h), x)


def loop_with_params(p, x):
  """The parameters ride in the carry, as in a training state."""
  return lax.fori_loop(0, 3, lambda _, state: (state[0], up_down(*state)), (p, x))[1]


def growing(p, x):
  state = lax.while_loop(lambda s: jnp.sum(s * s) < 50, lambda s: s + up_down(p, s), x)
  return state


def growing_with_params(p, x):
  def condition(state):
    return jnp.sum(state[1] ** 2) < 50

  return lax.while_loop(condition, lambda s: (s[0], s[1] + up_down(*s)), (p, x))[1]


def condition_on_params(p, x):
  return lax.while_loop(lambda s: jnp.sum(abs(s @ p["w"])) < 99, lambda s: s + 1, x)


def nested_scan(p, x):
  def outer(h, layers):
    return scanned(layers, h)

  return lax.scan(outer, x, p)


def shrinking_params(p, x):
  """The loop changes the parameters themselves."""

  def body(state, _):
    p, x = state
    return (jax.tree.map(lambda w: 0.9 * w, p), up_down(p, x)), None

  return lax.scan(body, (p, x), length=2)[0][1]


def becomes_params(p, x):
  """The loop's state starts as an array and becomes the weight."""
  return lax.fori_loop(0, 2, lambda _, h: p["w"], jnp.ones_like(p["w"])).sum() + x


def exchanged_params(p, x):
  """Two weights change places in the carry."""

  def body(_, state):
    first, second, x = state
    return second, first, jnp.sin(x @ first)

  return lax.fori_loop(0, 3, body, (p["first"], p["second"], x))[2]


def branches(p, x, index):
  fs = [lambda p, x: x @ p["up"], lambda p, x: x[:, :1] + p["bias"], lambda p, x: x @ p["down"].T]
  return lax.switch(index, fs, p, x)


def chosen_weight(p, x):
  return x @ lax.cond(jnp.sum(x) > 0, lambda p: p["first"], lambda p: p["second"], p)


def noisy(p, x):
  """A random key and a step count live among the parameters."""
  noise = jax.random.normal(jax.random.fold_in(p["key"], p["step"]), x.shape)
  return (x + noise.astype(x.dtype)) @ p["w"], p["step"] + 1, p["key"]


def hessian_product(p, x):
  def loss(x):
    return jnp.sum(jnp.sin(x @ p["w"]) ** 2)

  return jax.jvp(jax.grad(loss), (x,), (jnp.cos(x),))


def linearized(p, x):
  y, push = jax.linearize(lambda x: dense(p, x), x)
  return y, push(jnp.cos(x)), jax.linear_transpose(push, x)(y)
