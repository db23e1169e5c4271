"""Chosen rows of an embedding, against the dense array and against peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jax import lax
from jaxprs import full_size_values
from peers import peft, torch
from tolerances import assert_close

import lora_jax
from lora_jax import Full, TokenRows, adapt, attach, init, match
from lora_jax import weights as kinds

KEY = jax.random.key(0)
V, D, IDS = 17, 11, (12, 3, 16)
TOKENS = jnp.array([[3, 0, 16, 3, 12], [1, 2, 12, 4, 16]])


def rows(w, dw=None, axis=0):
  """A weight with some rows moved."""
  w = normal(V, D) if w is None else w
  adapter = init(KEY, {"w": w}, {"w": TokenRows(ids=IDS, axis=axis)})["w"]
  return attach({"w": w}, {"w": jax.tree.map(lambda x: x + normal(*x.shape), adapter)})["w"]


LOOKUPS = {
  "brackets": lambda w, t: w[t],
  "one row of tokens": lambda w, t: w[t[0]],
  "negative ids": lambda w, t: w[t - V],
  "filled": lambda w, t: jnp.take(w, 2 * t, axis=0, fill_value=0.5),
  "clipped": lambda w, t: jnp.take(w, 2 * t - 5, axis=0, mode="clip"),
  "wrapped": lambda w, t: jnp.take(w, 2 * t, axis=0, mode="wrap"),
  "small integers": lambda w, t: w[t.astype(jnp.uint8)],
  "of the transpose": lambda w, t: w.T[:, t],
  "scaled": lambda w, t: (3.0 * w)[t],
  "cast": lambda w, t: w.astype(jnp.bfloat16)[t].astype(jnp.float32),
}


@pytest.mark.parametrize("lookup", LOOKUPS.values(), ids=LOOKUPS)
def test_a_look_up_is_that_of_the_dense_array_and_so_is_its_gradient(lookup):
  w = rows(None)
  dtype = "bfloat16" if lookup is LOOKUPS["cast"] else "float32"

  def loss(w):
    return jnp.sum(jnp.sin(lookup(w, TOKENS)))

  assert_close(adapt(lookup, strict=True)(w, TOKENS), lookup(w.materialize(), TOKENS), dtype)
  ours = jax.grad(adapt(loss, strict=True))(w)
  assert_close(ours, jax.grad(lambda w: loss(lora_jax.materialize(w)))(w), dtype)


PRODUCTS = {
  "tied head": (lambda w, x: x @ w.T, normal(2, 5, D)),
  "by einsum": (lambda w, x: jnp.einsum("vd,btd->vbt", w, x), normal(2, 5, D)),
  "one-hot rows": (lambda w, x: x @ w, jax.nn.one_hot(TOKENS, V)),
  "token by token": (lambda w, x: jnp.einsum("vd,vd->v", w, x), normal(V, D)),
  "integers": (lambda w, x: x @ w, jnp.arange(2 * V).reshape(2, V) % 4),
}


@pytest.mark.parametrize(("product", "x"), PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_is_that_of_the_dense_array_and_forms_none(product, x):
  w = rows(None)
  assert_close(adapt(product, strict=True)(w, x), product(w.materialize(), x))

  def loss(w, x):
    return jnp.sum(jnp.sin(product(w, x)))

  assert_close(
    jax.grad(adapt(loss, strict=True))(w, x),
    jax.grad(lambda w, x: loss(lora_jax.materialize(w), x))(w, x),
  )
  train, frozen = lora_jax.partition(w, w.trainable())
  f = jax.grad(lambda train: adapt(loss)(lora_jax.join(train, frozen), x))
  base = full_size_values(loss, (w.w, x), {(V, D)})
  if x.shape != (V, D):
    assert full_size_values(f, (train,), {(V, D)}) == base


def test_embedding_and_tied_head_share_the_rows():
  def model(w, tokens):
    return jnp.tanh(w[tokens]) @ w.T

  w = rows(None)
  assert_close(adapt(model, strict=True)(w, TOKENS), model(w.materialize(), TOKENS))


def test_the_kernel_of_a_head_has_its_tokens_on_the_other_axis():
  w = rows(normal(D, V), axis=1)
  assert (w.roles, w.dw.shape) == ("oi", (3, D))
  change = w.materialize() - w.w
  np.testing.assert_allclose(change[:, jnp.array(IDS)], w.dw.T, atol=1e-6)
  assert set(np.flatnonzero(np.abs(change).max(0))) == set(IDS)
  x = normal(2, D)
  assert_close(adapt(lambda w, x: x @ w, strict=True)(w, x), x @ w.materialize())


def test_rows_says_what_the_rows_are_in_the_order_of_the_ids():
  for w in (rows(None), rows(normal(D, V), axis=1)):
    dense = w.materialize() if w.roles == "io" else w.materialize().T
    assert_close(w.rows, dense[jnp.array(IDS)])


def test_rows_of_another_model_are_refused():
  adapter = rows(None).detach()
  for shape in [(16, D), (V, 12), (V,), (2, V, D + 1)]:
    with pytest.raises(ValueError, match=r"made for another model"):
      attach({"w": jnp.zeros(shape)}, {"w": adapter})


@pytest.mark.parametrize("ids", [(), (3, 3), (-1, 2)])
def test_ids_that_are_no_set_of_tokens_are_refused(ids):
  with pytest.raises(ValueError, match="one or more tokens, each once, none below 0"):
    TokenRows(ids=ids)


def test_a_token_that_the_embedding_has_not_is_refused():
  with pytest.raises(ValueError, match=r"w: token 17 is not among the 17 of \(17, 11\)"):
    init(KEY, {"w": normal(V, D)}, {"w": TokenRows(ids=(2, 17))})


def test_what_is_not_defined_is_refused_in_strict_mode_with_the_reason():
  w = rows(None)
  for f, words in [
    (lambda w: w[:, jnp.arange(3)], "along the axis of the tokens"),
    (lambda w: lax.dynamic_slice(w, (2, 0), (3, D)), "no factored form of dynamic_slice"),
    (lambda w: w.astype(jnp.int32), "int32"),
  ]:
    with pytest.raises(lora_jax.MaterializationError, match=words):
      adapt(f, strict=True)(w)
    assert_close(adapt(f)(w), f(w.materialize()))


def test_a_batch_of_adapters_is_mapped_over():
  adapter = rows(None).detach()
  two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), adapter)
  base = {"w": normal(V, D)}

  def f(adapter, tokens):
    return adapt(lambda p, t: jnp.sin(p["w"][t]) @ p["w"].T, strict=True)(
      attach(base, {"w": adapter}), tokens
    )

  each = [f(jax.tree.map(lambda x, n=n: x[n], two), TOKENS[n]) for n in range(2)]
  assert_close(jax.vmap(f)(two, TOKENS), jnp.stack(each))


class TorchModel(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.embed = torch.nn.Embedding(V, D)
    self.head = torch.nn.Linear(D, V, bias=False)

  def forward(self, tokens):
    return self.head(torch.sin(self.embed(tokens)))


def test_training_is_that_of_peft_s_trainable_tokens():
  module = TorchModel()
  params = {
    "embed": jnp.asarray(module.embed.weight.detach().numpy()),
    "head": jnp.asarray(module.head.weight.detach().numpy().T),
  }
  theirs = peft.get_peft_model(
    module, peft.TrainableTokensConfig(target_modules=["embed", "head"], token_indices=list(IDS))
  )
  targets = np.asarray(TOKENS, np.int64)[:, ::-1].copy()
  optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)

  specs = match(params, [("embed", TokenRows(ids=IDS)), ("head", TokenRows(ids=IDS, axis=1))])
  adapters = init(KEY, params, specs)

  def loss(adapters):
    logits = adapt(lambda p, t: jnp.sin(p["embed"][t]) @ p["head"], strict=True)(
      attach(params, adapters), TOKENS
    )
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()

  for _ in range(5):
    optimizer.zero_grad()
    logits = theirs(torch.tensor(np.asarray(TOKENS)))
    peer = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    peer.backward()
    value, gradient = jax.value_and_grad(loss)(adapters)
    np.testing.assert_allclose(value, peer.item(), rtol=1e-5)
    optimizer.step()
    adapters = jax.tree.map(lambda x, g: x - 0.5 * g, adapters, gradient)
  state = peft.get_peft_model_state_dict(theirs)
  for path, weight in attach(params, adapters).items():
    (stored,) = (x.numpy() for name, x in state.items() if f".{path}." in f".{name}.")
    np.testing.assert_allclose(weight.rows, stored, rtol=1e-5, atol=1e-6)


def test_a_base_that_trained_in_full_keeps_its_rows_apart():
  params = {"w": normal(V, D)}
  weights = attach(params, init(KEY, params, {"w": Full()}))
  outer = attach(weights, init(KEY, weights, {"w": TokenRows(ids=IDS)}))
  outer = jax.tree.map(lambda x: x + 0.1, outer)
  assert isinstance(outer["w"].w, kinds.Full)
  assert_close(
    adapt(lambda p: p["w"][TOKENS], strict=True)(outer), outer["w"].materialize()[TOKENS]
  )
