"""Signs of life of a run, and its orderly end: heartbeat file, stall detector, SIGTERM."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import jax
from jax.experimental import multihost_utils

from compdiff_jax.cli import LostError, write_whole


class Preemption:
  """Notices SIGTERM, which schedulers send before they take a machine away. Use as a context manager.

  With several processes the runtime passes the notice on, and all agree on one step; alone, the next step is it.
  """

  def __init__(self):
    self._received = False
    self._previous = None
    self._asked = 0

  def __enter__(self) -> "Preemption":
    # With several processes the runtime has its own handler, which this one would replace.
    if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *_) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _receive(self, *_) -> None:
    self._received = True

  def reached(self) -> bool:
    """Whether to stop now. To be asked before the first step and after every one, equally often on every process."""
    if jax.distributed.is_initialized():
      # The runtime stops all at one number, that after the largest it was given. It begins with 0, so a notice that
      # comes before the first question would mean 1: steps, which a resumed run counts on, would never hit that.
      self._asked += 1
      return multihost_utils.reached_preemption_sync_point(self._asked)
    return self._received


class Heartbeat:
  """Writes a small JSON file while a run lives, and says where a run hangs that makes no more steps.

  The file holds {"state", "step", "steps", "seconds_since_step", "time"}; state is "training", then "finished",
  "stopped" (SIGTERM) or "failed". After `stall_seconds` without a step the stacks of all threads are printed; after
  twice that time the process ends with status 75, so that its scheduler starts the run again. Both count from the first
  step on: before it, compiling may take long. So may what is announced with `disarm`.
  """

  def __init__(self, path: Path, step: int, steps: int, stall_seconds: float, log: IO[str] | None = None):
    """`step`: the one training starts from; `steps`: the last one; `stall_seconds`: 0 for never; `log`: stderr."""
    self._path = path
    self._step, self._steps = step, steps
    self._state = "training"
    self._last = time.monotonic()
    self._armed = False
    self._reported = False
    self._stall = stall_seconds
    self._log = sys.__stderr__ if log is None else log  # faulthandler needs a real file
    self._wake = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

  def __enter__(self) -> "Heartbeat":
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._write()
    self._thread.start()
    return self

  def __exit__(self, kind, *_) -> None:
    if kind is not None:
      self._state = "failed"
    elif self._state == "training":
      self._state = "finished"
    self._wake.set()
    self._thread.join()
    self._write()

  def beat(self, step: int) -> None:
    """A step is done."""
    self._step, self._last, self._armed, self._reported = step, time.monotonic(), True, False

  def disarm(self) -> None:
    """Something long comes that is no step: until the next step is done, its time is no stall."""
    self._armed = False

  def stopped(self) -> None:
    """The run ends before its last step, on request."""
    self._state = "stopped"

  def _watch(self) -> None:
    interval = min(10.0, self._stall / 4) if self._stall else 10.0
    while not self._wake.wait(interval):
      self._write()
      silent = time.monotonic() - self._last
      if not self._armed or not self._stall or silent < self._stall:
        continue
      if not self._reported:
        self._say(f"no step for {silent:.0f} s; the last one was {self._step}. This is where every thread is:")
        faulthandler.dump_traceback(self._log, all_threads=True)
        self._reported = True
      elif silent > 2 * self._stall:
        self._state = "failed"
        self._write()
        self._say(f"no step for {silent:.0f} s after step {self._step}: giving up; the same command resumes")
        os._exit(LostError.status)

  def _say(self, text: str) -> None:
    print(f"stall: {text}", file=self._log, flush=True)

  def _write(self) -> None:
    content = {
      "state": self._state,
      "step": self._step,
      "steps": self._steps,
      "seconds_since_step": round(time.monotonic() - self._last, 1),
      "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
      write_whole(self._path, json.dumps(content) + "\n")
    except OSError as error:  # a full disk must not end a run through its heartbeat
      self._say(f"cannot write {self._path}: {error.strerror or error}")
