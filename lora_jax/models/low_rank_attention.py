"""Attention of low rank over positions, in time and memory linear in the number of tokens.

    how = Nystrom(landmarks=64, iterations=6)
    out_BTNH = nystrom(query_BTNH, key_BTNH, value_BTNH, seen_BT, how)
    out_BTNH = linformer(query_BTNH, key_BTNH, value_BTNH, keys_PM, values_PM, seen_BT)

Both replace S = softmax(Q Kᵀ / √H), [T, T], by products of matrices with M columns or rows. The M
landmarks, or projected positions, are segments of a text: contiguous runs of tokens of nearly equal
length. Every token sees every other one, so neither is for decoders.

Padding: only a text's own tokens are in segments, so that a short text has short segments. Segments
of different lengths enter a softmax with the number n_j of their tokens: exp(q · k_j) is multiplied
by n_j, and a segment without tokens has no weight. Where all have one length this is the papers'
formula. It makes both exact for queries and keys that are constant within each segment.

Shapes: B texts, T tokens, N heads, H features of a head, M landmarks or projected positions, P rows
of a projection.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_MOST = 1 << 16  # landmarks; more than tokens in any text here
_UNSEEN = float(np.finfo(np.float32).min) / 2  # a score whose weight is 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nystrom:
  """Nyström attention (Xiong et al. 2021, "Nyströmformer", section 3).

  landmarks: M. Their queries and keys are the means of M segments.
  iterations: of the pseudo-inverse; 6 in the paper. See `pseudo_inverse`.

  Raises ValueError for values that are not whole numbers from 1 to 65,536 and to 24.
  """

  landmarks: int
  iterations: int

  def __post_init__(self):
    _check("Nystrom: landmarks", self.landmarks, _MOST)
    _check("Nystrom: iterations", self.iterations, 24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linformer:
  """Attention on projected keys and values (Wang et al. 2020, "Linformer", section 4).

  rank: M, the positions that keys and values are projected to.

  Raises ValueError for a rank that is no whole number from 1 to 65,536.
  """

  rank: int

  def __post_init__(self):
    _check("Linformer: rank", self.rank, _MOST)


def _check(name: str, value: int, most: int) -> None:
  if type(value) is not int or not 1 <= value <= most:
    raise ValueError(f"{name} must be a whole number from 1 to {most:,}, not {value!r:.40}")


class Segments(NamedTuple):
  """The segments of texts; without the axis B where no text is padded.

  member_BTM: 1 for the tokens of a segment, float32.
  counts_BM: the number of its tokens.
  """

  member_BTM: jax.Array
  counts_BM: jax.Array

  @property
  def means_BTM(self) -> jax.Array:
    """The weights of the mean of each segment; zeros for one without tokens."""
    return self.member_BTM / jnp.maximum(self.counts_BM, 1)[..., None, :]

  @property
  def bias_BM(self) -> jax.Array:
    """The logarithm of the number of tokens, for scores."""
    return jnp.where(self.counts_BM > 0, jnp.log(jnp.maximum(self.counts_BM, 1)), _UNSEEN)

  def over_heads(self, x_BM: jax.Array) -> jax.Array:
    """Values of segments in the shape [B or 1, 1, 1, M] of scores."""
    return x_BM.reshape(-1, 1, 1, x_BM.shape[-1])


def scaled_places(length: int, size: int, seen_BT: jax.Array | None) -> jax.Array | np.ndarray:
  """Each token's place in its text, scaled from its text's number of tokens to `size`: floor(t size
  / n), [B, T], or [T] where `seen_BT` is None. Tokens that are not seen have some place."""
  if seen_BT is None:
    return np.arange(length) * size // length
  counts_B1 = jnp.sum(seen_BT, axis=1, keepdims=True)
  places_BT = jnp.cumsum(seen_BT, axis=1) - 1
  return jnp.clip(places_BT * size // jnp.maximum(counts_B1, 1), 0, size - 1)


def segments_of(
  places_BT: jax.Array | np.ndarray, count: int, seen_BT: jax.Array | None
) -> Segments:
  """The segments with these numbers, from 0 to `count` - 1."""
  member_BTM = jax.nn.one_hot(places_BT, count, dtype=jnp.float32)
  if seen_BT is not None:
    member_BTM *= seen_BT[..., None]
  return Segments(member_BTM, jnp.sum(member_BTM, axis=-2))


def nystrom(
  query_BTNH: jax.Array,
  key_BTNH: jax.Array,
  value_BTNH: jax.Array,
  seen_BT: jax.Array | None,
  how: Nystrom,
) -> jax.Array:
  """Returns softmax(Q K̃ᵀ) pinv(softmax(Q̃ K̃ᵀ)) softmax(Q̃ Kᵀ) V, [B, T, N, H].

  Q̃ and K̃ are the segments' means; scores are divided by √H. The paper adds a convolution of V with
  learned kernels, which a pretrained model does not have; it is left out. In float32, but for the
  products with values.

  Args:
    query_BTNH, key_BTNH, value_BTNH: as in `lora_jax.models.attention.attend`.
    seen_BT: True for a token, False for padding, which no token sees; None: no padding.
    how: the settings.
  """
  length, features = query_BTNH.shape[1], query_BTNH.shape[-1]
  places = scaled_places(length, how.landmarks, seen_BT)
  segments = segments_of(places, how.landmarks, seen_BT)
  both = jnp.concatenate([query_BTNH, key_BTNH], axis=2)
  both = _over_tokens(segments.means_BTM.astype(both.dtype), both)
  mean_query_BMNH, mean_key_BMNH = jnp.split(both, 2, axis=2)
  bias = segments.over_heads(segments.bias_BM)
  left_BNTM = _softmax(query_BTNH, mean_key_BMNH, features, bias)
  filled_BM = (segments.counts_BM > 0).astype(jnp.float32)
  middle_BNMM = _softmax(mean_query_BMNH, mean_key_BMNH, features, bias)
  middle_BNMM *= segments.over_heads(filled_BM).swapaxes(-1, -2)
  seen_B11T = None if seen_BT is None else jnp.where(seen_BT, 0.0, _UNSEEN)[:, None, None]
  right_BNMT = _softmax(mean_query_BMNH, key_BTNH, features, seen_B11T)
  dtype = value_BTNH.dtype
  found_BNMH = jnp.einsum("bnmt,btnh->bnmh", right_BNMT.astype(dtype), value_BTNH)
  inverse_BNMM = pseudo_inverse(middle_BNMM, how.iterations)
  found_BNMH = (inverse_BNMM @ found_BNMH.astype(jnp.float32)).astype(dtype)
  return jnp.einsum("bntm,bnmh->btnh", left_BNTM.astype(dtype), found_BNMH)


def pseudo_inverse(matrix: jax.Array, iterations: int) -> jax.Array:
  """Returns an approximation of the pseudo-inverse of each square matrix A.

      Z₀ = Aᵀ / (‖A‖₁ ‖A‖∞),   Zₖ₊₁ = Zₖ (13 I - A Zₖ (15 I - A Zₖ (7 I - A Zₖ))) / 4

  Razavi et al. 2014, as in Xiong et al. 2021, equation 11. The error of a singular value σ falls
  with the third power in each iteration once σ² is near the norms above, and σ² grows by 13/4 in
  each until then. Rounding errors outside the rank of A grow by as much, and without end: about 12
  iterations are the most that float32 bears for a singular matrix. A matrix of zeros has the
  inverse zero.

  Args:
    matrix: [..., M, M], float32.
    iterations: the last k.
  """
  sizes = jnp.abs(matrix)
  norm = jnp.max(jnp.sum(sizes, axis=-1), axis=-1) * jnp.max(jnp.sum(sizes, axis=-2), axis=-1)
  inverse = matrix.swapaxes(-1, -2) / jnp.where(norm > 0, norm, 1)[..., None, None]
  identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

  def step(inverse, _):
    product = matrix @ inverse
    inner = 15 * identity - product @ (7 * identity - product)
    return inverse @ (13 * identity - product @ inner) / 4, None

  return jax.lax.scan(step, inverse, length=iterations)[0]


def segment_means(
  key: jax.Array | None, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """The start of a projection, [..., P, M]: column j averages segment j of the P positions.

  key: unused; it makes this an initializer.
  """
  del key
  rows, columns = shape[-2:]
  segments = segments_of(np.arange(rows) * columns // rows, columns, None)
  return jnp.broadcast_to(segments.means_BTM, shape).astype(dtype)


def linformer(
  query_BTNH: jax.Array,
  key_BTNH: jax.Array,
  value_BTNH: jax.Array,
  keys_PM: jax.Array,
  values_PM: jax.Array,
  seen_BT: jax.Array | None,
) -> jax.Array:
  """Returns softmax(Q (Eᵀ K)ᵀ / √H) Fᵀ V, [B, T, N, H].

  E and F, [P, M], are shared by the heads. For a text of P tokens this is the paper's formula. The
  tokens of another text have the rows floor(t P / n), so that a row stands for a part of a text and
  not for a position. Column j is then divided by the tokens that its segment has, and multiplied by
  the rows of that segment.

  Args:
    query_BTNH, key_BTNH, value_BTNH: as in `lora_jax.models.attention.attend`.
    keys_PM, values_PM: E and F. `segment_means` is their start.
    seen_BT: as in `nystrom`.
  """
  length, features = query_BTNH.shape[1], query_BTNH.shape[-1]
  rows, rank = keys_PM.shape
  places = scaled_places(length, rows, seen_BT)
  segments = segments_of(places * rank // rows, rank, seen_BT)
  sizes_M = np.bincount(np.arange(rows) * rank // rows, minlength=rank)
  scale_BM = sizes_M / jnp.maximum(segments.counts_BM, 1)

  def project(projection_PM, x_BTNH):
    weights_BTM = projection_PM.at[places].get(mode="clip") * scale_BM[..., None, :]
    if seen_BT is not None:
      weights_BTM *= seen_BT[..., None]
    return _over_tokens(weights_BTM.astype(x_BTNH.dtype), x_BTNH)

  bias = segments.over_heads(segments.bias_BM)
  weights_BNTM = _softmax(query_BTNH, project(keys_PM, key_BTNH), features, bias)
  value_BMNH = project(values_PM, value_BTNH)
  return jnp.einsum("bntm,bmnh->btnh", weights_BNTM.astype(value_BMNH.dtype), value_BMNH)


def _over_tokens(weights_BTM, x_BTNH):
  """Sums over tokens, [B, M, N, H]; weights may lack the axis B."""
  letters = "tm" if weights_BTM.ndim == 2 else "btm"
  return jnp.einsum(f"{letters},btnh->bmnh", weights_BTM, x_BTNH)


def _softmax(query_BTNH, key_BSNH, features: int, bias=None):
  """The softmax of scores, [B, N, T, S], in float32."""
  scores = jnp.einsum("btnh,bsnh->bnts", query_BTNH, key_BSNH, preferred_element_type=jnp.float32)
  scores *= features**-0.5
  return jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
