"""What the benchmark pages share: the machine in words, and tables in Markdown."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Sequence


def machine(*packages: str) -> str:
  """One sentence: date, CPU cores, Python and the versions of `packages`."""
  versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
  date = datetime.date.today().isoformat()
  return f"{date}, {os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, {versions}."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)
