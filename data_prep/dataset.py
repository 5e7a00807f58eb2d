"""Writes one data set directory: patient-level splits, hold-outs, ArrayRecord shards, rejected rows and a data card.

Every builder (`data_prep.phantom`, `data_prep.table`, ...) yields rows (data_prep/rows.py) and calls `write_dataset`.
Everything is written into a temporary sibling and renamed at the end, so a directory with the final name is always
complete.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from compdiff_jax.cli import InputError, whole_directory, writing
from compdiff_jax.conditioning.schema import Cell, Schema
from compdiff_jax.data.records import SPLITS, write_description, write_split
from data_prep import card
from data_prep.holdouts import hold_out
from data_prep.rows import RowError

FRACTIONS = (0.8, 0.1, 0.1)
MAX_REJECTED = 0.05
REJECTED_COLUMNS = ("file", "row", "reason")
_SHARD_BYTES = 256 * 2**20
_BATCH = 256


def patient_hash(patient: str, salt: str) -> tuple[str, float]:
  """The stored name of a patient (16 hex digits) and a number in [0, 1) that decides the split.

  Both come from one salted SHA-256, from different bits: the split of a patient never depends on other patients.
  """
  digest = hashlib.sha256(f"{salt}\0{patient}".encode()).hexdigest()
  return digest[:16], int(digest[16:32], 16) / 2**64


def key_hash(file: str, salt: str) -> str:
  """The public name of a record that came from `file`, 16 hex digits: who knows the salt can find the file again."""
  return hashlib.sha256(f"{salt}\0file\0{file}".encode()).hexdigest()[:16]


def parse_cells(spec: str, schema: Schema) -> list[dict[str, int]]:
  """Reads a hold-out such as "age=60-80,sex=female;age=80+,sex=male"; the empty string holds out nothing."""
  return [schema.parse_cell(part) for part in spec.split(";") if part.strip()]


def parse_fractions(text: str) -> tuple[float, float, float]:
  """Reads "0.8,0.1,0.1" (train, val, test)."""
  try:
    fractions = tuple(float(part) for part in text.split(","))
  except ValueError:
    fractions = ()
  if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
    raise InputError(f"--fractions {text!r}: give three numbers (train, val, test) that sum to 1, such as 0.8,0.1,0.1")
  return fractions


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options that every writer of data sets shares; `options` turns them into arguments of `write_dataset`."""
  parser.add_argument("--out", required=True, help="data set directory to make; new or empty")
  parser.add_argument("--holdout", default="", help="cells to keep out of train and val: 'age=60-80,sex=female;...'")
  parser.add_argument("--fractions", default="0.8,0.1,0.1", help="shares of patients in train,val,test")
  parser.add_argument("--max_rejected", type=float, default=MAX_REJECTED, help="largest accepted share of bad rows")
  parser.add_argument("--salt", help="secret salt of the patient hash; the default is public")


def options(args: argparse.Namespace, schema: Schema) -> dict[str, Any]:
  """The arguments of `write_dataset` that `add_arguments` read."""
  if not 0 <= args.max_rejected <= 1:
    raise InputError(f"--max_rejected {args.max_rejected}: give a share between 0 and 1")
  return {
    "out": args.out,
    "held_out": parse_cells(args.holdout, schema),
    "fractions": parse_fractions(args.fractions),
    "max_rejected": args.max_rejected,
    "salt": args.salt,
  }


def command_line(prog: str, argv: Sequence[str]) -> str:
  """The command for the data card, without the value of `--salt`."""
  return re.sub(r"(--salt[= ])('[^']*'|\S+)", r"\1(secret)", shlex.join([*prog.split(), *argv]))


def write_dataset(
  out: str | Path,
  *,
  name: str,
  schema: Schema,
  examples: Iterable[Mapping[str, Any]],
  description: str,
  size: int,
  command: str,
  encode: Callable[[Any], bytes] = bytes,
  held_out: Sequence[Cell] = (),
  max_rejected: float = MAX_REJECTED,
  fractions: Sequence[float] = FRACTIONS,
  salt: str | None = None,
) -> dict[str, int]:
  """Writes the data set `out` and returns the number of images per split.

  Args:
    out: a new or empty directory.
    name: name of the data set, used in file names; letters, digits, underscores.
    schema: the attributes.
    examples: the rows, rejected ones among them, as data_prep/rows.py describes them.
    description: one paragraph for the data card.
    size: image height and width in pixels, for the card.
    command: the command line, for the card; see `command_line`.
    encode: makes the encoded image of `row["image"]`, or raises `RowError`. The default takes finished bytes.
    held_out: cells that must not occur in train and val. A patient with any image in such a cell goes to test.
    max_rejected: largest accepted share of rejected rows.
    fractions: expected shares of patients in train, val and test.
    salt: salt of the patient hash. The default depends on `name` only and is therefore public: whoever can list the
      possible patient ids can undo the hash. Give a secret one for data that leaves the house.

  Raises:
    InputError: `out` is taken, too many rows were rejected, a split is empty, or the hold-out removes a level from
      the training split. `out` then does not exist (or is as empty as before).
  """
  if not re.fullmatch(r"\w+", name):
    raise InputError(f"data set name {name!r}: use letters, digits and underscores")
  out = Path(out)
  salt = f"compdiff-jax/{name}" if salt is None else salt
  with whole_directory(out) as directory:
    with open(directory / "images.spool", "w+b") as spool:
      rows, rejected = _collect(examples, encode, spool, schema, salt, out)
      _check_rejected(out, len(rows), rejected, max_rejected)
      assigned = _assign(rows, fractions)
      holdout = hold_out(rows, assigned, schema, held_out)
      _check_patients(out, rows, assigned)
      splits = {split: [row for row, own in zip(rows, assigned) if own == split] for split in SPLITS}
      for split, fraction in zip(SPLITS, fractions):
        if not splits[split] and fraction:
          raise InputError(
            f"{out}: the {split} split would be empty ({len(rows)} images of"
            f" {len({row['patient'] for row in rows})} patients); give more patients, other --fractions or another"
            " --salt"
          )
      splits = {split: members for split, members in splits.items() if members}
      with writing(out):
        infos = [
          write_split(directory, name, split, schema, _Records(members, spool), _num_shards(members))
          for split, members in splits.items()
        ]
        if holdout:
          (directory / "holdout.json").write_text(json.dumps(holdout, indent=2) + "\n")
        _write_csv(directory / "rejected.csv", REJECTED_COLUMNS, rejected)
        _write_attribution(directory / "attribution.csv", splits)
        card.write_card(
          directory,
          name=name,
          schema=schema,
          splits=splits,
          description=description,
          size=size,
          command=command,
          holdout=holdout,
          rejected=rejected,
          read_image=lambda row: _read(spool, row),
        )
        write_description(directory, name, schema, infos, description)
    (directory / "images.spool").unlink()
  counts = {split: len(members) for split, members in splits.items()}
  _report(out, splits, rejected, holdout)
  return counts


def _collect(
  examples: Iterable[Mapping[str, Any]],
  encode: Callable[[Any], bytes],
  spool: BinaryIO,
  schema: Schema,
  salt: str,
  out: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Makes all images; their bytes go to the spool file, so memory holds the small columns only."""
  rows, rejected = [], []
  position = 0
  for example, image in _encoded(_unique(examples, salt), encode):
    if isinstance(image, RowError):
      rejected.append({"file": example["file"], "row": example["row"], "reason": str(image)})
      continue
    with writing(out):
      spool.write(image)
    patient, draw = patient_hash(str(example["patient"]), salt)
    rows.append(
      {
        "key": example["key"],
        "patient": patient,
        "draw": draw,
        "splits": tuple(example.get("splits", SPLITS)),
        "text": example["text"],
        "attributes": {a.name: np.asarray(example["attributes"][a.name], a.dtype) for a in schema},
        "findings": json.dumps(example["findings"], sort_keys=True),
        "factors": json.dumps(example["factors"], sort_keys=True),
        "attribution": dict(example.get("attribution", {})),
        "span": (position, len(image)),
      }
    )
    position += len(image)
  return rows, rejected


def _unique(examples: Iterable[Mapping[str, Any]], salt: str) -> Iterator[dict[str, Any]]:
  """Names every row and its place; of rows with one name the first counts, the others become rejected rows."""
  first = {}
  for number, example in enumerate(examples, start=1):
    name = str(example.get("key", example.get("file")))
    example = {"file": name, "row": number, "key": example.get("key") or key_hash(name, salt), **example}
    if "reason" not in example:
      if name in first:
        example["reason"] = f"duplicate key: {name} was first seen in row {first[name]}"
      else:
        first[name] = example["row"]
    yield example


def _encoded(
  examples: Iterable[Mapping[str, Any]], encode: Callable[[Any], bytes]
) -> Iterator[tuple[Mapping[str, Any], bytes | RowError]]:
  """Each row with its image or with the reason why there is none, in the order of the rows."""

  def attempt(example: Mapping[str, Any]) -> bytes | RowError:
    try:
      if "reason" in example:
        raise RowError(example["reason"])
      return encode(example["image"])
    except RowError as error:
      return error

  examples = iter(examples)
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    while batch := list(itertools.islice(examples, _BATCH)):
      yield from zip(batch, pool.map(attempt, batch))


def _check_rejected(out: Path, written: int, rejected: Sequence[Mapping[str, Any]], limit: float) -> None:
  total = written + len(rejected)
  if not total:
    raise InputError(f"{out}: there are no rows to write; check the input table")
  share = len(rejected) / total
  if share <= limit and written:
    return
  # The list is needed to mend the input, so it outlives the failed run beside the place of the data set.
  place = out.with_name(f"{out.name}.rejected.csv")
  with writing(place):
    _write_csv(place, REJECTED_COLUMNS, rejected)
  worst, count = Counter(row["reason"].split(":")[0] for row in rejected).most_common(1)[0]
  raise InputError(
    f"{len(rejected)} of {total} rows rejected ({share:.1%}, limit {limit:.1%}; most often: {worst}, {count}x);"
    f" see {place}, mend the rows or raise --max_rejected"
  )


def _assign(rows: Sequence[Mapping[str, Any]], fractions: Sequence[float]) -> list[str]:
  """The split of each row: the patient's own number decides between the splits that the row may go to."""
  return [_choose(row["draw"], row["splits"], dict(zip(SPLITS, fractions))) for row in rows]


def _choose(draw: float, allowed: Sequence[str], fractions: Mapping[str, float]) -> str:
  if not any(fractions[split] for split in allowed):
    return allowed[0]
  edges = np.cumsum([fractions[split] for split in allowed])
  return allowed[int(np.searchsorted(edges[:-1], draw * edges[-1], side="right"))]


def _check_patients(out: Path, rows: Sequence[Mapping[str, Any]], assigned: Sequence[str]) -> None:
  """A patient in two splits would let a model be tested on what it was trained on; only given splits can do that."""
  splits: dict[str, set[str]] = {}
  for row, split in zip(rows, assigned):
    splits.setdefault(row["patient"], set()).add(split)
  both = [patient for patient, names in splits.items() if len(names) > 1]
  if both:
    raise InputError(
      f"{out}: {len(both)} patients (first: hash {both[0]}) are in more than one of the splits that the data set comes"
      " with; divide by patient instead (--split patient)"
    )


def _num_shards(rows: Sequence[Mapping[str, Any]]) -> int:
  return max(1, -(-sum(row["span"][1] for row in rows) // _SHARD_BYTES))


def _read(spool: BinaryIO, row: Mapping[str, Any]) -> bytes:
  offset, length = row["span"]
  spool.seek(offset)
  return spool.read(length)


class _Records(Sequence):
  """The rows of one split as complete records; a slice is an iterator that reads images one at a time."""

  def __init__(self, rows: Sequence[Mapping[str, Any]], spool: BinaryIO):
    self._rows = rows
    self._spool = spool

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return (self._record(row) for row in self._rows[index])
    return self._record(self._rows[index])

  def _record(self, row: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("key", "patient", "text", "attributes", "findings", "factors")
    return {**{field: row[field] for field in fields}, "image": _read(self._spool, row)}


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: row.get(column, "") for column in columns} for row in rows)


def _write_attribution(path: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """One line an image with its licence and source, where the reader gave them."""
  columns = list(dict.fromkeys(c for members in splits.values() for row in members for c in row["attribution"]))
  if columns:
    lines = ({"key": r["key"], "split": s, **r["attribution"]} for s, members in splits.items() for r in members)
    _write_csv(path, ("key", "split", *columns), lines)


def _report(out: Path, splits: Mapping[str, Sequence], rejected: Sequence, holdout: Mapping[str, Any] | None) -> None:
  written = sum(len(members) for members in splits.values())
  total = f"{written + len(rejected)} rows in = {written} written + {len(rejected)} rejected"
  print(f"{out}: {total}" + (f" (reasons in {out / 'rejected.csv'})" if rejected else ""))
  for split, members in splits.items():
    print(f"  {split:5s} {len(members):7d} images of {len({row['patient'] for row in members})} patients")
  for text, count in (holdout or {"images": {}})["images"].items():
    print(f"  held out {text}: {count} images, {holdout['status'][text]}")
  print(f"  data card: {out / 'README.md'}, {out / 'sheet.png'}")
