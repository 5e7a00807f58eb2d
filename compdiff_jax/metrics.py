"""Metrics of a run: `metrics.jsonl` always, TensorBoard through CLU where TensorFlow is installed, and progress."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from compdiff_jax.cli import write_whole


class MetricWriter:
  """Writes one JSON line per report to `<workdir>/metrics.jsonl`; rows after `start_step` are dropped on resume.

  A run that was killed has reported steps past its last checkpoint. Resuming repeats those steps, so their old rows
  are removed (the file is replaced atomically) and every step stands in it once.
  """

  def __init__(self, workdir: Path, start_step: int):
    self._path = Path(workdir) / "metrics.jsonl"
    kept = [row for row in read_metrics(workdir) if row["step"] <= start_step]
    write_whole(self._path, "".join(json.dumps(row) + "\n" for row in kept))
    self._file = self._path.open("a")
    self._tensorboard = _tensorboard_writer(Path(workdir) / "tensorboard")

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    if self._tensorboard is not None:
      self._tensorboard.write_scalars(step, dict(values))

  def close(self) -> None:
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()


def _tensorboard_writer(logdir: Path):
  """CLU's summary writer, or None without TensorFlow and TensorBoard: that costs the feature, not the run."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets on import
  try:
    from clu import metric_writers
  except ImportError as error:
    print(f"no TensorBoard files, metrics.jsonl only ({error})", file=sys.stderr)
    return None
  return metric_writers.SummaryWriter(str(logdir))


def mean_over_steps(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """The mean of each metric over the steps in which it is a number; without any it is left out."""
  columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
  known = {name: values[~np.isnan(values)] for name, values in columns.items()}
  return {name: float(values.mean()) for name, values in known.items() if len(values)}


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
  """The rows of `metrics.jsonl`; a last line that a kill cut short is left out."""
  path = Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  rows = []
  for line in path.read_text().splitlines():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class Progress:
  """A progress bar on a terminal, one plain line a report otherwise."""

  def __init__(self, total: int, initial: int, unit: str):
    self._bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True) if sys.stderr.isatty() else None
    self._total, self._unit, self._start = total, unit, time.monotonic()
    self._initial = initial

  def update(self, step: int, text: str = "") -> None:
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    rate = (step - self._initial) / max(time.monotonic() - self._start, 1e-9)
    left = f"{(self._total - step) / rate / 60:.1f} min left" if rate else ""
    print("  ".join(filter(None, (f"{self._unit} {step}/{self._total}", text, left))), file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
