"""Sampling plans: one CSV row an image, with its text, attributes and seed."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compdiff_jax.cli import InputError, nearest, write_whole, writing
from compdiff_jax.conditioning.schema import Attribute, Schema, Value
from compdiff_jax.data.csv_file import iterate_csv
from compdiff_jax.data.records import RecordSet

_NUM_SEEDS = 2**32  # seeds are unsigned 32-bit integers


@dataclasses.dataclass(frozen=True)
class PlanRow:
  """One image to make.

  Attributes:
    text: clinical text without demographics.
    attributes: encoded value per schema attribute; unknown where the plan's field is empty.
    seed: 0 .. 2**32 - 1; the same seed and row give the same image.
    row: position in the plan, from 0.
    id: the plan's own name for the row, or "".
    negative: negative prompt of the row, or "".
  """

  text: str
  attributes: Mapping[str, Value]
  seed: int
  row: int
  id: str = ""
  negative: str = ""


def read_plan(path: str | Path, schema: Schema, all_or_none: Schema | None = None) -> list[PlanRow]:
  """Reads and checks a whole plan; every error is an `InputError` that names file, row and column.

  Columns: `text`, one per attribute (empty = unknown), optionally `seed` (default: the position of the row), `id`
  (unique) and `negative` (a negative prompt). Other columns are ignored, so a manifest is a plan too. Rows are counted
  as in a spreadsheet. Of the attributes `all_or_none` a row that gives one must give all.
  """
  header, table = iterate_csv(path)
  for name in ("text", *schema.names):
    if name not in header:
      raise InputError(f"{path} has no column {name!r}{nearest(name, header)}; an unknown attribute is an empty field")
  rows, ids = [], {}
  for index, (number, values) in enumerate(table):
    place = f"{path} row {number}"
    if len(values) != len(header):
      raise InputError(f"{place} has {len(values)} values instead of {len(header)}; check commas and quotation marks")
    fields = {name: value.strip() for name, value in zip(header, values)}
    name = fields.get("id", "")
    if name and name in ids:
      raise InputError(f"{place} column id: {name!r} is already used in row {ids[name]}; ids must be unique")
    ids[name] = number
    attributes = {a.name: _encode(a, fields[a.name], place) for a in schema}
    unknown = [a.name for a in all_or_none or () if not a.is_known(attributes[a.name])]
    if unknown and len(unknown) < len(all_or_none.names):
      raise InputError(
        f"{place}: {', '.join(unknown)} left out, and this model has no learned nulls; give all of"
        f" {', '.join(all_or_none.names)}, or none of them"
      )
    seed = _seed(fields["seed"], place) if "seed" in fields else index
    rows.append(PlanRow(fields["text"], attributes, seed, index, name, fields.get("negative", "")))
  return rows


def _encode(attribute: Attribute, text: str, place: str) -> Value:
  try:
    return attribute.encode(text)
  except ValueError as error:
    raise InputError(f"{place} column {attribute.name}: {error}; leave it empty when unknown") from None


def _seed(text: str, place: str) -> int:
  if not (text.isascii() and text.isdigit() and int(text) < _NUM_SEEDS):
    raise InputError(f"{place} column seed: {text!r} is not an integer from 0 to {_NUM_SEEDS - 1}")
  return int(text)


def write_plan(path: str | Path, rows: Sequence[PlanRow], schema: Schema) -> None:
  """Writes rows as a plan CSV; an existing file is never overwritten."""
  path = Path(path)
  if path.exists():
    raise InputError(f"{path} exists; give a new file name or remove it first")
  named, negative = any(row.id for row in rows), any(row.negative for row in rows)
  table = io.StringIO()
  writer = csv.writer(table, lineterminator="\n")
  writer.writerow([*(["id"] if named else []), "text", *schema.names, "seed", *(["negative"] if negative else [])])
  for row in rows:
    values = [a.decode(row.attributes[a.name]) for a in schema]
    optional = [row.negative] if negative else []
    writer.writerow([*([row.id] if named else []), row.text, *values, row.seed, *optional])
  with writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, table.getvalue())


def balanced_plan(
  records: RecordSet, attributes: Sequence[str], per_cell: int, split: str = "train", seed: int = 0
) -> list[PlanRow]:
  """A plan with `per_cell` rows for every cell of the named attributes, empty and held-out cells included.

  Texts come from randomly drawn records of the split, whatever their cell, so text and the named attributes are
  independent; attributes that are not named come with the text (unknown stays unknown). A continuous value is drawn
  from the records of its cell, or uniformly from its bin when the split has none. Rows go round the cells, so any
  beginning of the plan is balanced too.
  """
  if per_cell < 1:
    raise InputError(f"--per_cell {per_cell} must be at least 1")
  if not attributes or len(set(attributes)) != len(attributes):
    raise InputError(f"attributes to balance {','.join(attributes)!r}: name at least one, each once")
  rng = np.random.default_rng(seed)
  named = records.schema.subset(attributes)
  _, texts, columns = _read(records, split)
  cells = named.cells()
  inside = [np.flatnonzero(named.in_cell(columns, cell)) for cell in cells]
  seeds = _seeds(rng, len(cells) * per_cell)
  rows = []
  for number in range(len(cells) * per_cell):
    cell, members = cells[number % len(cells)], inside[number % len(cells)]
    donor = int(rng.integers(len(texts)))
    values = {a.name: columns[a.name][donor].tolist() for a in records.schema}
    like = int(rng.choice(members)) if len(members) else None
    for a in named:
      if a.kind == "categorical":
        values[a.name] = cell[a.name]
      else:
        values[a.name] = _in_bin(a, cell[a.name], rng) if like is None else columns[a.name][like].item()
    rows.append(PlanRow(texts[donor], values, seeds[number], number))
  return rows


def copied_plan(records: RecordSet, split: str, seed: int = 0) -> list[PlanRow]:
  """One row for each record of a split, with its text and attributes, so that real and synthetic sets match."""
  keys, texts, columns = _read(records, split)
  seeds = _seeds(np.random.default_rng(seed), len(texts))
  values = [{name: column[i].tolist() for name, column in columns.items()} for i in range(len(texts))]
  return [PlanRow(texts[i], values[i], seeds[i], i, keys[i]) for i in range(len(texts))]


def _read(records: RecordSet, split: str) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
  keys, texts, attributes = [], [], []
  source = records.split(split)
  for index in range(len(source)):
    record: Mapping[str, Any] = source[index]
    keys.append(record["key"])
    texts.append(record["text"])
    attributes.append(record["attributes"])
  return keys, texts, {a.name: np.array([values[a.name] for values in attributes], a.dtype) for a in records.schema}


def _seeds(rng: np.random.Generator, count: int) -> list[int]:
  """Consecutive seeds from a random start: unique inside a plan, rarely shared between plans."""
  start = int(rng.integers(_NUM_SEEDS))
  return [(start + i) % _NUM_SEEDS for i in range(count)]


def _in_bin(attribute: Attribute, level: int, rng: np.random.Generator) -> float:
  edges = (attribute.low, *attribute.bins, attribute.high)
  # As it will be read back from the CSV: printing may round onto the next bin's edge.
  value = float(attribute.decode(rng.uniform(edges[level], edges[level + 1])))
  return value if int(attribute.levels(np.array([value]))[0]) == level else attribute.representative(level)
