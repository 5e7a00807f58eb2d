"""`python -m benchmarks.restart --dir DIR -- compdiff train --config=FILE …`: what a restart costs, and the input.

Starts the command three times in one new workdir and stops it with SIGTERM: with an empty compilation cache, with a
full one, both for `--first` steps, and then for two reports of `--steps` steps. One JSON line: seconds from the start
of the process to the end of its first step, cold and warm, and what the last report says of the speed, with the share
of time that the devices waited for input. At full size the command needs a data set of moments and networks of true
size, with any weights.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from compdiff_jax.metrics import read_metrics
from compdiff_jax.training.speed import FIELDS


def _run(command: list[str], environment: dict[str, str], workdir: Path, rows: int) -> float:
  """Runs until metrics.jsonl has so many rows more; returns the seconds until the first of them."""
  before = len(read_metrics(workdir))
  begin, first = time.monotonic(), None
  process = subprocess.Popen(command, env=environment)
  try:
    while (written := len(read_metrics(workdir)) - before) < rows and process.poll() is None:
      if written and first is None:
        first = time.monotonic() - begin
      time.sleep(0.02)
    first = first or time.monotonic() - begin
    process.terminate()
    if process.wait() or written < rows:
      raise SystemExit(f"status {process.returncode} after {written} reports: {' '.join(command)}")
  finally:
    process.kill()
  return first


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--dir", type=Path, required=True, help="new directory for the workdir and the compilation cache")
  parser.add_argument("--first", type=int, default=3, help="steps of the runs that measure the start")
  parser.add_argument("--steps", type=int, default=100, help="steps of a report of the run that measures the speed")
  parser.add_argument("command", nargs="+", metavar="-- compdiff train …", help="without --workdir")
  args = parser.parse_args(argv)
  workdir = args.dir / "run"
  if workdir.exists():
    parser.error(f"{workdir} exists; give a new --dir")
  program = ["-m", "compdiff_jax"] if args.command[0] == "compdiff" else args.command[:1]
  train = [sys.executable, *program, *args.command[1:], f"--workdir={workdir}"]
  train += ["--config.logging.sample_every=1000000000"]
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(args.dir / "compiled")}

  def reporting(every: int) -> list[str]:
    return [*train, f"--config.logging.log_every={every}", f"--config.logging.checkpoint_every={10**6 * every}"]

  cold, warm = (_run(reporting(1), environment, workdir, args.first) for _ in range(2))
  # Two reports, since the first may hold nothing but the first step.
  _run(reporting(args.steps), environment, workdir, 2)
  row = read_metrics(workdir)[-1]
  speed = {name: round(row[name], 4) for name in FIELDS if name in row}
  print(
    json.dumps({"cold_seconds_to_first_step": round(cold, 1), "warm_seconds_to_first_step": round(warm, 1), **speed})
  )


if __name__ == "__main__":
  main()
