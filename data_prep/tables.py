"""Finds and reads the tables of a public data set: CSV (also gzipped) and Parquet, only the columns that are used."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from compdiff_jax.cli import InputError, nearest
from compdiff_jax.data.csv_file import FIRST_ROW, iterate_csv


class TableRow(NamedTuple):
  """One row: its line in a spreadsheet, the used columns, and why it cannot be read (empty when it can)."""

  number: int
  values: dict[str, str]
  fault: str


def find_table(folders: Sequence[Path], names: Sequence[str], option: str = "--source") -> Path:
  """The first of the files `names` (or its .gz) in the first of `folders` that has one."""
  for folder in folders:
    for name in names:
      if path := plain_or_gzipped(folder / name):
        return path
  places = folders[0] if len(folders) == 1 else f"{folders[0]} or its usual subfolders"
  raise InputError(f"{' or '.join(names)} (or .gz) is not in {places}; check {option}")


def plain_or_gzipped(path: Path) -> Path | None:
  """`path`, or else its .gz, where there is one."""
  return next((each for each in (path, path.with_name(f"{path.name}.gz")) if each.is_file()), None)


def read_table(path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
  """Header and (number, cells) of each row of a CSV or Parquet file; every value is a text, a missing one is empty."""
  if Path(path).suffix.lower() in (".parquet", ".pq"):
    return _read_parquet(path)
  return iterate_csv(path)


def read_rows(path: str | Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[TableRow]:
  """The rows with the columns named; an absent `optional` column reads as empty. Values are stripped of blanks.

  Raises:
    InputError: the file cannot be read or lacks one of `columns`.
  """
  header, rows = read_table(path)
  for name in columns:
    if name not in header:
      raise InputError(f"{path} has no column {name!r}{nearest(name, header)}")
  places = {name: header.index(name) for name in (*columns, *optional) if name in header}
  absent = dict.fromkeys(set(optional) - set(header), "")
  for number, cells in rows:
    values = {name: cells[place].strip() if place < len(cells) else "" for name, place in places.items()}
    wrong = len(cells) != len(header)
    fault = f"wrong number of columns: {len(cells)} instead of {len(header)}" if wrong else ""
    yield TableRow(number, {**values, **absent}, fault)


def read_lookup(path: str | Path, key: str, columns: Sequence[str]) -> dict[str, TableRow]:
  """{value of the column `key`: its first row}; a damaged row or one that contradicts an earlier one stops the run.

  Errors name rows, never a key: it may be the id of a patient.
  """
  found: dict[str, TableRow] = {}
  for row in read_rows(path, (key, *columns)):
    name = row.values.pop(key)
    if row.fault or not name:
      raise InputError(f"{path}, row {row.number}: {row.fault or f'{key} is empty'}; fetch the file again")
    first = found.setdefault(name, row)
    if first.values != row.values:
      raise InputError(
        f"{path}, row {row.number}: its {key} is that of row {first.number}, with other values; fetch the file again"
      )
  return found


def known(parse: Callable[[str], str], text: str, path: str | Path, number: int) -> str:
  """`parse(text)` of data_prep/demographics.py for a value that a whole table must have."""
  try:
    return parse(text)
  except ValueError as error:
    raise InputError(f"{path}, row {number}: {error}; extend data_prep/demographics.py") from None


def _read_parquet(path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
  try:
    import pyarrow
    from pyarrow import parquet
  except ImportError:
    raise InputError(f"{path}: reading Parquet needs pyarrow; pip install pyarrow, or save the table as CSV") from None
  try:
    file = parquet.ParquetFile(path)
    header = [str(name) for name in file.schema_arrow.names]
    if not file.metadata.num_rows:
      raise InputError(f"{path} has no data rows; it needs at least one")
    return header, enumerate(_parquet_rows(path, file), start=FIRST_ROW)
  except (OSError, pyarrow.ArrowException) as error:
    raise InputError(f"cannot read {path}: {' '.join(str(error).split())}; give a Parquet file") from None


def _parquet_rows(path: str | Path, file) -> Iterator[list[str]]:
  from pyarrow import ArrowException

  try:
    for batch in file.iter_batches():
      for row in zip(*(column.to_pylist() for column in batch.columns)):
        yield ["" if value is None or value != value else str(value) for value in row]
  except (OSError, UnicodeDecodeError, ArrowException) as error:  # pages are read as they are needed
    raise InputError(f"{path} is damaged ({' '.join(str(error).split())}); fetch it again") from None
