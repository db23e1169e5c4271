import struct

import matplotlib
import numpy as np
import pytest
from PIL import Image

from lora_jax.run.plot import plot_loss, plot_members, smooth


def records(steps):
  rng = np.random.default_rng(0)
  result = [{"step": i, "loss": float(2.5 * 0.98**i + 0.4 + rng.normal() / 8)} for i in steps]
  for record in result[24::25]:
    record["validation/loss"] = 2.6 * 0.98 ** record["step"] + 0.45
  return result


def test_smoothing_keeps_a_constant_and_does_not_lag_behind_a_line():
  np.testing.assert_allclose(smooth([3.0] * 50, width=4), 3.0)
  line = np.arange(100.0)
  np.testing.assert_allclose(smooth(line, width=3)[20:80], line[20:80])


def test_smoothing_is_the_mean_weighted_by_a_gaussian():
  values = np.random.default_rng(0).normal(size=30)
  places = np.arange(30)
  weights = np.exp(-0.5 * ((places[:, None] - places) / 2.0) ** 2)
  wanted = weights @ values / weights.sum(axis=1)
  np.testing.assert_allclose(smooth(values, width=2.0), wanted, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_width_beyond_the_values_smooths_them_to_about_their_mean(count):
  values = np.arange(float(count))
  np.testing.assert_allclose(smooth(values, width=1000.0), values.mean(), atol=1e-3)


def test_the_plot_is_a_png_of_both_curves(tmp_path):
  path = tmp_path / "loss.png"
  plot_loss(records(range(1, 101)), path)
  header = path.read_bytes()[:24]
  assert header[:8] == b"\x89PNG\r\n\x1a\n"
  assert struct.unpack(">II", header[16:]) == (1050, 600)
  pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
  for colour in ((0x25, 0x63, 0xA8), (0xD9, 0x54, 0x1E)):
    assert np.sum(np.all(pixels == colour, axis=1)) > 200


def test_a_run_of_one_step_can_be_drawn(tmp_path):
  plot_loss([{"step": 1, "loss": 1.0}], tmp_path / "loss.png")
  assert (tmp_path / "loss.png").stat().st_size > 0


def test_a_run_that_logged_nothing_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no step was logged"):
    plot_loss([], tmp_path / "loss.png")


def test_the_plot_of_a_sweep_has_a_curve_for_each_member_as_long_as_it_trained(tmp_path):
  path = tmp_path / "loss.png"
  lines = [{"step": n, "loss/0": 2.0 / n} | ({"loss/1": 3.0} if n < 5 else {}) for n in range(1, 9)]
  plot_members(lines, ["0: rank 4", "1: rank 8", "2: diverged at once"], path)
  with Image.open(path) as image:
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
  colors = 255 * matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 3))[:2, :3]
  counts = [np.sum(np.abs(pixels - color).max(axis=1) < 12) for color in colors]
  assert min(counts) > 100
  with pytest.raises(ValueError, match="no step was logged"):
    plot_members([], ["0"], path)
