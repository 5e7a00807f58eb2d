"""What texts tell of held-out cells: which records they put into one, and which of them name a level of one.

Where the table knows a value, no word moves the record: "woman" in the text of a man may be about somebody else. The
text is still found and reported, as a model that reads it learns the word.

`named` is what data_prep/leaks.py finds in the text of each row: {key: {attribute: {level: words}}}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from compdiff_jax.conditioning.schema import Cell, Schema
from data_prep.holdouts import attribute_columns

COLUMNS = ("key", "split", "cell", "attribute", "level", "words")

Rows = Sequence[Mapping[str, Any]]
Named = Mapping[str, Mapping[str, Mapping[int, str]]]


def placed(rows: Rows, assigned: Sequence[str], named: Named, cells: Sequence[Cell], schema: Schema) -> list[bool]:
  """Which records of train and val their text puts into a cell, where it names what the attributes leave unknown."""
  if not cells:
    return [False] * len(rows)
  columns = attribute_columns(rows, schema.grouping)
  levels = {a.name: a.levels(columns[a.name]).tolist() for a in schema.grouping}

  def is_placed(i: int) -> bool:
    words = named.get(rows[i]["key"], {})
    unknown = {name for name, own in levels.items() if own[i] < 0 and name in words}
    return bool(unknown) and any(
      not unknown.isdisjoint(cell)
      and all(level in words[name] if name in unknown else level == levels[name][i] for name, level in cell.items())
      for cell in cells
    )

  return [split != "test" and is_placed(i) for i, split in enumerate(assigned)]


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
