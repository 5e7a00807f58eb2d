"""All Orbax calls: asynchronous checkpoints of the training state.

On disk: `<directory>/<step>/{params, ema, optimizer}/`. The position in the data is the step (`data.order`), so a run
continues on any number of hosts. A checkpoint appears under its step only once it is complete; one that was cut short
is never picked up.
"""

import contextlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from compdiff_jax import distributed
from compdiff_jax.cli import InputError, RunError

# What writing may hold beside the arrays; without a bound Orbax takes as much again as the whole state.
_WRITE_BYTES = 2**28
# Devices that hold the same array write a part of it each, but not of the small ones, where cutting takes longest.
_SLICE_BYTES = 2**20


class Checkpoints:
  """The checkpoints of one run. Use as a context manager: leaving it waits for pending writes.

  With several processes every one of them makes the same calls; each writes what its devices hold.
  """

  def __init__(
    self, directory: str | Path, keep: int = 2, keep_every: int = 0, keep_best: str = "", trains: bool = False
  ):
    """Keeps the latest `keep`, the multiples of `keep_every` steps, and that with the lowest metric `keep_best`.

    The run itself, which `trains`, clears away what was cut short; to others that may be a checkpoint in the making.
    """
    keeping = ocp.training.preservation_policies
    policies = [keeping.LatestN(keep)]
    if keep_every:
      policies.append(keeping.EveryNSteps(keep_every))
    if keep_best:
      lowest = lambda metrics: metrics.get(keep_best, math.inf)  # noqa: E731 (a report may lack it)
      policies.append(keeping.BestN(get_metric_fn=lowest, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    self._directory = Path(directory).absolute()
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it touches
    self._checkpointer = ocp.training.Checkpointer(
      str(self._directory),
      preservation_policy=keeping.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=trains,
    )

  def __enter__(self):
    return self

  def __exit__(self, kind, *_):
    # After a failure the other processes may be gone, and an unfinished write would wait for them.
    if kind is None or jax.process_count() == 1:
      self.close()

  def close(self):
    self._checkpointer.close()

  def wait(self) -> None:
    """Until what `save` has started is complete."""
    self._checkpointer.wait()

  @property
  def steps(self) -> list[int]:
    return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

  def latest(self) -> int | None:
    """The step of the latest checkpoint, on every process that which the writer sees; None where there is none.

    A network disk may show its hosts different lists, and processes that start from different steps would not notice.
    """
    return distributed.from_writer(lambda: max(self.steps, default=None))

  def save(
    self,
    step: int,
    parts: dict[str, Any],
    metrics: Mapping[str, float] | None = None,
    note: Mapping[str, Any] | None = None,
  ) -> None:
    """Starts writing `parts` (pytrees of arrays) and returns; the previous write is awaited.

    `metrics` are what `keep_best` chooses by; `note` is any JSON object that belongs to the step.
    """
    self.wait()
    largest = max((getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(parts)), default=0)
    context = ocp.Context()
    context.memory.write_concurrent_bytes = max(_WRITE_BYTES, 2 * largest)
    context.array.saving.min_slice_bytes_for_replica_parallel = _SLICE_BYTES
    with context:
      self._checkpointer.save_checkpointables_async(
        step, parts, force=True, metrics=metrics and dict(metrics), custom_metadata=note and dict(note)
      )

  def note(self, step: int) -> dict[str, Any]:
    """What `save` was given as the step's note."""
    return self._checkpointer.checkpointables_metadata(step).custom_metadata or {}

  def restore(self, parts: dict[str, Any], step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Loads the named parts of a step (default: the latest) into the given shapes and shardings.

    Args:
      parts: for each part an abstract pytree (`ShapeDtypeStruct` with sharding).
      step: which checkpoint.

    Returns:
      (step, loaded parts).

    Raises:
      InputError: there is no such checkpoint, or its files are damaged.
      RunError: the file system fails, and the checkpoint may be whole. What JAX raises passes as it is.
    """
    step = self.latest() if step is None else step
    if step is None:
      raise InputError(f"{self._directory} holds no complete checkpoint; train first")
    if step not in self.steps:
      self._checkpointer.reload()  # the process that chose it may have seen the directory later
    if step not in self.steps:
      there = ", ".join(map(str, self.steps)) or "none"
      raise InputError(f"{self._directory} has no checkpoint of step {step}; this host sees {there}")
    try:
      return step, self._checkpointer.load_checkpointables(step, parts)
    except jax.errors.JaxRuntimeError:
      raise
    except Exception as error:  # tensorstore, JSON and key errors: whichever file was damaged decides the type
      if isinstance(error, TimeoutError) and error.errno is None:
        raise  # Orbax waited in vain for the other processes
      if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise RunError(f"checkpoint {self._directory / str(step)} cannot be read: {error.strerror or error}") from None
      reason = " ".join(str(error).split())[:300]
      raise InputError(
        f"checkpoint {self._directory / str(step)} is damaged or of another model ({type(error).__name__}: {reason});"
        " move it away to go on from an earlier step"
      ) from None


def has_checkpoint(directory: str | Path) -> bool:
  """Whether a complete checkpoint exists, without creating anything."""
  if not Path(directory).is_dir():
    return False
  with contextlib.closing(Checkpoints(directory)) as checkpoints:
    return bool(checkpoints.steps)
