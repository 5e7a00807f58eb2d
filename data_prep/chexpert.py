"""CheXpert as Stanford distributes it: `python -m data_prep.chexpert --source DIR --out DIR --help`.

DIR is CheXpert-v1.0 or CheXpert-v1.0-small, or the folder around it: train.csv, valid.csv, perhaps test.csv, and the
images that their column Path names. Race comes from the separate table of demographics, saved as CSV: --demographics
(PATIENT, PRIMARY_RACE, ETHNICITY). Images of train.csv are divided by patient, those of valid.csv go to val.
"""

import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compdiff_jax import cli
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.data.records import SPLITS
from data_prep import builder
from data_prep.demographics import UNKNOWN, encode, parse_age, parse_race, parse_sex
from data_prep.images import FolderImages
from data_prep.rows import RowError
from data_prep.schemas import AGE, CHEST_RACES, CHEXPERT_LABELS, SEX, demographic_schema
from data_prep.tables import TableRow, find_table, known, plain_or_gzipped, read_lookup, read_rows

_PROG = "python -m data_prep.chexpert"
_TABLES = {"train.csv": SPLITS, "valid.csv": ("val",), "test.csv": ("test",)}
_COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", *CHEXPERT_LABELS)
_FOLDERS = ("CheXpert-v1.0-small", "CheXpert-v1.0")
_PATIENT = re.compile(r"(?:^|/)(patient\d+)/")


class CheXpert:
  name = "chexpert"
  description = "Chest radiographs of CheXpert with the labels of their reports, age and sex (Irvin et al., AAAI 2019)."
  licence = "Stanford's research use agreement holds for the images, this data set and what is trained from it."

  def __init__(self, options: builder.Options, demographics: Path | None, lateral: bool):
    self._options = options
    places = [options.source, *(options.source / name for name in _FOLDERS)]
    folder = find_table(places, ["train.csv"]).parent
    tables = {name: plain_or_gzipped(folder / name) for name in _TABLES}
    table = [(name, row) for name, path in tables.items() if path for row in read_rows(path, _COLUMNS)]
    views = ("Frontal", "Lateral") if lateral else ("Frontal",)
    self._rows = [(n, row) for n, row in table if row.fault or row.values["Frontal/Lateral"] in views]
    self.selected = f"{len(self._rows)} of {len(table)} images selected ({' and '.join(views).lower()})."
    self._races = _read_races(demographics) if demographics else {}
    found = {race for race in self._races.values()}
    self.schema = demographic_schema(CHEST_RACES, found) if demographics else Schema((AGE, SEX))
    self.encode = FolderImages(str(options.source), options.images)

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return builder.rows(
      (row.values["Path"], row.number, functools.partial(self._row, name, row)) for name, row in self._rows
    )

  def _row(self, table: str, row: TableRow) -> dict[str, Any]:
    if row.fault:
      raise RowError(row.fault)
    path = row.values["Path"]
    match = _PATIENT.search(path)
    if not match:
      raise RowError(f"no patient id: {path!r} names no patient")
    try:
      texts = [parse_age(row.values["Age"]), parse_sex(row.values["Sex"]), self._races.get(match[1], "")]
    except ValueError as error:
      raise RowError(f"bad attribute value: {error}") from None
    findings = builder.chexpert_findings(row.values)
    inside = path.partition("/")[2]
    return {
      "image": (path, inside),
      "patient": match[1],
      "text": builder.findings_text(findings),
      "attributes": {a.name: encode(a, text) for a, text in zip(self.schema, texts)},
      "findings": findings,
      **self._options.splits(*_TABLES[table]),
    }


def _read_races(path: Path) -> dict[str, str]:
  """{patient: race}. "White, Hispanic" and a Hispanic ethnicity are Hispanic, as MIMIC-IV's single column has it."""
  races = {}
  for patient, row in read_lookup(path, "PATIENT", ("PRIMARY_RACE", "ETHNICITY")).items():
    race, ethnicity = row.values["PRIMARY_RACE"].lower(), row.values["ETHNICITY"].lower()
    hispanic = re.search(r", hispanic|^hispanic", race) or re.match(r"hispanic", ethnicity)
    value = "hispanic" if hispanic else "" if race in UNKNOWN else race
    races[patient] = known(parse_race, value, path, row.number)
  return races


def main(argv: list[str]) -> None:
  parser = builder.parser(_PROG, "CheXpert as a data set.")
  parser.add_argument("--demographics", type=Path, help="CSV of PATIENT, PRIMARY_RACE, ETHNICITY; without it no race")
  parser.add_argument("--lateral", action="store_true", help="keep lateral views too")
  args = parser.parse_args(argv)
  builder.write(_PROG, CheXpert(builder.options(args), args.demographics, args.lateral), args, argv)


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
