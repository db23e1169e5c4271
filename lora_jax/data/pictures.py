"""Reads pictures from files, as arrays [height, width, 3] of uint8.

    picture = read("cat.jpg", most=448)

JPEG, PNG, WebP, BMP, GIF and TIFF are supported. The contents are converted as follows:

    grey, black and white        the same value in red, green and blue
    palette                      the colors of the palette
    transparent parts            composed onto white
    16 bits of grey              v / 257, rounded to 8 bits
    16 bits of color in PNG      the upper 8 of them, as Pillow reads them
    CMYK, YCbCr                  Pillow's formula, without a color profile
    EXIF orientation             applied
    two views (MPO)              the first of them
    animated, several pages      refused
    32 bits, Lab, HSV            refused
    over 67 million pixels       refused before a pixel is decoded
    truncated, damaged           refused, and so are files that Pillow reads with a warning

Files are untrusted. An error names the file.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lora_jax.io import files

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "MPO")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""How the names of pictures' files end, in small letters."""

_MOST_PIXELS = 1 << 26
_MOST_BYTES = 1 << 28
_PLAIN = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBX")
_TRANSPARENT = ("RGBA", "LA", "PA")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_WHITE = (255, 255, 255, 255)
_ORIENTATION = 0x0112  # the tag of EXIF


def read(path: str | Path, most: int) -> np.ndarray:
  """Returns a picture.

  Args:
    path: of its file.
    most: the most pixels of its shorter side; larger pictures are shrunk, bicubic and with
      antialiasing.

  Raises:
    FileNotFoundError, PermissionError: as `files.open_regular` does.
    ValueError: with the reason, for a file that is refused; see the module.
  """
  content = files.read_bytes(path, _MOST_BYTES)
  try:
    return decode(content, most)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from None


def decode(content: bytes, most: int) -> np.ndarray:
  """Returns a picture from the content of a file; see `read`."""
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # Pillow only warns of damaged parts
    return _decoded(content, most)


def _decoded(content: bytes, most: int) -> np.ndarray:
  try:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
  except Exception as error:  # Pillow's readers do not document their exceptions
    raise ValueError(f"is no picture that can be read ({_words(error)})") from None
  width, height = image.size
  if width * height > _MOST_PIXELS:
    raise ValueError(
      f"has {width:,} × {height:,} pixels, over the limit of {_MOST_PIXELS:,}; shrink it first"
    )
  try:
    if getattr(image, "is_animated", False) and image.format != "MPO":
      raise _Refused("is animated or has several pages; save the one that is meant")
    image.load()
    orientation = image.getexif().get(_ORIENTATION)
    found = _in_color(image)
    if orientation is not None:
      found.getexif()[_ORIENTATION] = orientation  # the conversion may have lost it
    return shrunk(np.array(ImageOps.exif_transpose(found)), most)
  except _Refused as error:
    raise ValueError(str(error)) from None
  except Exception as error:
    raise ValueError(f"is a damaged picture ({_words(error)}); save it again") from None


class _Refused(ValueError):
  """A file that is refused here rather than by Pillow."""


def _words(error: Exception) -> str:
  return (str(error) or type(error).__name__)[:200]


def _in_color(image: Image.Image) -> Image.Image:
  if image.mode in _DEEP:
    return _eight_bits(image)
  if image.mode in _TRANSPARENT or (image.mode in _PLAIN and "transparency" in image.info):
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
  if image.mode in _PLAIN:
    return image.convert("RGB")
  raise _Refused(f"has the mode {image.mode}, which is not read; save it as RGB or grey")


def _eight_bits(image: Image.Image) -> Image.Image:
  values = np.asarray(image).astype(np.int64)
  if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
    raise _Refused("has 32 bits of grey, which is not read; save it with 8 or 16")
  return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")


def shrunk(picture: np.ndarray, most: int) -> np.ndarray:
  """Returns a picture whose shorter side has at most `most` pixels."""
  shorter = min(picture.shape[:2])
  if shorter <= most:
    return picture
  height, width = (max(1, round(side * most / shorter)) for side in picture.shape[:2])
  return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
