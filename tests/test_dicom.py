"""DICOM files written by the test: windows, tables, inversion, depth, compression, and files that must be refused."""

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from compdiff_jax.data.records import decode_image
from data_prep import images
from data_prep.dicom import is_dicom
from data_prep.rows import RowError

RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8) * 64  # 0..4032 of 12 bits


def write_dicom(path, pixels=RAMP, stored=12, syntax=ExplicitVRLittleEndian, photometric="MONOCHROME2", **elements):
  """A digital radiograph with the given stored values; `elements` are set last."""
  dataset = Dataset()
  dataset.file_meta = FileMetaDataset()
  dataset.file_meta.TransferSyntaxUID = syntax if syntax != RLELossless else ExplicitVRLittleEndian
  dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
  dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=["test"])
  dataset.Rows, dataset.Columns = pixels.shape[:2]
  dataset.SamplesPerPixel = pixels.shape[2] if pixels.ndim == 3 else 1
  if pixels.ndim == 3:
    dataset.PlanarConfiguration = 0
  dataset.PhotometricInterpretation = photometric
  dataset.BitsAllocated = pixels.dtype.itemsize * 8
  dataset.BitsStored, dataset.HighBit = stored, stored - 1
  dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
  dataset.PixelData = pixels.tobytes()
  for name, value in elements.items():
    setattr(dataset, name, value)
  if syntax == RLELossless:
    dataset.compress(RLELossless, encoding_plugin="pydicom")
  if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
    dataset["PixelData"].VR = "OB"
  dataset.save_as(path, enforce_file_format=True)
  return path


def shown(path) -> np.ndarray:
  return np.asarray(images.read_image(path), np.float64)


def test_without_a_window_the_full_range_is_shown(tmp_path):
  path = write_dicom(tmp_path / "a.dcm")
  assert is_dicom(path)
  np.testing.assert_allclose(shown(path), RAMP / 4032 * 255, atol=1e-4)  # 12 bits, not 8
  inverse = shown(write_dicom(tmp_path / "b.dcm", photometric="MONOCHROME1"))
  np.testing.assert_allclose(inverse, 255 - RAMP / 4032 * 255, atol=1e-4)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_linear_window_after_rescale(tmp_path, photometric):
  elements = {"RescaleSlope": 0.5, "RescaleIntercept": -100, "WindowCenter": [900, 1], "WindowWidth": [1000, 1]}
  values = shown(write_dicom(tmp_path / "a.dcm", photometric=photometric, **elements))
  x = RAMP * 0.5 - 100
  # PS3.3 C.11.2.1.2.1, with y from 0 to 1.
  expected = np.where(x <= 900 - 0.5 - 999 / 2, 0, np.where(x > 900 - 0.5 + 999 / 2, 1, (x - 899.5) / 999 + 0.5)) * 255
  np.testing.assert_allclose(values, 255 - expected if photometric == "MONOCHROME1" else expected, atol=1e-3)
  assert values.min() == 0 and values.max() == 255  # cut at both ends, though no pixel says where they are


def test_sigmoid_window(tmp_path):
  values = shown(write_dicom(tmp_path / "a.dcm", WindowCenter=2000, WindowWidth=1500, VOILUTFunction="SIGMOID"))
  np.testing.assert_allclose(values, 255 / (1 + np.exp(-4 * (RAMP - 2000.0) / 1500)), atol=0.1)


def test_voi_table_is_preferred_to_the_window(tmp_path):
  item = Dataset()
  item.LUTDescriptor = [4096, 0, 10]
  table = np.round(1023 * np.sqrt(np.arange(4096) / 4095)).astype(np.uint16)
  item.add_new("LUTData", "OW", table.tobytes())
  values = shown(write_dicom(tmp_path / "a.dcm", VOILUTSequence=[item], WindowCenter=10, WindowWidth=10))
  np.testing.assert_allclose(values, table[RAMP] / 1023 * 255, atol=1e-3)


def test_signed_values_and_padding(tmp_path):
  pixels = (RAMP.astype(np.int16) - 2000) // 2
  pixels[0] = -2048
  path = write_dicom(tmp_path / "a.dcm", pixels, 12, photometric="MONOCHROME1", PixelPaddingValue=-2048)
  seen = pixels[1:].astype(float)
  expected = 255 - (seen - seen.min()) / np.ptp(seen) * 255
  np.testing.assert_allclose(shown(path)[1:], expected, atol=1e-4)
  assert not shown(path)[0].any()  # padding is black although MONOCHROME1 shows its value white


def test_compressed_and_colour(tmp_path):
  np.testing.assert_array_equal(
    shown(write_dicom(tmp_path / "a.dcm", syntax=RLELossless)), shown(write_dicom(tmp_path / "b.dcm"))
  )
  colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
  np.testing.assert_array_equal(shown(write_dicom(tmp_path / "c.dcm", colour, 8, photometric="RGB")), colour)


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_encapsulated_jpeg(tmp_path, kind):
  pixels = np.repeat(np.repeat(np.uint8(RAMP // 16), 8, 0), 8, 1)
  data = io.BytesIO()
  Image.fromarray(pixels).save(data, kind, **({"quality": 100} if kind == "JPEG" else {"irreversible": False}))
  syntax = pydicom.uid.JPEGBaseline8Bit if kind == "JPEG" else pydicom.uid.JPEG2000Lossless
  frames = pydicom.encaps.encapsulate([data.getvalue()])
  path = write_dicom(tmp_path / "a.dcm", pixels, 8, syntax=syntax, PixelData=frames)
  expected = pixels / pixels.max() * 255
  np.testing.assert_allclose(shown(path), expected, atol=3 if kind == "JPEG" else 1e-4)


def test_stored_file_goes_through_resize(tmp_path):
  write_dicom(tmp_path / "a.dcm")
  encode = images.FolderImages(str(tmp_path), images.ImageOptions(4))
  values = decode_image(encode(("a.jpg", "a.dcm")))
  assert values.shape == (4, 4, 3) and values[0, 0, 0] < values[3, 3, 0]


def test_refused_files(tmp_path):
  write_dicom(tmp_path / "frames.dcm", NumberOfFrames=2)
  write_dicom(tmp_path / "large.dcm", Rows=60_000, Columns=60_000)
  write_dicom(tmp_path / "short.dcm", Rows=100)
  write_dicom(tmp_path / "palette.dcm", photometric="PALETTE COLOR")
  whole = write_dicom(tmp_path / "whole.dcm").read_bytes()
  (tmp_path / "cut.dcm").write_bytes(whole[:200])
  dataset = pydicom.dcmread(tmp_path / "whole.dcm")
  dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
  dataset.save_as(tmp_path / "deflated.dcm")
  del dataset.PixelData
  dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  dataset.save_as(tmp_path / "report.dcm")
  for name, reason in {
    "frames.dcm": "unreadable image: DICOM with 2 frames",
    "large.dcm": "image too large: 3600000000 pixels",
    "short.dcm": "unreadable image: ",
    "palette.dcm": "unreadable image: photometric interpretation PALETTE COLOR",
    "cut.dcm": "unreadable image: ",
    "deflated.dcm": "unreadable image: deflated DICOM",
    "report.dcm": "unreadable image: ",
  }.items():
    with pytest.raises(RowError) as caught:
      images.FolderImages(str(tmp_path), images.ImageOptions(4))(name)
    assert str(caught.value).startswith(reason) and "\n" not in str(caught.value), (name, caught.value)
