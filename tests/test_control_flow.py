"""What is particular to functions that hold functions: gradients, policies, names, reasons."""

import jax
import jax.numpy as jnp
import pytest
from functions import LAYER, LAYERS, dense, normal, scanned, up_down, wrong_jvp, wrong_vjp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxprs import compilations, equations
from programs import PROGRAMS
from tolerances import assert_close
from weight_table import low_rank

import lora_jax
from lora_jax import MaterializationError, adapt, materialize

W, X = low_rank(normal(11, 13), "io"), normal(3, 11)


@pytest.mark.parametrize(("wrong", "factor"), [(wrong_jvp, 3), (wrong_vjp, -2)])
@pytest.mark.parametrize("of_weight", [True, False], ids=["of the weight", "of activations"])
def test_the_author_s_gradient_is_kept_though_it_is_not_the_true_one(wrong, factor, of_weight):
  def f(wrap, p, x):
    if of_weight:
      return jnp.sum(wrap(lambda w, x: x @ w)(p["w"], x))
    return jnp.sum(wrap(jnp.sin)(x @ p["w"]))

  def gradients(wrap):
    return jax.grad(adapt(lambda p, x: f(wrap, p, x)), (0, 1))({"w": W}, X)

  true, kept = gradients(lambda f: f), gradients(wrong)
  assert_close(kept, jax.tree.map(lambda g: factor * g, true))


def test_the_author_s_gradient_is_kept_inside_a_jitted_remat_in_a_scan():
  @jax.jit
  @jax.checkpoint
  def body(p, x):
    return wrong_vjp(jnp.sin)(x @ p["up"]) @ p["down"]

  def loss(p, x):
    return jnp.sum(scanned(p, x, body=body)[0])

  layers = {name: low_rank(w, "sio") for name, w in LAYERS.items()}
  expected = jax.grad(lambda p, x: loss(materialize(p), x))(layers, X)
  assert_close(jax.grad(adapt(loss, strict=True))(layers, X), expected)


def saved(f, *args) -> list[tuple[int, ...]]:
  """The shapes of what the forward pass keeps for the backward pass, sorted."""
  _, pullback = jax.vjp(f, *args)
  return sorted(x.shape for x in jax.tree.leaves(pullback) if hasattr(x, "shape"))


@pytest.mark.parametrize(
  ("policy", "keeps_hidden"),
  [
    (jax.checkpoint_policies.everything_saveable, True),
    (jax.checkpoint_policies.nothing_saveable, False),
    (jax.checkpoint_policies.save_only_these_names("hidden"), True),
    (jax.checkpoint_policies.save_only_these_names("another"), False),
    (jax.checkpoint_policies.save_any_names_but_these("hidden"), False),
  ],
)
def test_a_remat_keeps_what_its_policy_says(policy, keeps_hidden):
  def block(p, x):
    hidden = checkpoint_name(jnp.sin(x @ p["up"]), "hidden")
    return jnp.sum(jnp.sin(hidden @ p["down"]))

  f = jax.checkpoint(block, policy=policy)
  weights = {name: low_rank(w, "io") for name, w in LAYER.items()}
  assert ((3, 13) in saved(f, LAYER, X)) == keeps_hidden
  assert ((3, 13) in saved(adapt(f, strict=True), weights, X)) == keeps_hidden


def test_keeping_products_keeps_their_sum_and_not_the_terms():
  def block(p, x):
    return jnp.sum(jnp.sin(jnp.sin(x @ p["up"]) @ p["down"]))

  weights = {name: low_rank(w, "io") for name, w in LAYER.items()}
  kept = {}
  for policy in (lora_jax.products_saveable, jax.checkpoint_policies.dots_saveable):
    f = adapt(jax.checkpoint(block, policy=policy), strict=True)
    kept[policy] = [shape for shape in saved(f, weights, X) if shape in ((3, 11), (3, 13))]
  ours, usual = kept.values()
  assert sorted(ours) == [(3, 11), (3, 11), (3, 13)]  # x, and what each product returns
  assert len(usual) > len(ours)


def test_a_remat_keeps_its_protection_from_common_subexpressions():
  for prevent_cse in (True, False):
    f = adapt(jax.checkpoint(dense, prevent_cse=prevent_cse))
    found = [
      eqn.params["prevent_cse"]
      for eqn in equations(jax.make_jaxpr(f)({"w": W}, X))
      if "prevent_cse" in eqn.params
    ]
    assert found == [prevent_cse]


def test_a_scan_stays_one_scan_however_many_layers_it_has():
  layers = {name: low_rank(w, "sio") for name, w in LAYERS.items()}
  f = adapt(lambda p, x: scanned(p, x, reverse=True, unroll=2)[0], strict=True)
  (scan,) = [eqn for eqn in equations(jax.make_jaxpr(f)(layers, X)) if eqn.primitive.name == "scan"]
  assert (scan.params["length"], scan.params["reverse"], scan.params["unroll"]) == (3, True, 2)


def test_a_weight_that_rides_in_a_carry_is_not_carried():
  f = adapt(PROGRAMS["fori with the weights in its carry"].f, strict=True)
  weights = {name: low_rank(w, "io") for name, w in LAYER.items()}
  (scan,) = [
    eqn for eqn in equations(jax.make_jaxpr(f)(weights, X)) if eqn.primitive.name == "scan"
  ]
  carried = [v.aval.shape for v in scan.outvars]
  assert (3, 11) in carried and (11, 13) not in carried


def test_a_jitted_function_is_inlined_under_its_name_and_compiles_nothing_at_a_second_eager_call():
  @jax.jit
  def project(p, x):
    return x @ p["w"]

  f = adapt(lambda p, x: project(p, x))
  (product,) = [
    eqn
    for eqn in equations(jax.make_jaxpr(f)({"w": W}, X))
    if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.shape == (11, 13)
  ]
  assert "project" in str(product.source_info.name_stack)
  f({"w": W}, X)
  with compilations() as events:
    f({"w": W}, X)
  assert not [event for event in events if "backend_compile" in event]


def test_equations_keep_their_named_scope():
  @jax.named_scope("layer")
  def f(p, x):
    with jax.named_scope("attention"):
      return x @ p["w"]

  products = [
    eqn
    for eqn in jax.make_jaxpr(adapt(f))({"w": W}, X).eqns
    if eqn.primitive.name in ("dot_general", "jit")
  ]
  assert {str(eqn.source_info.name_stack) for eqn in products} == {"layer/attention"}
  assert len(products) == 2, "x w; and (x a) b, a function of its own"


@pytest.mark.parametrize("index", range(-1, 4))
def test_every_branch_of_a_switch_is_adapted_and_an_index_out_of_range_is_clamped(index):
  def f(p, x, index):
    branches = [lambda x: x @ p["up"], lambda x: -x @ p["up"], lambda x: x @ p["down"].T]
    return lax.switch(index, branches, x)

  weights = {name: low_rank(w, "io") for name, w in LAYER.items()}
  assert_close(adapt(f, strict=True)(weights, X, index), f(materialize(weights), X, index))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_cond_takes_the_branch_that_its_predicate_says(sign):
  def f(p, x):
    return lax.cond(jnp.sum(x) > 0, dense, lambda p, x: x @ p["w"], p, x)

  x = sign * abs(X)
  assert_close(adapt(f, strict=True)({"w": W}, x), f({"w": W.materialize()}, x))


def test_a_while_loop_whose_condition_needs_the_weight_runs_as_often_as_the_dense_one():
  program = PROGRAMS["while"]

  def counted(p, x):
    return lax.while_loop(
      lambda s: jnp.sum(abs(s[1] @ p["up"])) < 500,
      lambda s: (s[0] + 1, s[1] + up_down(p, s[1])),
      (0, x),
    )

  weights = {name: low_rank(w, "io") for name, w in program.params.items()}
  steps, _ = adapt(counted, strict=True)(weights, X)
  assert steps == counted(materialize(weights), X)[0] > 2


def test_a_refusal_inside_a_loop_names_path_primitive_reason_and_remedy():
  def f(p, x):
    return scanned(
      p, x, body=jax.checkpoint(lambda p, x: up_down({**p, "up": jnp.sin(p["up"])}, x))
    )

  layers = {"block": {name: low_rank(w, "sio") for name, w in LAYERS.items()}}
  with pytest.raises(
    MaterializationError,
    match=r"block/up: sin would materialize this LowRank of shape \(11, 13\): there is no rule for "
    r"sin\. Leave this path out of the targets, give adapt a rule .*, or use strict=False",
  ):
    adapt(lambda p, x: f(p["block"], x), strict=True)(layers, X)


def test_what_a_branch_cannot_keep_factored_is_materialized_in_that_branch_alone():
  def f(p, x):
    return lax.cond(jnp.sum(x) > 0, lambda x: x @ jnp.sin(p["w"]), lambda x: jnp.tan(x @ p["w"]), x)

  (cond,) = [
    eqn for eqn in equations(jax.make_jaxpr(adapt(f))({"w": W}, X)) if eqn.primitive.name == "cond"
  ]
  names = [[eqn.primitive.name for eqn in equations(branch)] for branch in cond.params["branches"]]
  (factored,) = [branch for branch in names if "tan" in branch]
  (materialized,) = [branch for branch in names if "sin" in branch]
  assert factored.count("dot_general") == 3
  assert materialized.count("dot_general") == 2, "a @ b, and x with the sine of the sum"


def test_a_leaf_that_a_scan_cannot_follow_is_materialized_alone_and_strict_mode_names_it():
  layers = {name: low_rank(w, "sio") for name, w in LAYERS.items()}
  layers["zz_shift"] = low_rank(normal(3, 11), "io")

  def f(p, x):
    return lax.scan(lambda h, layer: (up_down(layer, h) + layer["zz_shift"], None), x, p)[0]

  assert_close(adapt(f)(layers, X), f(materialize(layers), X))
  products = [
    eqn
    for eqn in equations(jax.make_jaxpr(adapt(f))(layers, X))
    if eqn.primitive.name == "dot_general"
  ]
  assert len(products) == 1 + 3 + 3, "a @ b of the shift; x w, x a and (x a) b of the others"
  with pytest.raises(MaterializationError, match=r"^0/zz_shift: scan .* that is not a stack"):
    adapt(f, strict=True)(layers, X)


def test_a_loop_materializes_what_it_changes_and_not_what_it_passes_on():
  def f(p, x):
    def step(_, state):
      p, x = state
      return {**p, "up": jnp.sin(p["up"])}, jax.jit(up_down)(p, x)

    return lax.fori_loop(0, 3, jax.checkpoint(step), (p, x))[1]

  weights = {name: low_rank(w, "io") for name, w in LAYER.items()}
  assert_close(adapt(f)(weights, X), f(materialize(weights), X))
  (scan,) = [
    eqn for eqn in equations(jax.make_jaxpr(adapt(f))(weights, X)) if eqn.primitive.name == "scan"
  ]
  carried = [v.aval.shape for v in scan.outvars]
  assert (11, 13) in carried and (13, 11) not in carried
  with pytest.raises(MaterializationError, match=r"^0/up: sin would materialize"):
    adapt(f, strict=True)(weights, X)


def test_a_branch_that_returns_another_weight_materializes_what_is_returned_alone():
  def f(p, x):
    w = lax.cond(jnp.sum(x) > 0, lambda p: p["up"], lambda p: p["down"].T, p)
    return x @ w + x @ p["up"]

  weights = {"up": low_rank(LAYER["up"], "io"), "down": LAYER["down"]}
  assert_close(adapt(f)(weights, X), f(materialize(weights), X))
  with pytest.raises(MaterializationError, match=r"^0/up: cond .* a branch returns the weight"):
    adapt(f, strict=True)(weights, X)


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_a_remat_in_a_gradient_inside_recomputes_as_it_does_without_adapters(prevent_cse):
  """JAX puts a barrier before what it recomputes, or the compiler would not recompute it."""
  block = jax.checkpoint(lambda p, x: jnp.sin(up_down(p, x)), prevent_cse=prevent_cse)

  def gradient(p, x):
    return jax.grad(lambda x: jnp.sum(block(p, block(p, x)) ** 2))(x)

  def barriers(f, p):
    lines = jax.jit(f).lower(p, X).as_text().splitlines()
    values = [line.count("tensor<") for line in lines if "optimization_barrier" in line]
    return sum(count > 1 for count in values)  # that of a product has one value

  weights = {name: low_rank(w, "io") for name, w in LAYER.items()}
  assert barriers(adapt(gradient), weights) == barriers(gradient, LAYER) == 2 * prevent_cse


def test_an_inner_jit_keeps_the_shardings_of_its_arguments_and_results():
  mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def on(*spec):
    return jax.sharding.NamedSharding(mesh, jax.P(*spec))

  inner = jax.jit(
    lambda w, x: x @ w, in_shardings=(on(None, "model"), on("data")), out_shardings=on("data")
  )
  jaxpr = jax.make_jaxpr(adapt(lambda p, x: inner(p["w"], x), strict=True))({"w": W}, X)
  found = {
    (eqn.invars[0].aval.shape, tuple(eqn.params["sharding"].spec))
    for eqn in equations(jaxpr)
    if eqn.primitive.name == "sharding_constraint"
  }
  assert found == {
    ((11, 13), (None, "model")),
    ((11, 2), (None, None)),
    ((2, 13), (None, "model")),
    ((3, 11), ("data",)),
    ((3, 13), ("data",)),
  }


def test_a_device_and_a_sharding_reach_every_part_of_a_weight():
  mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.P(None, "model"))
  for device in (jax.devices()[0], sharding):
    f = adapt(lambda p, x, device=device: x @ jax.device_put(p["w"], device), strict=True)
    assert_close(f({"w": W}, X), X @ W.materialize())
  specs = [
    tuple(place.spec)
    for eqn in equations(jax.make_jaxpr(f)({"w": W}, X))
    if eqn.primitive.name == "device_put"
    for place in eqn.params["devices"]
  ]
  assert sorted(map(str, specs)) == ["(None, 'model')", "(None, 'model')", "(None, None)"]
