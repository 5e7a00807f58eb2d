"""SHA256SUMS of a finished data set directory, in the format that `sha256sum -c` reads."""

import hashlib
from pathlib import Path

from compdiff_jax.cli import InputError

NAME = "SHA256SUMS"
_UNLISTED = {NAME, "rejected.csv"}  # a set is whole without its rejected rows: they are left out when it is passed on
_CHUNK = 2**20


def write(directory: Path) -> None:
  """Writes the hashes of the files of `directory`; nothing may be added or changed afterwards."""
  paths = sorted(path for path in directory.iterdir() if path.is_file() and path.name not in _UNLISTED)
  (directory / NAME).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in paths), encoding="utf-8")


def sha256(path: Path) -> str:
  digest = hashlib.sha256()
  with open(path, "rb") as file:
    while chunk := file.read(_CHUNK):
      digest.update(chunk)
  return digest.hexdigest()


def problems(directory: Path) -> list[str]:
  """One line for each file that is changed, missing or not listed."""
  try:
    lines = (directory / NAME).read_text(encoding="utf-8").splitlines()
  except FileNotFoundError:
    return [f"{NAME} is missing: nothing says whether a file changed"]
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"cannot read {directory / NAME}: {error}") from None
  listed = dict(reversed(line.split("  ", 1)) for line in lines if "  " in line)
  for name in _UNLISTED & listed.keys():  # earlier versions did list it
    del listed[name]
  present = {path.name for path in directory.iterdir() if path.is_file()} - _UNLISTED
  found = [f"{name}: listed in {NAME}, but missing" for name in sorted(listed.keys() - present)]
  found += [f"{name}: not listed in {NAME}" for name in sorted(present - listed.keys())]
  changed = (name for name in sorted(listed.keys() & present) if sha256(directory / name) != listed[name])
  return found + [f"{name}: changed since it was written" for name in changed]
