"""What every command shares: the argument parser, the exit statuses and the one-line error.

Exit status 0: success. 2: bad argument or bad input, said in one line on stderr. 1: a failure while running; 75: one
after which the same command may succeed.
"""

import argparse
import contextlib
import difflib
import fcntl
import glob
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


class InputError(Exception):
  """The user's input is wrong. The message names the file, row or key and the remedy; the exit status is 2."""


class UnfinishedError(InputError):
  """An input error found after work was done; finished pieces are kept for the next run."""


class RunError(Exception):
  """The run itself failed (for example the loss became NaN). One line, exit status 1."""

  status = 1


class LostError(RunError):
  """Another process or the network failed, not this run: the same command resumes. One line, exit status 75."""

  status = 75


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
    return error.status
  except KeyboardInterrupt:
    print(f"{prog}: interrupted", file=sys.stderr)
    return 130


def nearest(word: str, choices: Iterable[str]) -> str:
  """`"; did you mean 'x'?"` for the closest choice, or the list of choices when nothing is close."""
  choices = [str(choice) for choice in choices]
  close = difflib.get_close_matches(word, choices, n=1)
  return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(choices)}"


def check_free(path: str | Path) -> None:
  """Refuses an output directory that is a file, not empty or cannot be replaced by the finished one."""
  path = Path(path)
  if path.exists() and not path.is_dir():
    raise InputError(f"{path} is a file; give a directory for the output")
  if path.exists() and any(path.iterdir()):
    raise InputError(f"{path} is not empty; give a new directory or remove it first")
  if path.exists() and path.samefile(os.curdir):
    raise InputError(f"{path} is the current directory, which cannot be replaced; give a new directory in it")
  if os.path.ismount(_real(path)):
    raise InputError(f"{path} is a mount point, which cannot be replaced; give a new directory in it")


def new_directory(path: str | Path) -> Path:
  """`path` as a directory that is new or empty and replaceable, else an `InputError`; nothing is overwritten."""
  check_free(path)
  real = _real(path)
  with writing(path):
    real.mkdir(parents=True, exist_ok=True)
  with writing(real.parent):  # the finished directory is made there and takes the place of `path`
    probe = real.with_name(f".{real.name}.writable")
    probe.touch()
    probe.unlink(missing_ok=True)
  return Path(path)


def _real(path: str | Path) -> Path:
  """The directory that a symbolic link leads to: a link itself cannot be replaced by a directory."""
  return Path(os.path.realpath(path))


@contextlib.contextmanager
def writing(path: str | Path):
  """Turns an operating-system error while writing below `path` (permission, disk full) into an `InputError`."""
  try:
    yield
  except OSError as error:
    raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
  """Writes a small file under a temporary name and renames it."""
  temporary = path.with_name(f".{path.name}.part")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)


def check_space(path: str | Path, num_bytes: int) -> None:
  """Raises an `InputError` when the disk of `path`, which need not exist, has less than `num_bytes` free."""
  place = Path(path).absolute()
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  if free < num_bytes:
    raise InputError(
      f"{path} needs {num_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free; make room or choose another"
    )


@contextlib.contextmanager
def whole_directory(path: str | Path):
  """A temporary sibling directory that becomes `path` when the block succeeds and vanishes when it fails.

  What a killed run on this machine has left of its own goes away, too.

  Raises:
    InputError: `path` is not new or empty, or cannot be written.
  """
  existed = Path(path).exists()
  path = _real(new_directory(path))
  directory, lock = None, None
  try:
    with writing(path):
      directory, lock = _partial_directory(path)
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
  finally:
    if lock is not None:
      os.close(lock)


def _partial_directory(path: Path) -> tuple[Path, int | None]:
  """A new sibling of `path` and the lock that is held on it; those of the same name that nobody holds are removed.

  The kernel lets go of a lock when its process ends, however it ends. Locks of another machine cannot be relied upon,
  so each looks after its own.
  """
  parent, prefix = path.parent, f".{path.name}.partial-{socket.gethostname()}-"
  for left in parent.glob(f"{glob.escape(prefix)}*"):
    lock = _lock(left)
    if lock is not None:
      shutil.rmtree(left, ignore_errors=True)
      os.close(lock)
  # It is locked before it gets a name under which it would be removed.
  new = Path(tempfile.mkdtemp(prefix=f".{path.name}.new-", dir=parent))
  lock = _lock(new)
  directory = parent / f"{prefix}{new.name.rpartition('-')[2]}"
  new.rename(directory)
  return directory, lock


def _lock(directory: Path) -> int | None:
  """A descriptor that holds the directory; None where another process does, or where the file system has no locks."""
  try:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  except OSError:  # removed by another process
    return None
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(descriptor)
    return None
  return descriptor


@contextlib.contextmanager
def resumable_directory(path: str | Path, job: Mapping[str, Any]):
  """Like `whole_directory`, but what a killed run has finished is there again for the next run of the same job.

  Yields two directories below the sibling `.NAME.unfinished`: one that becomes `path`, and one for notes about what is
  finished. Files in them must be whole or not there. They are kept when the run is killed, fails or cannot write (disk
  full), and continued by a run whose `job`, which names everything that decides the result, is the same. Another job
  discards them, and so does bad input, unless it is an `UnfinishedError`. One process at a time owns them.
  """
  existed = Path(path).exists()
  path = _real(new_directory(path))
  place = path.with_name(f".{path.name}.unfinished")
  directory, notes, description = place / "files", place / "notes", json.dumps(dict(job), sort_keys=True)
  with writing(path):
    place.mkdir(exist_ok=True)
    lock = open(place / "lock", "w")  # noqa: SIM115 (held until the end)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    lock.close()
    raise InputError(f"another process is writing {path}; wait for it or end it") from None
  try:
    with writing(path):
      owner = place / "job.json"
      if not owner.exists() or owner.read_text() != description:
        owner.unlink(missing_ok=True)
        for stale in (directory, notes):
          shutil.rmtree(stale, ignore_errors=True)
        owner.write_text(description)
      directory.mkdir(exist_ok=True)
      notes.mkdir(exist_ok=True)
      for part in [*directory.glob(".*"), *notes.glob(".*")]:  # files that were being written
        part.unlink()
      directory.chmod(path.stat().st_mode & 0o777)
    yield directory, notes
    with writing(path):
      directory.replace(path)
    shutil.rmtree(place, ignore_errors=True)
  except BaseException as error:
    bad_input = isinstance(error, InputError) and not isinstance(error, UnfinishedError)
    if bad_input and not isinstance(error.__cause__, OSError):
      shutil.rmtree(place, ignore_errors=True)
    if not existed:
      with contextlib.suppress(OSError):
        path.rmdir()
    raise
  finally:
    lock.close()
