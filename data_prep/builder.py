"""What the builders of public data sets share: options, texts, and the call of `write_dataset`."""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from compdiff_jax import cli
from compdiff_jax.cli import InputError
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.metrics import Progress
from data_prep import dataset, scrub
from data_prep.images import ImageOptions
from data_prep.rows import RowError
from data_prep.schemas import CHEXPERT_LABELS

_MAX_WORDS = 60
_SECONDS = 5.0  # between two reports of progress
_STATES = {"1": "positive", "0": "negative", "-1": "uncertain"}


class Builder(Protocol):
  """A public data set: iterating gives its rows (data_prep/rows.py), `encode` makes their images.

  Attributes:
    name, description, licence, schema: as `write_dataset` takes them.
    selected: how the rows were chosen from the tables, one sentence for the terminal and the card.
  """

  name: str
  description: str
  licence: str
  schema: Schema
  selected: str
  encode: Callable[[Any], bytes]

  def __len__(self) -> int: ...

  def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Options:
  """The options that builders read.

  Attributes:
    source: the folder of the public data set, as it is distributed.
    images: size and format of the stored images.
    official: keep the splits that the data set comes with; otherwise patients are divided by their hash.
    max_words, rules: how free texts are cut and scrubbed.
  """

  source: Path
  images: ImageOptions
  official: bool
  max_words: int = _MAX_WORDS
  rules: scrub.Rules = scrub.ALL

  def text(self, raw: str) -> str:
    """Free text without identifiers and demographics."""
    return scrub.cut(scrub.scrub(raw, self.rules), self.max_words)

  def splits(self, *names: str) -> dict[str, tuple[str, ...]]:
    """The field `splits` of a row that the data set puts into one of these splits."""
    return {"splits": names} if self.official else {}


def parser(prog: str, description: str) -> argparse.ArgumentParser:
  parser = cli.parser(prog, description)
  parser.add_argument("--source", required=True, help="folder of the data set as it is distributed")
  parser.add_argument("--size", type=int, default=512, help="height and width of the stored images in pixels")
  parser.add_argument("--resize", default="pad", choices=("pad", "crop"), help="to a square: add zeros, or cut")
  parser.add_argument("--jpeg_quality", type=int, default=0, help="1 to 100; 0 stores PNG")
  parser.add_argument(
    "--split", default="official", choices=("official", "patient"), help="the data set's own splits, or by patient hash"
  )
  dataset.add_arguments(parser)
  return parser


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of free text: builders whose texts are worded from labels do not have them."""
  parser.add_argument("--max_words", type=int, default=_MAX_WORDS, help="free texts are cut after so many words")
  parser.add_argument("--scrub", metavar="FILE", help="more rules for free text, one regular expression a line")


def options(args: argparse.Namespace) -> Options:
  if not Path(args.source).is_dir():
    raise InputError(f"--source {args.source} is not a folder")
  common = Options(
    source=Path(args.source),
    images=ImageOptions(args.size, args.resize, args.jpeg_quality),
    official=args.split == "official",
  )
  if "max_words" not in args:
    return common
  if args.max_words < 1:
    raise InputError(f"--max_words {args.max_words}: give a positive number")
  rules = (*scrub.ALL, *(scrub.read_rules(args.scrub) if args.scrub else ()))
  return dataclasses.replace(common, max_words=args.max_words, rules=rules)


def write(prog: str, builder: Builder, args: argparse.Namespace, argv: Sequence[str]) -> None:
  print(builder.selected)
  dataset.write_dataset(
    name=builder.name,
    schema=builder.schema,
    examples=_shown(builder),
    encode=builder.encode,
    description=f"{builder.description} {builder.selected}",
    licence=builder.licence,
    size=args.size,
    command=dataset.command_line(prog, argv),
    **dataset.options(args, builder.schema),
  )


def _shown(builder: Builder) -> Iterator[Mapping[str, Any]]:
  """The rows; reading hundreds of thousands of reports takes minutes, so that one sees how far it is."""
  progress = Progress(len(builder), 0, "row")
  last = time.monotonic()
  for number, row in enumerate(builder, start=1):
    yield row
    if time.monotonic() - last > _SECONDS:
      progress.update(number)
      last = time.monotonic()
  progress.close()


def rows(table: Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
  """Rows of (file, line number, function that makes the rest); a `RowError` of the function rejects the row."""
  for file, number, make in table:
    try:
      yield {"factors": {}, **make(), "file": file, "row": number}
    except RowError as error:
      yield {"file": file, "row": number, "reason": str(error)}


def chexpert_findings(values: Mapping[str, str]) -> dict[str, str]:
  """{label: state} of the fourteen label columns: 1, 0, -1; an empty value is unmentioned."""
  findings = {}
  for label in CHEXPERT_LABELS:
    value = values[label].removesuffix(".0")
    if value.lower() not in ("", "nan"):
      if value not in _STATES:
        raise RowError(f"bad label: {label} {values[label]!r} is not 1, 0, -1 or empty")
      findings[label] = _STATES[value]
  return findings


def findings_text(findings: Mapping[str, str]) -> str:
  """The names of what is present, for data sets without reports: "Cardiomegaly. Pleural Effusion."."""
  return " ".join(f"{name}." for name, state in findings.items() if state == "positive")
