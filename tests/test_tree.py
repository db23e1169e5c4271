"""Slash paths, partition and join, on any pytree."""

import flax.core
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weight_table import low_rank

import lora_jax
from lora_jax import is_weight, tree

KERNEL = np.ones((4, 3), np.float32)

leaves = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
names = st.text("abc_1", min_size=1, max_size=3)
pytrees = st.recursive(
  leaves,
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(names, inner, max_size=3)
    | st.dictionaries(names, inner, max_size=3).map(flax.core.freeze)
  ),
  max_leaves=12,
)


def test_paths_are_keys_joined_by_slashes_in_every_container():
  params = {
    "block_0": flax.core.freeze({"kernel": 1}),
    "layers": [{"w": 2}, (3, None)],
    "point": optax.TraceState(trace=4),
  }
  assert tree.flatten(params) == {
    "block_0/kernel": 1,
    "layers/0/w": 2,
    "layers/1/0": 3,
    "point/trace": 4,
  }


def test_the_paths_of_an_nnx_state_are_those_of_its_attributes():
  class Model(flax.nnx.Module):
    def __init__(self, rngs):
      self.layers = flax.nnx.List([flax.nnx.Linear(2, 3, rngs=rngs)])

  _, state = flax.nnx.split(Model(flax.nnx.Rngs(0)))
  arrays = flax.nnx.to_pure_dict(state)
  assert list(tree.flatten(arrays)) == ["layers/0/bias", "layers/0/kernel"]


def test_two_leaves_of_one_path_are_refused():
  with pytest.raises(ValueError, match="a/b: two leaves have this path; rename one of them"):
    tree.flatten({"a/b": 1, "a": {"b": 2}})


def test_replace_exchanges_leaves_and_keeps_the_containers():
  params = flax.core.freeze({"a": (1, 2), "b": 3})
  assert tree.replace(params, {"a/1": 9}) == flax.core.freeze({"a": (1, 9), "b": 3})


def test_replace_refuses_a_path_that_the_tree_has_not():
  with pytest.raises(ValueError, match="no leaf at a/2, c"):
    tree.replace({"a": (1, 2)}, {"c": 0, "a/2": 0, "a/1": 0})


@given(pytrees, st.randoms(use_true_random=False))
def test_join_is_the_inverse_of_partition(params, random):
  mask = jax.tree.map(lambda _: random.random() < 0.5, params)
  selected, rest = lora_jax.partition(params, mask)
  assert lora_jax.join(selected, rest) == params
  assert len(jax.tree.leaves(selected)) == sum(jax.tree.leaves(mask))
  assert len(jax.tree.leaves(selected)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(params))


@given(pytrees)
def test_one_bool_is_the_mask_of_a_whole_subtree(params):
  both = {"head": params, "body": params}
  selected, rest = lora_jax.partition(both, {"head": True, "body": False})
  assert selected == {"head": params, "body": jax.tree.map(lambda _: None, params)}
  assert lora_jax.join(selected, rest) == both


def test_partition_goes_through_weights_leaf_by_leaf():
  weights = {"kernel": low_rank(jnp.asarray(KERNEL), "io"), "bias": jnp.ones(3)}
  train, frozen = lora_jax.partition(weights, lora_jax.trainable_mask(weights))
  assert train["kernel"].w is None and frozen["kernel"].a is None and train["bias"] is None
  joined = lora_jax.join(train, frozen)
  assert all(x is y for x, y in zip(jax.tree.leaves(joined), jax.tree.leaves(weights), strict=True))
  assert is_weight(joined["kernel"])
