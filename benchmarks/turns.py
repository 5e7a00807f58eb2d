"""Programs timed side by side: each in a process of its own, in turn, so that what disturbs one disturbs the other."""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# A call does the work once and returns when the device is done.
Calls = Mapping[str, Callable[[], Any]]
# Makes the calls of one side: networks, data, compiled programs. Runs in the process that will time them.
Side = Callable[[Any], Calls]


class Times(NamedTuple):
  """Seconds of one call, by the clock and of processors (all threads), the mean of some repetitions."""

  wall: float
  processor: float


def take_turns(
  sides: Mapping[str, Side], options: Any, names: Sequence[str], rounds: int, repeats: int
) -> tuple[dict[str, dict[str, list[Times]]], dict[str, float]]:
  """Times the calls `names` of all sides.

  With several rounds all sides live at once and take turns. With one they come one after the other, and each has the
  memory of the device for itself.

  Returns:
    ({name: {side: times of each round}}, {side: peak memory in GB}).
  """
  times = {name: {side: [] for side in sides} for name in names}
  peaks = {}
  groups = [list(sides)] if rounds > 1 else [[side] for side in sides]
  for group in groups:
    workers = {side: _Worker(sides[side], options, names) for side in group}
    for _ in range(rounds):
      for name in names:
        for side, worker in workers.items():
          times[name][side].append(Times(*worker.ask(name, repeats)))
    peaks |= {side: worker.close() for side, worker in workers.items()}
  return times, peaks


def summary(
  name: str, options: Any, times: Mapping[str, Sequence[Times]], peaks: Mapping[str, float]
) -> dict[str, Any]:
  """One measured call as a row for JSON.

  `by_clock` and `by_processor_time` say how many times as fast "jax" is as the fastest other side: the median over the
  rounds, the lowest and the highest. Other programs on the machine lengthen the clock's time; they also make threads
  wait for each other, which with torch costs processor time.
  """
  middle = {side: Times(*map(statistics.median, zip(*own))) for side, own in times.items()}
  peer = min((side for side in middle if side != "jax"), key=lambda side: middle[side].wall)
  row = {"measured": name, **vars(options)}
  for side in ("jax", peer):
    row[side] = {
      "seconds": round(middle[side].wall, 4),
      "processor_seconds": round(middle[side].processor, 4),
      "images_per_second": round(options.batch / middle[side].wall, 2),
      "peak_GB": round(peaks[side], 2),
    }
  for field, label in (("wall", "by_clock"), ("processor", "by_processor_time")):
    each = [getattr(theirs, field) / getattr(ours, field) for ours, theirs in zip(times["jax"], times[peer])]
    found = {"ratio": statistics.median(each), "lowest": min(each), "highest": max(each)}
    row[label] = {word: round(value, 3) for word, value in found.items()}
  return row


class _Worker:
  """A process that times the calls of one side on request."""

  def __init__(self, side: Side, options: Any, names: Sequence[str]):
    context = multiprocessing.get_context("spawn")
    self._connection, remote = context.Pipe()
    self._process = context.Process(target=_serve, args=(side, options, names, remote), daemon=True)
    self._process.start()
    remote.close()
    self._receive()

  def ask(self, name: str, repeats: int) -> tuple[float, float]:
    self._connection.send((name, repeats))
    return self._receive()

  def close(self) -> float:
    self._connection.send(None)
    peak = self._receive()
    self._process.join()
    return peak

  def _receive(self) -> Any:
    try:
      return self._connection.recv()
    except EOFError:
      raise SystemExit("a side of the benchmark ended early; its error stands above") from None


def _serve(side: Side, options: Any, names: Sequence[str], connection: Any) -> None:
  calls = side(options)
  for name in names:
    calls[name]()  # compiles
  connection.send("ready")
  while request := connection.recv():
    name, repeats = request
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
      calls[name]()
    connection.send(((time.perf_counter() - wall) / repeats, (time.process_time() - processor) / repeats))
  connection.send(_peak_memory())


def _peak_memory() -> float:
  """The largest memory in GB so far: of the accelerator, else of this process."""
  torch, jax = (sys.modules.get(name) for name in ("torch", "jax"))
  if torch and torch.cuda.is_initialized():
    return torch.cuda.max_memory_allocated() / 1e9
  stats = (jax and jax.local_devices()[0].memory_stats()) or {}
  return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
