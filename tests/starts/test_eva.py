"""EVA against the SVD of the inputs in float64, and against PEFT's where both subtract no mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from peers import peft, torch

import lora_jax
from lora_jax import Axes, LoRA, PiSSA, adapt, attach, eva, initializers
from lora_jax.calibration import Moments, second_moments

SPEC = LoRA(rank=2, alpha=3.0)


def spectrum(d: int, seed: int, decay: float) -> np.ndarray:
  """Rows [30, d] with singular values that fall by a factor, and their negatives: no mean."""
  rng = np.random.default_rng(seed)
  u, v = (np.linalg.qr(rng.standard_normal(shape))[0] for shape in ((15, d), (d, d)))
  x = (u * decay ** np.arange(d)) @ v.T
  return np.concatenate([x, -x]).astype(np.float32)


# Three kernels, of which one has all the variance of its inputs in few directions.
INPUTS = {"sharp": spectrum(9, 0, 0.2), "flat": spectrum(9, 1, 0.9), "middle": spectrum(7, 2, 0.5)}
PARAMS = {name: normal(x.shape[1], 13) for name, x in INPUTS.items()}
SPECS = dict.fromkeys(PARAMS, SPEC)


def f(params, inputs):
  return sum(inputs[name] @ w for name, w in params.items())


@pytest.fixture(scope="module")
def moments():
  return second_moments(f, PARAMS, PARAMS, [INPUTS])


def ranks_of(adapters):
  return {path: adapter.rank for path, adapter in adapters.items()}


def same_directions(a, v, tolerance=1e-4):
  """Asserts that the columns of a are those of v, but for their signs."""
  np.testing.assert_allclose(np.abs(np.sum(np.asarray(a) * v, 0)), 1.0, atol=tolerance)
  np.testing.assert_allclose(np.linalg.norm(a, axis=0), 1.0, atol=1e-5)


@pytest.mark.parametrize("iterations", [None, 4])
def test_a_starts_from_the_right_singular_vectors_of_the_inputs_and_b_from_zero(
  moments, iterations
):
  adapters = eva.start(PARAMS, SPECS, moments, iterations=iterations)
  assert ranks_of(adapters) == {"sharp": 1, "flat": 3, "middle": 2}
  for path, adapter in adapters.items():
    v = np.linalg.svd(INPUTS[path].astype(np.float64))[2].T[:, : adapter.rank]
    same_directions(adapter.a, v)
    assert adapter.b.shape == (adapter.rank, 13) and not adapter.b.any()
    assert adapter.scale == 1.5
  weights = attach(PARAMS, adapters)
  np.testing.assert_array_equal(jax.jit(adapt(f))(weights, INPUTS), jax.jit(f)(PARAMS, INPUTS))


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 4.0])
def test_the_ranks_are_one_budget_that_goes_to_what_explains_most(moments, rho):
  adapters = eva.start(PARAMS, SPECS, moments, rho=rho)
  # The greedy choice, one column at a time.
  shares, expected = {}, dict.fromkeys(PARAMS, 0)
  for path, x in INPUTS.items():
    s = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    shares[path] = s**2 / np.sum(s**2)
  for _ in range(6):
    open_ = [path for path in PARAMS if expected[path] < round(2 * rho)]
    expected[max(open_, key=lambda path: shares[path][expected[path]])] += 1
  assert ranks_of(adapters) == {path: rank for path, rank in expected.items() if rank}
  assert sum(ranks_of(adapters).values()) == 6


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_the_start_is_peft_s(moments, rho):
  class Parallel(torch.nn.Module):
    def __init__(self):
      super().__init__()
      for name, w in PARAMS.items():
        setattr(self, name, torch.nn.Linear(*w.shape, bias=False))

    def forward(self, inputs):
      return sum(getattr(self, name)(x) for name, x in inputs.items())

  config = peft.LoraConfig(
    r=2,
    init_lora_weights="eva",
    target_modules=list(PARAMS),
    eva_config=peft.EvaConfig(rho=rho, tau=0.9999),
  )
  inputs = {"inputs": {name: torch.tensor(x) for name, x in INPUTS.items()}}
  theirs = peft.tuners.lora.eva.get_eva_state_dict(
    Parallel(),
    [inputs],
    config,
    prepare_model_inputs_fn=None,
    prepare_layer_inputs_fn=None,
    show_progress_bar=False,
  )
  ours = eva.start(PARAMS, SPECS, moments, rho=rho)
  assert ranks_of(ours) == {path: len(v) for path, v in theirs.items() if len(v)}
  for path, adapter in ours.items():
    same_directions(adapter.a, theirs[path].numpy().T, tolerance=1e-2)


STACK = jnp.stack([normal(9, 13), normal(9, 13) * 2, normal(9, 13) + 0.1])
STACKED_INPUTS = jnp.stack([spectrum(9, n, decay) for n, decay in enumerate((0.2, 0.9, 0.6))])


def stacked(params, x):
  return jnp.sum(jnp.tanh(jnp.einsum("snd,sdk->snk", x, params["layers"])), axis=0)


def unstacked(params, x):
  return sum(jnp.tanh(x[n] @ params[f"layer_{n}"]) for n in range(3))


def test_layers_of_a_stack_start_and_train_as_they_would_unstacked():
  axes = {"layers": Axes("sio", ("dot_general",))}
  starts = {}
  for g, params in (
    (stacked, {"layers": STACK}),
    (unstacked, {f"layer_{n}": STACK[n] for n in range(3)}),
  ):
    specs = dict.fromkeys(params, SPEC)
    moments = second_moments(
      g, params, params, [STACKED_INPUTS], axes=axes if g is stacked else None
    )
    adapters = eva.start(params, specs, moments, axes=axes if g is stacked else None)

    def loss(adapters, g=g, params=params):
      return jnp.mean((adapt(g)(attach(params, adapters), STACKED_INPUTS) - 1) ** 2)

    gradient = jax.jit(jax.grad(loss))
    for _ in range(5):
      adapters = jax.tree.map(lambda x, d: x - 0.5 * d, adapters, gradient(adapters))
    starts[g] = adapters
  layers, alone = starts[stacked]["layers"], starts[unstacked]
  own = [alone[f"layer_{n}"].rank for n in range(3)]
  assert sum(own) == 6 and min(own) < max(own) == layers.rank
  for n, rank in enumerate(own):
    np.testing.assert_allclose(layers.a[n][:, :rank], alone[f"layer_{n}"].a, atol=1e-5)
    np.testing.assert_allclose(layers.b[n][:rank], alone[f"layer_{n}"].b, atol=1e-5)
    assert not layers.a[n][:, rank:].any() and not layers.b[n][rank:].any()
    assert layers.b[n][:rank].any()


@pytest.mark.parametrize(
  ("roles", "shape", "equation"),
  [("ioo", (12, 3, 5), "nd,dhk->nhk"), ("iio", (3, 4, 5), "nab,abk->nk")],
)
def test_a_kernel_of_several_axes_starts_in_all_its_inputs(roles, shape, equation):
  x = spectrum(12, 0, 0.7)
  params, axes = {"w": normal(*shape)}, {"w": Axes(roles, ("dot_general",))}
  rows = x.reshape(30, *[n for n, role in zip(shape, roles, strict=True) if role == "i"])
  moments = second_moments(
    lambda p, x: jnp.einsum(equation, x, p["w"]), params, ["w"], [rows], axes=axes
  )
  adapter = eva.start(params, {"w": SPEC}, moments, axes=axes)["w"]
  same_directions(adapter.a.reshape(12, 2), np.linalg.svd(x.astype(np.float64))[2].T[:, :2])
  assert np.isfinite(
    adapt(lambda p, x: jnp.einsum(equation, x, p["w"]))(attach(params, {"w": adapter}), rows)
  ).all()


def test_a_randomised_start_explains_nearly_as_much_as_the_exact_one():
  x = normal(200, 64) * 0.95 ** jnp.arange(64)
  params = {"w": normal(64, 80)}
  moments = second_moments(lambda p, x: x @ p["w"], params, ["w"], [x])
  starts = [
    eva.start(params, {"w": LoRA(rank=8, alpha=8.0)}, moments, iterations=n)["w"].a
    for n in (None, 0, 4)
  ]
  exact, rough, fine = (float(np.sum((x @ a) ** 2)) for a in starts)
  assert rough < fine <= exact * (1 + 1e-5) and fine > 0.999 * exact
  for a in starts:
    np.testing.assert_allclose(a.T @ a, np.eye(8), atol=1e-5)


def test_an_expert_without_rows_gets_no_rank_while_others_want_it():
  x, axes = spectrum(9, 1, 0.9), {"w": Axes("sio", ("ragged_dot_general",))}
  moments = second_moments(
    lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([30, 0], jnp.int32)),
    {"w": normal(2, 9, 13)},
    ["w"],
    [x],
    axes=axes,
  )
  adapter = eva.start({"w": normal(2, 9, 13)}, {"w": SPEC}, moments, axes=axes)["w"]
  assert adapter.rank == 4
  assert jnp.any(adapter.a, axis=1).sum(-1).tolist() == [4, 0]


def test_a_kernel_whose_rank_comes_out_as_zero_gets_no_adapter():
  one = np.zeros((4, 4), np.float32)
  one[0, 0] = 1.0
  even = np.eye(4, dtype=np.float32)
  moments = {"one": Moments(one, np.array(1.0)), "even": Moments(even, np.array(4.0))}
  moments["two"] = Moments(one / 2 + one[::-1, ::-1] / 2, np.array(1.0))
  params = {name: normal(4, 5) for name in moments}
  adapters = eva.start(params, dict.fromkeys(params, LoRA(rank=1, alpha=1.0)), moments)
  assert ranks_of(adapters) == {"one": 1, "two": 2}


def test_what_does_not_train_or_drops_is_the_spec_s():
  spec = LoRA(rank=2, alpha=3.0, rslora=True, train_a=False, dropout=0.1)
  moments = second_moments(f, PARAMS, PARAMS, [INPUTS])
  adapters = eva.start(PARAMS, dict.fromkeys(PARAMS, spec), moments)
  for adapter in adapters.values():
    assert (adapter.scale, adapter.dropout) == (spec.scale, 0.1)
    mask = adapter.unseal().trainable()
    assert (mask.a, mask.b) == (False, True)


def start_of(change=lambda moments: moments, spec=SPEC, **settings):
  ok = {"w": Moments(jnp.eye(11), jnp.array(4.0))}
  return eva.start({"w": normal(11, 13)}, {"w": spec}, change(ok), **settings)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"rho": 0.5}, "EVA: rho 0.5 is below 1"),
    ({"spec": PiSSA(rank=2, alpha=1.0)}, "w: EVA is a start of LoRA, and the spec is PiSSA"),
    (
      {"spec": LoRA(rank=2, alpha=1.0, initializer=initializers.gaussian)},
      "w: EVA is a start, and so is the spec's initializer",
    ),
    ({"spec": LoRA(rank=12, alpha=1.0)}, r"w: rank 12 exceeds min\(11, 13\)"),
    ({"change": lambda moments: {}}, "w: has no moments"),
    (
      {"change": lambda ok: {"w": Moments(jnp.ones(11), jnp.array(4.0))}},
      r"w: the moments are \(11,\), and EVA needs \(11, 11\).*diagonal=False",
    ),
    (
      {"change": lambda ok: {"w": Moments(jnp.full((11, 11), jnp.inf), jnp.array(4.0))}},
      "w: the moments are not finite",
    ),
  ],
)
def test_what_eva_cannot_start_from_is_refused(settings, words):
  assert lora_jax.is_weight(start_of()["w"])
  with pytest.raises(ValueError, match=words):
    start_of(**settings)


@pytest.mark.parametrize("method", [lora_jax.EVA, lora_jax.LoftQ])
def test_init_refuses_what_starts_from_more_than_the_base_and_summary_counts_it(method):
  specs = lora_jax.match(PARAMS, [(".*", method(rank=2, alpha=3.0))])
  start = f"lora_jax.{method.__name__.lower()}.start"
  with pytest.raises(ValueError, match=f"{method.__name__} starts from more than .* by {start}"):
    lora_jax.init(jax.random.key(0), PARAMS, specs)
  shapes = [leaf.shape for leaf in PARAMS.values()]
  assert lora_jax.summary(PARAMS, specs).trainable == sum(2 * (d + k) for d, k in shapes)
