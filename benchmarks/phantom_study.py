"""The study: all methods on the phantom with one budget, one order of data and the same seeds, and cells held out.

  python -m benchmarks.phantom_study --out build/study --quick     two CPU cores
  python -m benchmarks.phantom_study --out build/study             one GPU

The same command goes on where it stopped. It draws the data, trains one autoencoder that all methods share, trains and
samples every method and seed, measures, and writes tables (Markdown and CSV), plots and a picture grid to --out.

Real images to compare with are a population of their own, balanced: the same number in every cell, one a patient. So
every cell can be judged, all at one size. Each run samples exactly their texts and attributes.
"""

import argparse
import dataclasses
import itertools
import os
import queue
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import study_measure, study_report
from compdiff_jax import cli, plan, sample, train, train_vae
from compdiff_jax.checkpoint import Checkpoints
from compdiff_jax.conditioning.schema import Schema
from compdiff_jax.methods import CONDITIONERS
from data_prep import vocabulary
from data_prep.dataset import write_dataset
from data_prep.phantom import __main__ as phantom
from data_prep.phantom.population import SCHEMA, PhantomImages, row, visit_of
from launch.chain import _XLA_FLAGS

# Not the rarest: enough images would be in training if they were not held out. Every pair remains.
HELD_OUT = (
  "age=40-60,sex=female,group=B",
  "age=18-40,sex=male,group=B",
  "age=60-80,sex=male,group=C",
  "age=60-80,sex=female,group=D",
)
_POPULATION, _REFERENCE = 0, 1  # seeds of the phantom
IMAGE_SIZE = 32
# What differs from the configs of the methods, for all of them: 8 x 8 latents, attention at both of their levels.
_NETWORKS = {
  "data.image_size": IMAGE_SIZE,
  "vae.sample_size": IMAGE_SIZE,
  "unet.sample_size": IMAGE_SIZE // 4,
  "unet.block_out_channels": (32, 64),
  "unet.down_block_types": ("CrossAttnDownBlock2D",) * 2,
  "unet.up_block_types": ("CrossAttnUpBlock2D",) * 2,
  "text_encoder.num_hidden_layers": 1,
}


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a run may cost; the same for all methods.

  Attributes:
    images: phantoms drawn for train, val and test together; per_cell: real images a cell to compare with.
    vae_steps: of the shared autoencoder, 32 images each.
    steps, batch_size, learning_rate: of every run. seeds: training seeds.
    sample_steps, guidance: of DDIM sampling.
    min_n: as for `compdiff evaluate`.
  """

  images: int
  per_cell: int
  vae_steps: int
  steps: int
  batch_size: int
  learning_rate: float
  seeds: tuple[int, ...]
  sample_steps: int = 25
  guidance: float = 2.0
  min_n: int = 20


BUDGETS = {
  "quick": Budget(4000, 24, 800, 1200, 32, 1e-3, (42, 43, 44)),
  "full": Budget(12_000, 60, 4000, 12_000, 64, 5e-4, (42, 43, 44)),
}


def main(argv: list[str]) -> None:
  parser = cli.parser("python -m benchmarks.phantom_study", __doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, required=True, help="directory of the study; the same command goes on in it")
  parser.add_argument("--quick", action="store_true", help="the size for two CPU cores")
  parser.add_argument("--methods", default=",".join(CONDITIONERS), help="which methods")
  parser.add_argument("--seeds", help="training seeds, e.g. 42,43")
  parser.add_argument("--steps", type=int, help="training steps of every run")
  parser.add_argument("--workers", type=int, help="runs at a time; one a core on a CPU, one on an accelerator")
  parser.add_argument("--job", help=argparse.SUPPRESS)  # METHOD:SEED, in a process of its own
  parser.add_argument("--core", type=int, help=argparse.SUPPRESS)  # the one core of that process
  args = parser.parse_args(argv)
  budget = BUDGETS["quick" if args.quick else "full"]
  if args.steps:
    budget = dataclasses.replace(budget, steps=args.steps)
  if args.seeds:
    budget = dataclasses.replace(budget, seeds=tuple(int(seed) for seed in args.seeds.split(",")))
  methods = [name.strip() for name in args.methods.split(",") if name.strip()]
  for name in methods:
    if name not in CONDITIONERS:
      raise cli.InputError(f"--methods: there is no {name!r}{cli.nearest(name, CONDITIONERS)}")

  if args.job:
    if args.core is not None:
      os.sched_setaffinity(0, {args.core})  # before JAX starts its threads
    method, seed = args.job.split(":")
    run_method(args.out, method, int(seed), budget)
    return
  start = time.monotonic()
  prepare(args.out, budget)
  _run_jobs(args, methods, budget)
  results = study_measure.measure_all(args.out, methods, budget.seeds, budget.min_n)
  study_report.write(args.out, results, methods, budget, time.monotonic() - start)
  print((args.out / "tables.md").read_text())


# ---- What all methods share


def prepare(out: Path, budget: Budget) -> None:
  """Data, reference, vocabulary, autoencoder and plan, each once. An empty directory is what a kill leaves."""
  data = out / "data"
  if not (data / "dataset_info.json").exists():
    options = ["--num", budget.images, "--size", IMAGE_SIZE, "--seed", _POPULATION, "--holdout", ";".join(HELD_OUT)]
    phantom.main(["--out", str(data), *map(str, options)])
  if not (out / "reference" / "dataset_info.json").exists():
    write_reference(out / "reference", budget.per_cell)
  if not (out / "tokenizer" / "vocab.json").exists():
    vocabulary.main(["--data", str(data), "--out", str(out / "tokenizer"), "--size", "600"])
  if not (out / "plan.csv").exists():
    plan.main([f"--data={out / 'reference'}", "--like=test", f"--out={out / 'plan.csv'}"])
  if not (out / "vae" / "config.json").exists():
    settings = {"vae_training.steps": budget.vae_steps, "vae_training.batch_size": 32}
    train_vae.main([*config_arguments(out, "baseline", settings), f"--out={out / 'vae'}"])


def write_reference(path: Path, per_cell: int, schema: Schema = SCHEMA) -> None:
  """Real images of other patients than those of training: the first `per_cell` of every cell, one a patient."""
  missing = {schema.cell_name(cell): per_cell for cell in schema.cells()}
  chosen, index = [], 0
  while any(missing.values()):
    if visit_of(_REFERENCE, index)[1] == 0:
      candidate = row(_REFERENCE, index)
      levels = {a.name: int(a.levels(np.array([candidate["attributes"][a.name]]))[0]) for a in schema}
      name = schema.cell_name(levels)
      if missing[name]:
        missing[name] -= 1
        chosen.append(candidate)
    index += 1
  write_dataset(
    path,
    name="phantom",
    schema=schema,
    examples=chosen,
    encode=PhantomImages(_REFERENCE, IMAGE_SIZE),
    description="Balanced phantoms for comparison; no patient of these is in training.",
    size=IMAGE_SIZE,
    command="python -m benchmarks.phantom_study",
    fractions=(0, 0, 1),
  )


# ---- One method and seed


def run_method(out: Path, method: str, seed: int, budget: Budget) -> None:
  """Trains and samples; both go on where they stopped."""
  directory = out / "runs" / f"{method}-{seed}"
  if not _trained(directory / "run", budget.steps):
    train.main([*config_arguments(out, method, run_settings(seed, budget)), f"--workdir={directory / 'run'}"])
  sample.main([f"--workdir={directory / 'run'}", f"--plan={out / 'plan.csv'}", f"--out={directory / 'samples'}"])


def run_settings(seed: int, budget: Budget) -> dict[str, Any]:
  """What the study sets in the config of every method."""
  return {
    "seed": seed,
    "train.steps": budget.steps,
    "train.batch_size": budget.batch_size,
    "train.learning_rate": budget.learning_rate,
    "train.warmup_steps": budget.steps // 10,
    "train.ema_decay": 0.995,
    "logging.log_every": 100,
    "logging.checkpoint_every": 400,
    "logging.keep_checkpoints": 1,
    "logging.sample_every": budget.steps * 2,
    "sample.num_steps": budget.sample_steps,
    "sample.guidance": budget.guidance,
    "sample.batch_size": 64,
  }


def _trained(workdir: Path, steps: int) -> bool:
  if not (workdir / "checkpoints").is_dir():
    return False
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    return steps in checkpoints.steps


def config_arguments(out: Path, method: str, settings: Mapping[str, Any]) -> list[str]:
  """The arguments of a command: the method's config, and what the study sets."""
  paths = {"data.path": out / "data", "weights.vae": out / "vae", "weights.tokenizer": out / "tokenizer"}
  overrides = {**_NETWORKS, **paths, **settings}
  return [f"--config=configs/phantom_{method}.py", *(f"--config.{key}={value}" for key, value in overrides.items())]


# ---- All of them


def _run_jobs(args: argparse.Namespace, methods: list[str], budget: Budget) -> None:
  """Every method and seed in a process of its own, some at a time.

  Small networks gain little from a second core, so on a CPU each run has one core and several run at once.
  """
  on_cpu = os.environ.get("JAX_PLATFORMS", "") == "cpu" or args.quick
  own_cores = sorted(os.sched_getaffinity(0))
  workers = args.workers or (len(own_cores) if on_cpu else 1)
  cores: queue.Queue[int] = queue.Queue()
  for core in itertools.islice(itertools.cycle(own_cores), workers):
    cores.put(core)

  def run(job: str) -> tuple[str, int, float]:
    start, core = time.monotonic(), cores.get()
    log = args.out / "runs" / f"{job.replace(':', '-')}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.phantom_study", "--out", str(args.out), "--job", job]
    command += ["--quick"] * args.quick + [f"--steps={budget.steps}", f"--seeds={','.join(map(str, budget.seeds))}"]
    environment = {"XLA_FLAGS": _XLA_FLAGS, **({"JAX_PLATFORMS": "cpu"} if on_cpu else {}), **os.environ}
    if on_cpu and workers > 1:
      command.append(f"--core={core}")
    with log.open("a") as file:
      status = subprocess.run(command, env=environment, stdout=file, stderr=file, check=False).returncode
    cores.put(core)
    return job, status, time.monotonic() - start

  # A seed at a time, so that a study that is stopped early has every method.
  jobs = [f"{method}:{seed}" for seed in budget.seeds for method in methods]
  jobs = [job for job in jobs if not study_measure.finished(args.out / "runs" / job.replace(":", "-"))]
  failed = []
  with ThreadPoolExecutor(workers) as pool:
    for number, (job, status, seconds) in enumerate(pool.map(run, jobs), start=1):
      print(
        f"run {number}/{len(jobs)} {job}: {'ok' if not status else f'status {status}'}, {seconds:.0f} s", flush=True
      )
      failed += [job] * bool(status)
  if failed:
    log = args.out / "runs" / f"{failed[0].replace(':', '-')}.log"
    raise cli.RunError(f"{len(failed)} runs failed ({', '.join(failed)}); see {log}")


if __name__ == "__main__":
  sys.exit(cli.run(main, "python -m benchmarks.phantom_study"))
