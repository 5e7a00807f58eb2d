"""Removes cells from the training of a finished data set, and proves that they are gone: `python -m data_prep.holdout`.

Patients with an image in a removed cell go to test. So do those whose text places an image there by an attribute that
the table does not know ("72 year old woman" without a sex); a known one decides alone. Beside the data set this writes

  holdout.json          cells, status (pair-seen: each pair of the cell's levels remains in training), counts, proof
  holdout_images.csv    the evaluation list: every test image of a removed cell
  holdout_leaks.csv     texts that name a level of a removed cell, with their split

A training text that names such a level lets a model learn the level as a word. With any of those the cells are not
unseen for a model that reads the text, so the command ends with an error unless --allow_text_leaks is given. Test texts
are counted apart: plans made with --like copy them into prompts.
"""

import csv
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compdiff_jax import cli
from compdiff_jax.conditioning.schema import Cell, Schema
from compdiff_jax.data.records import SPLITS, RecordSet, decode_image, write_description, write_split
from data_prep import card, checksums, text_leaks
from data_prep.dataset import parse_cells, write_csv
from data_prep.holdouts import attribute_columns, hold_out, report_lines
from data_prep.leaks import Scanner, read_patterns

_PROG = "python -m data_prep.holdout"
_TRAINING = ("train", "val")
_IMAGE_COLUMNS = ("key", "patient", "cell", "status")
_SHOWN = 3  # keys named in the error

Row = dict[str, Any]


def main(argv: list[str]) -> None:
  parser = cli.parser(_PROG, __doc__.splitlines()[0])
  parser.add_argument("--data", required=True, help="prepared data set")
  parser.add_argument("--out", required=True, type=Path, help="data set directory to make; new or empty")
  parser.add_argument("--cells", default="", help="cells to remove: 'age=60-80,sex=female,race=Asian;...'")
  parser.add_argument("--rarest", type=int, default=0, metavar="K", help="or the K rarest cells of training")
  parser.add_argument("--attributes", default="", help="attributes whose cells --rarest ranks, e.g. age,sex; all")
  parser.add_argument("--patterns", help="JSON {attribute: {level: [regular expression]}} of words that name a level")
  parser.add_argument("--allow_text_leaks", action="store_true", help="write the data set although texts name levels")
  args = parser.parse_args(argv)
  if bool(args.cells) == bool(args.rarest):
    raise cli.InputError("give either --cells 'age=...,sex=...;...' or --rarest K")
  if args.rarest < 0 or (args.attributes and not args.rarest):
    raise cli.InputError("--rarest takes a positive number; --attributes goes with it")
  cli.check_free(args.out)
  records = RecordSet(args.data)
  if records.latents is not None:
    raise cli.InputError(f"{args.data} holds moments; hold out from its data set of images, then encode the result")
  scanner = Scanner(records.schema, read_patterns(args.patterns, records.schema) if args.patterns else None)

  # ---- Which cells, and who leaves training
  rows = _read_rows(records)
  assigned = [row["split"] for row in rows]  # `split` of a row stays where its record is
  if args.rarest:
    names = [name.strip() for name in args.attributes.split(",") if name.strip()] or records.schema.grouping.names
    cells = rarest_cells(rows, records.schema.grouping.subset(names), args.rarest)
  else:
    cells = parse_cells(args.cells, records.schema)
  already = [records.schema.parse_cell(text) for text in records.held_out]
  cells = [*already, *(cell for cell in cells if cell not in already)]
  named = {row["key"]: scanner(row["text"]) for row in rows}
  placed = text_leaks.placed(rows, assigned, named, cells, records.schema)
  holdout = hold_out(rows, assigned, records.schema, cells, placed)

  # ---- The proof
  leaks = text_leaks.find(rows, assigned, named, cells, records.schema)
  learned = [leak for leak in leaks if leak["split"] in _TRAINING]
  if learned and not args.allow_text_leaks:
    place = args.out.with_name(f"{args.out.name}.leaks.csv")
    with cli.writing(place):
      write_csv(place, text_leaks.COLUMNS, learned)
    keys = list(dict.fromkeys(leak["key"] for leak in learned))
    raise cli.InputError(
      f"{len(keys)} training and validation texts name a level of a held-out cell ({', '.join(keys[:_SHOWN])} ...);"
      f" see {place}; take the words out of the texts, correct --patterns, or accept them with --allow_text_leaks"
    )
  holdout["text"] = text_leaks.describe(leaks, assigned, sum(placed))

  # ---- The data set
  with cli.whole_directory(args.out) as directory:
    _write(directory, records, rows, assigned, holdout, shlex.join([*_PROG.split(), *argv]))
    write_csv(directory / "holdout_images.csv", _IMAGE_COLUMNS, evaluation_list(rows, cells, records.schema, holdout))
    write_csv(directory / "holdout_leaks.csv", text_leaks.COLUMNS, leaks)
    holdout["proof"] = _proof(RecordSet(directory), cells)
    (directory / "holdout.json").write_text(json.dumps(holdout, indent=2) + "\n")
    checksums.write(directory)
  _report(args.out, holdout)


def _read_rows(records: RecordSet) -> list[Row]:
  """Every record without its image, and where it is."""
  rows = []
  for split in (split for split in SPLITS if records.splits.get(split)):
    source = records.split(split)
    for index in range(len(source)):
      record = source[index]
      json_fields = {field: json.dumps(record[field], sort_keys=True) for field in ("findings", "factors")}
      kept = {field: record[field] for field in ("key", "patient", "text", "attributes")}
      rows.append({**kept, **json_fields, "split": split, "index": index, "attribution": {}})
  return rows


def rarest_cells(rows: Sequence[Row], schema: Schema, count: int) -> list[dict[str, int]]:
  """The `count` cells with fewest training images, of those that have any; equal counts in the schema's order."""
  train = attribute_columns([row for row in rows if row["split"] == "train"], schema)
  sizes = {schema.cell_name(cell): int(schema.in_cell(train, cell).sum()) for cell in schema.cells()}
  present = sorted((name for name, size in sizes.items() if size), key=sizes.get)
  if count >= len(present):
    raise cli.InputError(f"--rarest {count}: training has images in {len(present)} cells; leave at least one")
  return [schema.parse_cell(name) for name in present[:count]]


def evaluation_list(
  rows: Sequence[Row], cells: Sequence[Cell], schema: Schema, holdout: Mapping[str, Any]
) -> Iterator[dict[str, str]]:
  """The images that lie in a held-out cell by their attributes; all of them are in test."""
  columns = attribute_columns(rows, schema)
  for cell in cells:
    name = schema.cell_name(cell)
    for i in np.flatnonzero(schema.in_cell(columns, cell)):
      yield {**{f: rows[i][f] for f in ("key", "patient")}, "cell": name, "status": holdout["status"][name]}


def _proof(records: RecordSet, cells: Sequence[Cell]) -> dict[str, int]:
  """Counted in the data set as written: images of the cells, and their patients, in train and val. All must be zero."""
  rows = _read_rows(records)
  schema = records.schema
  columns = attribute_columns(rows, schema)
  inside = np.logical_or.reduce([schema.in_cell(columns, cell) for cell in cells])
  patients = {row["patient"] for row, hit in zip(rows, inside) if hit}
  training = [(row, hit) for row, hit in zip(rows, inside) if row["split"] in _TRAINING]
  proof = {
    "images_checked": len(training),
    "images_in_held_out_cells": int(sum(hit for _, hit in training)),
    "images_of_held_out_patients": sum(row["patient"] in patients for row, _ in training),
  }
  if proof["images_in_held_out_cells"] or proof["images_of_held_out_patients"]:
    raise cli.RunError(f"held-out images are still in training: {proof}; nothing was written")
  return proof


class _Copied(Sequence):
  """Records of some rows, read from their old place one at a time."""

  def __init__(self, records: RecordSet, rows: Sequence[Row]):
    self._sources = {split: records.split(split) for split in {row["split"] for row in rows}}
    self._rows = rows

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return (self._record(row) for row in self._rows[index])
    return self._record(self._rows[index])

  def image(self, row: Row) -> bytes:
    return self._sources[row["split"]][row["index"]]["image"]

  def _record(self, row: Row) -> dict[str, Any]:
    fields = ("key", "patient", "text", "attributes", "findings", "factors")
    return {**{field: row[field] for field in fields}, "image": self.image(row)}


def _write(
  directory: Path, records: RecordSet, rows: Sequence[Row], assigned: Sequence[str], holdout: Mapping, command: str
) -> None:
  """The shards, description and card; rows that came with the old data set (rejected, attribution) stay with it."""
  rejected = _read_csv(records.path / "rejected.csv")
  attribution = _read_csv(records.path / "attribution.csv")
  by_key = {line["key"]: {k: v for k, v in line.items() if k not in ("key", "split")} for line in attribution}
  for row in rows:
    row["attribution"] = by_key.get(row["key"], {})
  splits = {split: [row for row, own in zip(rows, assigned) if own == split] for split in SPLITS}
  empty = [split for split in SPLITS if records.splits.get(split) and not splits[split]]
  if empty:
    raise cli.InputError(f"the {empty[0]} split would be empty; hold out fewer cells")
  splits = {split: members for split, members in splits.items() if members}
  per_shard = max(length for split in records.splits for length in records.shard_lengths(split))
  copied = _Copied(records, rows)
  infos = [
    write_split(directory, records.name, split, records.schema, _Copied(records, own), -(-len(own) // per_shard))
    for split, own in splits.items()
  ]
  write_csv(directory / "rejected.csv", ("file", "row", "reason"), rejected)
  if attribution:
    own = dict(zip((row["key"] for row in rows), assigned))
    lines = ({**line, "split": own[line["key"]]} for line in attribution)
    write_csv(directory / "attribution.csv", list(attribution[0]), lines)
  card.write_card(
    directory,
    name=records.name,
    schema=records.schema,
    splits=splits,
    description=records.description,
    size=decode_image(copied.image(rows[0])).shape[0],
    command=command,
    holdout=holdout,
    rejected=rejected,
    read_image=copied.image,
    licence=records.licence,
  )
  write_description(directory, records.name, records.schema, infos, records.description, licence=records.licence)


def _read_csv(path: Path) -> list[dict[str, str]]:
  if not path.exists():
    return []
  with open(path, newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def _report(out: Path, holdout: Mapping[str, Any]) -> None:
  for line in report_lines(holdout):
    print(line)
  proof = holdout["proof"]
  print(f"  {proof['images_checked']} training and validation images checked: none in these cells or of their patients")
  print(f"  evaluation list: {out / 'holdout_images.csv'}")


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
