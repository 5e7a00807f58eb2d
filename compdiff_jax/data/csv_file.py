"""Reads CSV files the way people save them: several encodings and separators, gzip, one kind of error."""

import csv
import gzip
import io
import itertools
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from compdiff_jax.cli import InputError

FIRST_ROW = 2  # rows are counted as a spreadsheet does, blank ones too: the header is row 1
_GZIP = b"\x1f\x8b"


def iterate_csv(path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
  """Header and (number, cells) of each data row, of a file with commas, semicolons or tabs, gzipped or not.

  Encodings are UTF-8, with or without BOM, and else Windows-1252, which covers the printable half of Latin-1; that is
  said on stderr. Blank lines are counted and skipped. A row may have another number of values than the header; that is
  the caller's to judge.
  """
  text = _text(path)
  head = text.lstrip().partition("\n")[0]
  delimiter = max(",;\t", key=head.count)
  csv.field_size_limit(2**24)
  rows = _rows(path, text, delimiter)
  header = [name.strip() for name in next(rows, (0, []))[1]]
  first = next(rows, None)
  if first is None:
    raise InputError(f"{path} has no data rows; it needs a header line and at least one row")
  twice = sorted({name for name in header if header.count(name) > 1})
  if twice:
    raise InputError(f"{path}: column {twice[0]!r} occurs twice in the header; rename one")
  return header, itertools.chain([first], rows)


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
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    print(
      f"{path} is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}) and is read as Windows-1252; if letters"
      " come out wrong, save it as UTF-8",
      file=sys.stderr,
    )
    return data.decode("cp1252", "replace")  # five bytes mean nothing there


def _rows(path: str | Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
  try:
    for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), start=1):
      if cells:
        yield number, cells
  except csv.Error as error:
    raise InputError(f"{path} cannot be read as CSV ({error}); check its quotation marks") from None
