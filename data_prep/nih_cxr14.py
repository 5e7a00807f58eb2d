"""NIH ChestX-ray14 as the NIH Clinical Center distributes it: `python -m data_prep.nih_cxr14 --source DIR --out DIR`.

DIR holds Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv), train_val_list.txt, test_list.txt and the PNGs in images/,
images_001/images/ to images_012/images/, or images_001/ to images_012/.
"""

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compdiff_jax import cli
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Schema
from data_prep import builder
from data_prep.demographics import encode, parse_age, parse_sex
from data_prep.images import FolderImages
from data_prep.rows import RowError
from data_prep.schemas import AGE, SEX, VIEW
from data_prep.tables import TableRow, find_table, read_rows

_PROG = "python -m data_prep.nih_cxr14"
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")
_LISTS = {"train_val_list.txt": ("train", "val"), "test_list.txt": ("test",)}
_FOLDERS = ("images", *(f"images_{i:03d}/images" for i in range(1, 13)), *(f"images_{i:03d}" for i in range(1, 13)))
# The labels as NIH names them; the text says them in words.
LABELS = (
  *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
  *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia", "No Finding"),
)


class NihCxr14:
  name = "nih_cxr14"
  description = (
    "Frontal chest radiographs of NIH ChestX-ray14 with text-mined findings, age, sex and view (Wang et al., CVPR"
    " 2017); race is not recorded."
  )
  licence = (
    "Free use with attribution: provided by the NIH Clinical Center (nihcc.app.box.com/v/ChestXray-NIHCC), to be"
    " acknowledged with the paper."
  )
  schema = Schema((AGE, SEX, VIEW))

  def __init__(self, options: builder.Options):
    self._options = options
    path = find_table([options.source], _TABLES)
    self._rows = list(read_rows(path, _COLUMNS))
    self.selected = f"{len(self._rows)} rows of {path.name}."
    self._splits = _read_lists(options.source) if options.official else {}
    self._folders = [folder for folder in _FOLDERS if (options.source / folder).is_dir()]
    if not self._folders:
      raise InputError(f"{options.source} has no images/ and no images_001/; check --source")
    self.encode = FolderImages(str(options.source), options.images)

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return builder.rows(
      (row.values["Image Index"], row.number, functools.partial(self._row, row)) for row in self._rows
    )

  def _row(self, row: TableRow) -> dict[str, Any]:
    if row.fault:
      raise RowError(row.fault)
    file, labels, patient, age, sex, view = (row.values[name] for name in _COLUMNS)
    if not file or not patient:
      raise RowError(f"no {'patient id' if file else 'image file'}: the column is empty")
    if self._options.official and file not in self._splits:
      raise RowError(f"no split: {file} is neither in train_val_list.txt nor in test_list.txt")
    names = [name.strip() for name in labels.split("|") if name.strip()]
    unknown = [name for name in names if name not in LABELS]
    if unknown:
      raise RowError(f"bad label: {unknown[0]!r} is no label of ChestX-ray14")
    try:
      attributes = (parse_age(age), parse_sex(sex), view)
    except ValueError as error:
      raise RowError(f"bad attribute value: {error}") from None
    findings = {re.sub("_", " ", name): "positive" for name in names}
    return {
      "image": tuple(f"{folder}/{file}" for folder in self._folders),
      "patient": patient,
      "text": builder.findings_text(findings),
      "attributes": {a.name: encode(a, text) for a, text in zip(self.schema, attributes)},
      "findings": findings,
      **self._options.splits(*self._splits.get(file, ())),
    }


def _read_lists(source: Path) -> dict[str, tuple[str, ...]]:
  """{image: splits it may go to}; the two official lists divide by patient."""
  splits = {}
  for name, allowed in _LISTS.items():
    try:
      lines = (source / name).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
      reason = getattr(error, "strerror", None) or error
      raise InputError(f"cannot read {source / name}: {reason}; fetch it, or use --split patient") from None
    splits |= dict.fromkeys(lines, allowed)
  return splits


def main(argv: list[str]) -> None:
  args = builder.parser(_PROG, "NIH ChestX-ray14 as a data set.").parse_args(argv)
  builder.write(_PROG, NihCxr14(builder.options(args)), args, argv)


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
