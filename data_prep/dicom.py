"""DICOM radiographs as they are meant to be seen: modality rescale, VOI window or table, MONOCHROME1 inverted."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.rows import RowError

_PREAMBLE = 128
_FAR = 1e9  # beyond every window: gives the ends of a window function's output


def is_dicom(path: Path) -> bool:
  with open(path, "rb") as file:
    return file.read(_PREAMBLE + 4)[_PREAMBLE:] == b"DICM"


def read_dicom(path: Path, max_pixels: int) -> Image.Image:
  """One frame as an image of mode F (float32 in 0..255) or RGB; bits are kept up to the window.

  The first VOI table or window of the file is used; without one, the values from minimum to maximum. Pixels that the
  file declares as padding are black and do not count for the maximum.
  """
  import pydicom  # only who reads DICOM waits for it

  try:
    syntax = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
      # pydicom unpacks such a file whole before anything in it can be checked.
      raise RowError("unreadable image: deflated DICOM is not read; convert it to another transfer syntax")
    dataset = pydicom.dcmread(path)
    if int(dataset.get("NumberOfFrames", 1) or 1) != 1:
      raise RowError(f"unreadable image: DICOM with {dataset.NumberOfFrames} frames, one is expected")
    if dataset.Rows * dataset.Columns > max_pixels:
      raise RowError(f"image too large: {dataset.Rows * dataset.Columns} pixels, the limit is {max_pixels}")
    return _grey(dataset) if dataset.SamplesPerPixel == 1 else _colour(dataset)
  except RowError:
    raise
  except Exception as error:  # a damaged file can make pydicom and its decoders raise anything
    raise RowError(f"unreadable image: {type(error).__name__}: {' '.join(str(error).split())}") from None


def _grey(dataset) -> Image.Image:
  """PS3.3 C.11: stored values -> modality transformation -> VOI transformation -> 0..255, black is air."""
  from pydicom.pixels import apply_modality_lut, pixel_array

  if dataset.PhotometricInterpretation not in ("MONOCHROME1", "MONOCHROME2"):
    raise RowError(f"unreadable image: photometric interpretation {dataset.PhotometricInterpretation}")
  stored = pixel_array(dataset)
  # Padding is a stored value, compared before any transformation.
  padding = stored == dataset.PixelPaddingValue if "PixelPaddingValue" in dataset else np.zeros(stored.shape, bool)
  values, low, high = _window(apply_modality_lut(stored, dataset), padding, dataset)
  shown = np.clip((np.float64(values) - low) * (255 / max(high - low, 1e-12)), 0, 255)
  if dataset.PhotometricInterpretation == "MONOCHROME1":
    shown = 255 - shown
  return Image.fromarray(np.float32(np.where(padding, 0, shown)))


def _window(values: np.ndarray, padding: np.ndarray, dataset) -> tuple[np.ndarray, float, float]:
  """The values after the VOI transformation, and what becomes black and white."""
  from pydicom.pixels import apply_voi, apply_windowing

  if dataset.get("VOILUTSequence"):
    bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
    return apply_voi(values, dataset), 0.0, 2.0**bits - 1
  if dataset.get("WindowWidth") not in (None, "") and dataset.get("WindowCenter") not in (None, ""):
    with np.errstate(over="ignore"):
      low, high = apply_windowing(np.array([-_FAR, _FAR]), dataset)
      return apply_windowing(values, dataset), float(low), float(high)
  seen = values[~padding] if not padding.all() else values
  return values, float(seen.min()), float(seen.max())


def _colour(dataset) -> Image.Image:
  from pydicom.pixels import pixel_array

  pixels = pixel_array(dataset)  # YBR becomes RGB
  if pixels.dtype != np.uint8 or pixels.ndim != 3:
    raise RowError(f"unreadable image: colour DICOM with {dataset.BitsAllocated} bits")
  return Image.fromarray(pixels)
