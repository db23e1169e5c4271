"""How far two results may lie apart: the one table, by dtype, and the comparison that uses it."""

import jax
import jax.numpy as jnp
import numpy as np

# Of the difference's norm, relative to that of the expected array. A bfloat16 keeps 8 bits, and a
# factored product rounds its two thin products where the oracle rounds the sum of the weights; in
# a second derivative the oracle itself is 5 % from the float32 one, the factored product 3 %.
TOLERANCES = {"float32": 1e-5, "bfloat16": 8e-2}


def assert_close(actual, expected, dtype: str = "float32") -> None:
  """Asserts that two pytrees have one structure, shapes and dtypes, and close values.

  Args:
    actual, expected: pytrees of arrays.
    dtype: the coarsest dtype of the arithmetic; what is no float must be equal.
  """
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
  for (key_path, x), y in pairs:
    where = jax.tree_util.keystr(key_path) or "the result"
    assert (jnp.shape(x), jnp.result_type(x)) == (jnp.shape(y), jnp.result_type(y)), where
    if not jnp.issubdtype(jnp.result_type(y), jnp.inexact):
      np.testing.assert_array_equal(_bits(x), _bits(y), err_msg=where)
      continue
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    error, size = np.linalg.norm(x - y), np.linalg.norm(y)
    assert error <= TOLERANCES[dtype] * max(size, 1e-3), f"{where}: {error} of {size}"


def _bits(x):
  return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
