"""Held-out cells: combinations of levels that are in no training image, and what their removal costs the others."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Cell, Schema

_SHOWN = 3  # cells named in an error


def attribute_columns(rows: Sequence[Mapping[str, Any]], schema: Schema) -> dict[str, np.ndarray]:
  """The attributes of many rows as a batch: {name: array [B]}."""
  return {a.name: np.array([row["attributes"][a.name] for row in rows], a.dtype) for a in schema}


def hold_out(
  rows: Sequence[Mapping[str, Any]],
  assigned: list[str],
  schema: Schema,
  cells: Sequence[Cell],
  placed: Sequence[bool] = (),
) -> dict[str, Any] | None:
  """Moves patients of held-out cells to test (in place); returns the content of holdout.json.

  Args:
    rows: dicts with `patient` and `attributes`.
    assigned: the split of each row.
    schema: the attributes; cells: the cells to hold out.
    placed: rows that belong to such a cell although their attributes do not say so; their patients go too.

  `status` of a cell is "pair-seen" when each pair of its levels still occurs together in training, else "pair-unseen".
  `cost` counts, per cell that is not held out, the train and val images that left with their patients.
  `maybe_in_train` counts training images that may belong to the cell because an attribute of theirs is unknown.

  Raises:
    InputError: a cell has no image, or a level would leave training altogether.
  """
  if not cells:
    return None
  columns = attribute_columns(rows, schema)
  inside = {schema.cell_name(cell): schema.in_cell(columns, cell) for cell in cells}
  for cell, (text, mask) in zip(cells, inside.items()):
    if not mask.any():
      raise InputError(f"hold-out {text}: no image lies in this cell; {_occurring(columns, schema, cell)}")
  any_inside = np.logical_or.reduce(list(inside.values()))
  leaving = any_inside | np.asarray(placed, bool) if len(placed) else any_inside
  patients = {row["patient"] for row, hit in zip(rows, leaving) if hit}
  names = _cell_names(columns, schema)
  moved = [i for i, row in enumerate(rows) if row["patient"] in patients and assigned[i] != "test"]
  before = {level for i, own in enumerate(assigned) if own == "train" for level in _levels(names[i])}
  for i in moved:
    assigned[i] = "test"
  train = [set(_levels(names[i])) for i, own in enumerate(assigned) if own == "train"]
  after = set().union(*train)
  needed = before | {level for cell in cells for level in _levels(schema.cell_name(cell))}
  for level in sorted(needed - after):
    raise InputError(
      f"hold-out {';'.join(inside)}: no image with {level} would remain in the training split, and a level that was"
      " never seen cannot be composed; hold out fewer cells or give more data"
    )
  status = {}
  for text in inside:
    pairs = itertools.combinations(_levels(text), 2)
    status[text] = "pair-seen" if all(any({*pair} <= seen for seen in train) for pair in pairs) else "pair-unseen"
  return {
    "cells": list(inside),
    "status": status,
    "images": {text: int(mask.sum()) for text, mask in inside.items()},
    "patients": {text: len({rows[i]["patient"] for i in np.flatnonzero(mask)}) for text, mask in inside.items()},
    "moved_to_test": {"images": len(moved), "patients": len({rows[i]["patient"] for i in moved})},
    "maybe_in_train": {schema.cell_name(cell): _maybe_inside(columns, schema, cell, assigned) for cell in cells},
    "cost": dict(sorted(Counter(names[i] for i in moved if not any_inside[i]).items())),
  }


def report_lines(holdout: Mapping[str, Any]) -> Iterator[str]:
  """What the terminal shows of a finished holdout.json: cells, what may still be in training, what moved, and texts."""
  for cell in holdout["cells"]:
    yield f"  held out {cell}: {holdout['images'][cell]} images, {holdout['status'][cell]}"
    if maybe := holdout["maybe_in_train"][cell]:
      yield f"    {maybe} training images may belong to it: an attribute of theirs is unknown"
  text, test, moved = holdout["text"], holdout["text"]["test"], holdout["moved_to_test"]
  by_text = f"{text['moved_by_text']} images by their text"
  yield f"  moved to test: {moved['images']} images of {moved['patients']} patients, {by_text}"
  yield f"  {text['texts_scanned']} training and validation texts scanned: {text['status']}"
  if text["texts_naming_a_level"] or test["texts_naming_a_level"]:
    yield (
      f"  {text['texts_naming_a_level']} of them and {test['texts_naming_a_level']} of {test['texts_scanned']} test"
      " texts, which plans made with --like copy into prompts, name a level of a held-out cell: see holdout_leaks.csv"
    )


def _occurring(columns: Mapping[str, np.ndarray], schema: Schema, cell: Cell) -> str:
  """The remedy for a cell without an image: which cells over its attributes have some, the rarest first."""
  names = [n for n in _cell_names(columns, schema.subset(list(cell))) if n.count(",") == len(cell) - 1]
  rarest = [f"{n} ({count})" for n, count in sorted(Counter(filter(None, names)).items(), key=lambda item: item[1])]
  return f"give more images (of the phantom: --num) or hold out one of those that occur: {'; '.join(rarest[:_SHOWN])}"


def _maybe_inside(columns: Mapping[str, np.ndarray], schema: Schema, cell: Cell, assigned: Sequence[str]) -> int:
  levels = {name: schema[name].levels(columns[name]) for name in cell}
  fits = np.logical_and.reduce([(levels[name] == level) | (levels[name] < 0) for name, level in cell.items()])
  return int(np.sum(fits & (np.array(assigned) == "train")))


def _cell_names(columns: Mapping[str, np.ndarray], schema: Schema) -> list[str]:
  """Per row its cell over the known attributes, in `Schema.cell_name` form."""
  levels = {a.name: a.levels(columns[a.name]) for a in schema.grouping}
  count = len(next(iter(levels.values())))
  return [schema.cell_name({n: int(x[i]) for n, x in levels.items() if x[i] >= 0}) for i in range(count)]


def _levels(cell_name: str) -> list[str]:
  return cell_name.split(",") if cell_name else []
