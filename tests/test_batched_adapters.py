"""Adapters of one structure: switched, stacked, and a row of a batch each its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal
from jaxprs import compilations, full_size_values
from programs import PROGRAMS
from tolerances import assert_close
from weight_table import factors

import lora_jax
from lora_jax import LoRA, LowRank, adapt, align, attach, combine, gate, put, select, stack
from lora_jax.compose import combiners
from lora_jax.models import decode, llama

PARAMS = {"up": normal(11, 13), "down": normal(13, 11)}
X = normal(5, 11)
ROWS = normal(5, 2, 11)  # five rows of two inputs each

# The numbers are what is looked at here, and most of the time is the compiler's.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

pickers = pytest.mark.parametrize("pick", [select, gate], ids=["select", "gate"])


def model(p, x):
  return jnp.sin(x @ p["up"]) @ p["down"]


def adapter(w, roles: str, seed: int, rank=2, scale=0.5) -> LowRank:
  a, b = factors(w.shape, roles, seed, rank)
  return LowRank(None, a, b, scale, roles=roles.lstrip("s"))


ON_BOTH = {path: adapter(w, "io", 1) for path, w in PARAMS.items()}
OTHER = {path: adapter(w, "io", 2, rank=3, scale=1.5) for path, w in PARAMS.items()}
ON_ONE = {"down": adapter(PARAMS["down"], "io", 3, rank=1)}
NAMED = {"both": ON_BOTH, "other": OTHER, "one": ON_ONE}
ADAPTERS = list(NAMED.values())


@jax.jit
def forward(adapters, x):
  return adapt(model, strict=True)(attach(PARAMS, adapters), x)


def oracle(adapters, x):
  return model(lora_jax.merge(PARAMS, adapters), x)


def by_row(pick, f=model):
  """`(params, stacked, slots, rows) -> results`, each row by the adapter of its slot."""

  def forward(params, stacked, slots, rows):
    def row(slot, x):
      return adapt(f, strict=True)(attach(params, pick(stacked, slot)), x)

    return jax.vmap(row)(slots, rows)

  return forward


# ---- switched


def test_switching_between_aligned_adapters_compiles_nothing_and_computes_what_each_does():
  aligned = align(NAMED)
  forward(aligned["both"], X)
  with compilations() as events:
    found = {name: forward(adapters, X) for name, adapters in aligned.items()}
  assert not events
  for name, y in found.items():
    assert_close(y, oracle(NAMED[name], X))


def test_an_adapter_that_comes_later_is_aligned_to_a_rank_and_compiles_nothing():
  forward(align({"other": OTHER}, rank=4)["other"], X)
  late = align({"both": ON_BOTH}, rank=4)["both"]
  with compilations() as events:
    y = forward(late, X)
  assert not events
  assert_close(y, oracle(ON_BOTH, X))


def test_aligned_adapters_have_each_leaf_s_largest_rank_unless_told():
  aligned = align(NAMED)["one"]
  assert {path: x.rank for path, x in aligned.items()} == {"up": 3, "down": 3}
  assert {x.rank for x in align(NAMED, rank=5)["one"].values()} == {5}
  assert not np.any(aligned["up"].a) and not np.any(aligned["up"].b)


def test_aligning_keeps_the_change_and_leaves_out_what_only_training_needs():
  spec = LoRA(rank=2, alpha=8.0, dropout=0.5, train_a=False)
  trained = lora_jax.init(jax.random.key(0), PARAMS, dict.fromkeys(PARAMS, spec))
  trained = jax.tree.map(lambda x: x + 1, trained)
  aligned = align({"x": trained, "y": OTHER})
  assert jax.tree.structure(aligned["x"]) == jax.tree.structure(aligned["y"])
  assert (aligned["x"]["up"].dropout, aligned["x"]["up"].frozen) == (0.0, ())
  assert_close(lora_jax.merge(PARAMS, aligned["x"]), lora_jax.merge(PARAMS, trained))


def test_a_pissa_adapter_is_aligned_by_its_change_of_the_original_base():
  specs = dict.fromkeys(PARAMS, lora_jax.PiSSA(rank=2, alpha=2.0))
  fresh = lora_jax.init(jax.random.key(0), PARAMS, specs)
  moved = {path: dataclasses.replace(x, b=x.b + 0.1) for path, x in fresh.items()}
  aligned = align({"x": moved, "y": OTHER})
  assert aligned["x"]["up"].rank == 4
  assert_close(lora_jax.merge(PARAMS, aligned["x"]), lora_jax.merge(PARAMS, moved))


def test_two_adapters_at_once_are_attached_one_after_the_other_and_are_their_concatenation():
  both = adapt(model, strict=True)(attach(attach(PARAMS, ON_BOTH), OTHER), X)
  joined = combine([ON_BOTH, OTHER], [1.0, 1.0], combiners.cat)
  assert_close(both, forward(joined, X))
  assert_close(both, model(lora_jax.merge(lora_jax.merge(PARAMS, ON_BOTH), OTHER), X))


# ---- a row each its own


@pickers
def test_each_row_is_computed_by_the_adapter_of_its_slot(pick):
  slots = jnp.array([2, 0, 1, 1, 0])
  found = jax.jit(by_row(pick))(PARAMS, stack(ADAPTERS), slots, ROWS)
  expected = [oracle(ADAPTERS[slot], x) for slot, x in zip(slots, ROWS, strict=True)]
  assert_close(found, jnp.stack(expected))


@pickers
def test_neither_the_base_nor_a_merged_matrix_is_formed_for_a_row(pick):
  arguments = PARAMS, stack(ADAPTERS), jnp.array([2, 0, 1, 1, 0]), ROWS
  assert full_size_values(by_row(pick), arguments, {(11, 13)}) == 0


def test_the_gate_keeps_the_factors_out_of_the_batch():
  arguments = PARAMS, stack(ADAPTERS), jnp.zeros(17, jnp.int32), normal(17, 2, 11)
  # A factor of one row, or of all slots: [11, 3] and [11, 9].
  batched = {(17, 11, 3), (17, 3, 13), (17, 11, 9), (17, 9, 13)}
  assert full_size_values(by_row(gate), arguments, batched) == 0
  assert full_size_values(by_row(select), arguments, batched) > 0


@pytest.mark.parametrize(
  "name",
  [
    "attention with head axes",
    "experts as a batch axis",
    "scan over layers",
    "remat of a scan",
    "tied embedding and head",
    "embedding of heads",
    "convolution, strided and dilated",
    "transposed use",
    "cond",
  ],
)
def test_every_kind_of_kernel_takes_an_adapter_a_row(name):
  f, params, roles, x = PROGRAMS[name][:4]
  leaves = lora_jax.tree.flatten(params)
  adapters = [
    {path: adapter(leaves[path], each, seed) for path, each in roles.items()} for seed in (1, 2)
  ]
  rows = jnp.stack([x, x, x])
  slots = jnp.array([1, 0, 1])
  found = quick_jit(by_row(gate, f))(params, stack(adapters, slots=3), slots, rows)
  expected = [f(lora_jax.merge(params, adapters[slot]), x) for slot in slots]
  assert_close(found, jax.tree.map(lambda *xs: jnp.stack(xs), *expected))


@pickers
def test_a_slot_that_is_none_or_empty_is_the_base(pick):
  found = by_row(pick)(PARAMS, stack(ADAPTERS, slots=5), jnp.array([-1, 3, 4, 5, 99]), ROWS)
  assert_close(found, model(PARAMS, ROWS))


@pickers
def test_the_factors_in_the_stack_have_gradients_of_their_own_rows(pick):
  slots = jnp.array([2, 0, 0, 2, 0])
  stacked = stack(ADAPTERS)

  def total(stacked):
    return jnp.sum(by_row(pick)(PARAMS, stacked, slots, ROWS) ** 2)

  def total_alone(adapters, rows):
    return jnp.sum(oracle(adapters, rows) ** 2)

  gradient = quick_jit(jax.grad(total))(stacked)
  for slot, one in enumerate(align(dict(enumerate(ADAPTERS))).values()):
    expected = quick_jit(jax.grad(total_alone))(one, ROWS[slots == slot])
    assert_close(jax.tree.map(lambda x, n=slot: x[n], gradient), expected)


# ---- the stack


def test_a_slot_of_the_stack_is_the_aligned_adapter():
  stacked = stack(ADAPTERS, rank=4, slots=6)
  assert stacked["up"].a.shape == (6, 11, 4) and stacked["up"].b.shape == (6, 4, 13)
  for slot, one in enumerate(align(NAMED, rank=4).values()):
    assert_close(select(stacked, slot), one)
  assert not any(np.any(x[3:]) for x in jax.tree.leaves(stacked))


def test_putting_an_adapter_into_a_slot_replaces_it_alone_and_recompiles_nothing():
  serve = jax.jit(by_row(gate))
  stacked = stack([ON_BOTH, ON_BOTH], rank=3, slots=4)
  slots = jnp.array([0, 1, 2, 3, 1])
  put(stacked, 0, OTHER)
  serve(PARAMS, stacked, slots, ROWS)
  changed = put(put(put(stacked, 2, OTHER), 3, ON_ONE), 0, {})
  with compilations() as events:
    found = serve(PARAMS, changed, slots, ROWS)
  assert not events
  expected = [{}, ON_BOTH, OTHER, ON_ONE, ON_BOTH]
  assert_close(found, jnp.stack([oracle(x, row) for x, row in zip(expected, ROWS, strict=True)]))


def test_putting_is_jitted_with_a_traced_slot_and_may_give_its_stack_away():
  stacked = stack([ON_BOTH], rank=3, slots=3)
  expected = put(stacked, 1, OTHER)
  none = jax.jit(put)(stacked, jnp.int32(7), OTHER)
  assert_close(none, stacked)
  found = jax.jit(put, donate_argnums=0)(stacked, jnp.int32(1), OTHER)
  assert_close(found, expected)
  assert stacked["up"].a.is_deleted()


def test_several_fresh_adapters_are_stacked_as_they_are_for_training():
  specs = dict.fromkeys(PARAMS, LoRA(rank=2, alpha=4.0))
  keys = jax.random.split(jax.random.key(0), 3)
  fresh = jax.vmap(lambda key: lora_jax.init(key, PARAMS, specs))(keys)
  assert fresh["up"].a.shape == (3, 11, 2) and fresh["up"].scale == 2.0
  assert len(np.unique(fresh["up"].a)) == 66
  gradient = jax.vmap(jax.grad(lambda x: jnp.sum(forward(x, X) ** 2)))(fresh)
  assert np.all(np.any(gradient["up"].b, axis=(1, 2)))


# ---- a language model


@pytest.fixture(
  scope="module",
  params=[True, pytest.param(False, marks=pytest.mark.slow)],
  ids=["scanned layers", "named layers"],
)
def language_model(request):
  """A small Llama and two adapters of it."""
  config = llama.LlamaConfig(
    vocab_size=97,
    width=16,
    mlp_width=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_length=32,
    tie_embeddings=True,
    scan_layers=request.param,
  )
  module = llama.Llama(config)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(module.init)(jax.random.key(0), tokens)["params"]
  axes = lora_jax.trace_axes(lambda p, t: module.apply({"params": p}, t), params, tokens)
  leaves = lora_jax.tree.flatten(params)
  paths = lora_jax.match(params, [("all-linear", LoRA(rank=1, alpha=1.0))], axes)
  adapters = [
    {path: adapter(leaves[path], axes[path].roles, seed, rank) for path in paths}
    for seed, rank in ((1, 2), (2, 3))
  ]
  return module, params, adapters


@pickers
def test_a_llama_answers_each_row_with_its_own_adapter(language_model, pick):
  module, params, adapters = language_model
  tokens = jax.random.randint(jax.random.key(3), (4, 5), 0, 97)
  slots = [1, 0, 2, 1]

  def apply(p, tokens):
    return module.apply({"params": p}, tokens[None])[0]

  stacked = stack(adapters, slots=3)
  found = quick_jit(by_row(pick, apply))(params, stacked, jnp.array(slots), tokens)
  merged = [lora_jax.merge(params, each) for each in (*adapters, {})]
  alone = quick_jit(apply)
  expected = [alone(merged[slot], row) for slot, row in zip(slots, tokens, strict=True)]
  assert_close(found, jnp.stack(expected))


def test_texts_are_decoded_together_each_with_its_own_adapter(language_model):
  module, params, adapters = language_model
  prompts = jax.random.randint(jax.random.key(4), (3, 4), 0, 97)
  lengths = jnp.array([4, 2, 3])
  slots = [1, 0, 1]

  def text(params, prompt, length):
    cache = llama.init_cache(module.config, 1, 10)
    return decode.decode(
      adapt(module.apply, strict=True),
      params,
      prompt[None],
      length[None],
      steps=6,
      choose=decode.greedy,
      key=jax.random.key(0),
      eos_id=None,
      cache=cache,
    )[0]

  def row(stacked, slot, prompt, length):
    return text(attach(params, gate(stacked, slot)), prompt, length)

  together = quick_jit(jax.vmap(row, (None, 0, 0, 0)))
  found = together(stack(adapters), jnp.array(slots), prompts, lengths)
  merged = [lora_jax.merge(params, each) for each in adapters]
  alone = quick_jit(text)
  expected = [
    alone(merged[slot], prompt, length)
    for slot, prompt, length in zip(slots, prompts, lengths, strict=True)
  ]
  np.testing.assert_array_equal(found, jnp.stack(expected))
  assert len({tuple(tokens) for tokens in found.tolist()}) == 3


# ---- what is refused


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: align(NAMED, rank=2), "up: the adapter's rank 3 exceeds 2; .*to_lora"),
    (lambda: align({"x": ON_BOTH, "y": {"up": ON_ONE["down"]}}), "up: .* of different leaves"),
    (lambda: stack([], slots=3), "0 adapters do not fit 3 slots"),
    (lambda: stack(ADAPTERS, slots=2), "3 adapters do not fit 2 slots"),
    (lambda: put(stack([ON_BOTH]), 0, OTHER), "down: the adapter's rank 3 exceeds 2"),
    (lambda: put(stack([ON_ONE]), 0, ON_BOTH), "the stack has no adapters at up"),
    (lambda: put(stack([ON_BOTH]), 1, ON_BOTH), "slot 1 is not among the stack's 1"),
    (lambda: put(stack([ON_BOTH]), -1, ON_BOTH), "slot -1 is not among"),
    (lambda: gate(stack([ON_BOTH]), jnp.array([0, 0])), "gate selects one slot; map over several"),
    (
      lambda: align({"x": {"bias": lora_jax.Full().init(None, "bias", normal(11), "")}}),
      "bias: Full has no low-rank form of its own; .*to_lora",
    ),
  ],
)
def test_what_does_not_fit_is_refused_with_the_reason(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def test_a_stack_is_not_attached_to_a_base():
  with pytest.raises(ValueError, match="do not fit"):
    attach(PARAMS, stack(ADAPTERS))
