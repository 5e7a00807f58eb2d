"""What every command shares: the argument parser, the exit statuses and the one-line error.

Exit status 0: success. 2: bad argument or bad input, said in one line on stderr. 1: a failure while running.
"""

import argparse
import contextlib
import difflib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path


class InputError(Exception):
  """The user's input is wrong. The message names the file, row or key and the remedy; the exit status is 2."""


class RunError(Exception):
  """The run itself failed (for example the loss became NaN). One line, exit status 1."""


class _Parser(argparse.ArgumentParser):
  def error(self, message):
    raise InputError(f"{message} (see '{self.prog} --help')")


def parser(prog: str, description: str) -> argparse.ArgumentParser:
  """An argument parser whose errors are `InputError`s and which accepts no abbreviated options."""
  return _Parser(
    prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
  )


def run(main: Callable[[list[str]], None], prog: str, argv: list[str] | None = None) -> int:
  """Calls `main(argv)` and returns the exit status; user mistakes become one line on stderr."""
  try:
    main(sys.argv[1:] if argv is None else argv)
    return 0
  except InputError as error:
    print(f"{prog}: error: {error}", file=sys.stderr)
    return 2
  except RunError as error:
    print(f"{prog}: failed: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"{prog}: interrupted", file=sys.stderr)
    return 130


def nearest(word: str, choices: Iterable[str]) -> str:
  """`"; did you mean 'x'?"` for the closest choice, or the list of choices when nothing is close."""
  choices = [str(choice) for choice in choices]
  close = difflib.get_close_matches(word, choices, n=1)
  return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(choices)}"


def new_directory(path: str | Path) -> Path:
  """`path` as a directory that is new or empty and writable, else an `InputError`; nothing is overwritten."""
  path = Path(path)
  if path.exists() and not path.is_dir():
    raise InputError(f"{path} is a file; give a directory for the output")
  if path.exists() and any(path.iterdir()):
    raise InputError(f"{path} is not empty; give a new directory or remove it first")
  with writing(path):
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".writable"
    probe.touch()
    probe.unlink()
  return path


@contextlib.contextmanager
def writing(path: str | Path):
  """Turns an operating-system error while writing below `path` (permission, disk full) into an `InputError`."""
  try:
    yield
  except OSError as error:
    raise InputError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def whole_directory(path: str | Path):
  """A temporary sibling directory that becomes `path` when the block succeeds and vanishes when it fails.

  Raises:
    InputError: `path` is not new or empty, or cannot be written.
  """
  path = Path(path)
  existed = path.exists()
  new_directory(path)
  directory = None
  try:
    with writing(path):
      directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.absolute().parent))
      directory.chmod(path.stat().st_mode & 0o777)  # mkdtemp's own mode is private
    yield directory
    with writing(path):
      directory.replace(path)
  except BaseException:
    if directory is not None:
      shutil.rmtree(directory, ignore_errors=True)
    if not existed:
      with contextlib.suppress(OSError):
        path.rmdir()
    raise
