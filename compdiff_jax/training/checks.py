"""Checks and reports at start-up and while training."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from compdiff_jax.cli import InputError, RunError
from compdiff_jax.data.records import RecordSet
from compdiff_jax.sharding import bytes_per_device


def check_intervals(logging: ml_collections.ConfigDict) -> None:
  """A checkpoint must fall on a report: a resumed run then reports the same means as an uninterrupted one."""
  if min(logging.log_every, logging.checkpoint_every, logging.sample_every, logging.keep_checkpoints) < 1:
    raise InputError("logging: log_every, checkpoint_every, sample_every and keep_checkpoints must be at least 1")
  if logging.checkpoint_every % logging.log_every:
    raise InputError(
      f"logging.checkpoint_every {logging.checkpoint_every} must be a multiple of logging.log_every {logging.log_every}"
    )


def warn_of_empty_levels(sets: Sequence[RecordSet]) -> None:
  """Says which values the schema has and training never sees: what stands for them stays as it was drawn."""
  columns = [records.attributes("train") for records in sets]
  empty = []
  for a in sets[0].schema.grouping:
    seen = set(np.concatenate([a.levels(own[a.name]) for own in columns]).tolist())
    empty += [f"{a.name}={name}" for level, name in enumerate(a.level_names) if level not in seen]
  if empty:
    print(f"warning: no training image has {', '.join(empty)}; pictures of these will mean nothing", file=sys.stderr)


def check_finite(rows: Sequence[Mapping[str, Any]], first_step: int) -> None:
  """Stops the run at the first step whose loss or gradient is not finite. Nothing after it has been checkpointed."""
  for step, row in enumerate(rows, start=first_step):
    bad = [name for name in ("loss", "grad_norm") if not np.isfinite(row[name])]
    if bad:
      raise RunError(
        f"{' and '.join(bad)} became {float(row[bad[0]])} at step {step}; the last checkpoint is from before it."
        " Lower train.learning_rate, or look at the batch of that step"
      )


def print_summary(shapes: Mapping[str, Mapping[str, Any]], abstract: Any, shardings: Any, mesh: Mesh) -> None:
  """Prints, for each trained component, its size and what one device holds of the training state."""
  print(f"mesh {dict(mesh.shape)} on {mesh.size} {jax.devices()[0].platform} device(s)", file=sys.stderr)
  for name, leaves in shapes.items():
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    print(f"  {name:<14}{len(leaves):>5} tensors {count:>13,} parameters", file=sys.stderr)
  mebibytes = bytes_per_device(abstract, shardings) / 2**20
  print(f"  training state (parameters, EMA, optimizer): {mebibytes:,.1f} MiB a device", file=sys.stderr)
