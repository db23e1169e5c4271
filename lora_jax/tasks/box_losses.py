"""The loss of a detector on anchors: cross-entropy with hard negatives, and smooth L1 of offsets.

Shapes: B images, N anchors, M true boxes, K classes and background.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector", section 2.2.
"""

import jax
import jax.numpy as jnp
import optax

from lora_jax.models import boxes
from lora_jax.train.step import Batch


def multibox_losses(
  logits_BNK: jax.Array,
  offsets_BN4: jax.Array,
  anchors_N4: jax.Array,
  batch: Batch,
  *,
  overlap: float,
  negatives: int,
) -> jax.Array:
  """Returns the loss of each image, [B]:

      (Σ cross-entropy of matched anchors and hard negatives + Σ smooth L1 of matched) / matched

  The hard negatives of an image are the anchors without a box that have the largest
  cross-entropies, `negatives` for each matched anchor (section 2.2, "Hard negative mining"). An
  image without boxes counts as one with a single matched anchor.

  Args:
    logits_BNK: of each anchor; class 0 is background.
    offsets_BN4, anchors_N4: as `ssdlite.SSDLite.offsets` returns them.
    batch: with `boxes` and `labels`, see `lora_jax.data.box_batches`.
    overlap: of a match, see `boxes.match`.
    negatives: at least 1.
  """

  def matched(boxes_M4: jax.Array, labels_M: jax.Array) -> tuple[jax.Array, jax.Array]:
    index_N = boxes.match(boxes_M4, labels_M >= 0, anchors_N4, overlap)
    classes_N = jnp.where(index_N >= 0, labels_M[index_N] + 1, 0)
    return classes_N, boxes.encode(boxes_M4[index_N], anchors_N4)

  classes_BN, wanted_BN4 = jax.vmap(matched)(batch["boxes"], batch["labels"])
  is_matched_BN = classes_BN > 0
  counts_B = jnp.maximum(is_matched_BN.sum(axis=1), 1)
  losses_BN = optax.softmax_cross_entropy_with_integer_labels(logits_BNK, classes_BN)
  of_negatives_BN = jnp.where(is_matched_BN, -jnp.inf, jax.lax.stop_gradient(losses_BN))
  ranks_BN = jnp.argsort(jnp.argsort(-of_negatives_BN, axis=1), axis=1)
  is_hard_BN = (ranks_BN < negatives * counts_B[:, None]) & ~is_matched_BN
  distances_BN = optax.huber_loss(offsets_BN4, wanted_BN4).sum(axis=-1)
  total_BN = jnp.where(is_matched_BN | is_hard_BN, losses_BN, 0)
  total_BN += jnp.where(is_matched_BN, distances_BN, 0)
  return total_BN.sum(axis=1) / counts_B
