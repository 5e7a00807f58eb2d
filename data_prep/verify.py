"""Reads every record of a finished data set again: `python -m data_prep.verify DIR`.

It trusts no code that wrote the set: hashes come from SHA256SUMS, the record format from features.json, counts from
dataset_info.json and cells.csv. Checked are file hashes, that every record decodes and fits the schema, that every
image decodes and is a square of one size (or that moments are numbers of the shape in latents.json), unique keys,
patients in one split, held-out cells, and all counts.
"""

import csv
import io
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from compdiff_jax import cli
from compdiff_jax.cli import InputError, RunError
from compdiff_jax.conditioning.schema import STATES, Attribute, Schema
from compdiff_jax.metrics import Progress
from data_prep import checksums
from data_prep.images import MAX_PIXELS

_PROG = "python -m data_prep.verify"
_STATES = ("positive", "negative", "uncertain")
_BATCH = 64
_SECONDS = 5.0  # between two reports of progress
_BFLOAT16_EXPONENT = 0x7F80  # all ones: infinity or NaN
_MAX_SHOWN = 20


class Findings:
  """What is wrong, counted by kind; the first of each kind is kept as an example."""

  def __init__(self):
    self.counts: Counter[str] = Counter()
    self.examples: list[str] = []

  def add(self, kind: str, where: str) -> None:
    self.counts[kind] += 1
    if self.counts[kind] <= 3:
      self.examples.append(f"{where}: {kind}")


def verify(directory: Path, show: bool = False) -> tuple[dict[str, int], Findings]:
  """(records per split, what is wrong). `show` reports progress, for a set whose images take long to decode."""
  found = Findings()
  for problem in checksums.problems(directory):
    found.add(problem.partition(": ")[2] or problem, problem.partition(": ")[0])
  try:
    info = json.loads((directory / "dataset_info.json").read_text())
    features = tfds.features.FeaturesDict.from_config(str(directory))
    schema = Schema.load(directory / "schema.json")
    splits = {split["name"]: [int(n) for n in split["shardLengths"]] for split in info["splits"]}
    latents = directory / "latents.json"
    moments = math.prod(json.loads(latents.read_text())["shape"]) if latents.exists() else 0
  except (OSError, ValueError, KeyError, TypeError) as error:
    reason = " ".join(str(error).split())
    raise InputError(
      f"{directory} is not a finished data set ({reason}); give a directory that data_prep made"
    ) from None
  held_out = _held_out(directory, schema, found)
  patients: dict[str, str] = {}
  keys: set[str] = set()
  cells: Counter[tuple[str, ...]] = Counter()
  counts: Counter[str] = Counter()
  sizes: set[tuple[int, int]] = set()
  progress = Progress(sum(map(sum, splits.values())), 0, "record")
  last = time.monotonic()
  for split, lengths in splits.items():
    for where, record in _records(directory, info["name"], split, lengths, features, found):
      counts[split] += 1
      if show and time.monotonic() - last > _SECONDS:
        progress.update(counts.total())
        last = time.monotonic()
      wrong = list(_record_problems(record, schema, sizes, moments))
      for kind in wrong:
        found.add(kind, where)
      key, patient = record["key"], record["patient"]
      if key in keys:
        found.add("key occurs twice", where)
      keys.add(key)
      if patients.setdefault(patient, split) != split:
        found.add("patient is in two splits", where)
      if wrong:
        continue  # it may have no level
      levels = {a.name: int(a.levels(np.asarray(record["attributes"][a.name])[None])[0]) for a in schema.grouping}
      cells[(*(_level_name(schema[name], level) for name, level in levels.items()), split)] += 1
      if split != "test" and any(all(levels[n] == i for n, i in cell.items()) for cell in held_out):
        found.add("lies in a held-out cell", where)
  progress.close()
  if len(sizes) > 1:
    found.add(f"images of {len(sizes)} sizes: {', '.join(f'{w}x{h}' for w, h in sorted(sizes))}", str(directory))
  _check_counts(directory, schema, splits, counts, cells, found)
  return dict(counts), found


def _records(
  directory: Path, name: str, split: str, lengths: list[int], features: Any, found: Findings
) -> Iterator[tuple[str, dict[str, Any]]]:
  """(place, record) of one split; a shard that cannot be read is a finding."""
  for shard, length in enumerate(lengths):
    path = directory / f"{name}-{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
    index = 0
    try:
      reader = ArrayRecordReader(str(path))
      if reader.num_records() != length:
        found.add(f"{reader.num_records()} records, dataset_info.json says {length}", path.name)
      while index < reader.num_records():
        for data in reader.read(range(index, min(index + _BATCH, reader.num_records()))):
          record = features.deserialize_example_np(data)
          yield (
            f"{path.name} record {index}",
            {key: v.decode() if key in ("key", "patient", "text") else v for key, v in record.items()},
          )
          index += 1
    except Exception as error:  # array_record and protobuf raise errors of their own kinds for damaged files
      found.add(
        f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:80]})", f"{path.name} record {index}"
      )


def _record_problems(
  record: dict[str, Any], schema: Schema, sizes: set[tuple[int, int]], moments: int
) -> Iterator[str]:
  """What is wrong with one record. `sizes` collects the sizes of images, `moments` is how many numbers a latent has."""
  if not record["key"] or not record["patient"]:
    yield "no key or no patient"
  if set(record["attributes"]) != set(schema.names):
    yield "attributes are not those of schema.json"
    return
  for a in schema:
    if not _fits(a, np.asarray(record["attributes"][a.name])):
      yield f"{a.name} is outside the schema"
  for field in ("findings", "factors"):
    try:
      values = json.loads(record[field])
    except ValueError:
      values = None
    if not isinstance(values, dict):
      yield f"{field} is no JSON object"
    elif field == "findings" and any(state not in _STATES for state in values.values()):
      yield "a finding is neither positive, negative nor uncertain"
  if moments:
    bits = np.frombuffer(record["moments"], "<u2") if len(record["moments"]) == 2 * moments else None
    if bits is None or np.any((bits & _BFLOAT16_EXPONENT) == _BFLOAT16_EXPONENT):
      yield "moments have another shape or are no numbers"
  else:
    try:
      with Image.open(io.BytesIO(record["image"]), formats=("PNG", "JPEG")) as image:
        if image.width * image.height > MAX_PIXELS:
          yield "image is too large"
          return
        image.load()
        sizes.add(image.size)
        if image.width != image.height or image.mode not in ("L", "RGB"):
          yield f"image is {image.width}x{image.height} {image.mode}, not a grey or RGB square"
    except (OSError, SyntaxError, ValueError) as error:
      yield f"image does not decode ({' '.join(str(error).split())[:60]})"


def _fits(attribute: Attribute, value: np.ndarray) -> bool:
  if value.shape != attribute.shape or value.dtype.kind != attribute.dtype.kind:
    return False
  if attribute.kind == "continuous":
    return bool(np.isnan(value) or attribute.low <= value <= attribute.high)
  last = len(STATES) - 1 if attribute.kind == "multilabel" else len(attribute.values) - 1
  return bool(np.all((value >= -1) & (value <= last)))


def _level_name(attribute: Attribute, level: int) -> str:
  return "unknown" if level < 0 else attribute.level_names[level]


def _held_out(directory: Path, schema: Schema, found: Findings) -> list[dict[str, int]]:
  path = directory / "holdout.json"
  try:
    return [schema.parse_cell(text) for text in json.loads(path.read_text())["cells"]] if path.exists() else []
  except (OSError, ValueError, KeyError, TypeError, AttributeError, InputError) as error:
    found.add(f"cannot be read ({' '.join(str(error).split())})", path.name)
    return []


def _check_counts(
  directory: Path, schema: Schema, splits: dict[str, list[int]], counts: Counter, cells: Counter, found: Findings
) -> None:
  """dataset_info.json and cells.csv against what was read."""
  for split, lengths in splits.items():
    if counts[split] != sum(lengths):
      found.add(f"split {split}: {counts[split]} records, dataset_info.json says {sum(lengths)}", "dataset_info.json")
  try:
    with open(directory / "cells.csv", newline="", encoding="utf-8") as file:
      rows = list(csv.DictReader(file))
    names = schema.grouping.names
    listed = {(*(row[n] for n in names), split): int(row[split]) for row in rows for split in splits}
  except (OSError, ValueError, KeyError) as error:
    found.add(f"cannot be read ({error})", "cells.csv")
    return
  wrong = [cell for cell in listed.keys() | cells.keys() if listed.get(cell, 0) != cells[cell]]
  for cell in sorted(wrong):
    found.add("count differs from the records", f"cells.csv {','.join(cell)}")


def main(argv: list[str]) -> None:
  parser = cli.parser(_PROG, "Reads every record of a finished data set again and checks it.")
  parser.add_argument("directory", type=Path, help="data set directory")
  directory = parser.parse_args(argv).directory
  counts, found = verify(directory, show=True)
  for split, count in counts.items():
    print(f"  {split:5s} {count:7d} records read")
  for line in found.examples[:_MAX_SHOWN]:
    print(f"  {line}")
  if found.counts:
    total = sum(found.counts.values())
    kinds = ", ".join(f"{kind} ({count})" for kind, count in found.counts.most_common(5))
    raise RunError(f"{directory} has {total} problems: {kinds}; prepare it again")
  print(f"{directory}: {sum(counts.values())} records, all hashes, records and counts are right")


if __name__ == "__main__":
  sys.exit(cli.run(main, _PROG))
