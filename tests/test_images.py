"""data_prep.images: size, depth and colour of stored images; files that must be refused."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from compdiff_jax.cli import InputError
from compdiff_jax.data.records import decode_image
from data_prep.images import FolderImages, ImageOptions, read_image
from data_prep.rows import RowError


def prepared(folder, name: str, size: int, resize: str = "pad") -> np.ndarray:
  return decode_image(FolderImages(str(folder), ImageOptions(size, resize))(name))


def test_pad_and_crop(tmp_path):
  pixels = np.zeros([40, 80], np.uint8)
  pixels[:, 20:60] = 200  # the middle half is bright
  Image.fromarray(pixels).save(tmp_path / "wide.png")
  padded = prepared(tmp_path, "wide.png", 40)[:, :, 0]
  assert not padded[:10].any() and not padded[30:].any()  # 80x40 becomes 40x20, rows 10 to 30
  assert (padded[12:28, 12:28] >= 199).all() and padded.shape == (40, 40)
  cropped = prepared(tmp_path, "wide.png", 20, "crop")[:, :, 0]
  assert cropped.shape == (20, 20) and (cropped[:, 4:-4] == 200).all() and cropped.min() > 180


def test_resize_is_antialiased_and_keeps_colour_and_depth(tmp_path):
  stripes = np.zeros([64, 64, 3], np.uint8)
  stripes[:, ::2, 0] = 255  # one pixel wide: without antialiasing they alias to 0 or 255
  Image.fromarray(stripes).save(tmp_path / "stripes.png")
  small = prepared(tmp_path, "stripes.png", 16)
  assert np.abs(small[2:-2, 2:-2, 0].astype(int) - 127).max() < 8 and not small[:, :, 1:].any()
  deep = np.linspace(1000, 5000, 256).reshape(16, 16).astype(np.uint16)
  Image.fromarray(deep).save(tmp_path / "deep.png")
  values = prepared(tmp_path, "deep.png", 16)[:, :, 0].ravel().astype(int)
  assert values[0] == 0 and values[-1] == 255 and (np.diff(values) >= 0).all()


def test_deep_images_are_rounded_once_after_resizing(tmp_path):
  # Two neighbours 300 and 301 of 0..60000 are one 8-bit value; their mean must not be rounded twice.
  rng = np.random.default_rng(0)
  deep = rng.integers(0, 60_000, (64, 64)).astype(np.uint16)
  deep[0, 0], deep[0, 1] = 0, 60_000
  Image.fromarray(deep).save(tmp_path / "deep.png")
  stored = prepared(tmp_path, "deep.png", 32)[:, :, 0].astype(float)
  image = Image.fromarray(np.float32(deep / 60_000 * 255)).resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0)
  exact = np.clip(np.asarray(image), 0, 255)
  assert np.abs(stored - exact).max() <= 0.5 + 1e-3


def test_orientation_is_as_stored(tmp_path):
  pixels = np.zeros([8, 8], np.uint8)
  pixels[0, 7] = 255
  exif = Image.Exif()
  exif[0x0112] = 3  # "rotated by 180 degrees"
  Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
  assert (prepared(tmp_path, "a.png", 8)[:, :, 0] == pixels).all()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_tiff_is_as_stored(tmp_path, orientation, depth, compression):
  pixels = np.arange(6 * 8, dtype=depth).reshape(6, 8)
  Image.fromarray(pixels).save(tmp_path / "a.tiff", compression=compression, tiffinfo={0x0112: orientation})
  found = np.asarray(read_image(tmp_path / "a.tiff"), float)
  np.testing.assert_allclose(found, pixels * (1 if depth == np.uint8 else 255 / 47), rtol=1e-6)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.float32])
def test_white_is_zero(tmp_path, depth):
  stored = np.linspace(0, 255, 16).round().reshape(4, 4).astype(depth)
  data = io.BytesIO()
  Image.fromarray(stored).save(data, "TIFF")
  entry = struct.pack("<HHIHH", 262, 3, 1, 1, 0)  # photometric interpretation: 1, black is zero
  assert data.getvalue().count(entry) == 1
  (tmp_path / "a.tiff").write_bytes(data.getvalue().replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
  np.testing.assert_allclose(np.asarray(read_image(tmp_path / "a.tiff"), float), 255.0 - stored, atol=1e-4)


def test_strips_that_cannot_be_cropped_are_refused(tmp_path):
  Image.new("L", (2, 90_000)).save(tmp_path / "strip.png")
  Image.new("L", (2, 200), 7).save(tmp_path / "narrow.png")
  with pytest.raises(RowError, match="image too narrow: 2x90000 pixels"):
    prepared(tmp_path, "strip.png", 512, "crop")
  assert prepared(tmp_path, "strip.png", 16).shape == (16, 16, 3)  # padding shrinks it
  assert (prepared(tmp_path, "narrow.png", 16, "crop") == 7).all()


def test_jpeg_of_the_asked_quality(tmp_path):
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
  sizes = []
  for quality in (95, 50):
    data = FolderImages(str(tmp_path), ImageOptions(32, "pad", quality))("a.png")
    assert Image.open(io.BytesIO(data)).format == "JPEG"
    sizes.append(len(data))
  assert sizes[0] > 1.5 * sizes[1]


@pytest.mark.parametrize("options", [(0, "pad", 0), (8, "stretch", 0), (8, "pad", 101)])
def test_bad_options(options):
  with pytest.raises(InputError, match=r"size|resize|jpeg_quality"):
    ImageOptions(*options)


def bomb(path):
  """A PNG of 40,000 x 40,000 pixels that is a few bytes long: only its header claims the size."""
  import zlib

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
  body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_refused_files(tmp_path):
  home = tmp_path / "home"
  home.mkdir()
  Image.new("L", (4, 4)).save(tmp_path / "outside.png")
  (home / "link.png").symlink_to(tmp_path / "outside.png")
  (home / "folder").symlink_to(tmp_path, target_is_directory=True)
  (home / "loop.png").symlink_to("loop.png")
  (home / "inside.png").symlink_to("real.png")
  Image.new("L", (4, 4)).save(home / "real.png")
  bomb(home / "bomb.png")
  (home / "text.png").write_text("no picture")
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)).save(home / "cut.png")
  (home / "cut.png").write_bytes((home / "cut.png").read_bytes()[:800])
  (home / "run.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
  Image.fromarray(np.full([4, 4], np.nan, np.float32)).save(home / "nan.tiff")
  encode = FolderImages(str(home), ImageOptions(4))
  for name, reason in {
    "../outside.png": "path outside the image folder",
    "a/../../outside.png": "path outside the image folder",
    str(tmp_path / "outside.png"): "path outside the image folder",
    "link.png": "path outside the image folder",
    "folder/outside.png": "path outside the image folder",
    "loop.png": "unreadable image: Too many levels of symbolic links",
    "nowhere.png": "missing image file",
    "real.png/x": "missing image file",
    "bomb.png": "image too large: Image size (1600000000 pixels)",
    "text.png": "unreadable image: not a PNG, JPEG, TIFF, BMP, WEBP or DICOM file",
    "cut.png": "unreadable image",
    "run.eps": "unreadable image: not a PNG, JPEG, TIFF, BMP, WEBP or DICOM file",
    "nan.tiff": "unreadable image: it has values that are no numbers",
    "a\0b": "unreadable image",
  }.items():
    with pytest.raises(RowError) as caught:
      encode(name)
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value), name
  assert encode("inside.png") == encode("real.png") == encode(("absent.png", "real.png"))
