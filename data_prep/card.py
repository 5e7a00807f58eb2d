"""The data card: README.md and card.html with the same content, and what they show.

cells.csv counts images per cell and split, sheet.png is a random sample, histogram-*.svg and findings.svg are figures.
"""

import csv
import importlib.metadata
import io
import json
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import compdiff_jax
from compdiff_jax.conditioning.schema import Schema
from data_prep import card_figures, card_page, duplicates

_PACKAGES = ("numpy", "pillow", "pydicom", "tensorflow-datasets", "array-record")
_COLUMNS, _ROWS, _TILE, _FONT = 6, 4, 176, 12
_MAX_LISTED = 40

Rows = Sequence[Mapping[str, Any]]


def write_card(
  directory: Path,
  *,
  name: str,
  schema: Schema,
  splits: Mapping[str, Rows],
  description: str,
  size: int,
  command: str,
  holdout: Mapping[str, Any] | None,
  rejected: Rows,
  read_image: Callable[[Mapping[str, Any]], bytes],
  repeated: Rows | None = None,
  licence: str = "",
) -> None:
  """Writes the files of the card into `directory`.

  `read_image` gives the encoded image of a row; `repeated` are the lines of duplicates.csv, if they were looked for.
  `licence` holds for all images; licences of single images are in their `attribution`.
  """
  cells = count_cells(splits, schema)
  with open(directory / "cells.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*schema.grouping.names, *splits, "total"])
    writer.writerows([*levels, *counts, sum(counts)] for levels, counts in cells.items())
  shown = next(iter(splits))
  sample_sheet(splits[shown], schema, read_image).save(directory / "sheet.png", optimize=True)
  every = [row for rows in splits.values() for row in rows]
  sections = [
    f"# {name}",
    description.strip(),
    f"![random sample of the {shown} split](sheet.png)",
    _what_section(splits, size, command, rejected),
    _attribute_section(schema, splits),
    *_histograms(directory, schema, every),
    _cell_section(schema, cells, list(splits), holdout),
    _findings_section(splits),
    _heat_map(directory, schema, every),
    f"## Repeated images\n\n{duplicates.summary(repeated)}" if repeated is not None else "",
    _rejected_section(rejected),
    _licence_section(licence, splits),
    "## Intended use\n\nResearch on generative models and their fairness. Not for clinical use. Patient ids are"
    " stored as salted SHA-256 hashes; all images of a patient are in one split. rejected.csv names source files"
    " and quotes refused values, which may name patients: leave it out when the data set is passed on. `python -m"
    " data_prep.verify` checks all of this.",
  ]
  text = "\n\n".join(part for part in sections if part) + "\n"
  (directory / "README.md").write_text(text, encoding="utf-8")
  (directory / "card.html").write_text(card_page.render(name, text, directory), encoding="utf-8")


def count_cells(splits: Mapping[str, Rows], schema: Schema) -> dict[tuple[str, ...], list[int]]:
  """{level names: images per split} for every full cell, empty ones too, then combinations with an unknown."""
  schema = schema.grouping
  names = {a.name: [*a.level_names, "unknown"] for a in schema}
  cells = {tuple(names[n][i] for n, i in cell.items()): [0] * len(splits) for cell in schema.cells()}
  partial = {}
  for column, rows in enumerate(splits.values()):
    levels = {a.name: a.levels(np.array([row["attributes"][a.name] for row in rows], a.dtype)) for a in schema}
    for i in range(len(rows)):
      cell = tuple(names[n][levels[n][i]] for n in schema.names)
      (cells if cell in cells else partial).setdefault(cell, [0] * len(splits))[column] += 1
  return {**cells, **dict(sorted(partial.items()))}


def sample_sheet(rows: Rows, schema: Schema, read_image: Callable[[Mapping[str, Any]], bytes]) -> Image.Image:
  """A grid of at most 24 images drawn without choice (fixed seed), each captioned with attributes, text and key."""
  chosen = np.random.default_rng(0).permutation(len(rows))[: _COLUMNS * _ROWS]
  font = ImageFont.load_default(_FONT)
  line = _FONT + 4
  height = _TILE + 3 * line + 8
  sheet = Image.new("RGB", (_COLUMNS * (_TILE + 8) + 8, -(-len(chosen) // _COLUMNS) * height + 8), "white")
  draw = ImageDraw.Draw(sheet)
  for place, index in enumerate(chosen):
    row = rows[index]
    x, y = 8 + place % _COLUMNS * (_TILE + 8), 8 + place // _COLUMNS * height
    image = Image.open(io.BytesIO(read_image(row))).convert("RGB")
    # Small images are enlarged without interpolation, so that what one sees are the stored pixels.
    enlarge = Image.Resampling.NEAREST if image.width <= _TILE else Image.Resampling.LANCZOS
    sheet.paste(image.resize((_TILE, _TILE), enlarge), (x, y))
    known = ", ".join(a.decode(row["attributes"][a.name]) or f"{a.name} unknown" for a in schema)
    for number, caption in enumerate((known, row["text"] or "(no text)", row["key"])):
      caption = _fit(" ".join(caption.encode("latin-1", "replace").decode("latin-1").split()), font)
      draw.text((x, y + _TILE + 2 + number * line), caption, "black" if number == 0 else "#555555", font)
  return sheet


def _fit(text: str, font: ImageFont.FreeTypeFont) -> str:
  if font.getlength(text) <= _TILE:
    return text
  while text and font.getlength(text + "...") > _TILE:
    text = text[:-1]
  return text + "..."


def _table(head: Sequence[Any], body: Sequence[Sequence[Any]]) -> str:
  lines = [head, ["---"] * len(head), *body]
  return "\n".join("| " + " | ".join(str(value).replace("|", "\\|") for value in row) + " |" for row in lines)


def _what_section(splits: Mapping[str, Rows], size: int, command: str, rejected: Rows) -> str:
  written = sum(len(rows) for rows in splits.values())
  versions = [f"compdiff-jax {compdiff_jax.__version__}", f"Python {platform.python_version()}"]
  versions += [f"{package} {importlib.metadata.version(package)}" for package in _PACKAGES]
  body = [[split, len(rows), len({row["patient"] for row in rows})] for split, rows in splits.items()]
  body.append(["all", written, sum(line[2] for line in body)])
  return (
    f"## What is here\n\n{written + len(rejected)} rows in = {written} images written + {len(rejected)} rows"
    f" rejected. Images are {size}x{size} pixels, stored as encoded bytes.\n\n"
    + _table(["split", "images", "patients"], body)
    + f"\n\nMade by\n\n    {command}\n\nwith {', '.join(versions)}."
  )


def _attribute_section(schema: Schema, splits: Mapping[str, Rows]) -> str:
  rows = [row for members in splits.values() for row in members]
  body = []
  for a in schema:
    values = np.array([row["attributes"][a.name] for row in rows], a.dtype)
    unknown = int(np.sum(~a.is_known(values)))
    if a.kind == "multilabel":
      names, counts = a.values, np.sum(values > 0, axis=0)  # labels that are mentioned, whatever is said
    else:
      names, counts = a.level_names, np.bincount(a.levels(values) + 1, minlength=a.num_levels + 1)[1:]
    levels = ", ".join(f"{level} {count}" for level, count in zip(names, counts))
    span = f", {a.low:g} to {a.high:g} {a.unit}".rstrip() if a.kind == "continuous" else ""
    body.append([a.name, a.kind + span, levels, f"{unknown} ({unknown / len(rows):.1%})"])
  return "## Attributes\n\n" + _table(["attribute", "kind", "images per level", "unknown"], body)


def _histograms(directory: Path, schema: Schema, rows: Rows) -> list[str]:
  parts = []
  for a in schema:
    if a.kind == "continuous":
      values = np.array([row["attributes"][a.name] for row in rows], a.dtype)
      (directory / f"histogram-{a.name}.svg").write_text(card_figures.histogram(a, values), encoding="utf-8")
      parts.append(f"![images by {a.name}](histogram-{a.name}.svg)")
  return parts


def _heat_map(directory: Path, schema: Schema, rows: Rows) -> str:
  figure = card_figures.heat_map(schema, rows)
  if not figure:
    return ""
  (directory / "findings.svg").write_text(figure, encoding="utf-8")
  return "Percent of the images of each level in which a finding is positive:\n\n![findings by level](findings.svg)"


def _cell_section(
  schema: Schema, cells: Mapping[tuple[str, ...], list[int]], splits: Sequence[str], holdout: Mapping | None
) -> str:
  filled = {levels: counts for levels, counts in cells.items() if sum(counts)}
  schema = schema.grouping
  full = len(schema.cells())
  empty = full - sum(1 for levels in filled if "unknown" not in levels)
  body = [[*levels, *counts, sum(counts)] for levels, counts in list(filled.items())[:_MAX_LISTED]]
  rest = len(filled) - len(body)
  text = "## Images per cell\n\n" + _table([*schema.names, *splits, "total"], body)
  text += f"\n\n{empty} of {full} cells are empty." + (f" {rest} more rows are in cells.csv." if rest else "")
  text += " All counts: [cells.csv](cells.csv).\n\n## Held-out cells\n\n"
  if not holdout:
    return text + "None."
  columns = ("images", "patients", "status", "maybe_in_train")
  body = [[cell, *(holdout[column][cell] for column in columns)] for cell in holdout["cells"]]
  moved = holdout["moved_to_test"]
  return (
    text
    + _table(["cell", "images", "patients", "pairs in training", "train images with unknowns that may belong"], body)
    + f"\n\nNo patient of these cells is in train or val: {moved['images']} images of {moved['patients']} patients"
    f" went to test, {sum(holdout['cost'].values())} of them from other cells (holdout.json, `cost`). Words that name a"
    f" level of these cells: in texts of train and val {holdout['text']['status']}, in those of test"
    f" {holdout['text']['test']['status']} (holdout_leaks.csv)."
  )


def _findings_section(splits: Mapping[str, Rows]) -> str:
  counts = Counter()
  for rows in splits.values():
    for row in rows:
      counts.update(json.loads(row["findings"]).items())
  if not counts:
    return ""
  states = ("positive", "negative", "uncertain")
  body = [[f, *(counts[f, state] for state in states)] for f in sorted({finding for finding, _ in counts})]
  return "## Findings\n\n" + _table(["finding", *states], body[:_MAX_LISTED])


def _rejected_section(rejected: Rows) -> str:
  if not rejected:
    return "## Rejected rows\n\nNone."
  reasons = Counter(row["reason"].split(":")[0] for row in rejected)
  return "## Rejected rows\n\nEach row is in [rejected.csv](rejected.csv).\n\n" + _table(
    ["reason", "rows"], reasons.most_common(_MAX_LISTED)
  )


def _licence_section(licence: str, splits: Mapping[str, Rows]) -> str:
  counts = Counter(
    row["attribution"]["licence"] for rows in splits.values() for row in rows if "licence" in row["attribution"]
  )
  parts = [licence] if licence else []
  if counts:
    parts += ["Per image in [attribution.csv](attribution.csv):", _table(["licence", "images"], counts.most_common())]
  return "\n\n".join(["## Licence", *parts]) if parts else ""
