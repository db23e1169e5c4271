"""Low-rank factorization of a trained model: kernels replaced by two thin factors.

    paths  = factorization.select(params, ["all-linear"], axes)
    ranks  = dict.fromkeys(paths, 128)
    params = factorization.factorize(params, ranks, factorization.svd, axes=axes)
    logits = lora_jax.adapt(model.apply)({"params": params}, tokens)

A decomposition is a function `(path, matrix, rank) -> (a, b)` of a [d, k] matrix, in float64 on the
host: `svd`, `randomized`, `pivoted_qr`, or a `Whitened`, which weights errors by the model's use of
the kernel. Ranks are set by a fraction of the energy (`energy_ranks`) or by a budget
(`sensitivity.allocate`).

Sources: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, for the randomized decomposition; Wang
et al. 2024, SVD-LLM, arXiv 2403.07378, sections 3.2 and 3.3, for whitening and the update.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lora_jax import decompositions, targets, tree
from lora_jax.adapters import Method
from lora_jax.axes import Axes, roles_of
from lora_jax.weights import Factored, is_weight
from lora_jax.weights.factor_axes import part_sizes
from lora_jax.weights.probe import Moments

PyTree = Any
# scipy declares no types; `cast` says what it returns by these arguments.
Matrix = np.ndarray
Decompose = Callable[[str, Matrix, int], tuple[Matrix, Matrix]]


# ---- the choice of kernels


def select(
  params: PyTree, patterns: Sequence[str], axes: Mapping[str, Axes] | None = None
) -> list[str]:
  """Returns the paths of the kernels to compress, in the tree's order.

  Args:
    params: a pytree of arrays.
    patterns: presets or regular expressions for whole paths, as in `lora_jax.match`.
    axes: the result of `trace_axes`. Kernels of two axes (in, out) do not need it.

  Raises:
    ValueError: as `lora_jax.match` does; and if a kernel is a Weight already, has values that are
      not finite, or has no axis of inputs or of outputs.
  """
  specs = targets.match(params, [(pattern, Method()) for pattern in patterns], axes)
  leaves = tree.flatten(params, is_leaf=is_weight)
  for path in specs:
    leaf = leaves[path]
    if is_weight(leaf):
      raise ValueError(
        f"{path}: is compressed already, a {type(leaf).__name__}; leave it out, or start from the "
        "dense model"
      )
    if not isinstance(leaf, jax.ShapeDtypeStruct) and not bool(jnp.isfinite(leaf).all()):
      raise ValueError(f"{path}: holds NaN or infinity; the model is damaged")
    roles = roles_of(path, leaves, axes)
    if not {"i", "o"} <= set(roles):
      raise ValueError(f"{path}: its axes {roles!r} are not inputs and outputs; leave it out")
  return list(specs)


def sizes(leaf: Any, roles: str) -> tuple[int, int, int]:
  """The number of kernels in a leaf, and the inputs and outputs of each."""
  stack, inputs, outputs = (int(np.prod(part_sizes(leaf.shape, roles, x, 0))) for x in "sio")
  return stack, inputs, outputs


# ---- decompositions


def svd(path: str, matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
  """The best approximation of this rank in the Frobenius norm, by an exact SVD."""
  del path
  u, s, vt = scipy.linalg.svd(matrix, full_matrices=False)
  return _balanced(u, s, vt, rank)


def randomized(seed: int, iterations: int = 4) -> Decompose:
  """Returns an approximate `svd` that costs a few thin products, for kernels with large axes.

  Args:
    seed: the seed of the random start.
    iterations: subspace iterations; see `lora_jax.decompositions.randomized_svd`.
  """

  def decompose(path, matrix, rank):
    del path
    found = decompositions.randomized_svd(
      jax.random.key(seed), jnp.asarray(matrix, jnp.float32), rank, iterations
    )
    u, s, vt = (np.asarray(x, np.float64) for x in found)
    return _balanced(u, s, vt, rank)

  return decompose


def pivoted_qr(path: str, matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
  """The truncated QR decomposition with column pivoting, `W P = Q R`.

  a is [d, rank] with orthonormal columns; b is the first rows of R with its columns in the original
  order. The error is within a factor of the SVD's, and it is several times as fast. Exact for a
  matrix of this rank.
  """
  del path
  made = scipy.linalg.qr(matrix, mode="economic", pivoting=True)
  q, r, pivots = cast(tuple[Matrix, Matrix, np.ndarray], made)
  b = np.empty((rank, matrix.shape[1]))
  b[:, pivots] = r[:rank]
  return q[:, :rank], b


@dataclasses.dataclass(frozen=True)
class Whitened:
  """Factors that minimize the error of the model's results rather than of the kernel.

      minimize ‖Sᵀ (W - a b) R‖_F,     S Sᵀ = E[x xᵀ],   R Rᵀ = E[g gᵀ]

  With inputs alone, that is the mean square of x (W - a b), SVD-LLM's truncation-aware whitening.
  With gradients it approximates the change of the loss; see `compress.sensitivity`. It is used like
  the other decompositions: `Whitened(inputs)(path, matrix, rank)`.

  Attributes:
    inputs: `{path: Moments}` as `lora_jax.second_moments` returns them, whole matrices.
    gradients: `{path: [k, k]}` as `sensitivity.gradient_moments` returns them, or None.
    damping: added to the moments' diagonals, as a fraction of their mean. Without it, directions
      that do not occur in the calibration data would cost nothing.
  """

  inputs: Mapping[str, Moments]
  gradients: Mapping[str, np.ndarray] | None = None
  damping: float = 1e-3

  def __call__(self, path: str, matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    left, right = self._roots(path, matrix)
    whitened = _between(left, matrix, right)
    squares, vectors, on_the_left = _directions(whitened)
    assert vectors is not None
    vectors = vectors[:, :rank]
    # The matrix is projected on its first singular vectors, on its smaller side.
    a, b = (vectors, vectors.T @ whitened) if on_the_left else (whitened @ vectors, vectors.T)
    least = max(squares[0] * 1e-30, 1e-100)  # a kernel of zeros has factors of zeros
    scale = np.maximum(squares[:rank], least) ** (0.25 if on_the_left else -0.25)
    a, b = a * scale, b / scale[:, None]
    a = scipy.linalg.solve_triangular(left, a, lower=True, trans=1)
    if right is not None:
      b = scipy.linalg.solve_triangular(right, b.T, lower=True, trans=1).T
    return a, b

  def values(self, path: str, matrix: Matrix) -> np.ndarray:
    """The singular values of `Sᵀ W R`, descending: the value of each rank."""
    left, right = self._roots(path, matrix)
    squares, _, _ = _directions(_between(left, matrix, right), vectors=False)
    return np.sqrt(squares)

  def _roots(self, path: str, matrix: Matrix) -> tuple[Matrix, Matrix | None]:
    if path not in self.inputs:
      raise ValueError(f"{path}: has no moments of its inputs; add it to second_moments' paths")
    rows = check_rows(path, self.inputs[path], matrix.shape[0])
    left = factor_root(
      path, np.asarray(self.inputs[path].mean), matrix.shape[0], "inputs", self.damping
    )
    if self.gradients is None:
      return left, None
    total = np.asarray(self.gradients[path])
    return left, factor_root(path, total / rows, matrix.shape[1], "gradients", self.damping)


def _between(left: Matrix, matrix: Matrix, right: Matrix | None) -> Matrix:
  matrix = left.T @ matrix
  return matrix if right is None else matrix @ right


def _directions(matrix: Matrix, vectors: bool = True) -> tuple[np.ndarray, Matrix | None, bool]:
  """The squared singular values, descending, the singular vectors of the smaller side, and True if
  that is the left side. Several times as fast as an SVD, and as good unless singular values below
  a hundred-millionth of the largest matter."""
  on_the_left = matrix.shape[0] <= matrix.shape[1]
  gram = matrix @ matrix.T if on_the_left else matrix.T @ matrix
  if not vectors:
    return np.maximum(scipy.linalg.eigvalsh(gram)[::-1], 0), None, on_the_left
  squares, found = scipy.linalg.eigh(gram)
  return np.maximum(squares[::-1], 0), found[:, ::-1], on_the_left


def check_rows(path: str, moments: Moments, inputs: int) -> int:
  """The number of rows of moments; raises ValueError if it is below the number of inputs."""
  rows = int(np.asarray(moments.rows).max())
  if rows < inputs:
    raise ValueError(
      f"{path}: the calibration data have {rows} rows for its {inputs} inputs; give more, or "
      "factorize it without them"
    )
  return rows


def factor_root(path: str, moments: Matrix, size: int, what: str, damping: float) -> Matrix:
  """The lower triangular S of `S Sᵀ = moments`, damped."""
  if moments.shape != (size, size):
    raise ValueError(
      f"{path}: the moments of its {what} are {moments.shape}, and whitening needs {(size, size)}; "
      "unstack a stack of layers, and pass whole matrices instead of diagonals"
    )
  if not np.isfinite(moments).all():
    raise ValueError(f"{path}: the moments of its {what} are not finite; an activation overflowed")
  moments = moments.astype(np.float64)
  scale = np.trace(moments) / size
  return scipy.linalg.cholesky(moments + damping * max(scale, 1e-30) * np.eye(size), lower=True)


def _balanced(u: Matrix, s: np.ndarray, vt: Matrix, rank: int) -> tuple[Matrix, Matrix]:
  root = np.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * vt[:rank]


# ---- ranks


def tails(
  params: PyTree,
  paths: Sequence[str],
  values: Callable[[str, Matrix], np.ndarray],
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, np.ndarray]:
  """Returns `{path: [n + 1]}`, each kernel's loss at the ranks 0 ... n: the sum of σ² beyond them.

  Args:
    params: the dense model.
    paths: the kernels, from `select`.
    values: `(path, matrix) -> singular values`: `Whitened.values`, `singular_values`, or
      `pivoted_rows` for `pivoted_qr`, which loses more than these.
    axes: the result of `trace_axes`; by default the axes that `match` was given for `paths`.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  axes = targets.axes_of(paths, axes, leaves)
  found = {}
  for path in paths:
    total = 0.0
    for matrix in _matrices(leaves[path], roles_of(path, leaves, axes)):
      squares = values(path, matrix) ** 2
      total = total + np.append(squares[::-1].cumsum()[::-1], 0.0)
    found[path] = total
  return found


def singular_values(path: str, matrix: Matrix) -> np.ndarray:
  """The singular values of the kernel itself."""
  del path
  return cast(np.ndarray, scipy.linalg.svdvals(matrix))


def pivoted_rows(path: str, matrix: Matrix) -> np.ndarray:
  """The norms of R's rows; `pivoted_qr` loses those beyond its rank."""
  del path
  r, _ = cast(tuple[Matrix, np.ndarray], scipy.linalg.qr(matrix, mode="r", pivoting=True))
  return np.linalg.norm(r[: min(matrix.shape)], axis=1)


def energy_ranks(losses: Mapping[str, np.ndarray], energy: float) -> dict[str, int]:
  """Returns the smallest rank of each kernel that keeps a fraction of its energy Σ σ².

  Args:
    losses: the result of `tails`.
    energy: the fraction to keep, above 0 and at most 1.

  Raises:
    ValueError: if `energy` is out of range.
  """
  if not 0 < energy <= 1:
    raise ValueError(f"the energy {energy} must be above 0 and at most 1")
  ranks = {}
  for path, loss in losses.items():
    # A fraction of one is reached where rounding leaves nothing.
    enough = loss <= (1 - energy + 1e-12) * loss[0]
    ranks[path] = max(int(np.argmax(enough)), 1)
  return ranks


# ---- the transform


def factorize(
  params: PyTree,
  ranks: Mapping[str, int],
  decompose: Decompose = svd,
  *,
  axes: Mapping[str, Axes] | None = None,
) -> PyTree:
  """Returns the tree with `Factored` kernels at these paths, in the kernels' dtype.

  Args:
    params: a pytree of arrays; other leaves, including Weights, are kept.
    ranks: `{path: rank}`; each layer of a stack gets this rank.
    decompose: `svd`, `randomized(seed)`, `pivoted_qr`, a `Whitened`, or your own function.
    axes: the result of `trace_axes`. Kernels of two axes (in, out) do not need it.

  Raises:
    ValueError: if `select` would refuse a path, or if a rank is below 1 or above the kernel's. All
      paths are checked before the first kernel is decomposed.
  """
  if not ranks:
    raise ValueError("there is no kernel to factorize: the ranks are empty")
  select(params, [re.escape(path) for path in ranks], axes)
  leaves = tree.flatten(params, is_leaf=is_weight)
  roles = {path: roles_of(path, leaves, axes) for path in ranks}
  for path, rank in ranks.items():
    _, d, k = sizes(leaves[path], roles[path])
    if not 1 <= rank <= min(d, k):
      raise ValueError(
        f"{path}: the rank must be from 1 to {min(d, k)}, the smaller of its {d} inputs and {k} "
        f"outputs, and is {rank}"
      )
  found = {
    path: _factored(path, leaves[path], roles[path], rank, decompose)
    for path, rank in ranks.items()
  }
  return tree.map_with_path(lambda path, leaf: found.get(path, leaf), params, is_leaf=is_weight)


def update(
  compressed: PyTree,
  dense: PyTree,
  paths: Sequence[str],
  moments: Mapping[str, Moments],
  *,
  damping: float = 1e-3,
) -> PyTree:
  """Returns the tree with the second factors of kernels refitted to their current inputs.

      b = argmin_b E‖x (W - a b)‖²  =  (aᵀ C a)⁻¹ aᵀ C W,     C = E[x xᵀ]

  Compressing earlier layers changes the inputs of later ones, for which those were factorized
  (SVD-LLM, section 3.3). Take the moments from `compressed`, in which all kernels before these have
  their final values.

  Args:
    compressed: the tree with `Factored` kernels at these paths, none of them a stack of layers.
    dense: the tree that it was made from.
    paths: the kernels.
    moments: `{path: Moments}` of the inputs in the compressed model.
    damping: as in `Whitened`.

  Raises:
    ValueError: if a kernel is not `Factored`, or its moments are missing or do not fit.
  """
  leaves = tree.flatten(compressed, is_leaf=is_weight)
  originals = tree.flatten(dense, is_leaf=is_weight)
  found = {}
  for path in paths:
    leaf = leaves[path]
    if not isinstance(leaf, Factored) or "s" in leaf.all_roles:
      raise ValueError(
        f"{path}: is not a factorized kernel, or is a stack of them; layers are updated one by one"
      )
    (w,) = _matrices(originals[path], leaf.all_roles)
    root = factor_root(path, np.asarray(moments[path].mean), w.shape[0], "inputs", damping)
    a = np.asarray(leaf.a, np.float64).reshape(w.shape[0], leaf.rank)
    b, *_ = cast(tuple[Matrix, ...], scipy.linalg.lstsq(root.T @ a, root.T @ w))
    found[path] = dataclasses.replace(leaf, b=jnp.asarray(b.reshape(leaf.b.shape), leaf.b.dtype))
  return tree.map_with_path(lambda path, leaf: found.get(path, leaf), compressed, is_leaf=is_weight)


def _factored(path: str, leaf, roles: str, rank: int, decompose: Decompose) -> Factored:
  def factors(matrix: jax.Array) -> tuple[Matrix, Matrix]:
    matrices = np.asarray(matrix, np.float64)
    stack = matrices.shape[:-2]
    pairs = [decompose(path, each, rank) for each in matrices.reshape(-1, *matrices.shape[-2:])]
    a, b = (np.stack(side).reshape(*stack, *side[0].shape) for side in zip(*pairs, strict=True))
    return a, b

  a, b = decompositions.factorized(leaf, roles, factors)
  return Factored(
    jnp.asarray(a, leaf.dtype), jnp.asarray(b, leaf.dtype), roles=roles.lstrip("s"), path=path
  )


def _matrices(leaf, roles: str) -> list[Matrix]:
  """The kernels of a leaf, [d, k] each, in float64."""
  order = [n for role in "sio" for n, each in enumerate(roles) if each == role]
  stack, d, k = sizes(leaf, roles)
  matrix = np.asarray(leaf, np.float64).transpose(order)
  return list(matrix.reshape(stack, d, k))
