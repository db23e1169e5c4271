"""SSDLite: its feature maps, its config in files, and its loss, on cases worked out by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import families
from lora_jax.io import ssdlite_configs
from lora_jax.models import boxes, mobilenet, ssdlite
from lora_jax.tasks import box_losses

TINY = {"width_multiplier": 0.1, "image_size": 64}
CONFIG = ssdlite.SSDLiteConfig(
  classes=("a", "b"), scales=((0.1, 0.2), (0.4,), (0.8,)), ratios=(1.0, 2.0), **TINY
)


def test_its_maps_have_the_strides_of_the_paper_and_an_anchor_for_each_output():
  model, images = ssdlite.SSDLite(CONFIG), jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
  variables = jax.eval_shape(model.init, jax.random.key(0), images)
  logits, found = jax.eval_shape(model.apply, variables, images)
  # Strides of 16 and 32, and a map of half the second one's size.
  count = 4 * 6 * 4 + 2 * 3 * 2 + 1 * 2 * 2
  assert logits.shape == (2, count, 3) and found.shape == (2, count, 4)
  anchors = boxes.anchors([(4, 6), (2, 3), (1, 2)], CONFIG.scales, CONFIG.ratios)
  assert anchors.shape == (count, 4)
  expansion = variables["params"]["block_13"]["expand"]["conv"]["kernel"]
  assert (
    variables["params"]["head"]["logits_0"]["depthwise"]["kernel"].shape[-1]
    == (expansion.shape[-1])
  )


def test_its_backbone_is_that_of_a_mobilenet():
  """The parameters outside of the head have the same paths and shapes, and make the same map."""
  plain = mobilenet.MobileNetV2Config(**TINY)
  bare = dataclasses.replace(CONFIG, classes=())
  shapes = families.param_shapes(plain)
  assert families.param_shapes(bare) == shapes
  own = families.param_shapes(CONFIG)
  assert {path: x for path, x in own.items() if not path.startswith("head/")} == shapes


@pytest.mark.slow
def test_the_second_map_has_the_values_of_the_mobilenet_s_features():
  images = jax.random.normal(jax.random.key(1), (1, 64, 64, 3))
  plain = mobilenet.MobileNetV2(mobilenet.MobileNetV2Config(**TINY))
  params = plain.init(jax.random.key(0), images)["params"]
  found = ssdlite.SSDLite(dataclasses.replace(CONFIG, classes=())).apply({"params": params}, images)
  np.testing.assert_allclose(found, plain.apply({"params": params}, images, method="features"))


def test_its_config_is_read_from_what_was_written():
  fields = json.loads(json.dumps(ssdlite_configs.to_json(CONFIG)))
  assert fields["model_type"] == "ssdlite_mobilenet_v2"
  assert families.parse_config(fields) == CONFIG
  for change, words in (
    ({"anchor_scales": None}, "scales None must hold scales"),
    ({"anchor_scales": [[0.1]]}, "scales for each of 2 to 6 feature maps"),
    ({"anchor_scales": [[0.1], []]}, "scales for each of 2 to 6 feature maps"),
    ({"anchor_scales": [[0.1], ["0.4"]]}, "scales must be numbers from 0.001 to 2, not '0.4'"),
    ({"anchor_ratios": [0.0]}, "ratios must be numbers from 0.015625 to 64"),
    ({"anchor_ratios": []}, "ratios are missing"),
    ({"anchor_scales": [[0.1] * 40, [0.2]]}, "more than 64 anchors at a position"),
    ({"architectures": ["MobileNetV2Model"]}, "architectures must name a detector"),
    ({"anchor_colors": [1]}, "anchor_colors"),
  ):
    with pytest.raises(ValueError, match=words):
      families.parse_config(fields | change)
  with pytest.raises(ValueError, match="lacks anchor_scales"):
    families.parse_config({x: fields[x] for x in fields if x != "anchor_scales"})


ANCHORS = np.array(
  [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1], [0, 0, 1, 1]],
  np.float32,
)


def losses(logits, offsets, true, labels, negatives=1):
  batch = {"boxes": np.array([true], np.float32), "labels": np.array([labels], np.int32)}
  [found] = box_losses.multibox_losses(
    jnp.asarray(logits, jnp.float32)[None],
    jnp.asarray(offsets, jnp.float32)[None],
    ANCHORS,
    batch,
    overlap=0.6,
    negatives=negatives,
  )
  return float(found)


def entropy(logits, label):
  return float(optax.softmax_cross_entropy_with_integer_labels(jnp.array(logits), label))


def test_the_loss_counts_matched_anchors_and_as_many_of_the_hardest_others():
  """One box on the first anchor; of the others the third is the most mistaken."""
  logits = np.array([[0.0, 1.0, 0.0], [3.0, 0, 0], [0, 0, 4.0], [1.0, 0, 0], [2.0, 0, 0]])
  true, labels = [[0, 0, 0.5, 0.5], [0, 0, 0, 0]], [1, -1]
  offsets = np.zeros((5, 4))
  wanted = entropy([0.0, 1.0, 0.0], 2) + entropy([0, 0, 4.0], 0)
  assert losses(logits, offsets, true, labels) == pytest.approx(wanted, rel=1e-5)
  two = wanted + entropy([1.0, 0, 0], 0)
  assert losses(logits, offsets, true, labels, negatives=2) == pytest.approx(two, rel=1e-5)
  # Smooth L1: half the square below 1, and above it the distance less a half.
  offsets[0] = [0.5, -3.0, 0, 0]
  offsets[2] = 100.0  # of an anchor without a box
  wanted += 0.5 * 0.5**2 + 3.0 - 0.5
  assert losses(logits, offsets, true, labels) == pytest.approx(wanted, rel=1e-5)


def test_the_loss_is_a_mean_over_the_matched_anchors():
  logits, offsets = np.zeros((5, 3)), np.zeros((5, 4))
  true = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
  one = losses(logits, offsets, true[:1] + [[0] * 4], [0, -1], negatives=1)
  two = losses(logits, offsets, true, [0, 1], negatives=1)
  assert one == pytest.approx(2 * np.log(3), rel=1e-5) and two == pytest.approx(one, rel=1e-5)


def test_an_image_without_boxes_teaches_background():
  logits = np.zeros((5, 3))
  logits[4, 1] = 2.0
  found = losses(logits, np.ones((5, 4)), [[0, 0, 0, 0]], [-1], negatives=1)
  assert found == pytest.approx(entropy([0.0, 2.0, 0.0], 0), rel=1e-5)
