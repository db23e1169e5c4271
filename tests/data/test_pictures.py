"""Pictures from files: what every mode becomes, and what is refused, with the file's name."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lora_jax.data import pictures

RNG = np.random.default_rng(0)
COLORS = RNG.integers(0, 256, (12, 20, 3), np.uint8)
GREY = RNG.integers(0, 256, (12, 20), np.uint8)


def saved(path, image, **how):
  image.save(path, **how)
  return path


def read(path, most=1000):
  return pictures.read(path, most)


def test_colors_grey_and_black_and_white_are_read_as_they_are(tmp_path):
  colors, grey = Image.fromarray(COLORS), Image.fromarray(GREY)
  for name in ("a.png", "a.bmp", "a.tif"):
    np.testing.assert_array_equal(read(saved(tmp_path / name, colors)), COLORS)
    found = read(saved(tmp_path / name, grey))
    np.testing.assert_array_equal(found, np.broadcast_to(GREY[..., None], COLORS.shape))
  near = saved(tmp_path / "a.webp", colors, lossless=True)
  np.testing.assert_array_equal(read(near), COLORS)
  binary = read(saved(tmp_path / "b.png", grey.point(lambda x: 255 * (x > 127), mode="1")))
  np.testing.assert_array_equal(binary[..., 0], 255 * (GREY > 127))
  smooth = np.tile(np.arange(0, 240, 12, dtype=np.uint8), (12, 1))
  jpeg = read(saved(tmp_path / "a.jpg", Image.fromarray(smooth), quality=95))
  assert np.abs(jpeg[..., 1].astype(int) - smooth).max() < 12


def test_a_palette_gives_its_colors_and_what_is_transparent_lies_on_white(tmp_path):
  palette = Image.fromarray(GREY % 4).convert("P")
  palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
  table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]], np.uint8)
  numbers = np.array(palette)
  for name in ("a.png", "a.gif"):
    np.testing.assert_array_equal(read(saved(tmp_path / name, palette)), table[numbers])
  found = read(saved(tmp_path / "b.png", palette, transparency=3))
  table[3] = 255
  np.testing.assert_array_equal(found, table[numbers])
  for alpha, expected in ((0, 255), (255, COLORS), (128, 127.5 + COLORS / 2)):
    image = Image.fromarray(COLORS).convert("RGBA")
    image.putalpha(alpha)
    found = read(saved(tmp_path / "c.png", image)).astype(float)
    assert np.abs(found - expected).max() <= 1.5
  grey = Image.merge("LA", (Image.fromarray(GREY), Image.new("L", (20, 12), 0)))
  assert (read(saved(tmp_path / "d.png", grey)) == 255).all()


def test_sixteen_bits_are_rounded_to_eight_and_thirty_two_are_refused(tmp_path):
  values = RNG.integers(0, 65536, (12, 20)).astype(np.uint16)
  for name in ("a.png", "a.tif"):
    found = read(saved(tmp_path / name, Image.fromarray(values)))
    np.testing.assert_array_equal(found[..., 2], np.round(values / 257.0))
  for values in (np.full((4, 4), 70000, np.int32), np.ones((4, 4), np.float32)):
    path = saved(tmp_path / "b.tif", Image.fromarray(values))
    with pytest.raises(ValueError, match=r"b\.tif: has (32 bits of grey|the mode F)"):
      read(path)


def test_cmyk_and_other_spaces_are_converted_or_refused(tmp_path):
  colors = Image.fromarray(COLORS)
  cmyk = saved(tmp_path / "a.tif", colors.convert("CMYK"))
  assert np.abs(read(cmyk).astype(int) - COLORS).max() <= 2
  path = saved(tmp_path / "b.tif", colors.convert("LAB"))
  with pytest.raises(ValueError, match=r"b\.tif: has the mode LAB, which is not read"):
    read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_as_its_exif_says(tmp_path, orientation):
  turns = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1], 8: lambda x: x.swapaxes(0, 1)[::-1],
  }  # fmt: skip
  exif = Image.Exif()
  exif[0x0112] = orientation
  for image in (
    Image.fromarray(COLORS),
    Image.fromarray(GREY),
    Image.fromarray(COLORS[..., :1].repeat(4, 2)),
  ):
    path = saved(tmp_path / "a.png", image, exif=exif)
    plain = read(saved(tmp_path / "b.png", image))
    np.testing.assert_array_equal(read(path), turns[orientation](plain))


def test_what_is_animated_or_has_pages_is_refused_and_of_two_views_the_first_is_read(tmp_path):
  frames = [Image.fromarray(COLORS), Image.fromarray(COLORS[::-1].copy())]
  for name in ("a.gif", "a.webp", "a.png", "a.tif"):
    path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"{name}: is animated or has several pages"):
      read(path)
  path = saved(tmp_path / "a.mpo", frames[0], save_all=True, append_images=frames[1:])
  expected = saved(tmp_path / "a.jpg", frames[0])
  np.testing.assert_array_equal(read(path), read(expected))


def test_a_large_picture_is_shrunk_to_its_shorter_side(tmp_path):
  path = saved(tmp_path / "a.png", Image.fromarray(np.full((90, 200, 3), 7, np.uint8)))
  found = read(path, most=30)
  assert found.shape == (30, 67, 3) and (found == 7).all()
  assert read(path, most=90).shape == (90, 200, 3)


def png(width, height, data=b""):
  def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  return b"".join(
    [
      b"\x89PNG\r\n\x1a\n",
      chunk(b"IHDR", header),
      chunk(b"IDAT", zlib.compress(data)),
      chunk(b"IEND", b""),
    ]
  )


def test_a_bomb_is_refused_before_a_pixel_is_decoded(tmp_path):
  path = tmp_path / "bomb.png"
  for size in (9_000, 20_000, 2**31 - 1):
    path.write_bytes(png(size, size, bytes(1000)))
    with pytest.raises(ValueError, match=r"bomb\.png: (has .* over the limit|is no picture)"):
      read(path)
  path.write_bytes(png(4, 4, bytes(10**7)))  # more behind the pixels than there are
  try:
    assert read(path).shape == (4, 4, 3)
  except ValueError as error:
    assert "bomb.png" in str(error)


def test_truncated_and_other_files_are_refused_by_name(tmp_path):
  for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.bmp", "a.tif"):
    path = saved(tmp_path / name, Image.fromarray(COLORS))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ValueError, match=rf"{name}: is (a damaged|no) picture"):
      read(path)
  for content in (b"", b"GIF89a", b"text", b"<svg></svg>", b"%!PS-Adobe EPSF\n"):
    path = tmp_path / "b.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.png: is no picture that can be read"):
      read(path)
  with pytest.raises(FileNotFoundError, match="nothing"):
    read(tmp_path / "nothing.png")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_pictures_are_pictures_or_are_refused(tmp_path, format):
  buffer = io.BytesIO()
  Image.fromarray(COLORS).save(buffer, format)
  refused = 0
  for n in range(60):
    rng = random.Random(n)
    data = bytearray(buffer.getvalue())
    for _ in range(rng.randint(1, 4)):
      data[rng.randrange(len(data))] = rng.randrange(256)
    path = tmp_path / "damaged"
    path.write_bytes(data)
    try:
      found = read(path)
    except ValueError as error:
      assert "damaged: " in str(error) and len(str(error)) < 500
      refused += 1
    else:
      assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
  assert refused > 0
