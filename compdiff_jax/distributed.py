"""Several processes that compute as one: finding each other, one writer, waiting with a time-out, ending together.

Every process runs the same command. `jax.distributed` finds the others by itself on TPU VMs, GKE, Slurm and Open MPI;
elsewhere the command names them. Enter `session` before any device is used.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from compdiff_jax.cli import InputError, LostError, RunError

# Errors of collectives whose peer is gone. Gloo, which joins CPU processes, raises a plain ValueError.
_LOST = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination service", "Barrier", "heartbeat")
# A process that sends no sign of life for so long is dead, and the runtime ends the others.
_HEARTBEAT_SECONDS = 60
# For what every process reaches at about the same time; --process_timeout changes it.
_WAIT_SECONDS = 300
_wait_seconds = float(_WAIT_SECONDS)
# A compiler may take long; processes that die meanwhile are noticed by their heartbeat.
_COMPILE_SECONDS = 4 * 3600
# After an error that all processes may have, how long one waits for the others to say it, too.
_LEAVE_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group(
    "several processes",
    "TPU VMs, GKE, Slurm and Open MPI are detected. Elsewhere start the same command once for each process with all of"
    " the first three options. --num_processes=1 alone switches detection off.",
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port on the host of process 0")
  group.add_argument("--num_processes", type=int, help="how many there are")
  group.add_argument("--process_id", type=int, help="which of them this is, from 0")
  group.add_argument(
    "--process_timeout", type=float, default=_WAIT_SECONDS, metavar="SECONDS", help="how long to wait for others"
  )


def is_writer() -> bool:
  """Whether this process writes what there is one of: metrics, pictures, config."""
  return jax.process_index() == 0


def _several() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


@contextlib.contextmanager
def session(args: argparse.Namespace) -> Iterator[None]:
  """Joins the other processes for the length of the block; at its end all wait for each other.

  Raises:
    InputError: the options are incomplete or contradict each other.
    LostError: not all processes came in time, or one of them was lost on the way.
  """
  global _wait_seconds
  _join(args)
  _wait_seconds = args.process_timeout
  try:
    yield
  except Exception as error:
    if _several() and _is_loss(error):
      reason = " ".join(str(error).split())[:200]
      raise LostError(
        f"process {jax.process_index()} of {jax.process_count()} lost another one, whose log may say why ({reason});"
        " the same command on every host resumes"
      ) from error
    raise
  if _several():
    # Whoever is still writing is waited for; afterwards the service can go without anyone taking it for a failure.
    barrier("end")
    jax.distributed.shutdown()


def _is_loss(error: Exception) -> bool:
  """Whether an error means that another process is gone: of a collective, or of Orbax, which waited for all of them."""
  if isinstance(error, (InputError, RunError)):  # whatever their texts say
    return False
  if isinstance(error, OSError):  # as of a file; Orbax's own time-outs are without a number
    return isinstance(error, TimeoutError) and error.errno is None
  return any(word in str(error) for word in _LOST)


def barrier(name: str, seconds: float | None = None) -> None:
  """Waits until every process has come here; one that does not in `seconds`, or --process_timeout, is an error."""
  if _several():
    timeout = _wait_seconds if seconds is None else seconds
    multihost.get_barrier_sync_fn()(key=f"compdiff {name}", timeout_ms=round(1000 * timeout))


def compile_together(function: Any, *arguments: Any) -> None:
  """Compiles a jitted function and waits until every process has, so that its first call starts everywhere at once.

  Only between CPU processes: there Gloo gives a collective 30 seconds, which one that still compiles may exceed.
  """
  if _several() and jax.default_backend() == "cpu":
    function.lower(*arguments).compile()
    barrier("compiled", _COMPILE_SECONDS)


def from_writer(function: Callable[[], Any]) -> Any:
  """`function()` of the writer, on every process: what it returns (as JSON) or the `InputError` that it raises."""
  if not _several():
    return function()
  answer = {}
  if is_writer():
    try:
      answer = {"result": function()}
    except InputError as error:
      answer = {"error": str(error)}
  barrier("writer")
  text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
  answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(text, size))))
  if "error" in answer:
    raise InputError(answer["error"])
  return answer["result"]


def leave(status: int) -> None:
  """After a failure ends this process, when it is one of several, without the waiting of an orderly end.

  An error that is not the loss of another process may be that of all: it gives them a while to come to it and say so,
  since process 0, which holds the others together, ends them when it goes.
  """
  if status and jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    if status != LostError.status:
      meeting = threading.Thread(target=_meet, daemon=True)
      meeting.start()
      meeting.join(2 * _LEAVE_SECONDS)
    os._exit(status)


def _meet() -> None:
  with contextlib.suppress(Exception):  # whoever does not come is gone or waits for something else
    barrier("leave", _LEAVE_SECONDS)
    jax.distributed.shutdown()


def _join(args: argparse.Namespace) -> None:
  given = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
  missing = [name for name, value in given.items() if value is None]
  if jax.distributed.is_initialized() or given == {"coordinator": None, "num_processes": 1, "process_id": None}:
    return
  if missing and len(missing) < 3:
    raise InputError(f"--{missing[0]} is missing; give --coordinator, --num_processes and --process_id together")
  if not missing:
    if not 0 <= args.process_id < args.num_processes:
      raise InputError(f"--process_id {args.process_id} must be from 0 to {args.num_processes - 1}")
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdigit():
      raise InputError(f"--coordinator {args.coordinator!r} must be HOST:PORT")
  if not 0 < args.process_timeout < math.inf:
    raise InputError(f"--process_timeout {args.process_timeout:g} must be above 0 and finite")

  failure: list[Exception] = []

  def initialize():
    try:
      jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        # All devices of the host, where the host says nothing else (Slurm: one process, one GPU).
        cluster_detection_method=None if missing else "deactivate",
        # The wait is bounded below: at its own time-out the runtime would abort without a word for the user.
        initialization_timeout=round(args.process_timeout) + 3600,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=max(1, round(args.process_timeout)),
      )
    except Exception as error:  # whatever detection raises: metadata, Kubernetes, sockets
      failure.append(error)

  thread = threading.Thread(target=initialize, daemon=True)
  thread.start()
  thread.join(args.process_timeout)
  if thread.is_alive():
    who = f"coordinator {args.coordinator}" if args.coordinator else "the coordinator"
    waits = "not all processes came" if args.process_id == 0 else f"{who} does not answer"
    raise LostError(
      f"{waits} within {args.process_timeout:g} s; check that the same command runs on every host and that the port is"
      " open, or raise --process_timeout"
    )
  if failure:
    reason = " ".join(str(failure[0]).split())
    # No cluster was detected, or this is a call from a program that already uses its devices: one process.
    if len(missing) == 3 and ("coordinator_address should be defined" in reason or "must be called before" in reason):
      return
    raise InputError(f"cannot join the other processes ({reason[:300]}); --num_processes=1 runs this one alone")
