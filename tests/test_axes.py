"""The roles of a leaf's axes, as the function that uses it says them."""

import flax.errors
import flax.linen as nn
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from functions import EMBED, HEADS, IDS, LAYERS, NESTED, X, attention, normal, scanned
from jax import lax
from jax.extend.core import primitives
from programs import PROGRAMS

import lora_jax
from lora_jax import LoRA, compat, trace_axes
from lora_jax.axes import STEPS, convolution_roles
from lora_jax.models import llama

# Programs whose trace tells the roles that their row of the table gives.
TOLD = [
  "matmul", "transposed twice", "vector", "many batch axes", "twice", "cast to the input's dtype",
  "bias and gelu", "tensordot over two axes", "attention with head axes",
  "fused query, key and value", "experts as a batch axis", "experts on a middle axis",
  "experts on the last axis", "two weights in a row", "embedding", "embedding by index",
  "embedding of heads", "tied embedding and head", "jit", "jit in jit", "remat", "remat in remat",
  "convolution, strided and dilated", "experts by ragged_dot", "scan over layers",
  "scan of a remat", "remat of a scan", "scan, layers on a middle axis", "nested scan",
  "scan with one weight for all steps", "scan with the weights in its carry", "fori",
  "fori with the weights in its carry", "while", "while with the weights in its carry",
  "custom_jvp", "custom_vjp", "shard_map", "vmap inside", "sliced", "one of a stack",
  "one of a stack, traced",
  "tuples, lists and None", "integers and a random key", "a bare leaf",
]  # fmt: skip


@pytest.mark.parametrize("name", TOLD)
def test_the_trace_of_a_program_tells_the_roles(name):
  program = PROGRAMS[name]
  axes = trace_axes(program.f, program.params, program.x)
  assert {path: axes[path].roles for path in program.roles} == program.roles


def test_the_roles_are_those_of_the_use_not_of_the_shape():
  w = {"w": normal(11, 13)}
  assert trace_axes(lambda p, x: x @ p["w"], w, normal(3, 11))["w"].roles == "io"
  assert trace_axes(lambda p, x: x @ p["w"].T, w, normal(3, 13))["w"].roles == "oi"
  assert trace_axes(lambda p, x: p["w"] @ x, w, normal(13, 3))["w"].roles == "oi"


def test_the_uses_are_named_in_the_order_of_the_first():
  axes = trace_axes(PROGRAMS["tied embedding and head"].f, EMBED, IDS)
  assert axes["embed"].uses == ("gather", "dot_general")


def test_leaves_that_are_never_contracted_have_no_roles():
  params = {"kernel": normal(11, 13), "bias": normal(13), "scale": normal(11), "unused": X}
  axes = trace_axes(lambda p, x: (x * p["scale"]) @ p["kernel"] + p["bias"], params, X)
  assert {path: a.roles for path, a in axes.items()} == {
    "bias": "",
    "kernel": "io",
    "scale": "",
    "unused": "",
  }
  assert axes["bias"].uses == ()


def test_branches_and_both_ends_of_a_cond_are_followed():
  def f(p, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ p["first"], lambda: x @ p["second"].T)

  axes = trace_axes(f, {"first": normal(11, 13), "second": normal(13, 11)}, X)
  assert (axes["first"].roles, axes["second"].roles) == ("io", "oi")


def test_nothing_is_computed_and_shapes_are_enough():
  params = {"w": jax.ShapeDtypeStruct((12288, 4 * 12288), jnp.float32)}
  x = jax.ShapeDtypeStruct((2**20, 12288), jnp.float32)
  assert trace_axes(lambda p, x: x @ p["w"], params, x)["w"].roles == "io"


def test_static_and_keyword_arguments_reach_the_function():
  def f(p, x, transpose, *, activation, none=None):
    assert none is None
    return activation(x @ (p["w"].T if transpose else p["w"]))

  axes = trace_axes(f, {"w": normal(13, 11)}, X, True, activation=jnp.tanh, none=None)
  assert axes["w"].roles == "oi"


@pytest.mark.parametrize(
  ("f", "params", "x"),
  [
    (attention, HEADS, normal(2, 4, 11)),
    (scanned, LAYERS, X),
    (PROGRAMS["nested scan"].f, NESTED, X),
    (PROGRAMS["experts on the last axis"].f, {"w": normal(11, 13, 3)}, normal(3, 2, 11)),
  ],
  ids=["heads", "scanned layers", "nested scan", "experts last"],
)
def test_init_gives_each_layer_factors_of_its_own_and_heads_axes_of_their_own(f, params, x):
  axes = trace_axes(f, params, x)
  adapters = lora_jax.init(
    jax.random.key(0), params, dict.fromkeys(axes, LoRA(rank=2, alpha=1.0)), axes=axes
  )
  y = lora_jax.adapt(f, strict=True)(lora_jax.attach(params, adapters), x)
  jax.tree.map(lambda a, b: jnp.array_equal(a, b) or pytest.fail("no identity"), y, f(params, x))


def test_llama_s_layers_are_known_scanned_and_not():
  config = {
    "vocab_size": 97, "width": 16, "mlp_width": 24, "num_layers": 2, "num_heads": 2,
    "num_kv_heads": 1, "head_dim": 8, "max_length": 8,
  }  # fmt: skip
  tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  for scan, prefix, roles in ((False, "block_0", "io"), (True, "blocks", "sio")):
    model = llama.Llama(llama.LlamaConfig(**config, scan_layers=scan))
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    axes = trace_axes(lambda p, t, m=model: m.apply({"params": p}, t), params, tokens)
    kernels = [path for path in axes if path.startswith(prefix) and path.endswith("kernel")]
    assert len(kernels) == 7 and {axes[path].roles for path in kernels} == {roles}
    assert axes["embed/embedding"].uses == ("gather",)
    assert axes["head/kernel"].roles == "io"


def test_linen_s_attention_tells_heads_from_inputs():
  model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
  params = jax.eval_shape(model.init, jax.random.key(0), normal(1, 4, 5))["params"]
  axes = trace_axes(lambda p, x: model.apply({"params": p}, x), params, normal(1, 4, 5))
  assert {path: a.roles for path, a in axes.items() if path.endswith("kernel")} == {
    "query/kernel": "ioo",
    "key/kernel": "ioo",
    "value/kernel": "ioo",
    "out/kernel": "iio",
  }


@pytest.mark.parametrize(
  ("f", "shape", "inputs", "roles"),
  [
    (lambda w, x: jnp.einsum("bd,dhe->bhe", x, w.reshape(4, 3, 5)), (4, 15), (2, 4), "io"),
    (lambda w, x: x @ w.reshape(4, 15), (4, 3, 5), (2, 4), "ioo"),
    (lambda w, x: x @ w.reshape(12, 5), (4, 3, 5), (2, 12), "iio"),
    (lambda w, x: x @ (0.5 * w[:, None].reshape(4, 1, 5)[:, 0]), (4, 5), (2, 4), "io"),
    (lambda w, x: x @ (w / x[0, 0]), (4, 5), (2, 4), "io"),
    (lambda w, x: x @ w.reshape(-1)[:4], (4, 5), (2, 4), ""),
  ],
  ids=["split", "outputs joined", "inputs joined", "ones and a scale", "divided", "flattened"],
)
def test_axes_are_followed_through_reshapes_and_scalings(f, shape, inputs, roles):
  w, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, inputs))
  assert trace_axes(lambda p, x: f(p["w"], x), {"w": w}, x)["w"].roles == roles


def test_the_rows_of_a_convolution_are_the_positions_of_its_result():
  def f(p, x):
    return jax.lax.conv_general_dilated(
      x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3
    )

  axes = trace_axes(f, {"w": normal(3, 3, 4, 6)}, normal(2, 8, 10, 12))
  assert axes["w"].rows == 2 * 4 * 5


def test_each_group_of_a_ragged_product_meets_its_share_of_the_rows():
  def f(p, x):
    return jax.lax.ragged_dot(x, p["w"], jnp.array([2, 2, 2]))

  assert trace_axes(f, {"w": normal(3, 4, 5)}, normal(6, 4))["w"].rows == 2


def test_the_report_is_a_table_with_a_line_for_each_kind_of_leaf():
  params = {f"layer_{i}": {"kernel": normal(11, 13), "bias": normal(13)} for i in range(2)}

  def f(params, x):
    return sum(x @ p["kernel"] + p["bias"] for p in params.values())

  lines = str(trace_axes(f, params, X)).splitlines()
  assert [line.split() for line in lines if not line.startswith("-")] == [
    ["path", "leaves", "axes", "used", "by", "rows"],
    ["layer_*/bias", "2", "-", "-", "0"],
    ["layer_*/kernel", "2", "in,", "out", "dot_general", "3"],
  ]


@pytest.mark.parametrize(
  ("name", "rows"),
  [
    ("matmul", {"w": 3}),
    ("attention with head axes", {"query": 8, "key": 8, "value": 8, "out": 8}),
    ("tied embedding and head", {"embed": 20}),
    ("scan over layers", {"up": 3, "down": 3}),
    ("scan with one weight for all steps", {"up": 3, "down": 3}),
    ("scan with the weights in its carry", {"up": 3, "down": 3}),
    ("experts as a batch axis", {"w": 2}),
    ("embedding", {"embed": 10}),
  ],
)
def test_the_rows_that_meet_a_matrix_are_counted(name, rows):
  program = PROGRAMS[name]
  axes = trace_axes(program.f, program.params, program.x)
  assert {path: axes[path].rows for path in program.roles} == rows


# ---- what leaves are followed through

W_13 = {"w": jax.ShapeDtypeStruct((11, 13), jnp.float32)}
SQUARE = {"w": jax.ShapeDtypeStruct((11, 11), jnp.float32)}
THREE = {name: jax.ShapeDtypeStruct((11, 11), jnp.float32) for name in "abc"}
STACKED = {"w": jax.ShapeDtypeStruct((3, 11, 11), jnp.float32)}
LEFT = jax.sharding.Mesh(
  np.array(jax.devices()[:1]), ("x",), axis_types=(jax.sharding.AxisType.Auto,)
)


def layers(ws, x):
  return lax.scan(lambda h, w: (jnp.sin(h @ w), None), x, ws)[0]


def masked(w):
  return w * np.triu(np.ones((11, 11), np.float32))


def carried(body, wrap=lambda f: f):
  """A loop with the weights in its carry, which `body` passes on."""

  def loop(p, x):
    step = wrap(lambda _, s: (body(s[0]), jnp.sin(s[1] @ s[0]["w"])))
    return lax.fori_loop(0, 3, step, (p, x))[1]

  return loop


# name: the function of the leaves (of p["w"], or of all) and the input, the leaves, their roles.
FOLLOWED = {
  "concatenate": (lambda p, x: x @ jnp.concatenate([*p.values()], 1), THREE, "io"),
  "concatenate along the inputs": (
    lambda p, x: jnp.tile(x, 3) @ jnp.concatenate([*p.values()]), THREE, "io",
  ),
  "stack, then scan": (lambda p, x: layers(jnp.stack([*p.values()]), x), THREE, "io"),
  "stack on a middle axis": (
    lambda p, x: jnp.einsum("bi,ino->bno", x, jnp.stack([*p.values()], 1)), THREE, "io",
  ),
  "stack, then index": (lambda p, x: x @ jnp.stack([*p.values()])[1], THREE, "io"),
  "stack of a tree": (
    lambda p, x: layers(jax.tree.map(lambda *w: jnp.stack(w), *p.values()), x), THREE, "io",
  ),
  "sum of leaves": (lambda p, x: x @ (p["a"] + p["b"].T - 2 * p["c"]), THREE, None),
  "split": (lambda p, x: [x @ w for w in jnp.split(p["w"], [3, 5], 1)], SQUARE, "io"),
  "split into layers": (
    lambda p, x: [x @ w[0] for w in jnp.split(p["w"], 3)], STACKED, "sio",
  ),
  "unstack": (lambda p, x: [x @ w for w in jnp.unstack(p["w"])], STACKED, "sio"),
  "one layer, reshaped": (lambda p, x: x @ p["w"][1:2].reshape(11, 11), STACKED, "sio"),
  "updated slice": (
    lambda p, x: x @ lax.dynamic_update_slice(jnp.zeros((12, 11)), p["w"], (0, 0))[:11],
    SQUARE, "io",
  ),
  "rev": (lambda p, x: x @ p["w"][::-1].T, SQUARE, "oi"),
  "pad": (lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 2))), SQUARE, "io"),
  "roll": (lambda p, x: x @ jnp.roll(p["w"], 2, 1), SQUARE, "io"),
  "tile": (lambda p, x: x @ jnp.tile(p["w"], (1, 2)), SQUARE, "io"),
  "repeat": (lambda p, x: x @ jnp.repeat(p["w"], 2, 1), SQUARE, "io"),
  "expand_dims": (lambda p, x: jnp.matmul(x, jnp.expand_dims(p["w"], 0)), SQUARE, "io"),
  "copy": (lambda p, x: x @ jnp.copy(p["w"]), SQUARE, "io"),
  "device_put": (lambda p, x: x @ jax.device_put(p["w"], jax.devices()[0]), SQUARE, "io"),
  "sharding_constraint": (
    lambda p, x: x @ lax.with_sharding_constraint(
      p["w"], jax.sharding.NamedSharding(LEFT, jax.P("x"))
    ),
    SQUARE, "io",
  ),
  "optimization_barrier": (
    lambda p, x: lax.optimization_barrier((x, p["w"]))[0] @ lax.optimization_barrier(p["w"]),
    SQUARE, "io",
  ),
  "select": (lambda p, x: x @ jnp.where(jnp.eye(11) > 0, 0.0, p["w"]), SQUARE, "io"),
  "mask": (lambda p, x: x @ masked(p["w"]), SQUARE, "io"),
  "rows and columns scaled": (
    lambda p, x: x @ (jnp.arange(11.0)[:, None] * p["w"] / jnp.arange(1.0, 12.0)), SQUARE, "io",
  ),
  "normalised": (
    lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)), SQUARE, "io",
  ),
  "standardised": (
    lambda p, x: x @ ((p["w"] - p["w"].mean(0)) * lax.rsqrt(p["w"].var(0) + 1e-5)), SQUARE, "io",
  ),
  "elementwise": (lambda p, x: x @ jnp.tanh(jnp.clip(p["w"], -1, 1) ** 3), SQUARE, "io"),
  "rounded": (
    lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.round(p["w"] * 8) / 8 - p["w"])),
    SQUARE, "io",
  ),
  "noise by a key": (
    lambda p, x: x @ (p["w"] * jax.random.bernoulli(jax.random.key(0), 0.9, (11, 11))),
    SQUARE, "io",
  ),
  "carry of fori": (carried(lambda p: p), SQUARE, "io"),
  "carry, cast and scaled": (
    carried(lambda p: {"w": 0.9 * p["w"].astype(jnp.bfloat16).astype(jnp.float32)}), SQUARE, "io",
  ),
  "carry of fori under jit": (jax.jit(carried(lambda p: p)), SQUARE, "io"),
  "carry of fori under remat": (jax.checkpoint(carried(lambda p: p)), SQUARE, "io"),
  "carry of fori, a jit in its body": (carried(lambda p: p, jax.jit), SQUARE, "io"),
  "carry of fori, a remat in its body": (carried(lambda p: p, jax.checkpoint), SQUARE, "io"),
  "carry that changes places": (
    lambda p, x: lax.fori_loop(0, 3, lambda _, s: (s[1], s[0], s[2] @ s[0]), (p["a"], p["b"], x)),
    {"a": SQUARE["w"], "b": SQUARE["w"]}, "io",
  ),
  "carry that becomes the leaf": (
    lambda p, x: x @ lax.fori_loop(0, 2, lambda _, h: p["w"], jnp.ones((11, 11))), SQUARE, "io",
  ),
  "after a loop": (lambda p, x: x @ lax.fori_loop(0, 3, lambda _, w: 2 * w, p["w"]), SQUARE, "io"),
  "results of a loop": (
    lambda p, x: layers(lax.map(lambda w: w / jnp.linalg.norm(w), p["w"]), x), STACKED, "sio",
  ),
  "condition of a while": (
    lambda p, x: lax.while_loop(lambda s: (s @ p["w"]).sum() < 9, lambda s: s + 1, x),
    SQUARE, "io",
  ),
  "one of two": (
    lambda p, x: x @ lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["b"]),
    {"a": SQUARE["w"], "b": SQUARE["w"]}, "io",
  ),
}  # fmt: skip


@pytest.mark.parametrize(("f", "params", "roles"), FOLLOWED.values(), ids=FOLLOWED)
def test_leaves_are_followed_through_what_moves_joins_or_changes_them(f, params, roles):
  axes = trace_axes(f, params, normal(3, 11))
  expected = dict.fromkeys(params, roles) if roles else {"a": "io", "b": "oi", "c": "io"}
  assert {path: found.roles for path, found in axes.items()} == expected


def test_a_reshard_is_followed():
  mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P("x"))
  axes = trace_axes(lambda p, x: x @ jax.sharding.reshard(p["w"], sharding), SQUARE, normal(3, 11))
  assert axes["w"].roles == "io"


def test_every_primitive_that_has_a_rule_has_a_step():
  assert set(lora_jax.RULES) - {None} <= set(STEPS)


@pytest.mark.parametrize(
  ("f", "shape", "rows"),
  [
    (lambda p, x: [x @ w for w in jnp.split(p["w"], 3, 1)], (11, 12), 3),
    (lambda p, x: x @ p["w"][:, :4], (11, 12), 1),
    (lambda p, x: [x @ w for w in p["w"]], (3, 11, 12), 3),
    (lambda p, x: x @ jnp.tile(p["w"], (1, 2)), (11, 12), 6),
    (lambda p, x: jnp.einsum("bd,bdk->bk", x, jnp.broadcast_to(p["w"], (3, 11, 12))), (11, 12), 3),
    (lambda p, x: x @ jnp.concatenate([p["w"], jnp.zeros((11, 2))], 1), (11, 12), 3),
  ],
  ids=["split", "a third", "layers", "tiled", "broadcast", "concatenated"],
)
def test_a_part_of_a_leaf_meets_its_rows_and_no_more(f, shape, rows):
  assert trace_axes(f, {"w": normal(*shape)}, normal(3, 11))["w"].rows == rows


JOINED = {
  "added": lambda p, x: (x + p["p"]) @ p["w"],
  "multiplied": lambda p, x: (x * p["p"]) @ p["w"],
  "prepended": lambda p, x: jnp.concatenate([p["p"], x]) @ p["w"],
  "where": lambda p, x: jnp.where(x > 0, x, p["p"]) @ p["w"],
  "in a scan": lambda p, x: lax.scan(lambda h, _: (h + p["p"], 0), x, length=2)[0] @ p["w"],
  "moved first": lambda p, x: (p["p"].T.T + jnp.sin(x)) @ p["w"],
}


@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined_with_activations_is_no_kernel_of_the_next_layer(name):
  f, params, x = JOINED[name], {"p": normal(3, 11), "w": normal(11, 13)}, normal(3, 11)
  found = [trace_axes(f, params, x)]
  if name != "multiplied":  # a closed-over array that multiplies a leaf may be its mask
    found.append(trace_axes(lambda p: f(p, x), params))
  for axes in found:
    assert axes["w"].roles == "io"
    assert (axes["p"].roles, axes["p"].uses) == ("", ())
    assert "joined with activations" in axes.reasons["p"]


def test_a_vector_that_scales_a_kernel_s_columns_is_no_kernel():
  params = {"v": normal(11, 13), "g": normal(1, 13)}
  axes = trace_axes(lambda p, x: x @ (p["g"] * p["v"]), params, X)
  assert (axes["v"].roles, axes["g"].roles, axes["g"].uses) == ("io", "", ())


@pytest.mark.parametrize(
  ("f", "roles"),
  [
    (lambda p, x: (x @ p["w"], jnp.vdot(p["w"], p["w"]))[0], "io"),
    (lambda p, x: x @ p["w"] + jnp.vdot(p["w"], p["w"]), "io"),
    (lambda p, x: x @ (p["w"] / (jnp.ones((1, 13)) @ (p["w"].T @ jnp.ones((11, 1))))), "io"),
    (lambda p, x: p["w"][jnp.arange(3), jnp.arange(3)] + (x @ p["w"])[:, 0], "io"),
  ],
  ids=["unused penalty", "penalty first", "power iteration", "single elements"],
)
def test_a_use_that_does_not_tell_the_roles_leaves_it_to_another(f, roles):
  assert trace_axes(f, W_13, X)["w"].roles == roles


def test_a_lookup_of_one_row_for_each_id_under_vmap_is_a_lookup():
  def f(p, ids):
    return jnp.sin(jax.vmap(lambda i: p["embed"][i])(ids)) @ p["embed"].T

  mapped = trace_axes(f, EMBED, IDS[0])["embed"]
  assert mapped == trace_axes(PROGRAMS["tied embedding and head"].f, EMBED, IDS[0])["embed"]
  assert (mapped.roles, mapped.uses) == ("io", ("gather", "dot_general"))


def test_the_input_gradient_of_a_convolution_and_its_transpose_swap_inputs_and_outputs():
  def convolve(x, w):
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

  def gradient(p, y):
    return jax.linear_transpose(lambda x: convolve(x, p["w"]), jnp.ones((1, 4, 12)))(y)

  kernel = {"w": normal(3, 12, 8)}
  assert trace_axes(lambda p, x: convolve(x, p["w"]), kernel, normal(1, 4, 12))["w"].roles == "iio"
  assert trace_axes(gradient, kernel, normal(1, 4, 8))["w"].roles == "ioi"
  for transposed, roles in ((False, "iio"), (True, "ioi")):
    model = nn.ConvTranspose(6, (3,), transpose_kernel=transposed)
    params = jax.eval_shape(model.init, jax.random.key(0), normal(1, 4, 12))
    axes = trace_axes(model.apply, params, normal(1, 4, 12))
    assert axes["params/kernel"].roles == roles


# ---- what they are not followed through


@pytest.mark.parametrize(
  ("f", "reason"),
  [
    (lambda p, x: x @ jnp.zeros((2, 11, 13)).at[0].set(p["w"])[0], "not followed: scatter"),
    (lambda p, x: x + p["w"].sum(1), "not followed: reduce_sum"),
    (lambda p, x: jnp.where(p["w"].T > 0, 0.0, 1.0) @ x.T, "not followed: gt"),
    (lambda p, x: x, "the function never contracts it"),
    (lambda p, x: x @ p["w"].reshape(-1)[:11], "dot_general leaves it no input or no output"),
  ],
)
def test_a_leaf_without_roles_has_a_reason(f, reason):
  axes = trace_axes(f, W_13, X)
  assert axes["w"].roles == "" and axes.reasons == {"w": reason}
  assert (reason in str(axes)) == reason.startswith("not followed")


def test_printing_a_leaf_is_no_use_of_it():
  def f(p, x):
    jax.debug.print("{}", p["w"])
    return x @ p["w"]

  assert trace_axes(f, W_13, X)["w"].roles == "io"


@pytest.mark.parametrize(
  ("f", "primitive", "parameter"),
  [
    (lambda p, x: x @ p["w"].T.T, primitives.transpose_p, "permutation"),
    (lambda p, x: x @ p["w"], primitives.dot_general_p, "dimension_numbers"),
    (lambda p, x: layers(p["w"][None], x), compat.scan_p, "num_consts"),
    (lambda p, x: layers(p["w"][None], x), compat.scan_p, "length"),
  ],
)
def test_a_parameter_that_another_release_of_jax_renames_is_a_reason(
  f, primitive, parameter, monkeypatch
):
  make_jaxpr = jax.make_jaxpr

  def renamed(eqn):
    if eqn.primitive is not primitive:
      return eqn
    kept = {k: v for k, v in eqn.params.items() if k not in (parameter, "ft_in")}
    return eqn.replace(params=kept)

  def traced(f):
    def make(*args):
      closed = make_jaxpr(f)(*args)
      eqns = [renamed(eqn) for eqn in closed.jaxpr.eqns]
      return jex.ClosedJaxpr(closed.jaxpr.replace(eqns=eqns), closed.consts)

    return make

  monkeypatch.setattr(jax, "make_jaxpr", traced)
  reason = trace_axes(f, {"w": normal(11, 11)}, X).reasons["w"]
  assert reason.startswith(f"not followed: {primitive.name} (it has no parameter '")


def test_a_number_and_a_key_among_the_parameters_are_leaves_without_roles():
  params = {"w": normal(11, 13), "scale": 0.5, "key": jax.random.key(0)}
  axes = trace_axes(lambda p, x: p["scale"] * (x @ p["w"]), params, X)
  assert {path: a.roles for path, a in axes.items()} == {"w": "io", "scale": "", "key": ""}


# ---- convolutions without a trace


class Convolutions(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x)
    return nn.Conv(8, (3, 3), feature_group_count=4, name="conv_depthwise")(x)


def shaped(**leaves):
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def test_convolutions_with_a_bias_need_no_trace_and_get_the_roles_that_it_finds():
  model, x = Convolutions(), normal(1, 5, 5, 3)
  params = jax.eval_shape(model.init, jax.random.key(0), x)
  specs = lora_jax.match(params, [("all-linear", LoRA(rank=1, alpha=1.0))])
  traced = trace_axes(model.apply, params, x)
  key = jax.random.key(0)
  without = lora_jax.init(key, params, specs)
  assert jax.tree.all(
    jax.tree.map(jnp.array_equal, without, lora_jax.init(key, params, specs, traced))
  )
  assert {path: a.roles for path, a in without.items()} == {
    "params/Conv_0/kernel": "iiio",
    "params/conv_depthwise/kernel": "iiio",
  }


@pytest.mark.parametrize(
  ("module", "leaves", "roles"),
  [
    ("Conv_0", shaped(kernel=(3, 4, 8), bias=(8,)), "iio"),
    ("conv1", {"kernel": shaped(value=(3, 4, 8)), "bias": shaped(value=(8,))}, "iio"),
    ("conv3_d", shaped(w=(3, 3, 3, 4, 8), b=(8,)), "iiiio"),
    ("Conv_0", shaped(kernel=(3, 4, 8)), ""),  # three layers of 1x1, without a bias?
    ("Conv_0", shaped(kernel=(2, 3, 3, 4, 8), bias=(2, 8)), ""),  # scanned
    ("conv", shaped(kernel=(8, 3, 8), bias=(8, 8)), ""),  # an ensemble by vmap
    ("Conv_0", shaped(kernel=(2, 3, 3, 3, 4, 8), bias=(8,)), ""),
    ("ConvTranspose_0", shaped(kernel=(3, 8, 8), bias=(8,)), ""),
    ("conv_transpose1", shaped(kernel=(3, 8, 8), bias=(8,)), ""),
    ("ConvLocal_0", shaped(kernel=(3, 4, 8), bias=(8,)), ""),
    ("blocks", shaped(kernel=(3, 4, 8), bias=(8,)), ""),
    ("Conv_0", shaped(weight=(8, 4, 3), bias=(8,)), ""),
  ],
)
def test_a_bias_proves_that_no_stack_leads_a_convolution_s_kernel(module, leaves, roles):
  tree = lora_jax.tree.flatten({"net": {module: leaves}})
  path = next(path for path in tree if not path.split("/")[2].startswith("b"))
  assert convolution_roles(path, tree) == roles


def test_a_leaf_whose_roles_nothing_tells_is_refused_with_those_that_it_may_have():
  params, spec = {"conv": shaped(kernel=(8, 3, 4))}, LoRA(rank=1, alpha=1.0)
  with pytest.raises(
    ValueError, match=r"conv/kernel: which of the axes of \(8, 3, 4\) are"
  ) as error:
    lora_jax.init(jax.random.key(0), params, {"conv/kernel": spec})
  for roles in ("'iio' (8×3 in, 4 out)", "'ioo' (8 in, 3×4 out)", "'sio' (8 stacked, 3 in, 4 out)"):
    assert roles in str(error.value)


def test_axes_of_a_leaf_with_other_axes_are_refused():
  axes = trace_axes(lambda p, x: x @ p["w"], {"w": normal(11, 13)}, X)
  with pytest.raises(ValueError, match=r"w: its shape is \(3, 11, 13\), and the axes 'io' were"):
    spec = {"w": LoRA(rank=1, alpha=1.0)}
    lora_jax.init(jax.random.key(0), {"w": normal(3, 11, 13)}, spec, axes)


@pytest.mark.parametrize("model", [nn.Dense(4), nn.Sequential([nn.Dense(4)])])
def test_parameters_given_to_apply_directly_are_explained(model):
  x = jnp.ones((2, 3))
  variables = model.init(jax.random.key(0), x)
  remedy = "trace_axes(lambda params, x: model.apply({'params': params}, x), params, x)"
  with pytest.raises(flax.errors.FlaxError) as caught:
    trace_axes(model.apply, variables["params"], x)
  assert remedy in str(caught.value.__notes__)
  with pytest.raises(flax.errors.FlaxError) as caught:
    trace_axes(model.apply, {"params": {}}, x)
  assert remedy not in str(caught.value.__notes__)
