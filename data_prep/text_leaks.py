"""What texts tell of held-out cells: which records they put into one, and which of them name a level of one.

`named` is what data_prep/leaks.py finds in the text of each row: {key: {attribute: {level: words}}}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compdiff_jax.conditioning.schema import Cell, Schema

COLUMNS = ("key", "split", "cell", "attribute", "level", "words")

Rows = Sequence[Mapping[str, Any]]
Named = Mapping[str, Mapping[str, Mapping[int, str]]]


def placed(rows: Rows, assigned: Sequence[str], named: Named, cells: Sequence[Cell], schema: Schema) -> list[bool]:
  """Which records of train and val lie in a cell by text and attributes together, but not by attributes alone."""
  return [
    split != "test" and _is_placed(row, named.get(row["key"], {}), cells, schema) for row, split in zip(rows, assigned)
  ]


def _is_placed(row: Mapping[str, Any], named: Mapping, cells: Sequence[Cell], schema: Schema) -> bool:
  own = {a.name: int(a.levels(np.asarray(row["attributes"][a.name])[None])[0]) for a in schema.grouping}

  def joined(cell: Cell) -> bool:
    return all(own[name] == level or level in named.get(name, ()) for name, level in cell.items())

  return any(joined(cell) and any(own[name] != level for name, level in cell.items()) for cell in cells)


def find(
  rows: Rows, assigned: Sequence[str], named: Named, cells: Sequence[Cell], schema: Schema
) -> list[dict[str, str]]:
  """One entry, with the fields COLUMNS, for each level of a held-out cell that a text names."""
  leaks = []
  for row, split in zip(rows, assigned):
    words = named.get(row["key"], {})
    for cell in cells:
      for name, level in cell.items():
        if level in words.get(name, ()):
          where = {"key": row["key"], "split": split, "cell": schema.cell_name(cell)}
          what = {"attribute": name, "level": schema[name].level_names[level], "words": words[name][level]}
          leaks.append({**where, **what})
  return leaks


def describe(leaks: Sequence[Mapping[str, str]], assigned: Sequence[str], moved: int) -> dict[str, Any]:
  """The entry `text` of holdout.json: the texts of train and val, how many records moved by text, and those of test."""
  training = [leak for leak in leaks if leak["split"] != "test"]
  test = [leak for leak in leaks if leak["split"] == "test"]
  tested = sum(split == "test" for split in assigned)
  return {**_count(training, len(assigned) - tested), "moved_by_text": moved, "test": _count(test, tested)}


def _count(leaks: Sequence[Mapping[str, str]], scanned: int) -> dict[str, Any]:
  names = sorted({leak["attribute"] for leak in leaks})
  return {
    "status": f"leaks: {', '.join(names)}" if names else "no leak",
    "texts_scanned": scanned,
    "texts_naming_a_level": len({leak["key"] for leak in leaks}),
  }
