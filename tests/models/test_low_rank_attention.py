"""Nyström attention and Linformer against formulas with every matrix in full, and in the models."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

import lora_jax
from lora_jax import families, tree
from lora_jax.models import bert, encoder_attention, vit
from lora_jax.models import low_rank_attention as low_rank
from lora_jax.models.attention import attend
from lora_jax.models.attention_kernels import Choice
from lora_jax.models.low_rank_attention import Linformer, Nystrom

SEEN_BT = np.arange(24) < np.array((24, 13, 3))[:, None]
HOW = Nystrom(landmarks=6, iterations=6)


def arrays(length=24, batch=3, seed=0, heads=1, features=8):
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.normal(size=(batch, length, heads, features)), jnp.float32) for _ in range(3)
  )


def segments(length, count):
  """The tokens of each segment that has any, by Python's own arithmetic."""
  found = [[t for t in range(length) if t * count // length == m] for m in range(count)]
  return [tokens for tokens in found if tokens]


def softmax(scores, counts=1.0):
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True)) * jnp.asarray(counts)
  return weights / weights.sum(axis=-1, keepdims=True)


def of_each_text(one, seen_BT, *arrays_BTNH):
  """`one` on the tokens of each text and head alone; zeros at padding."""
  batch, length, heads, _ = arrays_BTNH[0].shape
  rows = []
  for b in range(batch):
    n = length if seen_BT is None else int(seen_BT[b].sum())
    each = [one(*(x[b, :n, h] for x in arrays_BTNH)) for h in range(heads)]
    rows.append(jnp.pad(jnp.stack(each, axis=1), ((0, length - n), (0, 0), (0, 0))))
  return jnp.stack(rows)


def plain_nystrom(query, key, value, how=HOW):
  """Section 3 of the paper for one text and head, [T, H]."""
  tokens, scale = segments(len(query), how.landmarks), query.shape[-1] ** -0.5
  counts = np.array([len(x) for x in tokens], np.float32)
  mean_query, mean_key = (jnp.stack([x[np.array(t)].mean(0) for t in tokens]) for x in (query, key))
  left = softmax(query @ mean_key.T * scale, counts)
  middle = softmax(mean_query @ mean_key.T * scale, counts)
  right = softmax(mean_query @ key.T * scale)
  eye = jnp.eye(len(tokens))
  inverse = middle.T / (middle.sum(0).max() * middle.sum(1).max())
  for _ in range(how.iterations):
    az = middle @ inverse
    inverse = 0.25 * inverse @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
  return left @ inverse @ right @ value


def only_seen(out_BTNH):
  return jnp.where(SEEN_BT[..., None, None], out_BTNH, 0)


@pytest.mark.parametrize("seen_BT", [None, SEEN_BT], ids=["whole", "padded"])
def test_nystrom_and_its_gradients_are_those_of_the_matrices_in_full(seen_BT):
  inputs = arrays()

  def value(f, *x):
    return jnp.sum(jnp.sin(f(*x)))

  def ours(*x):
    out = low_rank.nystrom(*x, seen_BT, HOW)
    return out if seen_BT is None else only_seen(out)

  def oracle(*x):
    return of_each_text(plain_nystrom, seen_BT, *x)

  np.testing.assert_allclose(jax.jit(ours)(*inputs), jax.jit(oracle)(*inputs), rtol=2e-4, atol=2e-5)
  found, expected = (jax.jit(jax.grad(lambda x, f=f: value(f, *x)))(inputs) for f in (ours, oracle))
  for x, y in zip(found, expected, strict=True):
    assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y)


def projections(rows=24, rank=6):
  rng = np.random.default_rng(7)
  start = low_rank.segment_means(None, (rows, rank))
  return tuple(start + 0.1 * rng.normal(size=start.shape).astype("f") for _ in range(2))


def plain_linformer(query, key, value, keys_PM, values_PM):
  """Section 4 of the paper for one text and head; of a shorter one by the rule of `linformer`."""
  (rows, rank), n = keys_PM.shape, len(query)
  at = np.array([t * rows // n for t in range(n)])
  own = at * rank // rows
  counts = np.array([np.sum(own == m) for m in range(rank)], np.float32)
  sizes = np.array([np.sum(np.arange(rows) * rank // rows == m) for m in range(rank)])
  scale = np.where(counts > 0, sizes / np.maximum(counts, 1), 0)
  scores = query @ ((keys_PM[at] * scale).T @ key).T * query.shape[-1] ** -0.5
  return softmax(scores, counts) @ ((values_PM[at] * scale).T @ value)


@pytest.mark.parametrize("seen_BT", [None, SEEN_BT], ids=["whole", "padded"])
@pytest.mark.parametrize("rows", [24, 10, 64])
def test_linformer_and_its_gradients_are_those_of_the_matrices_in_full(seen_BT, rows):
  inputs = (*arrays(), *projections(rows))

  def ours(*x):
    out = low_rank.linformer(*x, seen_BT)
    return out if seen_BT is None else only_seen(out)

  def oracle(query, key, value, *along):
    def one(*x):
      return plain_linformer(*x, *along)

    return of_each_text(one, seen_BT, query, key, value)

  assert_close(ours(*inputs), oracle(*inputs))
  found, expected = (
    jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(*x)))))(inputs) for f in (ours, oracle)
  )
  assert_close(found, expected)


def test_for_a_text_of_as_many_tokens_as_rows_linformer_is_the_papers_formula():
  query, key, value = arrays(batch=1, heads=1)
  keys_PM, values_PM = projections()
  found = low_rank.linformer(query, key, value, keys_PM, values_PM, None)[0, :, 0]
  q, k, v = (x[0, :, 0] for x in (query, key, value))
  expected = softmax(q @ (keys_PM.T @ k).T * 8**-0.5) @ (values_PM.T @ v)
  assert_close(found, expected)


# ---- exact where the matrix is of low rank


def constant_in_segments(lengths, count, seed=1):
  """Queries, keys and values that are the same for all tokens of a segment of their text."""
  wide = arrays(count, len(lengths), seed)
  rows = []
  for b, n in enumerate(lengths):
    at = np.minimum(np.arange(max(lengths)) * count // n, count - 1)
    rows.append([x[b, at] for x in wide])
  return tuple(map(jnp.stack, zip(*rows, strict=True)))


@pytest.mark.parametrize("lengths", [(24, 24), (24, 17)], ids=["whole", "padded"])
def test_both_are_exact_where_the_attention_matrix_has_no_more_than_their_rank(lengths):
  query, key, value = constant_in_segments(lengths, 6)
  seen_BT = np.arange(24) < np.array(lengths)[:, None]
  exact = attend(query, key, value, mask=seen_BT[:, None, None])
  # The matrices have this rank, and values that vary with the token have no part in that.
  for b, n in enumerate(lengths):
    weights = softmax(query[b, :n, 0] @ key[b, :n, 0].T * 8**-0.5)
    assert np.linalg.matrix_rank(np.asarray(weights), tol=1e-5) == 6
  other = arrays(24, 2, seed=5)[2]
  for own in (value, other):
    exact = attend(query, key, own, mask=seen_BT[:, None, None])
    found = low_rank.nystrom(query, key, own, seen_BT, Nystrom(landmarks=6, iterations=24))
    np.testing.assert_allclose(jnp.where(seen_BT[..., None, None], found - exact, 0), 0, atol=2e-4)
  start = low_rank.segment_means(None, (24, 6))
  for own in (value, other):  # the mean of a segment's values is all that exact attention sees
    exact = attend(query, key, own, mask=seen_BT[:, None, None])
    found = low_rank.linformer(query, key, own, start, start, seen_BT)
    np.testing.assert_allclose(jnp.where(seen_BT[..., None, None], found - exact, 0), 0, atol=1e-5)
  off = low_rank.linformer(*arrays(24, 2), start, start, seen_BT)
  assert np.abs(off - attend(*arrays(24, 2), mask=seen_BT[:, None, None])).max() > 0.1


@pytest.mark.parametrize("rank", [24, 40])
def test_both_are_exact_with_a_landmark_for_every_token(rank):
  inputs = arrays()
  exact = only_seen(attend(*inputs, mask=SEEN_BT[:, None, None]))
  start = low_rank.segment_means(None, (40, rank))
  how = Nystrom(landmarks=rank, iterations=20)
  found = only_seen(low_rank.nystrom(*inputs, SEEN_BT, how))
  np.testing.assert_allclose(found, exact, atol=2e-4)
  if rank == 40:  # as many as rows
    np.testing.assert_allclose(
      only_seen(low_rank.linformer(*inputs, start, start, SEEN_BT)), exact, atol=1e-5
    )


def test_the_iteration_ends_at_the_pseudo_inverse_also_of_singular_matrices_and_zeros():
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  singular = ((basis[:, :3] * [1.0, 0.6, 0.3]) @ basis[:, 3:].T).astype(np.float32)
  cut = np.array(softmax(2 * jnp.eye(6) + jnp.asarray(rng.normal(size=(6, 6)))), np.float32)
  cut[4:], cut[:, 4:] = 0, 0
  for matrix in (singular, cut):
    found = low_rank.pseudo_inverse(jnp.asarray(matrix), 9)
    expected = np.linalg.pinv(matrix.astype(np.float64), rcond=1e-5)
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())
  # Rounding errors outside the rank grow, as the docstring says.
  far = low_rank.pseudo_inverse(jnp.asarray(singular), 40)
  assert not np.allclose(far, np.linalg.pinv(singular, rcond=1e-5), atol=0.1)
  zero = jnp.zeros((6, 6))
  assert not np.asarray(low_rank.pseudo_inverse(zero, 6)).any()
  assert np.isfinite(jax.grad(lambda x: low_rank.pseudo_inverse(x, 6).sum())(zero)).all()


# ---- padding


@pytest.mark.parametrize("kind", ["nystrom", "linformer"])
def test_padding_changes_nothing_wherever_it_is_and_a_row_of_it_is_finite(kind):
  start = low_rank.segment_means(None, (32, 6))

  def run(seen_BT, *x):
    if kind == "nystrom":
      return low_rank.nystrom(*x, seen_BT, HOW)
    return low_rank.linformer(*x, start, start, seen_BT)

  inputs = arrays(13, 1)
  alone = jax.jit(functools.partial(run, None))(*inputs)
  padded = [jnp.pad(x, ((0, 0), (4, 7), (0, 0), (0, 0)), constant_values=99.0) for x in inputs]
  seen_BT = jnp.asarray((np.arange(24) >= 4) & (np.arange(24) < 17))[None]
  found = jax.jit(run)(seen_BT, *padded)[:, 4:17]
  np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
  none = jnp.zeros_like(seen_BT)

  def total(x):
    return jnp.sum(run(none, *x))

  for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(total))(padded)):
    assert np.isfinite(leaf).all()


# ---- memory


@pytest.mark.parametrize("kind", ["plain", "nystrom", "linformer"])
def test_temporary_memory_grows_linearly_with_the_tokens(kind):
  start = low_rank.segment_means(None, (512, 32))

  def run(seen_BT, *x):
    match kind:
      case "nystrom":
        return low_rank.nystrom(*x, seen_BT, Nystrom(landmarks=32, iterations=6))
      case "linformer":
        return low_rank.linformer(*x, start, start, seen_BT)
    return attend(*x, mask=seen_BT[:, None, None], choice=Choice("plain"))

  def bytes_of(length):
    x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
    seen = jax.ShapeDtypeStruct((1, length), jnp.bool_)
    grad = jax.jit(jax.grad(lambda x, seen: run(seen, *x).sum()))
    return grad.lower((x, x, x), seen).compile().memory_analysis().temp_size_in_bytes

  before, after = bytes_of(1024), bytes_of(4096)
  if kind == "plain":
    assert after > 9 * before and after > 4096 * 4096 * 4
  else:
    assert after < 4.5 * before and after < 4096 * 4096 * 4 / 4


# ---- models

BERT = bert.BertConfig(
  vocab_size=64,
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=2,
  head_dim=8,
  max_length=32,
  classes=("a", "b"),
)
VIT = vit.ViTConfig(
  width=16,
  mlp_width=24,
  num_layers=2,
  num_heads=2,
  head_dim=8,
  image_size=20,
  patch_size=4,
  classes=("a", "b"),
)
TOKENS_BT = jnp.asarray(np.random.default_rng(2).integers(5, 64, (3, 24)), jnp.int32)
IMAGES = jnp.asarray(np.random.default_rng(2).normal(size=(2, 20, 20, 3)), jnp.float32)


def logits(config, how, scan=False, adapted=False, spread=1.0):
  """The logits of a model whose leaves do not depend on its attention.

  spread: multiplies the kernels of queries and keys. At 1 the tokens of a random model are much
    alike, and its matrix of attention is nearly singular.
  """
  config = dataclasses.replace(config, attention=how, scan_layers=scan)
  model = families.family_of(config).make_model(config)
  inputs, options = (TOKENS_BT,), {"mask_BT": SEEN_BT}
  if config.family == "vit":
    inputs, options = (IMAGES,), {}
  params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
  is_spread = re.compile(r".*/(query|key)/kernel").fullmatch
  params = tree.map_with_path(lambda path, x: x * spread if is_spread(path) else x, params)
  apply = lora_jax.adapt(model.apply, strict=True)
  if not adapted:
    return apply({"params": params}, *inputs, **options)
  axes = lora_jax.trace_axes(lambda p, x: model.apply({"params": p}, x), params, inputs[0])
  rules = []
  if adapted == "full" and encoder_attention.adds_leaves(config):
    rules = [(encoder_attention.PATTERN, lora_jax.Full())]
  specs = lora_jax.match(params, [*rules, ("all-linear", lora_jax.LoRA(rank=2, alpha=4.0))], axes)
  adapters = lora_jax.init(jax.random.key(1), params, specs, axes)
  adapters = jax.tree.map(lambda x: x + 0.02, adapters)

  def run(tree):
    return apply({"params": lora_jax.attach(params, tree)}, *inputs, **options)

  return specs, jax.jit(jax.grad(lambda tree: jnp.sin(run(tree)).sum(), allow_int=True))(adapters)


@pytest.mark.slow
@pytest.mark.parametrize(
  "config", [pytest.param(BERT, id="bert", marks=pytest.mark.slow), pytest.param(VIT, id="vit")]
)
def test_a_model_with_a_landmark_for_every_token_has_the_logits_of_exact_attention(config):
  exact = logits(config, Choice("plain"), spread=6.0)
  found = logits(config, Nystrom(landmarks=32, iterations=20), spread=6.0)
  np.testing.assert_allclose(found, exact, atol=1e-4)
  few = logits(config, Nystrom(landmarks=2, iterations=6), spread=6.0)
  assert np.abs(few - exact).max() > 0.5
  # P of the ViT is 26, and of the BERT 32.
  rank = 26 if config is VIT else 32
  whole, cut = (logits(config, Linformer(rank=r), spread=6.0) for r in (rank, 2))
  np.testing.assert_allclose(whole, exact, atol=1e-5)
  assert np.abs(cut - exact).max() > 0.5


@pytest.mark.parametrize(
  ("config", "how", "scan"),
  [
    pytest.param(BERT, HOW, True, id="bert-nystrom-scanned"),
    pytest.param(VIT, Linformer(rank=6), False, id="vit-linformer"),
    *(
      pytest.param(config, how, scan, marks=pytest.mark.slow)
      for config, how, scan in [
        (BERT, HOW, False),
        (BERT, Linformer(rank=6), False),
        (BERT, Linformer(rank=6), True),
        (VIT, HOW, False),
        (VIT, HOW, True),
        (VIT, Linformer(rank=6), True),
      ]
    ),
  ],
)
def test_adapters_train_on_it_factored_and_its_own_leaves_in_full(config, how, scan):
  """Also in strict mode, which raises where a full matrix would be made."""
  specs, gradients = logits(config, how, scan, adapted="full")
  own = [path for path, spec in specs.items() if isinstance(spec, lora_jax.Full)]
  layers = 1 if scan else config.num_layers
  assert len(own) == (2 * layers if isinstance(how, Linformer) else 0)
  for path in own:
    leaf = jax.tree.leaves(gradients[path])[0]
    assert leaf.shape[-2:] == (26 if config is VIT else 32, 6) and np.abs(leaf).max() > 0
  plain, _ = logits(config, how, scan, adapted=True)  # no preset takes them for kernels
  assert not [path for path in plain if "_along" in path]


@pytest.mark.parametrize("how", [Nystrom, Linformer])
def test_settings_out_of_range_are_refused(how):
  name = "landmarks" if how is Nystrom else "rank"
  rest = {"iterations": 6} if how is Nystrom else {}
  for value in (0, True, 1.5, 1 << 17):
    with pytest.raises(ValueError, match=f"{how.__name__}: {name} must be a whole number from 1"):
      how(**{name: value}, **rest)
  with pytest.raises(ValueError, match="attention 'nystrom' is no Choice, Nystrom or Linformer"):
    dataclasses.replace(BERT, attention="nystrom")
