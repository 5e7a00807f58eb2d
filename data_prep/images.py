"""Any image file as PNG or JPEG bytes of one size: `FolderImages` is the `encode` of every builder that reads files.

Images with more than 8 bits keep them until they are windowed; they are resized in float32 and rounded once.
Orientation is left as stored, nothing is flipped.
"""

import dataclasses
import io
import os
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from compdiff_jax.cli import InputError
from data_prep.dicom import is_dicom, read_dicom
from data_prep.rows import RowError

# The largest detectors give 25 megapixels. A file that claims more than this is damaged or wants to fill the memory.
MAX_PIXELS = 100_000_000
# Other readers of Pillow start foreign programs or have no place in medical data.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
# Cropping first resizes the whole image, which for a longer strip would not fit into memory.
_MAX_RATIO = 100
# Pillow turns a TIFF while it reads it, and no other format; this turns it back.
_TURN_BACK = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_90,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_270,
}
# What Pillow raises for images that are cut short or damaged.
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)


@dataclasses.dataclass(frozen=True)
class ImageOptions:
  """How images are stored.

  Attributes:
    size: height and width in pixels.
    resize: "pad" (to a square, with zeros) or "crop" (cuts the long side, centred).
    jpeg_quality: 1 to 100, or 0 for PNG.
  """

  size: int
  resize: str = "pad"
  jpeg_quality: int = 0

  def __post_init__(self):
    if self.size < 1:
      raise InputError(f"image size {self.size}: give a positive number of pixels")
    if self.resize not in ("pad", "crop"):
      raise InputError(f"resize {self.resize!r}: choose 'pad' or 'crop'")
    if not 0 <= self.jpeg_quality <= 100:
      raise InputError(f"jpeg_quality {self.jpeg_quality}: give 1 to 100, or 0 for PNG")


def encode_image(image: Image.Image, options: ImageOptions) -> bytes:
  """Encoded bytes of an image of mode L, RGB or F (float32 in 0..255).

  Resampling is antialiased (Lanczos, after a box reduction to three times the size). With padding, an odd pixel goes to
  the bottom or right. A strip too narrow to be cropped is a `RowError`.
  """
  if options.resize == "crop" and max(image.size) > _MAX_RATIO * min(image.size):
    raise RowError(f"image too narrow: {image.width}x{image.height} pixels, the limit for a crop is 1 to {_MAX_RATIO}")
  fit = max(image.size) if options.resize == "pad" else min(image.size)
  width, height = (max(1, round(side * options.size / fit)) for side in image.size)
  image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
  if image.mode == "F":
    image = Image.fromarray(np.uint8(np.round(np.clip(np.asarray(image), 0, 255))))
  square = Image.new(image.mode, (options.size, options.size))
  square.paste(image, ((options.size - width) // 2, (options.size - height) // 2))
  data = io.BytesIO()
  if options.jpeg_quality:
    square.save(data, "JPEG", quality=options.jpeg_quality, subsampling=0)
  else:
    square.save(data, "PNG")
  return data.getvalue()


def check_pixels(pixels: int) -> None:
  """Refuses an image that would not fit into memory, before it is decoded."""
  if pixels > MAX_PIXELS:
    raise RowError(f"image too large: {pixels} pixels, the limit is {MAX_PIXELS}")


def read_image(path: Path) -> Image.Image:
  """The image of a file in mode L, RGB or F (float32 in 0..255).

  DICOM files are shown through their own window. Other images of more than 8 bits are scaled from their minimum
  to their maximum, and inverted where a TIFF says that white is zero, which Pillow does for 8 bits only.
  """
  if is_dicom(path):
    return read_dicom(path, MAX_PIXELS)
  # From a path Pillow would map some TIFFs into memory, with width and height exchanged where they are turned.
  with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as source:
    check_pixels(source.width * source.height)
    tiff = source.format == "TIFF"
    turn_back = _TURN_BACK.get(source.getexif().get(ExifTags.Base.Orientation)) if tiff else None
    source.load()
    if source.mode[0] not in "IF":
      image = source.convert("L" if source.mode in ("1", "L", "LA") else "RGB")
    else:
      white_is_zero = tiff and source.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
      image = _scaled(np.asarray(source, np.float64), white_is_zero)
  return image if turn_back is None else image.transpose(turn_back)


def _scaled(values: np.ndarray, inverted: bool) -> Image.Image:
  """Values [H, W] of any range as an image of mode F in 0..255."""
  if not np.isfinite(values).all():
    raise RowError("unreadable image: it has values that are no numbers")
  low, high = values.min(), values.max()
  from_black = high - values if inverted else values - low
  return Image.fromarray(np.float32(from_black * (255 / max(high - low, 1e-12))))


def find_file(root: str | Path, *names: str) -> Path:
  """The first of the files `names` that exists below `root`; a path that leads out of `root` is refused."""
  home = os.path.realpath(root)
  for name in names:
    if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
      raise RowError(f"path outside the image folder: {name}")
    try:
      path = os.path.realpath(os.path.join(home, name), strict=True)
    except (FileNotFoundError, NotADirectoryError):
      continue
    except (OSError, ValueError) as error:  # a loop of symbolic links, a name too long, a NUL in the name
      raise RowError(f"unreadable image: {getattr(error, 'strerror', None) or error}") from None
    if os.path.commonpath([home, path]) != home:
      raise RowError(f"path outside the image folder: {name} is a link to a place outside")
    if os.path.isfile(path):
      return Path(path)
  raise RowError(f"missing image file: {' or '.join(names)}")


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
  return (names,) if isinstance(names, str) else names


@dataclasses.dataclass(frozen=True)
class FolderImages:
  """Encodes files below a folder. Called with a relative path, or several of which the first that exists counts."""

  root: str
  options: ImageOptions

  def files(self, names: str | tuple[str, ...]) -> list[str]:
    return [os.path.join(self.root, name) for name in _several(names)]

  def __call__(self, names: str | tuple[str, ...]) -> bytes:
    path = find_file(self.root, *_several(names))
    try:
      return encode_image(read_image(path), self.options)
    except Image.DecompressionBombError as error:
      raise RowError(f"image too large: {error}") from None
    except UnidentifiedImageError:
      raise RowError(f"unreadable image: not a {', '.join(_FORMATS)} or DICOM file") from None
    except _IMAGE_ERRORS as error:
      raise RowError(f"unreadable image: {' '.join(str(error).split())}") from None
