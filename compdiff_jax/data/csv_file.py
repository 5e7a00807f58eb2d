"""Reads CSV files the way people save them: several encodings and separators, gzip, one kind of error."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from compdiff_jax.cli import InputError

FIRST_ROW = 2  # rows are counted as a spreadsheet does: the header is row 1
_GZIP = b"\x1f\x8b"


def read_csv(path: str | Path) -> tuple[list[str], list[list[str]]]:
  """Header and data rows; see `iterate_csv`."""
  header, rows = iterate_csv(path)
  return header, list(rows)


def iterate_csv(path: str | Path) -> tuple[list[str], Iterator[list[str]]]:
  """Header and data rows: UTF-8 (with or without BOM) or Latin-1; comma, semicolon or tab separated; gzipped or not.

  Blank lines are skipped. A row may have another number of values than the header; that is the caller's to judge.
  """
  text = _text(path)
  head = text.lstrip().partition("\n")[0]
  delimiter = max(",;\t", key=head.count)
  csv.field_size_limit(2**24)
  rows = _rows(path, text, delimiter)
  header = [name.strip() for name in next(rows, [])]
  first = next(rows, None)
  if first is None:
    raise InputError(f"{path} has no data rows; it needs a header line and at least one row")
  twice = sorted({name for name in header if header.count(name) > 1})
  if twice:
    raise InputError(f"{path}: column {twice[0]!r} occurs twice in the header; rename one")
  return header, _chain(first, rows)


def _text(path: str | Path) -> str:
  try:
    data = Path(path).read_bytes()
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror}; give a CSV file") from None
  if data.startswith(_GZIP):
    try:
      data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
      raise InputError(f"{path} is a damaged gzip file ({error}); fetch it again") from None
  if b"\0" in data:
    raise InputError(f"{path} is not a text table; save it as CSV in UTF-8")
  try:
    return data.decode("utf-8-sig")
  except UnicodeDecodeError:
    return data.decode("latin-1")


def _rows(path: str | Path, text: str, delimiter: str) -> Iterator[list[str]]:
  try:
    yield from (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row)
  except csv.Error as error:
    raise InputError(f"{path} cannot be read as CSV ({error}); check its quotation marks") from None


def _chain(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
  yield first
  yield from rest
