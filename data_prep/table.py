"""Turns any CSV or Parquet table and a folder of images into a data set: `python -m data_prep.table --help`.

A config file (configs/data/*.py) maps columns to attributes, text, findings and patient id. Its keys:

  name, description   of the data set
  licence             what holds for all images, for the card; "" where `attribution` has a column "licence"
  size, resize        target size in pixels; "pad" (to a square, zeros) or "crop" (centre)
  jpeg_quality        1 to 100, or 0 to store PNG
  image, patient      columns: path relative to the image folder, patient id
  unknown             raw values that mean "not known" in attributes, text and findings; the empty value always does
  attributes          tuple of dicts: the fields of `Attribute`, `column`, and `mapping` {raw value: value}, where a
                      value "" makes a raw value unknown; without `mapping` the raw values are the attribute's values.
                      With unit "year", ages such as "058Y" (DICOM) and ">89" are read too
  text.parts          templates such as "{finding}."; a part is left out when one of its columns is unknown. Braces hold
                      the name of a column only, no format specification such as ":.1f"
  text.replace        (regular expression, replacement) pairs, ignoring case, applied to the columns of the text; they
                      keep attributes and identifiers out of it. No others are: free text needs data_prep.scrub.ALL here
  text.max_words      the text is cut after so many words
  findings.columns    columns whose values are names of findings that are present
  findings.separator  separates several names in one value
  attribution         columns kept per image in attribution.csv; the column "licence" is counted in the data card
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from compdiff_jax import cli
from compdiff_jax.cli import InputError, nearest
from compdiff_jax.conditioning.schema import Attribute, Schema
from compdiff_jax.config import load_config
from data_prep import dataset, scrub
from data_prep.demographics import parse_age
from data_prep.images import FolderImages, ImageOptions
from data_prep.rows import RowError
from data_prep.tables import read_table

_KEYS = (
  *("name", "description", "licence", "size", "resize", "jpeg_quality", "image", "patient", "unknown", "attributes"),
  *("text.parts", "text.replace", "text.max_words", "findings.columns", "findings.separator", "attribution"),
)
_COLUMN = re.compile(r"\{([^{}]*)\}")  # in text.parts


class TableReader:
  """The rows of a table, as data_prep/rows.py describes them; `encode` makes their images."""

  def __init__(self, csv_path: str | Path, images: str | Path, config: ml_collections.ConfigDict):
    for key in _KEYS:
      if not _has(config, key):
        raise InputError(f"config.{key} is missing; configs/data/chest_xray.py has every key")
    if not Path(images).is_dir():
      raise InputError(
        f"image folder {images} does not exist; give the folder that the column {config.image!r} refers to"
      )
    self._header, rows = read_table(csv_path)
    self._rows = list(rows)
    self._config = config
    self.encode = FolderImages(str(images), ImageOptions(config.size, config.resize, config.jpeg_quality))
    if config.text.max_words < 1:
      raise InputError(f"config.text.max_words {config.text.max_words}: give a positive number")
    self._unknown = frozenset({"", *(str(value).casefold() for value in config.unknown)})
    self._columns = [_as_texts(entry) for entry in config.attributes]
    self.schema = Schema(tuple(_attribute(entry) for entry in self._columns))
    self._parts = [(part, _COLUMN.findall(part)) for part in config.text.parts]
    for expression, _ in config.text.replace:
      _check_pattern(expression)
    self._text_columns = sorted({column for _, columns in self._parts for column in columns})
    needed = [config.image, config.patient, *(entry["column"] for entry in self._columns)]
    needed += [*self._text_columns, *config.findings.columns, *config.attribution]
    for name in needed:
      if name not in self._header:
        raise InputError(f"{csv_path} has no column {name!r}, which the config uses{nearest(name, self._header)}")

  def __len__(self) -> int:
    return len(self._rows)

  def __iter__(self) -> Iterator[dict[str, Any]]:
    """Rows in table order. `row` counts as a spreadsheet does: the header is row 1."""
    for number, cells in self._rows:
      yield self._read(number, cells)

  def _read(self, number: int, cells: Sequence[str]) -> dict[str, Any]:
    row = {name: cell.strip() for name, cell in zip(self._header, cells)}
    file = row.get(self._config.image, "")
    try:
      if len(cells) != len(self._header):
        raise RowError(f"wrong number of columns: {len(cells)} instead of {len(self._header)}")
      if not row[self._config.patient]:
        raise RowError(f"no patient id: column {self._config.patient} is empty")
      if not file:
        raise RowError(f"no image file: column {self._config.image} is empty")
      return {
        "patient": row[self._config.patient],
        "attributes": {e["name"]: self._encode(e, row) for e in self._columns},
        "image": file,
        "text": self._text(row),
        "findings": self._findings(row),
        "factors": {},
        "attribution": {name: row[name] for name in self._config.attribution},
        "file": file,
        "row": number,
      }
    except RowError as error:
      return {"file": file, "row": number, "reason": str(error)}

  def _is_unknown(self, value: str) -> bool:
    return value.casefold() in self._unknown

  def _encode(self, entry: Mapping[str, Any], row: Mapping[str, str]) -> int | float:
    attribute, raw = self.schema[entry["name"]], row[entry["column"]]
    if self._is_unknown(raw):
      return attribute.unknown
    mapping = entry.get("mapping")
    if mapping and raw not in mapping:
      raise RowError(f"bad attribute value: {attribute.name} {raw!r} is not one of {', '.join(mapping)}")
    value = mapping[raw] if mapping else raw
    try:
      return attribute.encode(parse_age(value) if attribute.unit == "year" else value)
    except ValueError as error:
      raise RowError(f"bad attribute value: {error}") from None

  def _text(self, row: Mapping[str, str]) -> str:
    clean = {name: "" if self._is_unknown(row[name]) else self._clean(row[name]) for name in self._text_columns}
    parts = (part for part, columns in self._parts if all(clean[column] for column in columns))
    text = " ".join(_COLUMN.sub(lambda column: clean[column[1]], part) for part in parts)
    return scrub.cut(scrub.tidy(text), self._config.text.max_words)

  def _clean(self, value: str) -> str:
    return scrub.substitute(value, self._config.text.replace).strip()

  def _findings(self, row: Mapping[str, str]) -> dict[str, str]:
    values = [row[name] for name in self._config.findings.columns if not self._is_unknown(row[name])]
    names = [name.strip() for value in values for name in value.split(self._config.findings.separator)]
    return {name: "positive" for name in names if name and not self._is_unknown(name)}


def _has(config: ml_collections.ConfigDict, key: str) -> bool:
  for name in key.split("."):
    if not isinstance(config, ml_collections.ConfigDict) or name not in config:
      return False
    config = config[name]
  return True


def _as_texts(entry: Mapping[str, Any]) -> dict[str, Any]:
  """An entry of config.attributes whose mapping, if it has one, goes from text to text, as the table's cells are."""
  texts = {str(raw): str(value) for raw, value in dict(entry.get("mapping", {})).items()}
  return {**entry, **({"mapping": texts} if texts else {})}


def _attribute(entry: Mapping[str, Any]) -> Attribute:
  fields = {key: value for key, value in entry.items() if key not in ("column", "mapping")}
  if "column" not in entry:
    raise InputError(f"config.attributes: {entry.get('name', entry)} names no column")
  try:
    attribute = Attribute(**fields)
  except (TypeError, InputError) as error:
    raise InputError(f"config.attributes: {entry.get('name', entry)}: {error}") from None
  for raw, value in entry.get("mapping", {}).items():
    try:
      attribute.encode(value)
    except ValueError as error:
      raise InputError(f"config.attributes: {attribute.name}: mapping of {raw!r}: {error}") from None
  return attribute


def _check_pattern(expression: str) -> None:
  try:
    scrub.pattern(expression)
  except InputError as error:
    raise InputError(f"config.text.replace: {error}") from None


def main(argv: list[str]) -> None:
  parser = cli.parser("python -m data_prep.table", "Turns a CSV and a folder of images into a data set.")
  parser.add_argument("--csv", required=True, help="table with one row an image")
  parser.add_argument("--images", required=True, help="folder that the image column refers to")
  parser.add_argument(
    "--config", required=True, help="e.g. configs/data/chest_xray.py; keys change by --config.KEY=VALUE"
  )
  dataset.add_arguments(parser)
  args, overrides = parser.parse_known_args(argv)
  config = load_config(args.config, overrides)
  reader = TableReader(args.csv, args.images, config)
  dataset.write_dataset(
    name=config.name,
    schema=reader.schema,
    examples=reader,
    encode=reader.encode,
    description=config.description,
    licence=config.licence,
    size=config.size,
    command=dataset.command_line("python -m data_prep.table", argv),
    **dataset.options(args, reader.schema),
  )


if __name__ == "__main__":
  sys.exit(cli.run(main, "python -m data_prep.table"))
