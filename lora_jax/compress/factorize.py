"""Low-rank factorization of a trained model: kernels exchanged for two thin factors.

    paths  = factorize.select(params, ["all-linear"], axes)
    params = factorize.factorize(params, dict.fromkeys(paths, 128), factorize.svd, axes=axes)
    logits = lora_jax.adapt(model.apply)({"params": params}, tokens)

How a kernel is decomposed is a function `(path, matrix, rank) -> (a, b)` of [d, k], in float64 on
the host: `svd`, `randomized`, `pivoted_qr`, or a `Whitened`, which weighs errors by what the model
is used on. Ranks by a share of the energy: `energy_ranks`; by a budget: `sensitivity.allocate`.

Sources: Halko, Martinsson and Tropp 2011, arXiv 0909.4061, for the randomized decomposition; Wang
et al. 2024, SVD-LLM, arXiv 2403.07378, sections 3.2 and 3.3, for whitening and the update.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lora_jax import factorization, targets, tree
from lora_jax.adapters import Method
from lora_jax.axes import Axes
from lora_jax.transform import roles_of
from lora_jax.weights import Factored, is_weight
from lora_jax.weights.factors import part_sizes
from lora_jax.weights.probe import Moments

PyTree = Any
Matrix = np.ndarray
Decompose = Callable[[str, Matrix, int], tuple[Matrix, Matrix]]


# ---- which kernels


def select(
  params: PyTree, patterns: Sequence[str], axes: Mapping[str, Axes] | None = None
) -> list[str]:
  """The paths of the kernels to compress, in the tree's order.

  Args:
    params: a pytree of arrays.
    patterns: presets or regular expressions for whole paths, as in `lora_jax.match`.
    axes: what `trace_axes` found. Kernels of two axes (in, out) do not need it.

  Raises:
    ValueError: as `lora_jax.match` does; and when a kernel is a Weight already, holds a number that
      is not finite, or has no axis of inputs or of outputs.
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
    roles = roles_of(Method(), path, leaves, axes)
    if not {"i", "o"} <= set(roles):
      raise ValueError(f"{path}: its axes {roles!r} are no inputs and outputs; leave it out")
  return list(specs)


def sizes(leaf, roles: str) -> tuple[int, int, int]:
  """How many kernels a leaf holds, and the inputs and outputs of each."""
  return tuple(int(np.prod(part_sizes(leaf.shape, roles, role, 0))) for role in "sio")


# ---- how


def svd(path: str, matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
  """The nearest matrix of this rank in the Frobenius norm, by an exact SVD."""
  del path
  return _balanced(*scipy.linalg.svd(matrix, full_matrices=False), rank)


def randomized(seed: int, iterations: int = 4) -> Decompose:
  """Nearly `svd` at the price of a few thin products, for kernels of many thousands of axes.

  Args:
    seed: of the random start.
    iterations: subspace iterations; see `lora_jax.factorization.randomized_svd`.
  """

  def decompose(path, matrix, rank):
    del path
    u, s, vt = factorization.randomized_svd(
      jax.random.key(seed), jnp.asarray(matrix, jnp.float32), rank, iterations
    )
    return _balanced(*(np.asarray(x, np.float64) for x in (u, s, vt)), rank)

  return decompose


def pivoted_qr(path: str, matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
  """The truncated QR decomposition with column pivoting, `W P = Q R`.

  a is [d, rank] with orthonormal columns, b the first rows of R with its columns put back. Within a
  factor of the SVD's error, and several times as fast. Exact for a matrix of this rank.
  """
  del path
  q, r, pivots = scipy.linalg.qr(matrix, mode="economic", pivoting=True)
  b = np.empty((rank, matrix.shape[1]))
  b[:, pivots] = r[:rank]
  return q[:, :rank], b


@dataclasses.dataclass(frozen=True)
class Whitened:
  """The factors that lose least of what the kernel is used for, not of the kernel itself.

      minimize ‖Sᵀ (W - a b) R‖_F,     S Sᵀ = E[x xᵀ],   R Rᵀ = E[g gᵀ]

  With inputs alone that is the mean square of x (W - a b), SVD-LLM's truncation-aware whitening;
  with gradients it is the change of the loss, see `compress.sensitivity`. A decomposition like the
  others: `Whitened(inputs)(path, matrix, rank)`.

  Attributes:
    inputs: `{path: Moments}` as `lora_jax.second_moments` returns them, whole matrices.
    gradients: `{path: [k, k]}` as `sensitivity.gradient_moments` returns them, or None.
    damping: of the mean of their diagonals, added to it: directions that the calibration data do
      not have would otherwise cost nothing.
  """

  inputs: Mapping[str, Moments]
  gradients: Mapping[str, np.ndarray] | None = None
  damping: float = 1e-3

  def __call__(self, path: str, matrix: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    left, right = self._roots(path, matrix)
    whitened = _between(left, matrix, right)
    squares, vectors, on_the_left = _directions(whitened)
    vectors = vectors[:, :rank]
    # The matrix projected on its first singular vectors, on whichever side it is smaller.
    a, b = (vectors, vectors.T @ whitened) if on_the_left else (whitened @ vectors, vectors.T)
    least = max(squares[0] * 1e-30, 1e-100)  # a kernel of zeros has factors of zeros
    scale = np.maximum(squares[:rank], least) ** (0.25 if on_the_left else -0.25)
    a, b = a * scale, b / scale[:, None]
    a = scipy.linalg.solve_triangular(left, a, lower=True, trans="T")
    if right is not None:
      b = scipy.linalg.solve_triangular(right, b.T, lower=True, trans="T").T
    return a, b

  def values(self, path: str, matrix: Matrix) -> np.ndarray:
    """The singular values of `Sᵀ W R`, falling: what each rank is worth."""
    left, right = self._roots(path, matrix)
    squares, _, _ = _directions(_between(left, matrix, right), vectors=False)
    return np.sqrt(squares)

  def _roots(self, path: str, matrix: Matrix) -> tuple[Matrix, Matrix | None]:
    if path not in self.inputs:
      raise ValueError(f"{path}: has no moments of its inputs; ask second_moments for it as well")
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
  """The squares of the singular values, falling, the singular vectors on the side where there are
  fewer axes, and whether that is the left: several times as fast as an SVD, and as good where
  nothing below a hundred-millionth of the largest matters."""
  on_the_left = matrix.shape[0] <= matrix.shape[1]
  gram = matrix @ matrix.T if on_the_left else matrix.T @ matrix
  if not vectors:
    return np.maximum(scipy.linalg.eigvalsh(gram)[::-1], 0), None, on_the_left
  squares, found = scipy.linalg.eigh(gram)
  return np.maximum(squares[::-1], 0), found[:, ::-1], on_the_left


def check_rows(path: str, moments: Moments, inputs: int) -> int:
  """The rows that moments are of; raises ValueError for fewer than there are inputs."""
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
      "a stack of layers is whitened layer by layer, unstacked, and from whole matrices"
    )
  if not np.isfinite(moments).all():
    raise ValueError(f"{path}: the moments of its {what} are not finite; an activation overflowed")
  moments = moments.astype(np.float64)
  scale = np.trace(moments) / size
  return scipy.linalg.cholesky(moments + damping * max(scale, 1e-30) * np.eye(size), lower=True)


def _balanced(u: Matrix, s: np.ndarray, vt: Matrix, rank: int) -> tuple[Matrix, Matrix]:
  root = np.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * vt[:rank]


# ---- how much


def tails(
  params: PyTree,
  paths: Sequence[str],
  values: Callable[[str, Matrix], np.ndarray],
  axes: Mapping[str, Axes] | None = None,
) -> dict[str, np.ndarray]:
  """`{path: [n + 1]}`, what is lost of each kernel at the ranks 0 ... n: the sum of σ² beyond them.

  Args:
    params: the dense model.
    paths: the kernels, from `select`.
    values: `(path, matrix) -> singular values`; `Whitened.values`, `singular_values`, or for
      `pivoted_qr`, which loses more than these, `pivoted_rows`.
    axes: what `trace_axes` found; by default what `match` was given for `paths`.
  """
  leaves = tree.flatten(params, is_leaf=is_weight)
  axes = targets.axes_of(paths, axes, leaves)
  found = {}
  for path in paths:
    total = 0.0
    for matrix in _matrices(leaves[path], roles_of(Method(), path, leaves, axes)):
      squares = values(path, matrix) ** 2
      total = total + np.append(squares[::-1].cumsum()[::-1], 0.0)
    found[path] = total
  return found


def singular_values(path: str, matrix: Matrix) -> np.ndarray:
  """Those of the kernel itself."""
  del path
  return scipy.linalg.svdvals(matrix)


def pivoted_rows(path: str, matrix: Matrix) -> np.ndarray:
  """The lengths of R's rows, of which `pivoted_qr` loses those beyond its rank."""
  del path
  r, _ = scipy.linalg.qr(matrix, mode="r", pivoting=True)
  return np.linalg.norm(r[: min(matrix.shape)], axis=1)


def energy_ranks(losses: Mapping[str, np.ndarray], energy: float) -> dict[str, int]:
  """The least rank of each kernel that keeps this share of its energy, Σ σ² up to it of all.

  Args:
    losses: as `tails` returns them.
    energy: above 0 and at most 1.

  Raises:
    ValueError: when it is out of that range.
  """
  if not 0 < energy <= 1:
    raise ValueError(f"the energy {energy} must be above 0 and at most 1")
  ranks = {}
  for path, loss in losses.items():
    # A share of one is reached where rounding leaves nothing.
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
  """The tree with the kernels at these paths exchanged for `Factored` ones, in the kernels' dtype.

  Args:
    params: a pytree of arrays; other leaves, Weights among them, stay as they are.
    ranks: `{path: rank}`; each layer of a stack gets it.
    decompose: `svd`, `randomized(seed)`, `pivoted_qr`, a `Whitened`, or your own.
    axes: what `trace_axes` found. Kernels of two axes (in, out) do not need it.

  Raises:
    ValueError: when a path is no kernel that `select` would take, or a rank is below 1 or above the
      kernel's; all are looked at before the first is decomposed.
  """
  if not ranks:
    raise ValueError("there is no kernel to factorize: the ranks are empty")
  select(params, [re.escape(path) for path in ranks], axes)
  leaves = tree.flatten(params, is_leaf=is_weight)
  roles = {path: roles_of(Method(), path, leaves, axes) for path in ranks}
  for path, rank in ranks.items():
    _, d, k = sizes(leaves[path], roles[path])
    if not 1 <= rank <= min(d, k):
      raise ValueError(
        f"{path}: the rank must be from 1 to {min(d, k)}, the least of its {d} inputs and {k} "
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
  """The second factors of some kernels fitted anew to the inputs that they now have.

      b = argmin_b E‖x (W - a b)‖²  =  (aᵀ C a)⁻¹ aᵀ C W,     C = E[x xᵀ]

  After earlier layers were compressed, the inputs of the later ones are no longer those that they
  were factorized for (SVD-LLM, section 3.3). Take the moments from `compressed`, in which the
  kernels before these are what they will be.

  Args:
    compressed: the tree with `Factored` kernels at these paths, of two axes.
    dense: the tree that it was made from.
    paths: the kernels.
    moments: `{path: Moments}` of the inputs in the compressed model.
    damping: as in `Whitened`.

  Raises:
    ValueError: when a kernel is not `Factored`, or its moments are missing or do not fit.
  """
  leaves = tree.flatten(compressed, is_leaf=is_weight)
  originals = tree.flatten(dense, is_leaf=is_weight)
  found = {}
  for path in paths:
    leaf = leaves[path]
    if not isinstance(leaf, Factored) or leaf.all_roles != "io":
      raise ValueError(f"{path}: is no factorized kernel of two axes, which alone can be updated")
    w = np.asarray(originals[path], np.float64)
    root = factor_root(path, np.asarray(moments[path].mean), w.shape[0], "inputs", damping)
    a = np.asarray(leaf.a, np.float64)
    b, *_ = scipy.linalg.lstsq(root.T @ a, root.T @ w)
    found[path] = dataclasses.replace(leaf, b=jnp.asarray(b, leaf.b.dtype))
  return tree.map_with_path(lambda path, leaf: found.get(path, leaf), compressed, is_leaf=is_weight)


def _factored(path: str, leaf, roles: str, rank: int, decompose: Decompose) -> Factored:
  def factors(matrix):
    matrices = np.asarray(matrix, np.float64)
    stack = matrices.shape[:-2]
    pairs = [decompose(path, each, rank) for each in matrices.reshape(-1, *matrices.shape[-2:])]
    return tuple(
      np.stack(side).reshape(*stack, *side[0].shape) for side in zip(*pairs, strict=True)
    )

  a, b = factorization.factorized(leaf, roles, factors)
  return Factored(
    jnp.asarray(a, leaf.dtype), jnp.asarray(b, leaf.dtype), roles=roles.lstrip("s"), path=path
  )


def _matrices(leaf, roles: str) -> list[Matrix]:
  """The kernels that a leaf holds, [d, k] each, in float64."""
  order = [n for role in "sio" for n, each in enumerate(roles) if each == role]
  stack, d, k = sizes(leaf, roles)
  matrix = np.asarray(leaf, np.float64).transpose(order)
  return list(matrix.reshape(stack, d, k))
