"""Checks at start-up and while training."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from compdiff_jax.cli import InputError, RunError, nearest
from compdiff_jax.data.records import RecordSet


def check_intervals(logging: ml_collections.ConfigDict) -> None:
  """A checkpoint must fall on a report: a resumed run then reports the same means as an uninterrupted one.

  And what is to be kept must be written.
  """
  if logging.checkpoint_every % logging.log_every:
    raise InputError(
      f"logging.checkpoint_every {logging.checkpoint_every} must be a multiple of logging.log_every {logging.log_every}"
    )
  every, written = logging.keep_every, logging.checkpoint_every
  if every and every % written and written % every:
    raise InputError(
      f"logging.keep_every {every} must be 0, or a multiple or divisor of logging.checkpoint_every {written}"
    )


def warn_of_empty_levels(sets: Sequence[RecordSet]) -> None:
  """Says which values the schema has and training never sees: their embeddings keep their random initial values."""
  columns = [records.attributes("train") for records in sets]
  empty = []
  for a in sets[0].schema.grouping:
    seen = set(np.concatenate([a.levels(own[a.name]) for own in columns]).tolist())
    empty += [f"{a.name}={name}" for level, name in enumerate(a.level_names) if level not in seen]
  if empty:
    names = ", ".join(empty)
    print(f"warning: no training image has {names}; images sampled for these are meaningless", file=sys.stderr)


def check_metric(name: str, metrics: Iterable[str]) -> None:
  """`logging.keep_best` must be one of the step's metrics."""
  if name not in metrics:
    raise InputError(f"logging.keep_best: there is no metric {name!r}{nearest(name, metrics)}")


def check_finite(
  rows: Sequence[Mapping[str, float]], first_step: int, keys: Callable[[int], Sequence[str]], path: Path
) -> None:
  """Stops the run at the first step whose loss or gradient is not finite. Nothing after it has been checkpointed.

  `keys(step)` names the records of a step's batch; they are written to `path`, with the metrics of the step.
  """
  for step, row in enumerate(rows, start=first_step):
    bad = [name for name in ("loss", "grad_norm") if not np.isfinite(row[name])]
    if bad:
      if jax.process_index() == 0:
        metrics = {name: repr(value) if not np.isfinite(value) else value for name, value in row.items()}
        path.write_text(json.dumps({"step": step, "metrics": metrics, "batch": list(keys(step))}, indent=2) + "\n")
      raise RunError(
        f"{' and '.join(bad)} became {row[bad[0]]} at step {step}; the last checkpoint is from before it, and the"
        f" records of its batch stand in {path}. Look at them, or lower train.learning_rate"
      )


@contextlib.contextmanager
def out_of_memory_advice(config: ml_collections.ConfigDict, what: str = "the training step") -> Iterator[None]:
  """Turns "out of device memory", at compile time or while running, into one line that says what to change.

  `what` runs inside: "the training step", "the training state" or "sampling".
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text and "Out of memory" not in text:
      raise
    # TPU: "Used 17.2G of 15.75G hbm"; GPU: "trying to allocate 1.2GiB".
    sizes = re.search(r"Used [\d.]+\w+ of [\d.]+\w+ hbm|[Tt]rying to allocate [\d.]+ ?\w+", text)
    options = [f"a larger mesh.fsdp (now {config.mesh.fsdp})"]
    if what == "sampling":
      options.insert(0, f"a smaller sample.batch_size (now {config.sample.batch_size})")
    elif what == "the training step":
      if config.compute_dtype == "float32":
        options.insert(0, "compute_dtype=bfloat16")
      if config.remat != "blocks":
        options.append(f"remat={'matmuls' if config.remat == 'none' else 'blocks'} (now {config.remat})")
      options.append(f"a larger train.accumulation (now {config.train.accumulation})")
      options.append(f"a smaller train.batch_size (now {config.train.batch_size})")
    raise RunError(
      f"{what} does not fit in device memory ({sizes.group() if sizes else text[:120]}); in this order, try"
      f" {'; '.join(options)}"
    ) from None
