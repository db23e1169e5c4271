"""Second moments against activations that are captured by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from tolerances import assert_close

import lora_jax
from lora_jax import LoRA, attach, init, trace_axes
from lora_jax.calibration import batch_moments, second_moments
from lora_jax.models import llama


def gram(*xs):
  """Σ x xᵀ over the rows of arrays [..., d], in float64."""
  rows = [np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in xs]
  return sum(x.T @ x for x in rows)


def check(moments, total, rows):
  assert moments.total.dtype == jnp.float32
  assert_close(moments.total, jnp.asarray(total, jnp.float32))
  np.testing.assert_array_equal(moments.rows, rows)


BATCHES = [normal(3, 5, 11), normal(2, 5, 11), normal(3, 5, 11) + 1]


class Net(nn.Module):
  """Dense, projections of several axes, and a transposed use of a kernel."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(13, name="up")(x)
    self.sow("seen", "up_out", x)
    x = nn.DenseGeneral((3, 7), name="heads")(nn.silu(x))
    self.sow("seen", "heads_out", x)
    return nn.DenseGeneral(11, axis=(-2, -1), name="back")(jnp.tanh(x))


def test_the_moments_of_a_linen_model_are_those_of_its_captured_activations():
  model = Net()
  params = model.init(jax.random.key(0), BATCHES[0])["params"]

  def f(params, x):
    return model.apply({"params": params}, x)

  axes = trace_axes(f, params, BATCHES[0])
  paths = ["up/kernel", "heads/kernel", "back/kernel"]
  moments = second_moments(f, params, paths, BATCHES, axes=axes)
  captured = [model.apply({"params": params}, x, mutable="seen")[1]["seen"] for x in BATCHES]
  heads = [nn.silu(seen["up_out"][0]) for seen in captured]
  back = [jnp.tanh(seen["heads_out"][0]).reshape(-1, 21) for seen in captured]
  rows = 5 * (3 + 2 + 3)
  check(moments["up/kernel"], gram(*BATCHES), rows)
  check(moments["heads/kernel"], gram(*heads), rows)
  check(moments["back/kernel"], gram(*back), rows)
  assert_close(moments["up/kernel"].mean, moments["up/kernel"].total / rows)

  diagonal = second_moments(f, params, paths, iter(BATCHES), axes=axes, diagonal=True)
  for path in paths:
    check(diagonal[path], np.diag(moments[path].total), rows)


CONFIG = llama.LlamaConfig(
  vocab_size=31,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  max_length=16,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 4, 7)))


def layers_of(params):
  """The blocks of an unrolled Llama, stacked as a scanned one has them."""
  blocks = [params[f"block_{n}"] for n in range(2)]
  rest = {name: leaf for name, leaf in params.items() if not name.startswith("block_")}
  return rest | {"blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)}


def llama_moments(params, paths, batches=TOKENS, mask=None, **options):
  model = llama.Llama(dataclasses.replace(CONFIG, **options))

  def f(params, tokens):
    return model.apply({"params": params}, tokens)[0]

  axes = trace_axes(f, params, batches[0])
  return second_moments(f, params, paths, batches, axes=axes, mask=mask)


@pytest.fixture(scope="module")
def params():
  model = llama.Llama(CONFIG)
  params = jax.jit(model.init)(jax.random.key(0), TOKENS[0])["params"]
  # Norms of their own, or queries and gates would have inputs of one spectrum.
  return jax.tree.map(lambda x: x + 0.3 * normal(*x.shape) if x.ndim == 1 else x, params)


NAMES = ("attn/query", "attn/out", "mlp/gate", "mlp/down")


@pytest.mark.parametrize(
  "options",
  [{}, {"remat_policy": jax.checkpoint_policies.nothing_saveable}],
  ids=["plain", "remat"],
)
def test_a_scanned_llama_has_the_moments_of_an_unrolled_one_layer_by_layer(params, options):
  unrolled = [f"block_{n}/{name}/kernel" for n in range(2) for name in NAMES]
  one = llama_moments(params, [*unrolled, "head/kernel"], **options)
  stacked = [f"blocks/{name}/kernel" for name in NAMES]
  two = llama_moments(layers_of(params), [*stacked, "head/kernel"], scan_layers=True, **options)
  for name in NAMES:
    assert two[f"blocks/{name}/kernel"].rows.tolist() == 2 * [56.0]
    for n in range(2):
      layer = jax.tree.map(lambda x, n=n: x[n], two[f"blocks/{name}/kernel"])
      assert_close(layer, one[f"block_{n}/{name}/kernel"])
  assert_close(two["head/kernel"], one["head/kernel"])
  check(one["block_0/attn/query/kernel"], gram(*normed(params)), 56)


def normed(params):
  """The input of the first block's query, by hand."""
  embedded = params["embed"]["embedding"][TOKENS]
  size = jnp.sqrt(jnp.mean(embedded**2, -1, keepdims=True) + 1e-5)
  return embedded / size * params["block_0"]["attn_norm"]["scale"]


def test_a_mask_leaves_rows_out(params):
  path = "block_0/attn/query/kernel"
  lengths = jnp.array([[7, 3, 0, 5], [1, 2, 3, 4]])
  mask = jnp.arange(7) < lengths[..., None]
  batches = list(zip(TOKENS, mask, strict=True))
  model = llama.Llama(CONFIG)

  def f(params, batch):
    return model.apply({"params": params}, batch[0])[0]

  moments = second_moments(f, params, [path], batches, mask=lambda batch: batch[1])
  check(moments[path], gram(normed(params)[mask]), 25)


def test_a_mask_reaches_every_layer_of_a_scan(params):
  mask = jnp.arange(7) < jnp.array([7, 3, 0, 5])[:, None]
  paths = [f"block_{n}/mlp/down/kernel" for n in range(2)]
  one = llama_moments(params, paths, mask=lambda _: mask)
  path = "blocks/mlp/down/kernel"
  two = llama_moments(layers_of(params), [path], mask=lambda _: mask, scan_layers=True)[path]
  assert two.rows.tolist() == 2 * [30.0]
  assert_close(two.total, jnp.stack([one[path].total for path in paths]))


W = normal(11, 13)
X = BATCHES[0]

# name: f, roles, the inputs of the kernel: one array of rows for each matrix.
USES = {
  "left operand": (lambda p, x: jnp.einsum("io,bti->obt", p["w"], x), "io", [X]),
  "transposed": (lambda p, x: x @ p["w"].T.T, "io", [X]),
  "mapped": (lambda p, x: jax.vmap(jax.vmap(lambda x: p["w"].T @ x))(x), "io", [X]),
  "cast and scaled": (lambda p, x: x @ (2 * p["w"].astype("bfloat16")).astype(x.dtype), "io", [X]),
  "split outputs": (lambda p, x: x @ p["w"][:, :5] @ jnp.ones((5, 1)), "io", [X]),
  "reshaped": (lambda p, x: x @ p["w"].reshape(11, 13, 1).reshape(11, 13), "io", [X]),
  "twice": (lambda p, x: x @ p["w"] + (x * 2) @ p["w"], "io", [jnp.stack([X, 2 * X])]),
}


@pytest.mark.parametrize("name", USES)
def test_however_a_kernel_is_used_its_rows_are_found(name):
  f, roles, rows = USES[name]
  axes = {"w": lora_jax.Axes(roles, ("dot_general",))}
  moments = second_moments(f, {"w": W}, ["w"], [X], axes=axes)["w"]
  check(moments, gram(*rows), sum(x.size for x in rows) // 11)


def stacked_use(f, roles="sio"):
  axes = {"w": lora_jax.Axes(roles, ("dot_general",))}
  params = {"w": jnp.stack([W, 2 * W, W + 1])}
  params = {"w": jnp.moveaxis(params["w"], 0, roles.index("s"))}
  return lambda x: second_moments(f, params, ["w"], [x], axes=axes)["w"]


def test_experts_have_the_moments_of_their_own_rows():
  x = normal(3, 4, 11)
  moments = stacked_use(lambda p, x: jnp.einsum("end,edk->enk", x, p["w"]))(x)
  check(moments, np.stack([gram(rows) for rows in x]), [4, 4, 4])
  other_axis = stacked_use(lambda p, x: jnp.einsum("end,dek->enk", x, p["w"]), "iso")(x)
  assert_close(other_axis, moments)


@pytest.mark.parametrize("diagonal", [False, True])
def test_rows_in_groups_count_for_the_matrix_that_they_meet(diagonal):
  x = normal(5, 11)
  sizes = jnp.array([2, 0, 3], jnp.int32)
  axes = {"w": lora_jax.Axes("sio", ("ragged_dot_general",))}

  def f(p, x):
    return lax.ragged_dot(x, p["w"], sizes)

  params = {"w": normal(3, 11, 13)}
  moments = second_moments(f, params, ["w"], [x], axes=axes, diagonal=diagonal)["w"]
  totals = np.stack([gram(x[:2]), gram(x[:0]), gram(x[2:])])
  check(moments, np.stack([np.diag(y) for y in totals]) if diagonal else totals, [2, 0, 3])
  assert np.isfinite(moments.mean).all()
  with pytest.raises(ValueError, match=r"w: .*sorted into groups, so a mask cannot be matched"):
    second_moments(f, params, ["w"], [x], axes=axes, mask=lambda _: jnp.ones(5))


@pytest.mark.parametrize(
  "index",
  [lambda p, n: p["w"][n], lambda p, n: lax.dynamic_index_in_dim(p["w"], n, keepdims=False)],
  ids=["slice", "dynamic_slice"],
)
def test_layers_that_are_picked_by_index_have_moments_of_their_own(index):
  def f(p, x):
    for n in (0, 2):
      x = jnp.tanh(x @ index(p, n)) @ W.T
    return x

  x = normal(4, 11)
  moments = stacked_use(f)(x)
  middle = jnp.tanh(x @ W) @ W.T
  check(moments, np.stack([gram(x), gram(x[:0]), gram(middle)]), [4, 0, 4])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_s_rows_are_what_it_covers_at_each_position(groups, stride):
  w, x = normal(3, 2, 4, 6), normal(2, 5, 7, 4 * groups)
  numbers = ("NHWC", "HWIO", "NHWC")

  def f(p, x):
    return lax.conv_general_dilated(
      x, p["w"], (stride, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups
    )

  axes = {"w": lora_jax.Axes("iiio", ("conv_general_dilated",))}
  moments = second_moments(f, {"w": w}, ["w"], [x], axes=axes)["w"]
  windows = [
    x[n, i : i + 3, j : j + 2, 4 * g : 4 * g + 4].ravel()
    for n in range(2)
    for g in range(groups)
    for i in range(0, 3, stride)
    for j in range(6)
  ]
  check(moments, gram(np.stack(windows)), len(windows))


def test_a_base_of_weights_is_probed_as_well():
  params = {"w": W, "v": normal(13, 11)}
  adapters = init(jax.random.key(0), params, {"w": LoRA(rank=2, alpha=2.0)})
  adapters = jax.tree.map(lambda x: x + 1.0, adapters)
  weights = attach(params, adapters)

  def f(p, x):
    return jnp.sin(x @ p["w"]) @ p["v"]

  moments = second_moments(f, weights, ["w", "v"], [X])
  check(moments["w"], gram(X), 15)
  check(moments["v"], gram(jnp.sin(X @ weights["w"].materialize())), 15)


def test_a_branch_that_is_not_taken_sees_no_row():
  def f(p, x):
    return lax.cond(x[0, 0, 0] < 1e9, lambda x: x @ p["w"], lambda x: (x + 1) @ p["w"], x)

  check(second_moments(f, {"w": W}, ["w"], [X])["w"], gram(X), 15)


def test_no_backward_pass_is_left_in_the_compiled_program():
  params, x = {"w": normal(8, 64, 64)}, normal(128, 64)

  def f(params, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["w"])[0]

  def cost(g):
    compiled = jax.jit(g).lower(params, x).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

  def moments(params, x):
    return batch_moments(f, params, x, {"w": "sio"})

  # The compiler counts the body of a loop once: one product forward, and one x xᵀ of its size.
  product = 2 * 128 * 64 * 64
  flops, memory = cost(moments)
  assert 2 * product <= flops < 2.5 * product
  # No activation is kept for each layer; the moments may be held once more.
  assert memory < cost(f)[1] + 4 * (8 * 64 * 64 + 4 * 128 * 64)


def test_one_program_serves_all_batches_of_a_shape():
  def f(p, x):
    traced.append(x.shape)
    return x @ p["w"]

  traced = []
  second_moments(f, {"w": W}, ["w"], BATCHES)
  assert traced == [(3, 5, 11), (2, 5, 11)]


@pytest.mark.parametrize(
  ("f", "words"),
  [
    (lambda p, x: p["w"][jnp.array([1, 2])] @ W.T, "w: .*its rows are looked up"),
    (lambda p, x: x @ W @ p["w"].T, "w: .*contracted over other axes than its inputs"),
    (lambda p, x: x * jnp.sum(p["w"] ** 2), "w: .*in something other than a product"),
    (lambda p, x: x[..., :4] @ p["w"][:4], "w: .*some of its inputs are sliced off"),
    (lambda p, x: x @ W @ p["w"].reshape(13, 11), "w: .*in something other than a product"),
    (lambda p, x: lax.stop_gradient(x @ p["w"]), "no row counted for w: .*stop_gradient cuts it"),
    (lambda p, x: x, "no row counted for w: .*does not use them"),
    (lambda p, x: jnp.argmax(x @ p["w"]), "returns no float"),
  ],
)
def test_a_use_that_has_no_moments_is_refused(f, words):
  axes = {"w": lora_jax.Axes("io", ("dot_general",))}
  with pytest.raises(ValueError, match=words):
    second_moments(f, {"w": W}, ["w"], [X], axes=axes)


@pytest.mark.parametrize(
  ("f", "shape", "words"),
  [
    (lambda p, x: x @ p["w"], (3, 4), r"w: .*the mask is \(3, 4\), and the rows .* \(3, 5\)"),
    (
      lambda p, x: lax.ragged_dot(x[0], p["w"][None], jnp.array([5])),
      (3, 5),
      "w: .*a mask cannot be matched",
    ),
    (lambda p, x: x @ p["w"], (3, 5), "no row counted for w: the mask is zero"),
  ],
)
def test_a_mask_that_does_not_fit_the_rows_is_refused(f, shape, words):
  with pytest.raises(ValueError, match=words):
    second_moments(f, {"w": W}, ["w"], [X], mask=lambda _: jnp.zeros(shape))


def test_a_mask_of_all_rows_fits_an_input_of_one_axis_of_rows():
  mask = normal(3, 5) > 0
  moments = second_moments(
    lambda p, x: x.reshape(15, 11) @ p["w"], {"w": W}, ["w"], [X], mask=lambda _: mask
  )
  check(moments["w"], gram(X[mask]), mask.sum())


def test_what_is_asked_for_is_checked_before_any_work():
  with pytest.raises(ValueError, match="the tree has no leaf at v, w/x"):
    second_moments(None, {"w": W}, ["w", "w/x", "v"], None)
  with pytest.raises(ValueError, match=r"heads: which of the axes of \(3, 4, 5\)"):
    second_moments(None, {"heads": normal(3, 4, 5)}, ["heads"], None)
  with pytest.raises(ValueError, match="no batch"):
    second_moments(lambda p, x: x @ p["w"], {"w": W}, ["w"], [])
