"""FairGenMed as distributed: `python -m data_prep.fairgenmed --source DIR --out DIR --help`.

DIR holds data_summary.csv (filename, age, gender, race, ..., use) and the npz files in Training/, Validation/, Test/ or
in training/, validation/, test/. Each file is one patient's SLO fundus image under the key `slo_fundus`.
"""

import dataclasses
import functools
import math
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compdiff_jax import cli
from data_prep import builder
from data_prep.demographics import UNKNOWN, encode, parse_age, parse_race, parse_sex, recorded_races
from data_prep.images import ImageOptions, check_pixels, encode_image, find_file
from data_prep.rows import RowError
from data_prep.schemas import FUNDUS_RACES, demographic_schema
from data_prep.tables import TableRow, find_table, read_rows

_PROG = "python -m data_prep.fairgenmed"
_KEY = "slo_fundus"
_CONDITIONS = ("glaucoma", "md_severity", "cdr_status", "near_vision_refraction_stage")
_COLUMNS = ("filename", "age", "gender", "race", *_CONDITIONS, "use")
_SPLITS = {"training": "train", "train": "train", "validation": "val", "val": "val", "test": "test"}
_FOLDERS = {"train": ("Training", "training"), "val": ("Validation", "validation"), "test": ("Test", "test")}

# Recorded value -> (words of the text, {finding: state}), as the reference words them (method E.3).
_GLAUCOMA = {
  **dict.fromkeys(("1", "1.0", "yes", "y", "true"), ("glaucoma", {"glaucoma": "positive"})),
  **dict.fromkeys(("0", "0.0", "no", "n", "false"), ("non-glaucoma", {"glaucoma": "negative"})),
}
_SEVERITY = {
  "normal": ("normal vision", {"vision loss": "negative"}),
  **{level: (f"{level} vision loss", {"vision loss": "positive"}) for level in ("mild", "moderate", "severe")},
}
_CUP_DISC = {
  "normal": ("normal cup-disc ratio", {"abnormal cup-disc ratio": "negative"}),
  "borderline": ("borderline cup-disc ratio", {"abnormal cup-disc ratio": "uncertain"}),
  "abnormal": ("abnormal cup-disc ratio", {"abnormal cup-disc ratio": "positive"}),
}
_REFRACTION = {
  "positive": ("hyperopia", {"hyperopia": "positive", "myopia": "negative"}),
  "neutral": ("emmetropia", {"hyperopia": "negative", "myopia": "negative"}),
  "negative": ("myopia", {"hyperopia": "negative", "myopia": "positive"}),
}


class FairGenMed:
  name = "fairgenmed"
  description = (
    "SLO fundus images of Harvard FairGenMed with glaucoma, vision, cup-disc ratio and refraction, age, sex and race."
  )
  licence = "CC BY-NC-ND 4.0."

  def __init__(self, options: builder.Options):
    self._options = options
    path = find_table([options.source], ["data_summary.csv"])
    self._rows = list(read_rows(path, _COLUMNS))
    self.selected = f"{len(self._rows)} rows of {path.name}."
    self.schema = demographic_schema(FUNDUS_RACES, recorded_races(row.values["race"] for row in self._rows))
    self.encode = NpzImages(str(options.source), options.images)

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return builder.rows((row.values["filename"], row.number, functools.partial(self._row, row)) for row in self._rows)

  def _row(self, row: TableRow) -> dict[str, Any]:
    if row.fault:
      raise RowError(row.fault)
    values = row.values
    file, use = values["filename"], values["use"].lower()
    if not file:
      raise RowError("no image file: column filename is empty")
    if use not in _SPLITS:
      raise RowError(f"bad split: use {values['use']!r} is not training, validation or test")
    split = _SPLITS[use]
    try:
      attributes = (parse_age(values["age"]), parse_sex(values["gender"]), parse_race(values["race"]))
    except ValueError as error:
      raise RowError(f"bad attribute value: {error}") from None
    text, findings = conditions(*(values[name] for name in _CONDITIONS))
    return {
      "image": (*(f"{folder}/{file}" for folder in _FOLDERS[split]), file),
      "patient": file,
      "text": text,
      "attributes": {a.name: encode(a, text) for a, text in zip(self.schema, attributes)},
      "findings": findings,
      **self._options.splits(split),
    }


def conditions(glaucoma: str, severity: str, cup_disc: str, refraction: str) -> tuple[str, dict[str, str]]:
  """The findings-only text of the reference's prompt and the findings; an unknown value is left out of both."""
  parts = []
  for column, value, table in zip(
    _CONDITIONS, (glaucoma, severity, cup_disc, refraction), (_GLAUCOMA, _SEVERITY, _CUP_DISC, _REFRACTION)
  ):
    value = value.strip().lower()
    if value in UNKNOWN:
      continue
    if value not in table:
      raise RowError(f"bad value: {column} {value!r} is not one of {', '.join(table)}")
    parts.append(table[value])
  findings = {name: state for _, found in parts for name, state in found.items()}
  return ", ".join(words for words, _ in parts), findings


@dataclasses.dataclass(frozen=True)
class NpzImages:
  """Encodes `slo_fundus` of npz files below a folder, each stretched from its own minimum and maximum (method E.3)."""

  root: str
  options: ImageOptions

  def files(self, names: tuple[str, ...]) -> list[Path]:
    return [Path(self.root) / name for name in names]

  def __call__(self, names: tuple[str, ...]) -> bytes:
    path = find_file(self.root, *names)
    try:
      values = read_array(path, _KEY)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
      raise RowError(f"unreadable image: {' '.join(str(error).split())}") from None
    return encode_image(_to_image(values), self.options)


def read_array(path: Path, key: str) -> np.ndarray:
  """One array of an npz file. Its header is checked before anything is unpacked; pickled objects are refused."""
  with zipfile.ZipFile(path) as archive:
    with archive.open(f"{key}.npy") as file:
      version = np.lib.format.read_magic(file)
      read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
      shape, _, dtype = read_header[version](file)
      if dtype.kind not in "uif":
        raise RowError(f"unreadable image: {key} holds {dtype}, not numbers")
      check_pixels(math.prod(shape))
    with archive.open(f"{key}.npy") as file:
      return np.lib.format.read_array(file, allow_pickle=False)


def _to_image(values: np.ndarray) -> Image.Image:
  """An array [H, W, 3], [3, H, W] (transposed) or [H, W] as an 8-bit image over its full range."""
  colour_last = values.ndim == 3 and values.shape[-1] == 3
  colour_first = values.ndim == 3 and values.shape[0] == 3
  if colour_last == colour_first and values.ndim != 2:
    raise RowError(f"bad image shape: {values.shape} is neither (H, W, 3) nor (3, H, W) nor (H, W)")
  if not values.size or not np.isfinite(values).all():
    raise RowError("unreadable image: it is empty or has values that are no numbers")
  values = np.asarray(np.moveaxis(values, 0, -1) if colour_first else values, np.float64)
  low, high = values.min(), values.max()
  return Image.fromarray(np.uint8(np.round((values - low) * (255 / max(high - low, 1e-12)))))


def main(argv: list[str]) -> None:
  args = builder.parser(_PROG, "FairGenMed as a data set.").parse_args(argv)
  builder.write(_PROG, FairGenMed(builder.options(args)), args, argv)


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
