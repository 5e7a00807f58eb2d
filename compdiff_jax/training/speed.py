"""How fast a run is: step times, throughput, share of the hardware's peak, waiting for input; and traces of steps."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from compdiff_jax.cli import InputError

# The fields of a report that depend on the clock.
FIELDS = (
  "images_per_second",
  "tflops_per_second_per_device",
  "mfu",
  "step_seconds_p50",
  "step_seconds_p90",
  "step_seconds_p99",
  "data_wait_share",
  "first_step_seconds",
)


class StepClock:
  """Times the steps between two reports.

  The host hands out a step while the devices are busy with the one before it. It must not run further ahead: the clock
  waits for the step before, so that a step's time is that between two ends. The first step, which compiles, is apart.
  """

  def __init__(self, images: int, devices: int, peak: float | None, now: Callable[[], float] | None = None):
    """
    Args:
      images: of a step, on all devices.
      devices: how many.
      peak: operations per second of one, None where it is not known.
      now: the clock, in seconds.
    """
    self.flops = 0  # operations of a step, on all devices; to be set before the first report
    self._images, self._devices, self._peak = images, devices, peak
    self._now = now or time.monotonic
    self._running: Any = None  # results of the step that the devices may still be busy with
    self._first: float | None = None
    self._told = False
    self._last = self._now()
    self._seconds: list[float] = []
    self._starved = 0.0

  def next(self, batches: Iterator[Any]) -> Any:
    """The next batch. Waiting for it counts if the devices have finished their step when it comes."""
    asked = self._now()
    batch = next(batches)
    if self._first is not None and (self._running is None or _finished(self._running)):
      self._starved += self._now() - asked
    return batch

  def started(self, results: Any) -> None:
    """A step with these results, arrays that no later step takes over, has been handed out."""
    self.drain()
    self._running = results

  def drain(self) -> None:
    """Waits until the devices are done."""
    if self._running is None:
      return
    jax.block_until_ready(self._running)
    self._running, now = None, self._now()
    if self._first is None:
      self._first = now - self._last
    else:
      self._seconds.append(now - self._last)
    self._last = now

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What runs inside is no part of training."""
    self.drain()
    begin = self._now()
    yield
    self._last += self._now() - begin

  def report(self) -> dict[str, float]:
    """Figures of the steps since the last report, those of `FIELDS` that are known; to be called when none runs."""
    figures, seconds = {}, self._seconds
    if self._first is not None and not self._told:
      figures["first_step_seconds"], self._told = self._first, True
    if seconds:
      rate = len(seconds) / sum(seconds)
      figures["images_per_second"] = rate * self._images
      figures["tflops_per_second_per_device"] = rate * self.flops / self._devices / 1e12
      if self._peak is not None:
        figures["mfu"] = rate * self.flops / self._devices / self._peak
      figures |= {f"step_seconds_p{share}": float(np.percentile(seconds, share)) for share in (50, 90, 99)}
      figures["data_wait_share"] = self._starved / sum(seconds)
    self._seconds, self._starved = [], 0.0
    return figures


def describe(figures: Mapping[str, float]) -> str:
  """A report of `StepClock` in a few words."""
  if "images_per_second" not in figures:
    return f"first step after {figures['first_step_seconds']:.1f} s" if "first_step_seconds" in figures else ""
  percentiles = "/".join(f"{figures[f'step_seconds_p{share}']:.3g}" for share in (50, 90, 99))
  words = [
    f"{figures['images_per_second']:.1f} images/s",
    f"{figures['tflops_per_second_per_device']:.3g} TFLOP/s a device",
    f"MFU {figures['mfu']:.1%}" if "mfu" in figures else "",
    f"step {percentiles} s (p50/p90/p99)",
    f"data wait {figures['data_wait_share']:.1%}",
  ]
  return "  ".join(filter(None, words))


def _finished(results: Any) -> bool:
  return all(leaf.is_ready() for leaf in jax.tree.leaves(results))


def parse_profile(text: str, steps: int) -> range:
  """The steps of `--profile=START:STOP`, both included, in a run of `steps`; "" is none."""
  if not text:
    return range(0)
  numbers = re.fullmatch(r"(\d+):(\d+)", text)
  start, stop = map(int, numbers.groups()) if numbers else (0, 0)
  if not 1 <= start <= stop <= steps:
    raise InputError(f"--profile={text}: give START:STOP, for example 20:25, within the steps 1:{steps} of this run")
  return range(start, stop + 1)


class Profile:
  """Writes a trace of some steps to a directory, for Perfetto (ui.perfetto.dev) and XProf.

  Steps that a run to be resumed has behind it are not traced again.
  """

  def __init__(self, steps: range, directory: Path, clock: StepClock):
    self._steps, self._directory, self._clock = steps, directory, clock
    self._tracing = False

  def before(self, step: int) -> None:
    """To be called before each step."""
    self._trace(step in self._steps)

  def close(self) -> None:
    self._trace(False)

  def _trace(self, wanted: bool) -> None:
    if wanted == self._tracing:
      return
    with self._clock.paused():
      if wanted:
        jax.profiler.start_trace(self._directory)
      else:
        jax.profiler.stop_trace()
    self._tracing = wanted
