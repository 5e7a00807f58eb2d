"""Writes one data set directory: patient-level splits, hold-outs, ArrayRecord shards, rejected rows and a data card.

Every builder (`data_prep.phantom`, `data_prep.table`, ...) yields rows (data_prep/rows.py) and calls `write_dataset`.
What each shard holds is planned before any image is opened, so shards can be made anywhere, in any order, and again
(data_prep/shards.py). They are written into a sibling `.NAME.unfinished`, which becomes the directory at the end: a
directory with the final name is always complete, and the same command continues after a kill.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from compdiff_jax.cli import InputError, UnfinishedError, check_free, resumable_directory, writing
from compdiff_jax.conditioning.schema import Cell, Schema
from compdiff_jax.data.records import (
  SPLITS,
  RecordSource,
  shard_name,
  split_info,
  write_attributes,
  write_description,
)
from data_prep import card, checksums, duplicates, text_leaks
from data_prep.holdouts import attribute_columns, hold_out, report_lines
from data_prep.leaks import Scanner
from data_prep.rows import RowError
from data_prep.shards import HERE, Runner, Task, read_note, run_tasks

FRACTIONS = (0.8, 0.1, 0.1)
MAX_REJECTED = 0.05
REJECTED_COLUMNS = ("file", "row", "reason")
SHARD_MIB = 300
_PLACES = ("--workers", "--runner", "--runner_options")  # say where the work is done
_MEASURED = 32  # images, at most one of 32, that the size of the shards is estimated from


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
  cells = [schema.parse_cell(part) for part in spec.split(";") if part.strip()]
  if spec and not cells:
    raise InputError(f"hold-out {spec!r} names no cell; give one such as 'age=60-80,sex=female'")
  return cells


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
  add_scale_arguments(parser)


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
  """The options that say where the work is done; none changes the records."""
  parser.add_argument("--workers", type=int, help="local processes that write shards; 0: none; default: one a core")
  parser.add_argument("--runner", default="", help="Apache Beam runner: DirectRunner, DataflowRunner, FlinkRunner, ...")
  parser.add_argument("--runner_options", default="", help="options of the Beam runner, in one quoted string")
  parser.add_argument("--shard_mib", type=float, default=SHARD_MIB, help="approximate size of a shard")


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
    **scale_options(args),
  }


def scale_options(args: argparse.Namespace) -> dict[str, Any]:
  """The arguments of `write_dataset` that `add_scale_arguments` read."""
  if args.workers is not None and args.workers < 0:
    raise InputError(f"--workers {args.workers}: give 0 or a positive number")
  if args.shard_mib <= 0:
    raise InputError(f"--shard_mib {args.shard_mib}: give a positive number")
  return {"runner": Runner(args.workers, args.runner, args.runner_options), "shard_mib": args.shard_mib}


def command_line(prog: str, argv: Sequence[str]) -> str:
  """The command for the data card, without the value of `--salt` and without what says where the work was done.

  Options are whole words here: the parsers accept no abbreviations.
  """
  kept, arguments = [], iter(argv)
  for argument in arguments:
    option, equals, _ = argument.partition("=")
    if option not in (*_PLACES, "--salt"):
      kept.append(argument)
      continue
    if not equals:
      next(arguments, None)  # its value
    if option == "--salt":
      kept.append("--salt=SECRET")
  return shlex.join([*prog.split(), *kept])


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
  licence: str = "",
  runner: Runner = HERE,
  shard_mib: float = SHARD_MIB,
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
    held_out: cells that must not occur in train and val. A patient with any image in such a cell goes to test, also
      where the text says so of an unknown attribute. Texts that name a level of a cell are counted and listed.
    max_rejected: largest accepted share of rejected rows.
    fractions: expected shares of patients in train, val and test.
    salt: salt of the patient hash. The default depends on `name` only and is therefore public: whoever can list the
      possible patient ids can undo the hash. Give a secret one for data that leaves the house.
    licence: what holds for all images, for the card and every data set that is derived from this one.
    runner: where the shards are made.
    shard_mib: approximate size of a shard.

  Raises:
    InputError: `out` is taken, too many rows were rejected, a split is empty, or the hold-out removes a level from
      the training split. `out` then does not exist (or is as empty as before). What was finished when too many
      images were rejected, or the disk was full, or the run was killed, is continued by the next run.
  """
  if not re.fullmatch(r"\w+", name):
    raise InputError(f"data set name {name!r}: use letters, digits and underscores")
  out = Path(out)
  salt = f"compdiff-jax/{name}" if salt is None else salt
  check_free(out)
  rows, rejected = _plan(examples, schema, salt)
  _check_rejected(out, len(rows), rejected, max_rejected)
  natural = _assign(rows, fractions)
  assigned = list(natural)
  scanner = Scanner(schema)
  named = {row["key"]: scanner(row["text"]) for row in rows} if held_out else {}
  hold_out(rows, assigned, schema, held_out, text_leaks.placed(rows, assigned, named, held_out, schema))
  _check_patients(out, rows, assigned)
  shards = _shards(rows, assigned, encode, shard_mib)
  _check_splits(out, shards, rows, fractions)
  with resumable_directory(out, _job(name, schema, encode, shards)) as (directory, notes), writing(out):
    tasks = {
      (split, i): Task(directory / (file := shard_name(name, split, i, len(parts))), notes / file, schema, encode, part)
      for split, parts in shards.items()
      for i, part in enumerate(parts)
    }
    run_tasks(list(tasks.values()), runner)
    for stale in {*directory.iterdir()} - {task.path for task in tasks.values()}:  # what describes a killed run
      stale.unlink()
    splits, done = {split: [] for split in shards}, {split: [] for split in shards}
    for (split, _), task in tasks.items():
      note = read_note(task.note)
      done[split].append(note.shard)
      hashes = iter(note.sha256)
      for i, row in enumerate(task.rows):
        if i in note.rejected:
          rejected.append({"file": row["file"], "row": row["row"], "reason": note.rejected[i], "number": row["number"]})
        else:
          splits[split].append({**row, "sha256": next(hashes)})
    rejected.sort(key=lambda row: row["number"])
    written = [row for members in splits.values() for row in members]
    _check_rejected(out, len(written), rejected, max_rejected)
    _check_splits(out, splits, written, fractions)
    splits = {split: members for split, members in splits.items() if members}
    # Described again, without the images that could not be read.
    before = {row["key"]: split for row, split in zip(rows, natural)}
    moved = {row["patient"] for row, own, split in zip(rows, natural, assigned) if own != split}
    own = [before[row["key"]] for row in written]
    by_text = sum(text_leaks.placed(written, own, named, held_out, schema))
    holdout = hold_out(written, own, schema, held_out, [row["patient"] in moved for row in written])
    if holdout:
      leaks = text_leaks.find(written, own, named, held_out, schema)
      holdout["text"] = text_leaks.describe(leaks, own, by_text)
      (directory / "holdout.json").write_text(json.dumps(holdout, indent=2) + "\n")
      write_csv(directory / "holdout_leaks.csv", text_leaks.COLUMNS, leaks)
    write_csv(directory / "rejected.csv", REJECTED_COLUMNS, rejected)
    repeated = duplicates.find(splits)
    write_csv(directory / "duplicates.csv", duplicates.COLUMNS, repeated)
    _write_attribution(directory / "attribution.csv", splits)
    for split, members in splits.items():
      write_attributes(directory, split, schema, attribute_columns(members, schema))
    stored = _stored(tasks, done, splits, schema)
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
      read_image=lambda row: stored[row["key"]]()["image"],
      repeated=repeated,
      licence=licence,
    )
    infos = [split_info(directory, name, split, done[split]) for split in splits]
    write_description(directory, name, schema, infos, description, licence=licence)
    checksums.write(directory)
  counts = {split: len(members) for split, members in splits.items()}
  _report(out, splits, rejected, holdout, repeated)
  return counts


def _plan(
  examples: Iterable[Mapping[str, Any]], schema: Schema, salt: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """All rows as they will be stored, without their images, and the rows that are rejected already."""
  rows, rejected = [], []
  for number, example in enumerate(_unique(examples, salt)):
    if "reason" in example:
      rejected.append({**{column: example[column] for column in REJECTED_COLUMNS}, "number": number})
      continue
    patient, draw = patient_hash(str(example["patient"]), salt)
    rows.append(
      {
        "number": number,
        "file": example["file"],
        "row": example["row"],
        "key": example["key"],
        "patient": patient,
        "draw": draw,
        "splits": tuple(example.get("splits", SPLITS)),
        "image": example["image"],
        "text": example["text"],
        "attributes": {a.name: np.asarray(example["attributes"][a.name], a.dtype) for a in schema},
        "findings": json.dumps(example["findings"], sort_keys=True),
        "factors": json.dumps(example["factors"], sort_keys=True),
        "attribution": dict(example.get("attribution", {})),
      }
    )
  return rows, rejected


def _shards(
  rows: Sequence[dict[str, Any]], assigned: Sequence[str], encode: Callable[[Any], bytes], mib: float
) -> dict[str, list[list[dict[str, Any]]]]:
  """{split: rows of each shard}, in the order of the rows. Sizes follow from a few images spread over the data."""
  sizes = []
  for row in rows[:: max(32, math.ceil(len(rows) / _MEASURED))]:
    with contextlib.suppress(RowError):
      sizes.append(len(encode(row["image"])) + len(row["text"]) + len(row["factors"]))
  per_shard = max(1.0, mib * 2**20 / max(1.0, float(np.mean(sizes or [1.0]))))
  shards = {}
  for split in SPLITS:
    members = [row for row, own in zip(rows, assigned) if own == split]
    if members:
      count = math.ceil(len(members) / per_shard)
      bounds = [round(i * len(members) / count) for i in range(count + 1)]
      shards[split] = [members[start:end] for start, end in itertools.pairwise(bounds)]
  return shards


def _job(name: str, schema: Schema, encode: Callable[[Any], bytes], shards: Mapping[str, Any]) -> dict[str, str]:
  """Names what decides the bytes of the shards, but for the source files: run_tasks looks whether those changed."""
  digest = hashlib.sha256(repr((name, schema, encode, PIL.__version__)).encode())
  for split, parts in shards.items():
    for part in parts:
      digest.update(repr((split, part)).encode())
  return {"tasks": digest.hexdigest()}


def _stored(
  tasks: Mapping[tuple[str, int], Task], done: Mapping[str, Any], splits: Mapping[str, Any], schema: Schema
) -> dict[str, Callable[[], dict[str, Any]]]:
  """{key: function that reads the record back}."""
  found = {}
  for split, members in splits.items():
    paths = [task.path for (own, _), task in tasks.items() if own == split]
    source = RecordSource(paths, [shard.records for shard in done[split]], schema)
    found |= {row["key"]: functools.partial(source.__getitem__, i) for i, row in enumerate(members)}
  return found


def _check_splits(
  out: Path, splits: Mapping[str, Sequence], written: Sequence[Mapping[str, Any]], fractions: Sequence[float]
) -> None:
  for split, fraction in zip(SPLITS, fractions):
    if not splits.get(split) and fraction:
      raise InputError(
        f"{out}: the {split} split would be empty ({len(written)} images of"
        f" {len({row['patient'] for row in written})} patients); give more patients, other --fractions or another"
        " --salt"
      )


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
    write_csv(place, REJECTED_COLUMNS, rejected)
  worst, count = Counter(row["reason"].split(":")[0] for row in rejected).most_common(1)[0]
  raise UnfinishedError(
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


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
  """A table of `columns`; what a row does not have is empty, and other entries of it are left out."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: row.get(column, "") for column in columns} for row in rows)


def _write_attribution(path: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
  """One line an image with its licence and source, where the reader gave them."""
  columns = list(dict.fromkeys(c for members in splits.values() for row in members for c in row["attribution"]))
  if columns:
    lines = ({"key": r["key"], "split": s, **r["attribution"]} for s, members in splits.items() for r in members)
    write_csv(path, ("key", "split", *columns), lines)


def _report(
  out: Path,
  splits: Mapping[str, Sequence],
  rejected: Sequence,
  holdout: Mapping[str, Any] | None,
  repeated: Sequence[Mapping[str, Any]],
) -> None:
  written = sum(len(members) for members in splits.values())
  total = f"{written + len(rejected)} rows in = {written} written + {len(rejected)} rejected"
  print(f"{out}: {total}" + (f" (reasons in {out / 'rejected.csv'})" if rejected else ""))
  for split, members in splits.items():
    print(f"  {split:5s} {len(members):7d} images of {len({row['patient'] for row in members})} patients")
  for line in report_lines(holdout) if holdout else ():
    print(line)
  print(f"  {duplicates.summary(repeated)}")
  print(f"  data card: {out / 'README.md'}, {out / 'sheet.png'}")
