"""Reads CSV files the way people save them: several encodings and separators, one kind of error."""

import csv
import io
from pathlib import Path

from compdiff_jax.cli import InputError

FIRST_ROW = 2  # rows are counted as a spreadsheet does: the header is row 1


def read_csv(path: str | Path) -> tuple[list[str], list[list[str]]]:
  """Header and data rows: UTF-8 (with or without BOM) or Latin-1; comma, semicolon or tab separated.

  Blank lines are skipped. A row may have another number of values than the header; that is the caller's to judge.
  """
  try:
    data = Path(path).read_bytes()
  except OSError as error:
    raise InputError(f"cannot read {path}: {error.strerror}; give a CSV file") from None
  if b"\0" in data:
    raise InputError(f"{path} is not a text table; save it as CSV in UTF-8")
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError:
    text = data.decode("latin-1")
  head = text.lstrip().partition("\n")[0]
  delimiter = max(",;\t", key=head.count)
  csv.field_size_limit(2**24)
  try:
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
  except csv.Error as error:
    raise InputError(f"{path} cannot be read as CSV ({error}); check its quotation marks") from None
  if len(rows) < 2:
    raise InputError(f"{path} has no data rows; it needs a header line and at least one row")
  header = [name.strip() for name in rows[0]]
  twice = sorted({name for name in header if header.count(name) > 1})
  if twice:
    raise InputError(f"{path}: column {twice[0]!r} occurs twice in the header; rename one")
  return header, rows[1:]
