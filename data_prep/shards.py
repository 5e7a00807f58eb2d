"""Writes the shards of a data set: one pure function a shard, run here, by local processes or by Apache Beam.

A task is a pickle file that holds everything a shard is made of; whoever runs it writes the shard and then a note, a
JSON file that says what became of its rows. Tasks, notes and shards lie in one directory that all workers can reach.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from compdiff_jax.cli import InputError, RunError, write_whole
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.data.records import Shard, features, write_shard
from compdiff_jax.metrics import Progress
from data_prep.rows import RowError

_FIELDS = ("key", "patient", "text", "attributes", "findings", "factors")
_BATCH = 64
# A smaller set is finished before processes have started.
_MANY_ROWS = 5_000
# Seconds between reports: on a terminal, in a log.
_EVERY = (0.5, 30.0)
# Finished tasks that are looked at together; it is waiting for a file system.
_CHECKS = 16


class Task(NamedTuple):
  """One shard to write.

  Attributes:
    path: of the shard; note: of the note.
    schema: the attributes.
    encode: makes the image of a row, see data_prep/rows.py.
    rows: dicts with the fields of the records, findings and factors as JSON, and `image` for `encode`.
  """

  path: Path
  note: Path
  schema: Schema
  encode: Callable[[Any], bytes]
  rows: Sequence[Mapping[str, Any]]


class Runner(NamedTuple):
  """Where tasks run.

  Attributes:
    workers: local processes; 0 uses this one, with a thread a core that makes images. None: one a core where many rows
      are to be done.
    beam: name of an Apache Beam runner, or "".
    beam_options: its command-line options.
  """

  workers: int | None = None
  beam: str = ""
  beam_options: str = ""


HERE = Runner(0)


class Note(NamedTuple):
  """What became of a task.

  Attributes:
    shard: what was written.
    rejected: {row of the task: reason}.
    sha256: of the images of the other rows.
    sources: digest of the files that the images came from, see `_sources`.
  """

  shard: Shard
  rejected: dict[int, str]
  sha256: list[str]
  sources: str


def read_note(path: Path) -> Note:
  note = json.loads(path.read_text())
  rejected = {int(row): reason for row, reason in note["rejected"].items()}
  return Note(Shard(*note["shard"]), rejected, note["sha256"], note["sources"])


def run_task(task: Task, threads: int = 1, advance: Callable[[int], None] = lambda count: None) -> None:
  """Writes the shard of a task and its note. The bytes depend on the task alone."""
  rejected: dict[int, str] = {}
  hashes: list[str] = []
  sources = _sources(task)  # before they are read: what is replaced meanwhile differs from it

  def records() -> Iterator[dict[str, Any]]:
    for number, (row, image) in enumerate(_images(task, threads)):
      advance(1)
      if isinstance(image, RowError):
        rejected[number] = str(image)
      else:
        hashes.append(hashlib.sha256(image).hexdigest())
        yield {**{field: row[field] for field in _FIELDS}, "image": image}

  shard = write_shard(task.path, features(task.schema), records())
  write_whole(task.note, json.dumps(Note(shard, rejected, hashes, sources)._asdict()))


def _images(task: Task, threads: int) -> Iterator[tuple[Mapping[str, Any], bytes | RowError]]:
  """Each row with its image or with the reason why there is none, in order."""
  attempt = functools.partial(_attempt, task)
  if threads < 2:
    yield from ((row, attempt(row)) for row in task.rows)
    return
  rows = iter(task.rows)
  with ThreadPoolExecutor(threads) as pool:
    while batch := list(itertools.islice(rows, _BATCH)):
      yield from zip(batch, pool.map(attempt, batch))


def _attempt(task: Task, row: Mapping[str, Any]) -> bytes | RowError:
  try:
    return task.encode(row["image"])
  except RowError as error:
    return error


def _sources(task: Task) -> str:
  """Tells the source files of a task from changed ones by path, size and time: one stat a file, none is opened."""
  files = getattr(task.encode, "files", lambda image: ())
  digest = hashlib.sha256()
  for row in task.rows:
    for path in files(row["image"]):
      with contextlib.suppress(OSError, ValueError):  # missing, or no name of a file
        stat = os.stat(path)
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        break
  return digest.hexdigest()


def _finished(task: Task) -> bool:
  """Whether a task was run and would give the same again: no source file changed, no rejected row was mended."""
  if not task.note.exists():
    return False
  note = read_note(task.note)
  same = all(str(_attempt(task, task.rows[i])) == reason for i, reason in note.rejected.items())
  return same and note.sources == _sources(task)


def run_tasks(tasks: Sequence[Task], runner: Runner) -> None:
  """Runs the tasks that are not finished yet."""
  with ThreadPoolExecutor(_CHECKS) as pool:
    finished = list(pool.map(_finished, tasks))
  waiting = [task for task, done in zip(tasks, finished) if not done]
  for task in waiting:
    task.note.unlink(missing_ok=True)  # it no longer belongs to the shard
  meter = _Meter(sum(len(task.rows) for task in tasks), sum(len(task.rows) for task in tasks if task not in waiting))
  try:
    if runner.beam:
      _run_beam(waiting, runner, meter)
    elif workers := _workers(waiting, runner):
      _run_processes(waiting, workers, meter)
    else:
      for task in waiting:
        run_task(task, os.cpu_count() or 1, meter.advance)
  finally:
    meter.close()


def _workers(tasks: Sequence[Task], runner: Runner) -> int:
  if runner.workers is not None:
    return runner.workers
  return (os.cpu_count() or 1) if sum(len(task.rows) for task in tasks) >= _MANY_ROWS and len(tasks) > 1 else 0


class _Meter:
  """Counts rows and shows progress and the time left, not more often than one wants to read."""

  def __init__(self, total: int, done: int):
    self._progress = Progress(total, done, "row")
    self._start = self.done = done
    self._every = _EVERY[0 if sys.stderr.isatty() else 1]
    self._last = time.monotonic()

  def advance(self, count: int) -> None:
    self.set(self.done - self._start + count)

  def set(self, count: int) -> None:
    """`count` rows were done by this run."""
    self.done = self._start + count
    if time.monotonic() - self._last >= self._every:
      self._last = time.monotonic()
      self._progress.update(self.done)

  def close(self) -> None:
    self._progress.close()


# ---- Local processes

_counter: Any = None  # rows done by all workers; set in each worker


def _start_worker(counter: Any) -> None:
  global _counter
  _counter = counter
  # A worker whose parent was killed would wait for work forever.
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_pickled(path: Path) -> None:
  def advance(count: int) -> None:
    if _counter is not None:
      with _counter.get_lock():
        _counter.value += count

  run_task(pickle.loads(path.read_bytes()), advance=advance)


def _pickled(task: Task) -> Path:
  path = task.note.with_name(f"{task.note.name}.task")
  path.write_bytes(pickle.dumps(task))
  return path


def _run_processes(tasks: Sequence[Task], workers: int, meter: _Meter) -> None:
  context = multiprocessing.get_context("spawn")
  counter = context.Value("q", 0)
  with ProcessPoolExecutor(workers, context, _start_worker, (counter,)) as pool:
    pending = {pool.submit(_run_pickled, _pickled(task)) for task in tasks}
    try:
      while pending:
        done, pending = wait(pending, timeout=_EVERY[0], return_when=FIRST_EXCEPTION)
        for future in done:
          future.result()
        meter.set(counter.value)
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
    # Leaving the pool waits for its processes: one that starts late still looks for the counter.


# ---- Apache Beam


def _run_beam(tasks: Sequence[Task], runner: Runner, meter: _Meter) -> None:
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise InputError(
      f"--runner {runner.beam} needs Apache Beam ({error}); pip install 'compdiff-jax[beam]', or use --workers alone"
    ) from None
  flags = [f"--runner={runner.beam}", *shlex.split(runner.beam_options)]
  if runner.beam == "DirectRunner":
    workers = (os.cpu_count() or 1) if runner.workers is None else runner.workers
    if workers:
      flags += [f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
  finished = threading.Event()

  def watch() -> None:
    while not finished.wait(_EVERY[0]):
      meter.set(sum(len(task.rows) for task in tasks if task.note.exists()))

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
      paths = [_pickled(task) for task in tasks]
      _ = pipeline | beam.Create(paths) | beam.Reshuffle() | beam.Map(_run_pickled)
  except (ValueError, RuntimeError) as error:  # Beam wraps whatever a worker raised
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    raise RunError(f"{runner.beam}: {lines[-1] if lines else error!r}") from error
  finally:
    finished.set()
    watcher.join()
  missing = [task.path.name for task in tasks if not task.note.exists()]
  if missing:
    raise RunError(f"{runner.beam} ended without {missing[0]}; its workers must reach {tasks[0].path.parent}")
