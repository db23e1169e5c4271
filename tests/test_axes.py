"""The roles of a leaf's axes, as the function that uses it says them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from programs import EMBED, HEADS, IDS, LAYERS, NESTED, PROGRAMS, X, attention, normal, scanned

import lora_jax
from lora_jax import LoRA, trace_axes
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
    "bias": "", "kernel": "io", "scale": "", "unused": "",
  }  # fmt: skip
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
    "query/kernel": "ioo", "key/kernel": "ioo", "value/kernel": "ioo", "out/kernel": "iio",
  }  # fmt: skip


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
