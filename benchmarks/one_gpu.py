"""`python -m benchmarks.one_gpu --out DIR --minutes 12`: what docs/benchmarks.md asks of one GPU, most important first.

Each measurement is a command of its own with the GPU for itself. DIR gets a log of each, and results.jsonl a row with
its last lines. What does not fit into the time is stopped and left for the next call, which goes on where this one
ended; what failed is tried again.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from compdiff_jax import cli

_STEP = "-m benchmarks.train_step --size sd21 --dtype bfloat16 --batch 64 --compiled --rounds 1 --repeats 20"
# {name: arguments of python}; OUT is the directory of the results, TRAIN what full_size printed.
MEASUREMENTS = {
  "kernels": "-m pytest -q tests/test_attention.py -k cudnn",
  "step": f"{_STEP} --only 'train step'",
  "sampling": "-m benchmarks.sampling --size sd21 --dtype bfloat16 --batch 16 --compiled --rounds 1 --repeats 3",
  "inputs": "-m benchmarks.full_size --out OUT/full_size",
  "restart": "-m benchmarks.restart --dir OUT/restart --steps 40 -- TRAIN --config.train.batch_size=64",
  "step with VAE": f"{_STEP} --only 'train step' --inputs images",
  "study": "-m benchmarks.phantom_study --out OUT/study",
}

# Tests run on a CPU unless told otherwise; JAX takes three quarters of the memory unless told otherwise.
_ENVIRONMENT = {"JAX_PLATFORMS": "cuda", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def main(argv: list[str]) -> None:
  parser = cli.parser("python -m benchmarks.one_gpu", __doc__.splitlines()[0])
  parser.add_argument(
    "--out", type=Path, required=True, help="directory of the results; the same command goes on in it"
  )
  parser.add_argument("--minutes", type=float, default=60, help="when to stop")
  parser.add_argument("--only", default=",".join(MEASUREMENTS), help="which, in what order")
  args = parser.parse_args(argv)
  names = args.only.split(",")
  for name in names:
    if name not in MEASUREMENTS:
      raise cli.InputError(f"--only: there is no {name!r}{cli.nearest(name, MEASUREMENTS)}")
  end = time.monotonic() + 60 * args.minutes
  args.out.mkdir(parents=True, exist_ok=True)
  for name in names:
    if name in finished(args.out):
      continue
    row = measure(name, args.out, end - time.monotonic())
    with (args.out / "results.jsonl").open("a") as file:
      file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1), flush=True)
    if time.monotonic() >= end:
      raise cli.RunError(f"the time is over; the same command goes on with {name!r}")


def finished(out: Path) -> dict[str, list[str]]:
  """{name: last lines} of what succeeded so far."""
  path = out / "results.jsonl"
  rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
  return {row["name"]: row["output"] for row in rows if row["status"] == 0}


def measure(name: str, out: Path, seconds: float) -> dict[str, object]:
  """Runs one measurement for at most so long: its command, status, seconds and last lines."""
  arguments = MEASUREMENTS[name].replace("OUT", str(out))
  if "TRAIN" in arguments:
    arguments = arguments.replace("TRAIN", finished(out).get("inputs", ["compdiff train"])[-1])
  if name == "restart":
    shutil.rmtree(out / "restart", ignore_errors=True)  # of a call that was stopped; it measures a new run
  words = shlex.split(arguments)
  log = out / f"{name.replace(' ', '_')}.log"
  environment = {**_ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str((out / "compiled").absolute()), **os.environ}
  begin = time.monotonic()
  with log.open("w") as file:
    process = subprocess.Popen([sys.executable, *words], stdout=file, stderr=file, env=environment, process_group=0)
    try:
      status = process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, 9)  # with the processes that it started
      status = process.wait()
  lines = log.read_text().splitlines()[-3:]
  return {"name": name, "command": words, "status": status, "seconds": round(time.monotonic() - begin), "output": lines}


if __name__ == "__main__":
  sys.exit(cli.run(main, "python -m benchmarks.one_gpu"))
